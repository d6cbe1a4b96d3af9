package snat

import (
	"math/bits"

	"github.com/overplane/overplane/dataplane/packet"
)

// Memory of one session, in bytes:
//
//	                         IPv4      IPv6
//	record                   64        64
//	addresses beside it      -         32
//	two indices              10.7-21.3 10.7-21.3     two slots of 4 bytes at a load of 0.375 to 0.75; 16 for a power of two
//	timer wheel              links in the record; 2 KiB of heads a table
//	together, at most        85.4      117.4
//
// With endpoint-independent mapping every mapping takes a record, too.

// record is one session. All its numbers that name records are 1 more than the index, 0 meaning none. The first 8 bytes are written last
// when a session is made and first when it ends, by one store, so that a process that dies in between leaves no half a session behind.
type record struct {
	inPort, remPort, extPort uint16 // host byte order; 0 where the protocol has none. ICMP: inPort and extPort are the identifier
	proto                    uint8
	flags                    uint8 // 0: not in use

	expires uint32 // tick from which on the session is over
	next    uint32 // in its slot of the wheel; in the list of free records
	prev    uint32

	pod   uint16
	tcp   uint8 // TCP: what was seen
	class uint8 // which timer

	deltaAddr uint16 // what the outbound change of address adds to a ones' complement sum
	bucket    uint16 // slot of the wheel
	mapping   uint32 // of a session: its mapping's record; of a mapping: how many sessions it has

	podNext, podPrev uint32 // the pod's sessions
	created          uint32 // tick
	out, in          uint32 // packets, wrapping; a GSO frame is one. Of a mapping: its parent, and whether its port must rest

	_              uint32
	inside, remote uint32 // IPv4 addresses; IPv6's are in table.addrs
}

// addrPair are the addresses of an IPv6 record.
type addrPair struct{ inside, remote packet.Addr }

const (
	recordSize = 64
	pairSize   = 32
	maxRecords = 1<<24 - 2
)

// Flags of a record.
const (
	flagLive     uint8 = 1 << iota // in use
	flagPin                        // not translated; only in the outbound index
	flagMapping                    // an endpoint-independent mapping or what it admits an address by, not a session
	flagHalfOpen                   // counted as half-open
)

// table is the sessions of one family. One goroutine at a time.
type table struct {
	v6    bool
	recs  []record
	addrs []addrPair // IPv6 only

	// Open addressing with linear probing: record number in the low 24 bits, 8 bits of its hash above; 0 is empty.
	outIdx, inIdx []uint32
	mask          uint64
	seed          [4]uint64

	high *uint32 // records ever in use, in the header, for whoever adopts the table
	free uint32
	used int

	wheel  wheel
	pods   []podSessions // the last one is for NoPod
	share  share         // of records
	half   share         // of half-open connections
	pins   int
	filter *pinFilter
	counts Counts
}

// podSessions is what a table knows of a pod.
type podSessions struct {
	first    uint32
	sessions uint32
	halfOpen uint32
}

const (
	tagShift = 24
	slotMask = 1<<tagShift - 1
)

// tuple is what a session is found by. ext is its external port.
type tuple struct {
	inside, remote           packet.Addr
	inPort, remPort, extPort uint16
	proto                    uint8
}

// mum is the folded product of wyhash.
func mum(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a, b)
	return hi ^ lo
}

// hashOut is the hash of a session's inside tuple.
func (t *table) hashOut(k *tuple) uint64 {
	ports := uint64(k.inPort)<<32 | uint64(k.remPort)<<16 | uint64(k.proto)<<8 | 1
	var h uint64
	if t.v6 {
		h = mum(k.inside.Hi^t.seed[2], k.inside.Lo^t.seed[3]) ^ mum(k.remote.Hi^t.seed[3], k.remote.Lo^t.seed[0])
	} else {
		h = k.inside.Lo<<32 | k.remote.Lo&0xffffffff
	}
	return mum(mum(h^t.seed[0], ports^t.seed[1]), t.seed[2])
}

// hashIn is the hash of a session's outside tuple. The external address is the node's and the same for all.
func (t *table) hashIn(k *tuple) uint64 {
	ports := uint64(k.extPort)<<32 | uint64(k.remPort)<<16 | uint64(k.proto)<<8 | 2
	var h uint64
	if t.v6 {
		h = mum(k.remote.Hi^t.seed[3], k.remote.Lo^t.seed[0])
	} else {
		h = k.remote.Lo & 0xffffffff
	}
	return mum(mum(h^t.seed[0], ports^t.seed[1]), t.seed[2])
}

func tagOf(h uint64) uint32 { return uint32(h>>56) << tagShift }

// findOut is the record with this inside tuple, or 0.
func (t *table) findOut(k *tuple) uint32 {
	h := t.hashOut(k)
	tag := tagOf(h)
	for pos := h & t.mask; ; pos = (pos + 1) & t.mask {
		s := t.outIdx[pos]
		if s == 0 {
			return 0
		}
		if s&^slotMask == tag {
			n := s & slotMask
			r := &t.recs[n-1]
			if r.inPort == k.inPort && r.remPort == k.remPort && r.proto == k.proto && t.sameInside(r, n, k) && t.sameRemote(r, n, k) {
				return n
			}
		}
	}
}

