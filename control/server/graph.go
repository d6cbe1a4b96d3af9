package server

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/ipam"
)

// history is how many steps are remembered: a node that is further behind gets a snapshot.
const history = 4096

// graph is the table that nodes are told, with its last changes. Its methods may be called concurrently.
type graph struct {
	log *slog.Logger

	mu          sync.Mutex
	incarnation string
	revision    uint64 // of the newest version
	applied     int64  // how far the store was followed; not every revision makes a version
	ready       bool
	entries     map[entryKey]*entry
	digest      uint64
	own         map[string]*ownBlocks
	steps       []step        // oldest first; each one's from is the to of the one before
	moved       chan struct{} // closed and replaced when applied moves on

	snapshot []chunk            // of the newest version, made when it is asked for
	deltas   map[uint64][]chunk // to the newest version, by where they start

	// What the table is made of.
	pools    map[netip.Prefix]*ipam.Pool
	nodes    map[string]*ipam.Node
	blocks   map[netip.Prefix]*ipam.Block
	routes   map[netip.Prefix]*ipam.StaticRoute
	settings *ipam.Settings

	expected map[netip.Prefix]bool // static routes that an operator removes
}

// step is how one version followed another.
type step struct {
	from, to uint64
	changed  []entryKey
	removed  uint32 // entries whose removal the records account for
}

// ownBlocks are the blocks of one node.
type ownBlocks struct {
	list      []*controlv1.OwnBlock
	digest    uint64
	releasing int
}

func newGraph(log *slog.Logger) *graph {
	return &graph{log: log, moved: make(chan struct{}), expected: make(map[netip.Prefix]bool)}
}

// pending is changes of the store that are not in the table yet.
type pending struct {
	revision int64
	changes  []ipam.Change
}

// reset makes the table anew. Versions stay comparable: what differs from before is one step, which accounts for no removals.
func (g *graph) reset(t *ipam.Table) {
	g.mu.Lock()
	defer g.mu.Unlock()
	before := g.entries
	if g.incarnation != t.Incarnation {
		g.steps, g.revision = nil, 0
	}
	g.incarnation = t.Incarnation
	g.entries, g.own, g.digest = make(map[entryKey]*entry), make(map[string]*ownBlocks), 0
	g.pools, g.nodes = make(map[netip.Prefix]*ipam.Pool), make(map[string]*ipam.Node)
	g.blocks, g.routes = make(map[netip.Prefix]*ipam.Block), make(map[netip.Prefix]*ipam.StaticRoute)
	g.settings = t.Settings()

	touched := make(map[entryKey]bool)
	for _, p := range t.Pools() {
		g.pools[p.CIDR] = p
		touched[entryKey{kindPool, p.CIDR.String()}] = true
	}
	for _, n := range t.Nodes() {
		g.nodes[n.Name] = n
		touched[entryKey{kindMember, n.Name}] = true
	}
	for _, b := range t.Blocks() {
		g.setBlock(nil, b)
		touched[entryKey{kindRoute, b.CIDR.String()}] = true
	}
	for _, r := range t.Routes() {
		g.routes[r.Prefix] = r
		touched[entryKey{kindRoute, r.Prefix.String()}] = true
	}
	g.touchSettings(g.settings, touched)
	for k := range touched {
		g.update(k)
	}
	for k := range before {
		touched[k] = true
	}
	g.ready = true
	g.publish(t.Revision, touched, 0)
}

// apply takes changes over and makes one version of them.
func (g *graph) apply(list []pending) {
	g.mu.Lock()
	defer g.mu.Unlock()
	touched := make(map[entryKey]bool)
	var removed uint32
	ownChanged := false
	revision := g.applied
	for _, p := range list {
		if p.revision <= g.applied {
			continue // the reset had it
		}
		revision = p.revision
		for _, c := range p.changes {
			removed += g.take(c, touched)
			ownChanged = ownChanged || c.Block != nil || c.BlockBefore != nil
		}
	}
	changed := make(map[entryKey]bool)
	for k := range touched {
		if g.update(k) {
			changed[k] = true
		}
	}
	if len(changed) == 0 && !ownChanged {
		g.applied = max(g.applied, revision)
		g.wake()
		return
	}
	g.publish(revision, changed, removed)
}

// publish makes a version of what the entries are now.
func (g *graph) publish(revision int64, changed map[entryKey]bool, removed uint32) {
	s := step{from: g.revision, to: uint64(revision), changed: make([]entryKey, 0, len(changed)), removed: removed}
	for k := range changed {
		s.changed = append(s.changed, k)
	}
	g.applied = revision
	if s.to > s.from {
		if s.from != 0 {
			g.steps = append(g.steps, s)
		}
		if len(g.steps) > history {
			g.steps = slices.Clone(g.steps[len(g.steps)-history/2:])
		}
		g.revision = s.to
	}
	g.snapshot, g.deltas = nil, make(map[uint64][]chunk)
	g.wake()
}

func (g *graph) wake() {
	close(g.moved)
	g.moved = make(chan struct{})
}

