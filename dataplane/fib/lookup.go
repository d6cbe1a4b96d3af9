package fib

import (
	"math/bits"

	"github.com/overplane/overplane/dataplane/packet"
)

// Lookup answers for an address of either family; see Lookup4 and Lookup6.
func (t *Table) Lookup(a packet.Addr) Entry {
	if a.Is4() {
		return t.Lookup4(a.V4())
	}
	return t.Lookup6(a.Hi, a.Lo)
}

// Lookup4 answers for an IPv4 address in host byte order: the entry of the longest matching prefix, Unreachable if there is
// none. It does not allocate.
func (t *Table) Lookup4(dst uint32) Entry {
	pools := t.pools4
	for i := range pools {
		p := &pools[i]
		if off := dst - p.base; off <= p.last {
			// The mask tells the compiler that the shift is a plain one.
			e := p.slots[off>>(p.shift&31)]
			if e < detailMark {
				return e
			}
			return t.lookupDetail4(e, dst)
		}
	}
	return t.lookupTrie4(dst)
}

// lookupDetail4 answers for an address of a block whose slot is marked.
func (t *Table) lookupDetail4(mark Entry, dst uint32) Entry {
	d := &t.details[mark&indexMask]
	if host := uint64(dst & uint32(d.hostLo)); host < uint64(len(d.hosts)) {
		return d.hosts[host]
	}
	if !d.inTrie {
		return d.rest
	}
	return t.lookupTrie4(dst)
}

func (t *Table) lookupTrie4(dst uint32) Entry {
	if t.front4 == nil {
		return 0
	}
	if e := t.front4[dst>>(32-frontBits)]; e != detailMark {
		return e
	}
	e, _ := t.trie4.Lookup(addr4(dst)) // no match is the zero Entry: Unreachable
	return e
}

// Lookup6 answers for an IPv6 address, given as its two words in network order: the entry of the longest matching prefix,
// Unreachable if there is none. It does not allocate.
func (t *Table) Lookup6(hi, lo uint64) Entry {
	pools := t.pools6
	for i := range pools {
		p := &pools[i]
		if hi&p.maskHi == p.baseHi && lo&p.maskLo == p.baseLo {
			block := bits.RotateLeft64(hi&p.blockHi|lo&p.blockLo, int(p.rotate))
			e := p.slots[block]
			if e < detailMark {
				return e
			}
			return t.lookupDetail6(e, hi, lo)
		}
	}
	return t.lookupTrie6(hi, lo)
}

// lookupDetail6 answers for an address of a block whose slot is marked.
func (t *Table) lookupDetail6(mark Entry, hi, lo uint64) Entry {
	d := &t.details[mark&indexMask]
	if host := lo & d.hostLo; hi&d.hostHi == 0 && host < uint64(len(d.hosts)) {
		return d.hosts[host]
	}
	if !d.inTrie {
		return d.rest
	}
	return t.lookupTrie6(hi, lo)
}

func (t *Table) lookupTrie6(hi, lo uint64) Entry {
	if t.front6 == nil {
		return 0
	}
	if e := t.front6[hi>>(64-frontBits)]; e != detailMark {
		return e
	}
	e, _ := t.trie6.Lookup(addr6(hi, lo))
	return e
}
