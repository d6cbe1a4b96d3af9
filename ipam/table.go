package ipam

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Table is all records of a cluster at one revision, indexed. One goroutine changes it by Apply; see Store.Read for who reads.
type Table struct {
	Revision    int64
	Incarnation string

	pools    []*Pool // by order
	nodes    map[string]*Node
	blocks   map[netip.Prefix]*Block
	owned    map[string]map[netip.Prefix]*Block // by owner, in all states
	inPool   map[netip.Prefix]map[int]*Block    // by pool and index
	routes   map[netip.Prefix]*StaticRoute
	settings *Settings
	address  map[netip.Addr]string // members' addresses
	mac      map[string]string
}

// NewTable returns an empty table.
func NewTable() *Table {
	return &Table{
		nodes: make(map[string]*Node), blocks: make(map[netip.Prefix]*Block), owned: make(map[string]map[netip.Prefix]*Block),
		inPool: make(map[netip.Prefix]map[int]*Block), routes: make(map[netip.Prefix]*StaticRoute), settings: &Settings{},
		address: make(map[netip.Addr]string), mac: make(map[string]string),
	}
}

// Change is what one write did to a table: the record before and after, nil where there was or is none. One pair is set.
type Change struct {
	PoolBefore, Pool         *Pool
	NodeBefore, Node         *Node
	BlockBefore, Block       *Block
	RouteBefore, Route       *StaticRoute
	SettingsBefore, Settings *Settings
}

// Apply takes over one write: a record, or the removal of one (value nil). A record that cannot be read is an error, and changes nothing. Keys that this
// version does not know are ignored. The caller sets Revision.
func (t *Table) Apply(kv KV) (c Change, err error) {
	kind, name, _ := strings.Cut(kv.Key, "/")
	gone := kv.Value == nil
	switch kind {
	case kindPool:
		c.PoolBefore = t.Pool(keyPrefix(name))
		if !gone {
			if c.Pool, err = decode[Pool](kv); err != nil {
				return Change{}, err
			}
			if b := c.Pool.BlockBits - c.Pool.CIDR.Bits(); b < 0 || b > maxBlockBits || c.Pool.BlockBits > c.Pool.CIDR.Addr().BitLen() {
				return Change{}, fmt.Errorf("record %s: blocks of /%d do not fit", kv.Key, c.Pool.BlockBits)
			}
			c.Pool.Revision = kv.Revision
		}
		t.setPool(c.PoolBefore, c.Pool)
	case kindNode:
		c.NodeBefore = t.nodes[name]
		if !gone {
			if c.Node, err = decode[Node](kv); err != nil {
				return Change{}, err
			}
			c.Node.Revision = kv.Revision
		}
		t.setNode(c.NodeBefore, c.Node)
	case kindBlock:
		c.BlockBefore = t.blocks[keyPrefix(name)]
		if !gone {
			if c.Block, err = decode[Block](kv); err != nil {
				return Change{}, err
			}
			c.Block.Revision = kv.Revision
		}
		t.setBlock(c.BlockBefore, c.Block)
	case kindRoute:
		p := keyPrefix(name)
		c.RouteBefore = t.routes[p]
		delete(t.routes, p)
		if !gone {
			if c.Route, err = decode[StaticRoute](kv); err != nil {
				return Change{}, err
			}
			c.Route.Revision = kv.Revision
			t.routes[p] = c.Route
		}
	case kindMeta:
		return t.applyMeta(kv)
	}
	return c, nil
}

func (t *Table) applyMeta(kv KV) (c Change, err error) {
	switch kv.Key {
	case IncarnationKey:
		t.Incarnation = string(kv.Value)
	case settingsKey:
		c.SettingsBefore, c.Settings = t.settings, &Settings{}
		if kv.Value != nil {
			if c.Settings, err = decode[Settings](kv); err != nil {
				return Change{}, err
			}
			c.Settings.Revision = kv.Revision
		}
		t.settings = c.Settings
	}
	return c, nil
}