// take applies one change of a record, and says which entries it may touch and how many removals it accounts for: those that a record remembers.
func (g *graph) take(c ipam.Change, touched map[entryKey]bool) (removed uint32) {
	switch {
	case c.Pool != nil:
		g.pools[c.Pool.CIDR] = c.Pool
		touched[entryKey{kindPool, c.Pool.CIDR.String()}] = true
	case c.PoolBefore != nil:
		delete(g.pools, c.PoolBefore.CIDR)
		touched[entryKey{kindPool, c.PoolBefore.CIDR.String()}] = true
	case c.Node != nil:
		g.nodes[c.Node.Name] = c.Node
		g.touchNode(c.Node.Name, touched)
		if c.Node.Gone && c.NodeBefore != nil && !c.NodeBefore.Gone {
			removed++
		}
	case c.NodeBefore != nil:
		delete(g.nodes, c.NodeBefore.Name)
		g.touchNode(c.NodeBefore.Name, touched)
	case c.Block != nil, c.BlockBefore != nil:
		g.setBlock(c.BlockBefore, c.Block)
		cidr := c.Block
		if cidr == nil {
			cidr = c.BlockBefore
		}
		touched[entryKey{kindRoute, cidr.CIDR.String()}] = true
		if c.Block != nil && c.BlockBefore != nil && c.BlockBefore.State != c.Block.State && c.Block.State != ipam.Allocated {
			removed++ // its route, or the owner's own block
		}
	case c.Route != nil:
		g.routes[c.Route.Prefix] = c.Route
		touched[entryKey{kindRoute, c.Route.Prefix.String()}] = true
	case c.RouteBefore != nil:
		delete(g.routes, c.RouteBefore.Prefix)
		touched[entryKey{kindRoute, c.RouteBefore.Prefix.String()}] = true
		if g.expected[c.RouteBefore.Prefix] {
			delete(g.expected, c.RouteBefore.Prefix)
			removed++
		}
	case c.Settings != nil:
		g.touchSettings(g.settings, touched)
		g.settings = c.Settings
		g.touchSettings(g.settings, touched)
	}
	return removed
}

// touchNode touches what depends on whether a node is a member.
func (g *graph) touchNode(name string, touched map[entryKey]bool) {
	touched[entryKey{kindMember, name}] = true
	if o := g.own[name]; o != nil {
		for _, b := range o.list {
			touched[entryKey{kindRoute, b.GetCidr()}] = true
		}
	}
	for _, r := range g.routes {
		if r.Node == name {
			touched[entryKey{kindRoute, r.Prefix.String()}] = true
		}
	}
}

func (g *graph) touchSettings(s *ipam.Settings, touched map[entryKey]bool) {
	if s == nil {
		return
	}
	touched[entryKey{kindSNAT, ""}] = true
	for _, p := range s.Ranges.Services {
		touched[entryKey{kindRoute, p.String()}] = true
	}
}

func (g *graph) setBlock(before, after *ipam.Block) {
	if before != nil {
		delete(g.blocks, before.CIDR)
		g.makeOwn(before.Owner, before, nil)
	}
	if after != nil {
		g.blocks[after.CIDR] = after
		g.makeOwn(after.Owner, nil, after)
	}
}

// makeOwn takes a block out of a node's own blocks, and another into them.
func (g *graph) makeOwn(node string, without, with *ipam.Block) {
	o := &ownBlocks{}
	if have := g.own[node]; have != nil {
		o.list = slices.Clone(have.list)
		o.releasing = have.releasing
	}
	if without != nil {
		o.list = slices.DeleteFunc(o.list, func(b *controlv1.OwnBlock) bool { return b.GetCidr() == without.CIDR.String() })
		if without.State == ipam.Releasing {
			o.releasing--
		}
	}
	if with != nil && with.State == ipam.Allocated {
		s := &controlv1.NodeState{OwnBlocks: []*controlv1.OwnBlock{{Cidr: with.CIDR.String()}}}
		api.Seal(s)
		o.list = append(o.list, s.GetOwnBlocks()...)
	}
	if with != nil && with.State == ipam.Releasing {
		o.releasing++
	}
	for _, b := range o.list {
		o.digest ^= b.GetHash()
	}
	if len(o.list) == 0 && o.releasing == 0 {
		delete(g.own, node)
		return
	}
	g.own[node] = o
}

// wait returns when the table has everything that the store had at the revision.
func (g *graph) wait(ctx context.Context, revision int64) error {
	for {
		g.mu.Lock()
		done, moved := g.ready && g.applied >= revision, g.moved
		g.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-moved:
		}
	}
}

// version is the newest one.
func (g *graph) version() *controlv1.Version {
	g.mu.Lock()
	defer g.mu.Unlock()
	return &controlv1.Version{Incarnation: g.incarnation, Revision: g.revision}
}

// releasing reports whether the node has blocks that it is to give up.
func (g *graph) releasing(node string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	o := g.own[node]
	return o != nil && o.releasing > 0
}

// expect says that an operator is about to remove a static route.
func (g *graph) expect(p netip.Prefix) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expected[p] = true
}
