// Package fib is the forwarding table: it answers, for a destination address, what kind of place it is and by which adjacency it is reached.
//
// A [Builder] collects pools, adjacencies and routes; Build turns them into a [Table], which never changes again, so that any number of
// workers read it without synchronisation. A change of the cluster is a new table.
//
// The answer is a longest-prefix match over all routes, with one addition: every pool is itself an unreachable route. An address of a
// pool that nobody owns is therefore unreachable, whatever shorter prefix or default route surrounds the pool.
//
// A lookup goes through at most four stages, each an expansion of the same match made when the table was built:
//
//	pool     destination in a pool: slots[block number] is the answer for the whole block, or a mark
//	block    marked: hosts[host part] is the answer for one address of a block with pods in it (the node's own block)
//	front    front[first 16 bits] is the answer for all of these addresses, or a mark: most of the world outside
//	trie     everything else: member addresses, service ranges, the default route, and blocks with prefixes that suit no array
//
// Memory, in bytes: 4 per block of a pool (10.244.0.0/16 in /24: 1 KiB; any pool with 16 bits of block number: 256 KiB), 4 per host of a
// block with pods in it (at most 16 KiB), 16 per adjacency, 24 per route for listing. The trie costs about 30 per densely
// numbered route, what stands in front of it 256 KiB. 5,000 blocks, 250 pods and 5,000 members of one family come to 1 MB.
package fib

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"github.com/overplane/overplane/dataplane/packet"
)

// Kind is what sort of place a route leads to.
type Kind uint8

// The kinds of route.
const (
	Unreachable Kind = iota // nowhere: answered with an ICMP error. Has no adjacency
	Pod                     // a pod of this node
	Node                    // pods of another node, usually its block
	Member                  // another cluster node's own underlay address
	Host                    // this node's kernel: its own addresses, service ranges
	Outside                 // out of the cluster, through the underlay's gateway
	numKinds
)

var kindNames = [numKinds]string{"unreachable", "pod", "node", "member", "host", "outside"}