// findIn is the record with this outside tuple, or 0.
func (t *table) findIn(k *tuple) uint32 {
	h := t.hashIn(k)
	tag := tagOf(h)
	for pos := h & t.mask; ; pos = (pos + 1) & t.mask {
		s := t.inIdx[pos]
		if s == 0 {
			return 0
		}
		if s&^slotMask == tag {
			n := s & slotMask
			r := &t.recs[n-1]
			if r.extPort == k.extPort && r.remPort == k.remPort && r.proto == k.proto && t.sameRemote(r, n, k) {
				return n
			}
		}
	}
}

func (t *table) sameInside(r *record, n uint32, k *tuple) bool {
	if t.v6 {
		return t.addrs[n-1].inside == k.inside
	}
	return r.inside == uint32(k.inside.Lo)
}

func (t *table) sameRemote(r *record, n uint32, k *tuple) bool {
	if t.v6 {
		return t.addrs[n-1].remote == k.remote
	}
	return r.remote == uint32(k.remote.Lo)
}

// tupleOf is the tuple of a record.
func (t *table) tupleOf(n uint32) (k tuple) {
	r := &t.recs[n-1]
	k.inPort, k.remPort, k.extPort, k.proto = r.inPort, r.remPort, r.extPort, r.proto
	if t.v6 {
		k.inside, k.remote = t.addrs[n-1].inside, t.addrs[n-1].remote
	} else {
		k.inside, k.remote = packet.AddrFrom4(r.inside), packet.AddrFrom4(r.remote)
	}
	return k
}

// insideOf is a record's inside address.
func (t *table) insideOf(n uint32) packet.Addr {
	if t.v6 {
		return t.addrs[n-1].inside
	}
	return packet.AddrFrom4(t.recs[n-1].inside)
}

// insert puts a record into an index under hash h.
func (t *table) insert(idx []uint32, h uint64, n uint32) {
	pos := h & t.mask
	for idx[pos] != 0 {
		pos = (pos + 1) & t.mask
	}
	idx[pos] = tagOf(h) | n
}

// remove takes a record out of an index and closes the gap (Knuth, The Art of Computer Programming, volume 3, algorithm 6.4R), so that lookups need
// no marks of what was there.
func (t *table) remove(idx []uint32, h uint64, n uint32, out bool) {
	pos, slot := h&t.mask, tagOf(h)|n
	for idx[pos] != slot {
		if idx[pos] == 0 {
			return
		}
		pos = (pos + 1) & t.mask
	}
	for next := (pos + 1) & t.mask; ; next = (next + 1) & t.mask {
		s := idx[next]
		if s == 0 {
			break
		}
		k := t.tupleOf(s & slotMask)
		home := t.hashIn(&k)
		if out {
			home = t.hashOut(&k)
		}
		// The entry may move to the gap if its home is not behind the gap.
		if (next-home)&t.mask >= (next-pos)&t.mask {
			idx[pos] = s
			pos = next
		}
	}
	idx[pos] = 0
}

// take reserves a record, or returns 0.
func (t *table) take() uint32 {
	if n := t.free; n != 0 {
		t.free = t.recs[n-1].next
		return n
	}
	if int(*t.high) == len(t.recs) {
		return 0
	}
	*t.high++
	return *t.high
}

// link makes a filled record findable and accounts for it. Its key and flags are given apart, to be stored last.
func (t *table) link(n uint32, k *tuple, flags uint8) {
	r := &t.recs[n-1]
	if t.v6 {
		t.addrs[n-1] = addrPair{k.inside, k.remote}
	} else {
		r.inside, r.remote = uint32(k.inside.Lo), uint32(k.remote.Lo)
	}
	publish(r, k, flags)
	t.index(n, k, flags)
}

// index enters a record whose fields are complete into everything that is kept beside the records.
func (t *table) index(n uint32, k *tuple, flags uint8) {
	r := &t.recs[n-1]
	t.insert(t.outIdx, t.hashOut(k), n)
	if flags&flagPin == 0 {
		t.insert(t.inIdx, t.hashIn(k), n)
	} else {
		t.pins++
		t.filter.add(k, 1)
	}
	p := &t.pods[r.pod]
	r.podPrev, r.podNext = 0, p.first
	if p.first != 0 {
		t.recs[p.first-1].podPrev = n
	}
	p.first = n
	t.share.add(&p.sessions)
	t.used++
	if flags&flagHalfOpen != 0 {
		t.half.add(&p.halfOpen)
	}
	if flags&flagMapping == 0 {
		t.wheel.link(t.recs, n)
	}
}

// unlink is the reverse of link, and frees the record.
func (t *table) unlink(n uint32) {
	r := &t.recs[n-1]
	k, flags := t.tupleOf(n), r.flags
	retire(r)
	t.remove(t.outIdx, t.hashOut(&k), n, true)
	if flags&flagPin == 0 {
		t.remove(t.inIdx, t.hashIn(&k), n, false)
	} else {
		t.pins--
		t.filter.add(&k, ^uint32(0))
	}
	if flags&flagMapping == 0 {
		t.wheel.unlink(t.recs, n)
	}
	p := &t.pods[r.pod]
	if r.podPrev != 0 {
		t.recs[r.podPrev-1].podNext = r.podNext
	} else {
		p.first = r.podNext
	}
	if r.podNext != 0 {
		t.recs[r.podNext-1].podPrev = r.podPrev
	}
	t.share.sub(&p.sessions)
	t.used--
	if flags&flagHalfOpen != 0 {
		t.half.sub(&p.halfOpen)
	}
	r.next = t.free
	t.free = n
}