func keyPrefix(name string) netip.Prefix {
	p, err := netip.ParsePrefix(strings.Replace(name, "_", "/", 1))
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

func (t *Table) setPool(before, after *Pool) {
	if before != nil {
		t.pools = slices.DeleteFunc(t.pools, func(p *Pool) bool { return p == before })
	}
	if after == nil {
		return
	}
	t.pools = append(t.pools, after)
	slices.SortFunc(t.pools, func(a, b *Pool) int {
		return cmp.Or(cmp.Compare(a.Order, b.Order), a.CIDR.Addr().Compare(b.CIDR.Addr()))
	})
	// Blocks that came before their pool did.
	for _, b := range t.blocks {
		if b.Pool == after.CIDR {
			t.index(b, after)
		}
	}
}

func (t *Table) setNode(before, after *Node) {
	if before != nil && !before.Gone {
		for _, a := range []netip.Addr{before.IPv4, before.IPv6} {
			if t.address[a] == before.Name {
				delete(t.address, a)
			}
		}
		if t.mac[before.MAC] == before.Name {
			delete(t.mac, before.MAC)
		}
	}
	if after == nil {
		if before != nil {
			delete(t.nodes, before.Name)
		}
		return
	}
	t.nodes[after.Name] = after
	if after.Gone {
		return
	}
	for _, a := range []netip.Addr{after.IPv4, after.IPv6} {
		if a.IsValid() {
			t.address[a] = after.Name
		}
	}
	if after.MAC != "" {
		t.mac[after.MAC] = after.Name
	}
}

func (t *Table) setBlock(before, after *Block) {
	if before != nil {
		delete(t.blocks, before.CIDR)
		delete(t.owned[before.Owner], before.CIDR)
		if len(t.owned[before.Owner]) == 0 {
			delete(t.owned, before.Owner)
		}
		if p := t.Pool(before.Pool); p != nil {
			delete(t.inPool[p.CIDR], p.index(before.CIDR))
		}
	}
	if after == nil {
		return
	}
	t.blocks[after.CIDR] = after
	if t.owned[after.Owner] == nil {
		t.owned[after.Owner] = make(map[netip.Prefix]*Block)
	}
	t.owned[after.Owner][after.CIDR] = after
	if p := t.Pool(after.Pool); p != nil {
		t.index(after, p)
	}
}

func (t *Table) index(b *Block, p *Pool) {
	if t.inPool[p.CIDR] == nil {
		t.inPool[p.CIDR] = make(map[int]*Block)
	}
	t.inPool[p.CIDR][p.index(b.CIDR)] = b
}

// Pools are the pools, by order. The list may not be changed.
func (t *Table) Pools() []*Pool { return t.pools }

// Pool is the pool of this CIDR, or nil.
func (t *Table) Pool(cidr netip.Prefix) *Pool {
	for _, p := range t.pools {
		if p.CIDR == cidr {
			return p
		}
	}
	return nil
}

// Node is the node of this name, or nil.
func (t *Table) Node(name string) *Node { return t.nodes[name] }

// Nodes are all nodes by name, those that are gone included.
func (t *Table) Nodes() []*Node {
	return slices.SortedFunc(maps.Values(t.nodes), func(a, b *Node) int { return strings.Compare(a.Name, b.Name) })
}

// Block is the block of this CIDR, or nil if it was never used.
func (t *Table) Block(cidr netip.Prefix) *Block { return t.blocks[cidr] }

// Blocks are all blocks with a record, by address.
func (t *Table) Blocks() []*Block { return sortedBlocks(t.blocks) }

// Owned are the blocks that the node owns or owned last, by address.
func (t *Table) Owned(node string) []*Block { return sortedBlocks(t.owned[node]) }

// Routes are the static routes, by address.
func (t *Table) Routes() []*StaticRoute {
	return slices.SortedFunc(maps.Values(t.routes), func(a, b *StaticRoute) int { return comparePrefixes(a.Prefix, b.Prefix) })
}

// Settings are the cluster's. Never nil.
func (t *Table) Settings() *Settings { return t.settings }

func sortedBlocks(m map[netip.Prefix]*Block) []*Block {
	return slices.SortedFunc(maps.Values(m), func(a, b *Block) int { return comparePrefixes(a.CIDR, b.CIDR) })
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}
