package snat

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// Create makes the session that a view with the action Create announced; the view becomes one with Translate. If an earlier packet of the
// batch made it, that one is found. Otherwise a reason is returned, v.Action is Refuse and v.Unreachable says whether the pod is to be told.
func (t *Translator) Create(p *packet.Packet, v *View) drop.Reason {
	tb, node := t.tableOf(p.Kind)
	k := tuple{inside: p.Src, remote: p.Dst, proto: p.Proto}
	switch p.Proto {
	case packet.ProtoTCP, packet.ProtoUDP:
		k.inPort, k.remPort = p.SrcPort, p.DstPort
	case packet.ProtoSCTP:
		k.inPort, k.remPort, k.extPort = p.SrcPort, p.DstPort, p.SrcPort
	case packet.ProtoICMP, packet.ProtoICMPv6:
		k.inPort = p.SrcPort
	}
	n := tb.findOut(&k)
	if n != 0 && t.over(&tb.recs[n-1]) {
		t.end(tb, n, true)
		n = 0
	}
	if n == 0 {
		var reason drop.Reason
		if n, reason = t.create(tb, node, p, &k, int(v.pod)); reason != drop.None {
			v.Action, v.Reason, v.Unreachable = Refuse, reason, true
			return reason
		}
	}
	v.Action, v.n, v.Addr, v.Port = Translate, n, node, tb.recs[n-1].extPort
	return drop.None
}

func (t *Translator) create(tb *table, node packet.Addr, p *packet.Packet, k *tuple, pod int) (uint32, drop.Reason) {
	// Once more: others of the same batch came first.
	s := &tb.pods[pod]
	if !tb.share.allows(s.sessions) {
		if tb.share.used >= tb.share.capacity {
			return 0, drop.NATTableFull
		}
		return 0, drop.NATSessionLimit
	}
	if k.proto == packet.ProtoTCP && !tb.half.allows(s.halfOpen) {
		return 0, drop.NATHalfOpenLimit
	}
	var parent uint32
	class, ported := ClassOf(k.proto)
	switch {
	case !ported: // the port, if any, stays: it must be free towards this peer
		if n := tb.findIn(k); n != 0 {
			if !t.over(&tb.recs[n-1]) {
				return 0, drop.NATPortTaken
			}
			t.end(tb, n, true)
		}
	case t.cfg.Mapping == EndpointIndependent:
		var reason drop.Reason
		if parent, reason = t.parentOf(tb, node, k, class, pod); reason != drop.None {
			return 0, reason
		}
	default:
		if r := t.choosePort(tb, k, class, pod); r != drop.None {
			return 0, r
		}
		t.hold(class, k.extPort)
	}
	n := tb.take()
	if n == 0 {
		if ported && parent == 0 {
			t.release(class, k.extPort, false)
		}
		t.dropParent(tb, parent)
		return 0, drop.NATTableFull
	}
	r := &tb.recs[n-1]
	*r = record{pod: uint16(pod), created: t.tick, mapping: parent, deltaAddr: deltaOf(k.inside, node)}
	if parent != 0 {
		tb.recs[parent-1].mapping++
	}
	flags := flagLive
	r.class = t.firstTimer(k.proto)
	if k.proto == packet.ProtoTCP {
		flags |= flagHalfOpen
	}
	r.expires = tickAfter(t.now + t.timeouts[r.class])
	tb.link(n, k, flags)
	tb.counts.Created++
	if !ported {
		t.event(tb, n, true)
	}
	return n, drop.None
}

// firstTimer is the timer that a session starts with.
func (t *Translator) firstTimer(proto uint8) timer {
	switch proto {
	case packet.ProtoTCP:
		return timerTCPOpening
	case packet.ProtoUDP:
		return timerUDP
	case packet.ProtoICMP, packet.ProtoICMPv6:
		return timerICMP
	}
	return timerOther
}

// parentOf finds or makes the mapping of a flow, and what admits its peer's address if that is filtered by; it sets k.extPort.
func (t *Translator) parentOf(tb *table, node packet.Addr, k *tuple, class Class, pod int) (uint32, drop.Reason) {
	mk := mappingKey(k)
	m := tb.findOut(mk)
	if m == 0 {
		if r := t.choosePort(tb, mk, class, pod); r != drop.None {
			return 0, r
		}
		if m = t.newParent(tb, node, mk, pod, 0); m == 0 {
			return 0, drop.NATTableFull
		}
		t.hold(class, mk.extPort)
	}
	k.extPort = tb.recs[m-1].extPort
	if t.alloc.excluded(class, k.extPort) {
		return 0, drop.NATNoPort // the host took it, and Expire has not ended the mapping's sessions yet
	}
	if t.cfg.Filtering != FilterAddress || class == ClassICMP {
		return m, drop.None
	}
	fk := filterKey(k)
	f := tb.findOut(fk)
	if f == 0 {
		if f = t.newParent(tb, node, fk, pod, m); f == 0 {
			t.dropParent(tb, m)
			return 0, drop.NATTableFull
		}
		tb.recs[m-1].mapping++
	}
	return f, drop.None
}

// newParent makes a mapping, or what admits an address.
func (t *Translator) newParent(tb *table, node packet.Addr, k *tuple, pod int, parent uint32) uint32 {
	n := tb.take()
	if n == 0 {
		return 0
	}
	tb.recs[n-1] = record{pod: uint16(pod), created: t.tick, out: parent, deltaAddr: deltaOf(k.inside, node)}
	tb.link(n, k, flagLive|flagMapping)
	return n
}

// dropParent ends a mapping, or what admits an address, that has no session.
func (t *Translator) dropParent(tb *table, n uint32) {
	for n != 0 && tb.recs[n-1].mapping == 0 {
		r := &tb.recs[n-1]
		parent, proto, port := r.out, r.proto, r.extPort
		tb.unlink(n)
		if parent == 0 {
			class, _ := ClassOf(proto)
			t.release(class, port, false)
			return
		}
		tb.recs[parent-1].mapping--
		n = parent
	}
}

// deltaOf is what replacing an address adds to a ones' complement sum (RFC 1624): the sum of the new words and the complements of the old.
func deltaOf(from, to packet.Addr) uint16 {
	return packet.Fold(words(^from.Hi) + words(^from.Lo) + words(to.Hi) + words(to.Lo))
}

func words(v uint64) uint64 { return v>>48 + v>>32&0xffff + v>>16&0xffff + v&0xffff }
