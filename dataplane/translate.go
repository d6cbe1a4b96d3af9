package dataplane

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

const (
	// expireSteps is how much of the translator's housekeeping a poll does: each step takes at most a few hundred nanoseconds.
	expireSteps = 64
	// noHandle is the handle of no fragment.
	noHandle = 0
)

// prefetch has the memory work on the sessions of all of a batch's packets at once, where there are so many sessions that each lookup would wait for it.
func (w *Worker) prefetch(in *PortInfo, n int) {
	t := w.translator
	if t == nil || in.Kind == PortHost || !t.PrefetchPays() {
		return
	}
	asked := 0
	for i := range w.journeys[:n] {
		p := &w.journeys[i].packet
		if p.Reason != drop.None || p.Kind != packet.KindIPv4 && p.Kind != packet.KindIPv6 {
			continue
		}
		if in.Kind == PortUplink && w.snap.isNode(p.Dst) || in.Kind == PortPod && w.snap.FIB.Lookup(p.Dst).Kind() == fib.Outside {
			w.asked[asked] = p
			asked++
		}
	}
	t.Prefetch(w.asked[:asked], in.Kind == PortPod)
}

// translate does to a packet what its verdict says about addresses and fragments. It reports whether the packet goes on by its verdict; if not, it died, waits, or
// went its way already.
func (w *Worker) translate(in *slot, j *journey, chain []port.Frame) bool {
	t, v, p := w.translator, &j.verdict, &j.packet
	if v.Fragmented && !w.track(in, j, chain) {
		return false
	}
	switch v.Translation {
	case TrackFragment:
		return true
	case MakePin:
		if reason := t.Pin(p, w.accountedPod(p)); reason != drop.None {
			v.Action, v.Reason, v.Error = Drop, reason, icmp.AdminProhibited
		}
		return true
	}
	if v.View.Action == snat.Create {
		if reason := t.Create(p, &v.View); reason != drop.None {
			v.Action, v.Reason, v.Error = Drop, reason, icmp.None
			if v.View.Unreachable {
				v.Error = icmp.AdminProhibited
			}
			return true
		}
		w.reportFlows()
	}
	frame := w.pool.Bytes(&chain[0])
	o := snat.Offload{Unfinished: chain[0].Offload.Flags&port.NeedsChecksum != 0, Segments: j.segments}
	switch v.Translation {
	case TranslateOut:
		t.TranslateOut(p, frame, &v.View, o)
	case TranslateIn:
		t.TranslateIn(p, frame, &v.View, o)
	case TranslateHairpin:
		t.TranslateOut(p, frame, &v.View, o)
		w.turn(in, j, chain, o)
		return v.Action != HandOver
	}
	return true
}

// turn takes a packet that a pod sent to the node's external address, translated on its way out, back in. Its sender is not told when there is no way: it would learn of
// a packet that it did not send.
func (w *Worker) turn(in *slot, j *journey, chain []port.Frame, o snat.Offload) {
	t, v, p, frame := w.translator, &j.verdict, &j.packet, w.pool.Bytes(&chain[0])
	if owner := t.OwnerIn(p, frame); owner != t.Worker() {
		// To its owner it has come from the wire.
		*(*packet.MAC)(frame[0:6]) = w.snap.Ports[UplinkSlot].MAC
		v.Action, v.Owner = HandOver, uint8(owner)
		in.in.Frames--
		in.in.Packets -= uint64(j.segments)
		total, _ := port.PacketLen(chain)
		in.in.Bytes -= uint64(total)
		up := w.slots[UplinkSlot]
		up.in.add(&Traffic{Frames: 1, Packets: uint64(j.segments), Bytes: uint64(total)})
		w.handOver(up, j, chain)
		return
	}
	v.Action, v.Reason = Drop, drop.NATNoSession
	switch t.Inbound(p, frame, &v.View); v.View.Action {
	case snat.Translate:
	case snat.Refuse:
		v.Reason = v.View.Reason
		return
	default:
		return
	}
	route := w.snap.FIB.Lookup(v.View.Addr)
	switch {
	case route.Kind() != fib.Pod:
	case p.TTL <= 1:
		v.Reason = drop.HopLimitExceeded
	case j.size > uint32(w.snap.FIB.Adjacency(route.Adjacency()).MTU):
		v.Reason = drop.TooBig
	default:
		t.TranslateIn(p, frame, &v.View, o)
		v.Action, v.Reason, v.Adjacency, v.Decrement = Forward, drop.None, route.Adjacency(), true
	}
}

