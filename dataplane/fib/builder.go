package fib

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Limits of a table.
const (
	MaxPools     = 8  // of one family
	MaxBlockBits = 16 // bits of a block's number: a pool has at most 65,536 blocks

	// maxHosts is the largest host part that the array of a block's pods covers. It is far above the pods of a node, and what bounds the
	// array's memory.
	maxHosts = 4096
)

// Builder collects what a table is made of, in any order. It belongs to one goroutine. After an error it is as it was before the call. It may
// be added to after Build, and built again.
type Builder struct {
	pools       []Pool
	adjacencies []Adjacency
	byAdjacency map[Adjacency]uint32
	routes      []route
	prefixes    map[prefixKey]struct{}
}

// NewBuilder returns an empty builder.
func NewBuilder() *Builder {
	return &Builder{byAdjacency: map[Adjacency]uint32{}, prefixes: map[prefixKey]struct{}{}}
}

// Grow makes room for as many more routes and adjacencies. It only saves time, about a third of a large table's: what was added need not be
// moved while the builder grows. Best before the first Add.
func (b *Builder) Grow(routes, adjacencies int) {
	b.routes = slices.Grow(b.routes, routes)
	b.adjacencies = slices.Grow(b.adjacencies, adjacencies)
	if len(b.prefixes) == 0 {
		b.prefixes = make(map[prefixKey]struct{}, routes)
	}
	if len(b.byAdjacency) == 0 {
		b.byAdjacency = make(map[Adjacency]uint32, adjacencies)
	}
}

// AddPool adds a range that pods are numbered from. blockBits is the prefix length of its blocks, at most [MaxBlockBits] longer
// than the range's own. All addresses of the pool that no route covers are Unreachable; routes shorter than the pool do not reach into it.
func (b *Builder) AddPool(cidr netip.Prefix, blockBits int) error {
	if err := checkPrefix(cidr); err != nil {
		return fmt.Errorf("fib: pool: %w", err)
	}
	if cidr.Bits() == 0 {
		return fmt.Errorf("fib: pool %v: a pool cannot be all addresses", cidr)
	}
	if blockBits < cidr.Bits() || blockBits > cidr.Addr().BitLen() || blockBits > cidr.Bits()+MaxBlockBits {
		return fmt.Errorf("fib: pool %v: block prefix length %d: want %d to %d",
			cidr, blockBits, cidr.Bits(), min(cidr.Bits()+MaxBlockBits, cidr.Addr().BitLen()))
	}
	family := 0
	for _, p := range b.pools {
		if p.CIDR.Overlaps(cidr) {
			return fmt.Errorf("fib: pools %v and %v overlap", p.CIDR, cidr)
		}
		if p.CIDR.Addr().Is4() == cidr.Addr().Is4() {
			family++
		}
	}
	if family == MaxPools {
		return fmt.Errorf("fib: pool %v: there are %d pools of its family already, the most there can be", cidr, MaxPools)
	}
	b.pools = append(b.pools, Pool{cidr, blockBits})
	return nil
}

// AddAdjacency adds a next hop and returns its index, which [MakeEntry] wants. Equal adjacencies have one index. Indexes mean something
// to this builder and its tables only.
func (b *Builder) AddAdjacency(a Adjacency) (uint32, error) {
	if i, ok := b.byAdjacency[a]; ok {
		return i, nil
	}
	if len(b.adjacencies) == MaxAdjacencies {
		return 0, fmt.Errorf("fib: there are %d adjacencies already, the most there can be", MaxAdjacencies)
	}
	i := uint32(len(b.adjacencies))
	b.adjacencies = append(b.adjacencies, a)
	b.byAdjacency[a] = i
	return i, nil
}

// Add adds a route. The prefix is of either family, any length, in canonical form (no host bits, no zone, IPv4 not mapped into IPv6).
// A second route for the same prefix is an error, even if it says the same.
func (b *Builder) Add(prefix netip.Prefix, e Entry) error {
	if err := checkPrefix(prefix); err != nil {
		return fmt.Errorf("fib: route: %w", err)
	}
	if e.Kind() >= numKinds {
		return fmt.Errorf("fib: route %v: unknown kind %d", prefix, e.Kind())
	}
	if e.Kind() != Unreachable && int(e.Adjacency()) >= len(b.adjacencies) {
		return fmt.Errorf("fib: route %v: %v: there are %d adjacencies", prefix, e, len(b.adjacencies))
	}
	if e.Kind() == Unreachable {
		e = 0 // one way to say it, so that entries compare
	}
	// One map operation instead of two: a prefix that was there already does not make the set larger.
	r, n := makeRoute(prefix, e), len(b.prefixes)
	b.prefixes[r.key()] = struct{}{}
	if len(b.prefixes) == n {
		old := b.routes[slices.IndexFunc(b.routes, func(o route) bool { return o.key() == r.key() })]
		return fmt.Errorf("fib: route %v twice: %v and %v", prefix, old.entry, e)
	}
	b.routes = append(b.routes, r)
	return nil
}

// prefixKey is a route's prefix for hashing: three whole words, hashed at once.
type prefixKey struct{ hi, lo, length uint64 }

func (r *route) key() prefixKey {
	k := prefixKey{r.hi, r.lo, uint64(r.bits)}
	if r.six {
		k.length |= 1 << 8 // ::ffff:0:0/96 is not 0.0.0.0/0
	}
	return k
}

func checkPrefix(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return errors.New("the prefix is not valid") // its String would say no more
	case p.Addr().Is4In6():
		return fmt.Errorf("%v is an IPv4 address mapped into IPv6: want it as IPv4", p)
	case p != p.Masked():
		return fmt.Errorf("%v has bits set beyond its prefix length: want %v", p, p.Masked())
	}
	return nil
}
