package fib

import (
	"math/bits"
	"slices"

	"github.com/gaissmai/bart"
)

// Build makes the table. It cannot fail: every Add was checked.
//
// Taken by rising prefix length, each route is expanded over all it covers, so that what is left in every place is the longest match. The
// stages differ in what a place is: a slot, a host, a node of the trie, which is then expanded once more, in front of it.
func (b *Builder) Build() *Table {
	t := &Table{
		adjacencies: slices.Clone(b.adjacencies),
		routes:      byLength(b.routes),
		ranges:      slices.Clone(b.pools),
	}
	slices.SortFunc(t.ranges, func(x, y Pool) int { return makeRoute(x.CIDR, 0).compare(makeRoute(y.CIDR, 0)) })

	spaces := make([]space, len(t.ranges))
	for i, p := range t.ranges {
		spaces[i] = makeSpace(p)
	}
	for i := range t.routes {
		t.place(spaces, &t.routes[i])
	}
	for i := range spaces {
		t.addDetails(&spaces[i])
		t.install(&spaces[i])
	}
	return t
}

// byLength returns the routes sorted by prefix length, by counting: full sorting is what would take longest in Build.
func byLength(routes []route) []route {
	var start [128 + 2]int
	for i := range routes {
		start[routes[i].long()+1]++
	}
	for i := range start[1:] {
		start[i+1] += start[i]
	}
	sorted := make([]route, len(routes))
	for i := range routes {
		at := &start[routes[i].long()]
		sorted[*at] = routes[i]
		*at++
	}
	return sorted
}

// place puts a route where it belongs; one that is longer than its block waits until the block's slot is final.
func (t *Table) place(spaces []space, r *route) {
	for i := range spaces {
		s := &spaces[i]
		if !s.contains(r) {
			continue
		}
		if r.long() > s.blockLong {
			s.longer = append(s.longer, *r)
			return
		}
		first := s.block(r)
		fill(s.slots[first:first+1<<(s.blockLong-r.long())], r.entry)
		return
	}
	t.insert(r)
}

// addDetails takes the routes that are longer than their blocks, block by block.
func (t *Table) addDetails(s *space) {
	// Sorted they stand together by block, and within one still covering prefix first.
	slices.SortFunc(s.longer, route.compare)
	for rest := s.longer; len(rest) > 0; {
		block, n := s.block(&rest[0]), 1
		for n < len(rest) && s.block(&rest[n]) == block {
			n++
		}
		t.addDetail(s, block, rest[:n])
		rest = rest[n:]
	}
}

// addDetail marks a block which has routes longer than itself, and builds what answers for it.
func (t *Table) addDetail(s *space, block uint64, routes []route) {
	d := detail{rest: s.slots[block]}
	d.hostHi, d.hostLo = notMask(s.blockLong)

	// An array up to the highest pod, if there are pods. Addresses of no pod in it are covered as well.
	var hosts uint64
	for i := range routes {
		r := &routes[i]
		if r.entry.Kind() == Pod && r.long() == 128 && r.hi&d.hostHi == 0 && r.lo&d.hostLo < maxHosts {
			hosts = max(hosts, r.lo&d.hostLo+1)
		}
	}
	if hosts > 0 {
		hosts = 1 << bits.Len64(hosts-1) // a block's size is a power of two: the array is never larger than it
		d.hosts = make([]Entry, hosts)
		fill(d.hosts, d.rest)
	}

	for i := range routes {
		r := &routes[i]
		first, size := r.lo&d.hostLo, uint64(1)<<min(128-r.long(), 63)
		if r.hi&d.hostHi != 0 || first >= hosts {
			d.inTrie = true
			continue
		}
		if size > hosts-first {
			d.inTrie, size = true, hosts-first
		}
		fill(d.hosts[first:first+size], r.entry)
	}
	if d.inTrie {
		// The block itself goes there too, lest an address that none of the routes covers finds a prefix shorter than the pool.
		covering := routes[0]
		covering.hi &^= d.hostHi
		covering.lo &^= d.hostLo
		covering.bits -= uint8(covering.long() - s.blockLong)
		covering.entry = d.rest
		t.insert(&covering)
		for i := range routes {
			t.insert(&routes[i])
		}
	}

	s.slots[block] = detailMark | Entry(len(t.details))
	t.details = append(t.details, d)
}

// insert puts a route into the trie and in front of it. In front, too, a route comes after those that cover it.
func (t *Table) insert(r *route) {
	trie, front, first := &t.trie4, &t.front4, uint32(r.lo)>>(32-frontBits)
	if r.six {
		trie, front, first = &t.trie6, &t.front6, uint32(r.hi>>(64-frontBits))
	}
	if *trie == nil {
		*trie, *front = new(bart.Fast[Entry]), new([1 << frontBits]Entry)
	}
	(*trie).Insert(r.prefix(), r.entry)
	if r.bits <= frontBits {
		fill((*front)[first:][:1<<(frontBits-r.bits)], r.entry)
	} else {
		(*front)[first] = detailMark
	}
}

// install gives the table a finished pool in the form its family's lookup wants.
func (t *Table) install(s *space) {
	shift := 128 - s.blockLong
	if !s.six {
		t.pools4 = append(t.pools4, pool4{
			base: uint32(s.lo), last: uint32(s.sizeLo), shift: uint8(shift), slots: s.slots,
		})
		return
	}
	// The bits of the block number: in the block's prefix, not in the pool's.
	restHi, restLo := notMask(s.blockLong)
	t.pools6 = append(t.pools6, pool6{
		baseHi: s.hi, baseLo: s.lo,
		maskHi: ^s.sizeHi, maskLo: ^s.sizeLo,
		blockHi: s.sizeHi &^ restHi, blockLo: s.sizeLo &^ restLo,
		rotate: uint8(-shift & 63), slots: s.slots,
	})
}

// space is a pool being built. Both families are treated as 128-bit addresses, IPv4 in its mapped form; "long" lengths are prefix lengths
// of that form.
type space struct {
	hi, lo         uint64
	sizeHi, sizeLo uint64 // offset of the last address
	six            bool
	long           int
	blockLong      int
	slots          []Entry
	longer         []route // than their blocks
}

func makeSpace(p Pool) space {
	r := makeRoute(p.CIDR, 0)
	s := space{hi: r.hi, lo: r.lo, six: r.six, long: r.long(), blockLong: r.long() + p.BlockBits - p.CIDR.Bits()}
	s.sizeHi, s.sizeLo = notMask(s.long)
	s.slots = make([]Entry, 1<<(s.blockLong-s.long))
	return s
}

func (s *space) contains(r *route) bool {
	return s.six == r.six && s.long <= r.long() && r.hi&^s.sizeHi == s.hi && r.lo&^s.sizeLo == s.lo
}

// block is the number of the block in which a route of the pool starts.
func (s *space) block(r *route) uint64 {
	hi, lo := r.hi&s.sizeHi, r.lo&s.sizeLo
	shift := uint(128 - s.blockLong)
	return lo>>shift | hi<<(64-shift) | hi>>(shift-64) // of the two shifts of hi one is too far and gives 0
}

// long is the prefix length as of the 128-bit form.
func (r *route) long() int {
	if r.six {
		return int(r.bits)
	}
	return int(r.bits) + 96
}

// notMask is the host part of a 128-bit prefix length: as a mask, and as the offset of a prefix's last address.
func notMask(long int) (hi, lo uint64) {
	return ^uint64(0) >> min(long, 64), ^uint64(0) >> max(long-64, 0)
}

func fill(s []Entry, e Entry) {
	for i := range s {
		s[i] = e
	}
}