// String is the kind's name in lower case.
func (k Kind) String() string {
	if k < numKinds {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// Entry is a lookup's answer: the kind in the top 3 bits, the adjacency's index in the other 29. The zero Entry is Unreachable.
type Entry uint32

const (
	kindShift = 29
	indexMask = 1<<kindShift - 1

	// frontBits is how many of an address's first bits choose its place in front of the trie.
	frontBits = 16

	// detailMark in the place of the kind marks a slot whose block has more to say: the index is one of Table.details.
	// It never leaves the package.
	detailMark = Entry(numKinds) << kindShift
)

// MaxAdjacencies is the number of adjacencies a table can hold.
const MaxAdjacencies = 1 << kindShift

// MakeEntry makes an entry. adjacency is an index that [Builder.AddAdjacency] returned; use 0 with Unreachable.
func MakeEntry(k Kind, adjacency uint32) Entry {
	return Entry(k)<<kindShift | Entry(adjacency&indexMask)
}

// Kind is what sort of place the entry leads to.
func (e Entry) Kind() Kind { return Kind(e >> kindShift) }

// Adjacency is the index of the next hop, for [Table.Adjacency]. Without meaning for Unreachable.
func (e Entry) Adjacency() uint32 { return uint32(e & indexMask) }

// String is the entry as people read it in errors and test failures.
func (e Entry) String() string {
	if e.Kind() == Unreachable {
		return Unreachable.String()
	}
	return fmt.Sprintf("%v via adjacency %d", e.Kind(), e.Adjacency())
}

// Adjacency is a resolved next hop: which port to send by, and what the frame must look like. 16 bytes, four to a cache line.
type Adjacency struct {
	Dst, Src packet.MAC // of the Ethernet header
	Port     uint16     // slot in the snapshot's ports
	MTU      uint16     // bytes of the largest IP packet
}

// Table is a forwarding table. It is immutable: all its methods may be called from any number of goroutines. The zero Table
// has no routes: every address is unreachable.
type Table struct {
	pools4  []pool4
	pools6  []pool6
	details []detail // of marked blocks, both families

	// The trie of each family, nil if nothing is in it. Two, so that a look at the pointer answers for a family without any.
	trie4 *bart.Fast[Entry]
	trie6 *bart.Fast[Entry]

	// In front of each trie, by an address's first bits: the answer for all of them, or detailMark. nil where the trie is.
	front4, front6 *[1 << frontBits]Entry

	adjacencies []Adjacency
	routes      []route // without the pools
	ranges      []Pool  // sorted
}

// Pool is a range that pods are numbered from, divided into blocks of equal size.
type Pool struct {
	CIDR      netip.Prefix
	BlockBits int // prefix length of a block
}

// pool4 is an IPv4 pool: base to base+last, block number = offset >> shift.
type pool4 struct {
	base, last uint32
	shift      uint8
	slots      []Entry // one a block
}

// pool6 is an IPv6 pool. The block number is at most 16 bits, which may lie in either word or across both. Their positions modulo 64
// differ, so that masking both words, joining them and one rotation gather it without a branch.
type pool6 struct {
	baseHi, baseLo   uint64
	maskHi, maskLo   uint64 // of the pool's prefix
	blockHi, blockLo uint64 // of the block number
	rotate           uint8  // left
	slots            []Entry
}

// detail answers for the addresses of one marked block.
type detail struct {
	hosts          []Entry // by the low bits of the host part, for addresses whose other host bits are zero
	hostHi, hostLo uint64  // mask of the host part
	inTrie         bool    // addresses beyond hosts are in the trie
	rest           Entry   // else this is their answer
}

// Adjacency returns the next hop with the given index, which must come from an entry of this table that is not Unreachable. It must not
// be written to.
func (t *Table) Adjacency(i uint32) *Adjacency { return &t.adjacencies[i] }

// NumAdjacencies is how many adjacencies there are; their indexes are 0 to NumAdjacencies-1.
func (t *Table) NumAdjacencies() int { return len(t.adjacencies) }

// Len is the number of routes that were added, both families, the pools not counted.
func (t *Table) Len() int { return len(t.routes) }

// Walk calls f with every route that was added until f returns false: IPv4 before IPv6, then by address, covering
// prefixes before those they cover. The pools are no routes; [Table.Pools] lists them. It sorts a copy each time: for people, not for
// packets.
func (t *Table) Walk(f func(netip.Prefix, Entry) bool) {
	routes := slices.SortedFunc(slices.Values(t.routes), route.compare)
	for i := range routes {
		if r := &routes[i]; !f(r.prefix(), r.entry) {
			return
		}
	}
}

// Pools lists the pools in the order of Walk. The caller owns the slice.
func (t *Table) Pools() []Pool { return slices.Clone(t.ranges) }

// route is a prefix and its entry in 24 bytes and without pointers, so that listings cost the garbage collector nothing.
type route struct {
	hi, lo uint64 // the address: IPv6 in network order, IPv4 as in packet.Addr
	bits   uint8  // prefix length within its own family
	six    bool
	entry  Entry
}

// makeRoute takes a valid prefix.
func makeRoute(p netip.Prefix, e Entry) route {
	b := p.Addr().As16()
	return route{
		hi: binary.BigEndian.Uint64(b[:8]), lo: binary.BigEndian.Uint64(b[8:]),
		bits: uint8(p.Bits()), six: p.Addr().Is6(), entry: e,
	}
}

func (r *route) prefix() netip.Prefix {
	if !r.six {
		return netip.PrefixFrom(packet.Addr{Hi: r.hi, Lo: r.lo}.Netip(), int(r.bits))
	}
	return netip.PrefixFrom(addr6(r.hi, r.lo), int(r.bits))
}

// compare orders routes as Walk promises.
func (r route) compare(o route) int {
	switch {
	case r.six != o.six:
		if o.six {
			return -1
		}
		return 1
	case r.hi != o.hi:
		return cmp.Compare(r.hi, o.hi)
	case r.lo != o.lo:
		return cmp.Compare(r.lo, o.lo)
	}
	return int(r.bits) - int(o.bits)
}

// addr4 and addr6 convert for the trie.
func addr4(v uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}

func addr6(hi, lo uint64) netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], hi)
	binary.BigEndian.PutUint64(b[8:], lo)
	return netip.AddrFrom16(b)
}
