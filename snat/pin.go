package snat

import (
	"math/bits"
	"sync/atomic"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// A pin is a flow that the node's kernel translated before it came through the host port. Its replies look like any other packet of a pod, and may
// come to any worker; only one of them has the pin. So that the others need not hand over every packet to be sure, all share a filter: counts of pins by a hash of their
// tuple, and by one of their addresses for fragments, which have no ports. Zero is certain; anything else makes the owner look.

const pinSlots = 1 << 15

// pinFilter counts the pins of all workers by hash. Any goroutine may use it.
type pinFilter struct {
	seed  [2]uint64
	all   atomic.Uint32
	slots [pinSlots]atomic.Uint32
}

func (f *pinFilter) slot(k *tuple, ports bool) *atomic.Uint32 {
	h := mum(k.inside.Hi^bits.RotateLeft64(k.remote.Hi, 32)^f.seed[0], k.inside.Lo^bits.RotateLeft64(k.remote.Lo, 32)^f.seed[1]^uint64(k.proto)<<56)
	if ports {
		h = mum(h^f.seed[1], uint64(k.inPort)<<16^uint64(k.remPort)^f.seed[0])
	}
	return &f.slots[h%pinSlots]
}

// add counts a pin; delta is 1, or ^0 to take it back.
func (f *pinFilter) add(k *tuple, delta uint32) {
	f.slot(k, true).Add(delta)
	f.slot(k, false).Add(delta)
	f.all.Add(delta)
}

// MayBePinned reports whether a packet towards a pod, an outside address or the node may be the reply to a flow that came through the host port: then its owner (OwnerOut) is
// to be asked (Pinned). For a fragment whose ports are not known it reports whether some flow between its addresses may be. Mostly it is one load and false.
func (t *Translator) MayBePinned(p *packet.Packet, frame []byte) bool {
	f := &t.alloc.pins
	if f.all.Load() == 0 {
		return false
	}
	if p.Flags&(packet.FlagFragment|packet.FlagCompleted) == packet.FlagFragment {
		return f.slot(&tuple{inside: p.Src, remote: p.Dst, proto: p.Proto}, false).Load() != 0
	}
	k, ok := pinKey(p, p.Src, p.Dst, p.SrcPort, p.DstPort)
	if !ok {
		if !isICMP(p) || messageOf(p) != messageError {
			return false
		}
		// An error is about a packet on the flow's way forth.
		proto, src, dst, srcPort, dstPort, quoted := quotedPorts(p, frame)
		if !quoted {
			return false
		}
		k = tuple{inside: dst, remote: src, proto: proto, inPort: dstPort, remPort: srcPort}
		if proto == packet.ProtoICMP || proto == packet.ProtoICMPv6 {
			k.remPort = 0
		}
	}
	return f.slot(&k, true).Load() != 0
}

// OwnerPin is the worker that owns the pin of a packet that came through the host port: the one that OwnerOut says of its replies.
func (t *Translator) OwnerPin(p *packet.Packet) int {
	if t.alloc.cfg.Workers == 1 {
		return 0
	}
	h := OwnerHash(p.Dst, p.DstPort, p.Proto)
	if _, ported := ClassOf(p.Proto); !ported {
		h = OwnerHash(p.Src, 0, p.Proto)
	}
	return int(h % uint32(t.alloc.cfg.Workers))
}

// Pin notes that a packet from the host port, whose source is not the node's own, wants its replies back at the host port, and keeps alive
// the pin there is. pod is the index of the pod that the flow is accounted to, or NoPod. A pin needs no port. The reason, if any, is
// that of the pod's or the table's limit. Protocols without ports get no pin and no reason.
func (t *Translator) Pin(p *packet.Packet, pod int) drop.Reason {
	tb, _ := t.tableOf(p.Kind)
	k, ok := pinKey(p, p.Dst, p.Src, p.DstPort, p.SrcPort)
	if !ok {
		return drop.None
	}
	if pod < 0 || pod >= len(t.pods)-1 || !t.pods[pod].attached {
		pod = len(t.pods) - 1
	}
	n := tb.findOut(&k)
	if n != 0 && tb.recs[n-1].flags&flagPin == 0 {
		return drop.None // the pod opened this flow itself; its replies never pass the host port
	}
	if n != 0 && t.over(&tb.recs[n-1]) {
		t.end(tb, n, false)
		n = 0
	}
	if n == 0 {
		if !tb.share.allows(tb.pods[pod].sessions) {
			if tb.share.used >= tb.share.capacity {
				return drop.NATTableFull
			}
			return drop.NATSessionLimit
		}
		if n = tb.take(); n == 0 {
			return drop.NATTableFull
		}
		class := t.firstTimer(k.proto)
		tb.recs[n-1] = record{pod: uint16(pod), created: t.tick, class: class, expires: tickAfter(t.now + t.timeouts[class])}
		tb.link(n, &k, flagLive|flagPin)
		tb.counts.Created++
	}
	t.touch(tb, n, p, false)
	return drop.None
}

// Pinned says whether a packet towards a pod or an outside address is the reply to a flow that came through the host port: then v.Action is ToHost,
// else NotOurs. For packets that Outbound is not asked about. Nothing but *v is written.
func (t *Translator) Pinned(p *packet.Packet, frame []byte, v *View) {
	*v = View{pod: NoPod, Action: NotOurs}
	tb, _ := t.tableOf(p.Kind)
	if tb.pins == 0 {
		return
	}
	k, ok := pinKey(p, p.Src, p.Dst, p.SrcPort, p.DstPort)
	if !ok {
		if isICMP(p) && messageOf(p) == messageError {
			if t.errorOutbound(tb, p, frame, v); v.Action != ToHost {
				*v = View{pod: NoPod, Action: NotOurs}
			}
		}
		return
	}
	if n := tb.findOut(&k); n != 0 && tb.recs[n-1].flags&flagPin != 0 && !t.over(&tb.recs[n-1]) {
		v.Action, v.n = ToHost, n
	}
}

// pinKey is the key of a pin whose replies go from src to dst; false for what gets no pin.
func pinKey(p *packet.Packet, src, dst packet.Addr, srcPort, dstPort uint16) (k tuple, ok bool) {
	k = tuple{inside: src, remote: dst, proto: p.Proto, inPort: srcPort, remPort: dstPort}
	switch p.Proto {
	case packet.ProtoTCP, packet.ProtoUDP, packet.ProtoSCTP:
		return k, true
	case packet.ProtoICMP, packet.ProtoICMPv6:
		k.remPort = 0
		m := messageOf(p)
		return k, isICMP(p) && (m == messageQuery || m == messageReply)
	}
	return k, false
}