// track tells the translator of a fragment. It reports whether the fragment goes on.
func (w *Worker) track(in *slot, j *journey, chain []port.Frame) bool {
	t, v, p := w.translator, &j.verdict, &j.packet
	handle := uint64(noHandle)
	if v.Action == Wait {
		if len(chain) == 1 {
			handle = w.waiting.take(waitingFragment{slot: in, frame: chain[0]})
		}
		if handle == noHandle {
			v.Fragment.Action, v.Fragment.Reason = snat.FragmentRefuse, drop.NATFragmentLimit
		}
	}
	switch action := t.TrackFragment(p, &v.Fragment, handle); {
	case action == snat.FragmentHold:
		in.uncount(&chain[0], w)
		return false
	case action == snat.FragmentRefuse:
		if handle != noHandle {
			w.waiting.give(handle)
		}
		in.dropsIn[v.Fragment.Reason]++
		w.pool.FreeAll(chain)
		return false
	case v.Action == Wait: // an earlier packet of the batch was its datagram's first: it is looked at again after the batch
		w.released = append(w.released, w.waiting.give(handle))
		in.uncount(&chain[0], w)
		return false
	}
	if p.Flags&packet.FlagFirst != 0 {
		for h, ok := t.ReleaseFragment(&v.Fragment); ok; h, ok = t.ReleaseFragment(&v.Fragment) {
			w.released = append(w.released, w.waiting.give(h))
		}
	}
	return true
}

// uncount takes back that a fragment was received, until it goes on: then it is received again. No counter is read in between.
func (s *slot) uncount(f *port.Frame, w *Worker) {
	s.in.Frames--
	s.in.Packets--
	s.in.Bytes -= uint64(f.Len)
	w.received--
}

// forwardReleased takes fragments that waited through their journey.
func (w *Worker) forwardReleased() {
	for len(w.released) > 0 {
		from, n := w.released[0].slot, 0
		for n < len(w.released) && n < batch && w.released[n].slot == from {
			w.again[n] = w.released[n].frame
			n++
		}
		w.released = w.released[:copy(w.released, w.released[n:])]
		w.batch = w.again[:n]
		w.forward(from, w.batch)
	}
}

// reportFlows tells of flows of protocols without translated ports that began or ended.
func (w *Worker) reportFlows() {
	if w.tellFlows != nil && w.translator.HasEvents() {
		w.tellFlows(w.translator.Events())
	}
}

// expireSessions does what time and the last snapshot bring to the translator.
func (w *Worker) expireSessions() {
	t := w.translator
	t.Expire(w.now, expireSteps)
	for h, ok := t.ExpiredFragment(); ok; h, ok = t.ExpiredFragment() {
		x := w.waiting.give(h)
		x.slot.in.add(&Traffic{Frames: 1, Packets: 1, Bytes: uint64(x.frame.Len)})
		x.slot.dropsIn[drop.NATFragmentTimeout]++
		w.received++
		w.pool.Free(x.frame)
	}
	if w.unsettled {
		w.settlePods()
	}
	w.reportFlows()
}

// settlePods tells the translator which pods there are. The index of a pod that left is free when the last of its sessions has ended.
func (w *Worker) settlePods() {
	t, ports := w.translator, w.snap.Ports
	w.unsettled = false
	for i := range t.MaxPods() {
		var want PortInfo
		if slot := i + FirstPodSlot; slot < len(ports) && ports[slot].Kind == PortPod {
			want = ports[slot]
		}
		a4, a6, attached, leaving := t.Pod(i)
		if attached && (want.Kind != PortPod || want.Addr4 != a4 || want.Addr6 != a6) {
			t.RemovePod(i)
			attached, leaving = false, true
		}
		switch {
		case attached || want.Kind != PortPod && !leaving:
		case leaving:
			w.unsettled = true
		default:
			if err := t.AddPod(i, want.Addr4, want.Addr6); err != nil {
				w.log.Error("a pod's packets will not be translated", "pod", want.Name, "error", err)
			}
		}
	}
}

// waitingFragment is a fragment, of one frame, that waits for its datagram's first.
type waitingFragment struct {
	slot  *slot // it came in by
	frame port.Frame
	next  uint32
}

// waitingFragments holds the frames that the translator has handles of. A handle is an index plus 1.
type waitingFragments struct {
	all  []waitingFragment
	free uint32
}

func (h *waitingFragments) init(n int) {
	h.all = make([]waitingFragment, n)
	for i := range h.all {
		h.all[i].next = uint32(i)
	}
	h.free = uint32(n)
}

// take keeps a fragment and returns its handle, or noHandle if there is no room.
func (h *waitingFragments) take(f waitingFragment) uint64 {
	n := h.free
	if n == 0 {
		return noHandle
	}
	h.free = h.all[n-1].next
	h.all[n-1] = f
	return uint64(n)
}

// give gives a fragment back.
func (h *waitingFragments) give(handle uint64) waitingFragment {
	x := &h.all[handle-1]
	f := *x
	*x = waitingFragment{next: h.free}
	h.free = uint32(handle)
	return f
}
