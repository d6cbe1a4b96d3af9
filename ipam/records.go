package ipam

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// Kinds of records: the first part of their keys.
const (
	kindPool  = "pools"
	kindNode  = "nodes"
	kindBlock = "blocks"
	kindRoute = "routes"
	kindMeta  = "meta"
)

// IncarnationKey is the record that names the store: a UUID, as text.
const IncarnationKey = kindMeta + "/incarnation"

// settingsKey is the record of what holds for the whole cluster.
const settingsKey = kindMeta + "/settings"

// Pool is a pod CIDR, divided into blocks of one size. Immutable once in a Table.
type Pool struct {
	CIDR      netip.Prefix `json:"cidr"`
	BlockBits int          `json:"block_bits"` // prefix length of a block
	Order     int          `json:"order"`      // blocks are taken from the pool with the lowest order first
	Created   time.Time    `json:"created"`

	Revision int64 `json:"-"`
}

// Blocks is how many blocks the pool has.
func (p *Pool) Blocks() int { return 1 << (p.BlockBits - p.CIDR.Bits()) }

// Block is the pool's block of the given number.
func (p *Pool) Block(i int) netip.Prefix {
	a := p.CIDR.Addr().AsSlice()
	for bit := p.BlockBits - 1; bit >= p.CIDR.Bits(); bit-- {
		a[bit/8] |= byte(i&1) << (7 - bit%8)
		i >>= 1
	}
	addr, _ := netip.AddrFromSlice(a) // as long as it was
	return netip.PrefixFrom(addr, p.BlockBits)
}

// index is the number of a block of the pool.
func (p *Pool) index(block netip.Prefix) int {
	a, i := block.Addr().AsSlice(), 0
	for bit := p.CIDR.Bits(); bit < p.BlockBits; bit++ {
		i = i<<1 | int(a[bit/8]>>(7-bit%8)&1)
	}
	return i
}

// State is where a block is in its life.
type State string

// States of a block. A block without a record was never used, and is free.
const (
	Free      State = "free"
	Allocated State = "allocated"
	Releasing State = "releasing"
	Cooldown  State = "cooldown"
)

// Block is a block that is or was in use. Immutable once in a Table.
type Block struct {
	CIDR   netip.Prefix `json:"cidr"`
	Pool   netip.Prefix `json:"pool"`
	State  State        `json:"state"`
	Owner  string       `json:"owner"`            // who owns it; in COOLDOWN and FREE, who did last
	Fenced bool         `json:"fenced,omitempty"` // an operator said that the owner is dead
	Since  time.Time    `json:"since"`            // wall clock, for people

	Revision int64 `json:"-"` // of the transaction that brought it into its state
}

// Held reports whether the owner still owns the block.
func (b *Block) Held() bool { return b.State == Allocated || b.State == Releasing }

// Node is a node that joined. Immutable once in a Table.
type Node struct {
	Name          string     `json:"name"`
	IPv4          netip.Addr `json:"ipv4,omitzero"`
	IPv6          netip.Addr `json:"ipv6,omitzero"`
	MAC           string     `json:"mac,omitempty"`
	DaemonVersion string     `json:"daemon_version,omitempty"`
	Draining      bool       `json:"draining,omitempty"` // it gets no more blocks
	Gone          bool       `json:"gone,omitempty"`     // it is no member any more, but remembered
	Joined        time.Time  `json:"joined"`
	Left          time.Time  `json:"left,omitzero"`

	Revision int64 `json:"-"`
}

// StaticRoute is a route that every node gets. Immutable once in a Table.
type StaticRoute struct {
	Prefix netip.Prefix `json:"prefix"`
	Node   string       `json:"node,omitempty"` // where it leads; empty: see Host
	Host   bool         `json:"host,omitempty"` // to each node's own kernel; else nowhere

	Revision int64 `json:"-"`
}

// Settings hold for the whole cluster. Immutable once in a Table.
type Settings struct {
	Ranges Ranges          `json:"ranges"`         // Pods is empty: pools have records of their own
	SNAT   json.RawMessage `json:"snat,omitempty"` // what nodes are told, opaque here

	Revision int64 `json:"-"`
}

func prefixKey(kind string, p netip.Prefix) string {
	return kind + "/" + strings.Replace(p.String(), "/", "_", 1)
}

// key of each record.
func (p *Pool) key() string        { return prefixKey(kindPool, p.CIDR) }
func (b *Block) key() string       { return prefixKey(kindBlock, b.CIDR) }
func (n *Node) key() string        { return kindNode + "/" + n.Name }
func (r *StaticRoute) key() string { return prefixKey(kindRoute, r.Prefix) }
func (s *Settings) key() string    { return settingsKey }

type record interface{ key() string }

// put adds the write of a record to the transaction.
func (t *Tx) put(r record) {
	value, err := json.Marshal(r)
	if err != nil {
		panic(fmt.Sprintf("ipam: a record that cannot be encoded: %v", err)) // they are plain structs
	}
	t.Put = append(t.Put, KV{Key: r.key(), Value: value})
}

// must adds a condition to the transaction.
func (t *Tx) must(key string, revision int64) {
	t.If = append(t.If, Compare{Key: key, Revision: revision})
}

// decode reads a record's value. It is strict about the key, which says what the record is about.
func decode[R any, P interface {
	*R
	record
}](kv KV) (P, error) {
	r := P(new(R))
	if err := json.Unmarshal(kv.Value, r); err != nil {
		return nil, fmt.Errorf("record %s: %w", kv.Key, err)
	}
	if r.key() != kv.Key {
		return nil, fmt.Errorf("record %s says that it is %s", kv.Key, r.key())
	}
	return r, nil
}
