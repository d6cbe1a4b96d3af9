package snat

import (
	"math/bits"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// Only the first fragment of a datagram carries ports; the others follow it by source, destination, protocol and identification. They may come
// before it, and are held until it does. The worker that owns a datagram (FragmentHash) does this:
//
//	Fragment(p, pod, &fv)           what would happen; p's ports are completed if they are known
//	TrackFragment(p, &fv, handle)   Pass: go on with Outbound or Inbound.  Hold: the translator has the handle.  Refuse: fv.Reason
//	ReleaseFragment(&fv)            after a first fragment has gone its way: the handles of those that waited, in their order
//	ExpiredFragment()               once a poll: the handles of those that waited in vain
//
// A handle stands for the caller's frame and means nothing here.

// FragmentAction is what becomes of a fragment.
type FragmentAction uint8

// The actions.
const (
	FragmentRefuse FragmentAction = iota // it dies of FragmentView.Reason
	FragmentPass                         // its ports are known and stand in the Packet
	FragmentHold                         // it waits for its datagram's first
)

// FragmentView is what a translator would do with a fragment. It is good until the next TrackFragment or Expire.
type FragmentView struct {
	Action FragmentAction
	Reason drop.Reason
	entry  uint32 // +1
	hash   uint32
	id     uint32 // as received
	pod    int
}

// fragmentEntry is one datagram. 96 bytes.
type fragmentEntry struct {
	src, dst         packet.Addr
	id, newID        uint32
	srcPort, dstPort uint16
	proto, icmpType  uint8
	known            bool // the first fragment was here
	source           uint8
	pod              uint16
	heldCount        uint16
	expires          uint32
	chain            uint32 // next of the same bucket; next free
	next, prev       uint32 // in the order of expiry
	held, heldTail   uint32
	release          bool
}

// contradicts reports whether a first fragment has other ports than the first one had.
func (e *fragmentEntry) contradicts(p *packet.Packet) bool {
	return e.known && (e.srcPort != p.SrcPort || e.dstPort != p.DstPort || e.icmpType != p.ICMPType)
}

type heldFragment struct {
	handle uint64
	next   uint32
}

// fragments is what is known of datagrams in pieces. All of it has a fixed size.
type fragments struct {
	entries        []fragmentEntry
	heads          []uint32
	free           uint32
	queues         [2]fragmentQueue // by known: each has its own time to live
	held           []heldFragment
	heldFree       uint32
	share          share
	pods           []uint32
	heldShare      share
	heldPods       []uint32
	sources        [256]uint16 // datagrams from outside by a hash of their source
	seed           uint64
	ttl            [2]int64
	tracked        uint64
	heldTotal      uint64
	perSource      uint16
	maxPerDatagram uint16
}

type fragmentQueue struct{ first, last uint32 }

func newFragments(c *Config, pods int) *fragments {
	f := &fragments{entries: make([]fragmentEntry, c.FragmentedDatagrams), heads: make([]uint32, 1<<bits.Len(uint(c.FragmentedDatagrams))),
		held: make([]heldFragment, c.HeldFragments), pods: make([]uint32, pods), heldPods: make([]uint32, pods), seed: newSeeds()[0],
		ttl: [2]int64{int64(c.Timers.FragmentHold), int64(c.Timers.Fragment)}, maxPerDatagram: 64}
	for i := range f.entries {
		f.entries[i].chain = uint32(i)
	}
	f.free = uint32(len(f.entries))
	for i := range f.held {
		f.held[i].next = uint32(i)
	}
	f.heldFree = uint32(len(f.held))
	f.share = share{capacity: len(f.entries), guarantee: max(1, len(f.entries)/(2*pods))}
	f.heldShare = share{capacity: len(f.held), guarantee: len(f.held) / (2 * pods)}
	f.share.attach(0)
	f.perSource = uint16(max(4, len(f.entries)/16))
	return f
}

// FragmentHash spreads fragmented datagrams over workers: all fragments of one have the same. p is as it was received.
func FragmentHash(p *packet.Packet) uint32 {
	return uint32(mum(p.Src.Hi^p.Src.Lo^0x9e3779b97f4a7c15, p.Dst.Hi^bits.RotateLeft64(p.Dst.Lo, 32)^uint64(p.FragmentID)<<8^uint64(p.Proto)))
}

func (f *fragments) hash(p *packet.Packet) uint32 {
	return uint32(mum(mum(p.Src.Hi^p.Src.Lo^f.seed, p.Dst.Hi^bits.RotateLeft64(p.Dst.Lo, 32))^f.seed, uint64(p.FragmentID)<<8^uint64(p.Proto)^0x9e3779b97f4a7c15))
}

func (f *fragments) find(p *packet.Packet, h uint32) uint32 {
	for n := f.heads[h&uint32(len(f.heads)-1)]; n != 0; n = f.entries[n-1].chain {
		if e := &f.entries[n-1]; e.id == p.FragmentID && e.proto == p.Proto && e.src == p.Src && e.dst == p.Dst {
			return n
		}
	}
	return 0
}

// Fragment says what becomes of a fragment, as it was received; pod is the sender's index, NoPod for packets from outside. With FragmentPass p's ports (and for
// outbound ones its identification) are completed, so that Outbound or Inbound understands it; nothing else is written.
func (t *Translator) Fragment(p *packet.Packet, pod int, v *FragmentView) {
	f := t.frags
	*v = FragmentView{hash: f.hash(p), id: p.FragmentID, pod: t.podSlot(pod)}
	v.entry = f.find(p, v.hash)
	first := p.Flags&packet.FlagFirst != 0
	if v.entry == 0 {
		switch {
		case !f.share.allows(f.pods[v.pod]), v.pod == len(f.pods)-1 && f.sources[sourceOf(p)] >= f.perSource:
			v.Reason = drop.NATFragmentLimit
		case first:
			v.Action = FragmentPass
		default:
			t.mayHold(nil, v)
		}
		return
	}
	e := &f.entries[v.entry-1]
	switch {
	case first && e.contradicts(p):
		v.Reason = drop.NATFragmentConflict
	case first:
		v.Action = FragmentPass
	case e.known && e.held == 0 || e.release:
		v.Action = FragmentPass
		p.SrcPort, p.DstPort, p.ICMPType = e.srcPort, e.dstPort, e.icmpType
	default:
		t.mayHold(e, v)
	}
	if v.Action == FragmentPass && e.known && pod != NoPod {
		p.FragmentID = e.newID
	}
}

func (t *Translator) mayHold(e *fragmentEntry, v *FragmentView) {
	f := t.frags
	if f.heldFree == 0 || !f.heldShare.allows(f.heldPods[v.pod]) || e != nil && e.heldCount >= f.maxPerDatagram {
		v.Reason = drop.NATFragmentLimit
		return
	}
	v.Action = FragmentHold
}

// podSlot is the place of a pod's counters; the last one is for NoPod.
func (t *Translator) podSlot(pod int) int {
	if pod < 0 || pod >= len(t.pods)-1 || !t.pods[pod].attached {
		return len(t.pods) - 1
	}
	return pod
}

func sourceOf(p *packet.Packet) uint8 { return uint8(mum(p.Src.Hi^0x9e3779b97f4a7c15, p.Src.Lo) >> 32) }

// TrackFragment does what the view says and returns its action, which may have become FragmentRefuse by what earlier fragments of the batch did. handle
// stands for the frame; with FragmentHold it is the translator's until ReleaseFragment or ExpiredFragment returns it.
func (t *Translator) TrackFragment(p *packet.Packet, v *FragmentView, handle uint64) FragmentAction {
	f := t.frags
	if v.Action == FragmentRefuse {
		return FragmentRefuse
	}
	first := p.Flags&packet.FlagFirst != 0
	if v.entry == 0 {
		id := p.FragmentID
		p.FragmentID = v.id
		v.entry = f.find(p, v.hash) // an earlier fragment of the batch
		p.FragmentID = id
	}
	if v.entry == 0 {
		if f.free == 0 || !f.share.allows(f.pods[v.pod]) {
			v.Action, v.Reason = FragmentRefuse, drop.NATFragmentLimit
			return v.Action
		}
		v.entry = t.newFragment(p, v)
	}
	e := &f.entries[v.entry-1]
	if first && e.contradicts(p) { // one of the batch
		v.Action, v.Reason = FragmentRefuse, drop.NATFragmentConflict
		return v.Action
	}
	if first && !e.known {
		e.known, e.srcPort, e.dstPort, e.icmpType = true, p.SrcPort, p.DstPort, p.ICMPType
		e.newID = v.id
		if v.pod != len(f.pods)-1 {
			e.newID = uint32(t.ids.take4(1))
			if p.Kind == packet.KindIPv6 {
				e.newID = t.ids.take6()
			}
		}
		f.requeue(v.entry, 1, tickAfter(t.now+f.ttl[1]))
	}
	if v.Action == FragmentHold && e.known && e.held == 0 { // its first was in the same batch
		v.Action = FragmentPass
		p.SrcPort, p.DstPort, p.ICMPType = e.srcPort, e.dstPort, e.icmpType
	}
	if v.Action == FragmentPass {
		if e.known {
			p.FragmentID = e.newID
		}
		return v.Action
	}
	if t.mayHold(e, v); v.Action != FragmentHold || v.Reason != drop.None {
		v.Action = FragmentRefuse
		return v.Action
	}
	n := f.heldFree
	h := &f.held[n-1]
	f.heldFree = h.next
	*h = heldFragment{handle: handle}
	if e.held == 0 {
		e.held = n
	} else {
		f.held[e.heldTail-1].next = n
	}
	e.heldTail = n
	e.heldCount++
	f.heldShare.add(&f.heldPods[e.pod])
	f.heldTotal++
	return FragmentHold
}

// newFragment makes an entry without ports.
func (t *Translator) newFragment(p *packet.Packet, v *FragmentView) uint32 {
	f := t.frags
	n := f.free
	e := &f.entries[n-1]
	f.free = e.chain
	head := &f.heads[v.hash&uint32(len(f.heads)-1)]
	*e = fragmentEntry{src: p.Src, dst: p.Dst, id: v.id, proto: p.Proto, pod: uint16(v.pod), source: sourceOf(p), chain: *head,
		expires: tickAfter(t.now + f.ttl[0])}
	*head = n
	f.queues[0].append(f.entries, n)
	f.share.add(&f.pods[v.pod])
	if v.pod == len(f.pods)-1 {
		f.sources[e.source]++
	}
	f.tracked++
	return n
}

// ReleaseFragment returns the next fragment that waited for the first one just handled, until ok is false. The caller takes each through
// parsing, Fragment and TrackFragment again: it passes.
func (t *Translator) ReleaseFragment(v *FragmentView) (handle uint64, ok bool) {
	if v.entry == 0 {
		return 0, false
	}
	f := t.frags
	e := &f.entries[v.entry-1]
	if !e.known || e.held == 0 {
		e.release = false
		return 0, false
	}
	e.release = true
	handle = f.takeHeld(e)
	return handle, true
}

func (f *fragments) takeHeld(e *fragmentEntry) uint64 {
	n := e.held
	h := &f.held[n-1]
	e.held = h.next
	e.heldCount--
	f.heldShare.sub(&f.heldPods[e.pod])
	h.next = f.heldFree
	f.heldFree = n
	return h.handle
}

// ExpiredFragment returns the handle of a fragment whose first did not come in time, for the caller to free and to count as
// drop.NATFragmentTimeout, until ok is false. To be called after Expire until then.
func (t *Translator) ExpiredFragment() (handle uint64, ok bool) {
	f := t.frags
	for {
		n := f.queues[0].first
		if n == 0 || int32(f.entries[n-1].expires-t.tick) > 0 {
			if n = f.queues[1].first; n == 0 || int32(f.entries[n-1].expires-t.tick) > 0 {
				return 0, false
			}
		}
		e := &f.entries[n-1]
		if e.held != 0 {
			return f.takeHeld(e), true
		}
		f.drop(n)
	}
}

// expire forgets datagrams whose time is over and that hold nothing.
func (f *fragments) expire(tick uint32) {
	for q := range f.queues {
		for n := f.queues[q].first; n != 0 && int32(f.entries[n-1].expires-tick) <= 0 && f.entries[n-1].held == 0; n = f.queues[q].first {
			f.drop(n)
		}
	}
}

// drop forgets a datagram.
func (f *fragments) drop(n uint32) {
	e := &f.entries[n-1]
	q := 0
	if e.known {
		q = 1
	}
	f.queues[q].remove(f.entries, n)
	h := f.hash(&packet.Packet{Src: e.src, Dst: e.dst, FragmentID: e.id, Proto: e.proto})
	at := &f.heads[h&uint32(len(f.heads)-1)]
	for *at != n {
		at = &f.entries[*at-1].chain
	}
	*at = e.chain
	f.share.sub(&f.pods[e.pod])
	if int(e.pod) == len(f.pods)-1 {
		f.sources[e.source]--
	}
	e.chain = f.free
	f.free = n
}

func (f *fragments) requeue(n uint32, to int, expires uint32) {
	f.queues[1-to].remove(f.entries, n)
	f.entries[n-1].expires = expires
	f.queues[to].append(f.entries, n)
}

func (q *fragmentQueue) append(e []fragmentEntry, n uint32) {
	e[n-1].next, e[n-1].prev = 0, q.last
	if q.last != 0 {
		e[q.last-1].next = n
	} else {
		q.first = n
	}
	q.last = n
}

func (q *fragmentQueue) remove(e []fragmentEntry, n uint32) {
	x := &e[n-1]
	if x.prev != 0 {
		e[x.prev-1].next = x.next
	} else {
		q.first = x.next
	}
	if x.next != 0 {
		e[x.next-1].prev = x.prev
	} else {
		q.last = x.prev
	}
}
