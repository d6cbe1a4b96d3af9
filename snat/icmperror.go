package snat

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// inner is where the packet lies that an ICMP error quotes. Offsets count from the frame's first byte; l3 is 0 if there is no error.
type inner struct {
	l3, l4, end uint16 // end of what is quoted
	proto       uint8
}

// quotation is the packet that an ICMP error quotes.
type quotation struct {
	inner
	srcPort, dstPort uint16 // ICMP echo: the identifier, and 0
	src, dst         packet.Addr
}

// quoted parses what an ICMP error quotes. ok is false with a reason if the error is no good, and without if it cannot belong to a session: it quotes a
// fragment without ports, or a message that is no echo.
func quoted(p *packet.Packet, frame []byte, q *quotation) (reason drop.Reason, ok bool) {
	end := int(p.L3) + int(p.Length)
	if p.Flags&packet.FlagFragment != 0 {
		return drop.None, false
	}
	if end > len(frame) {
		return drop.NATErrorBad, false // no error is longer than a buffer, and the rest could not be checked
	}
	m := frame[p.L4:end]
	if p.Kind == packet.KindIPv4 {
		if packet.Checksum(m, 0) != 0 {
			return drop.NATErrorBad, false
		}
	} else if packet.Checksum(m, packet.PseudoHeader(p.Src, p.Dst, packet.ProtoICMPv6, uint32(len(m)))) != 0 {
		return drop.NATErrorBad, false
	}
	l3 := int(p.L4) + packet.ICMPHeaderLen
	var l4 int
	if p.Kind == packet.KindIPv4 {
		l4, reason, ok = quoted4(frame[:end], l3, q)
	} else {
		l4, reason, ok = quoted6(frame[:end], l3, q)
	}
	if !ok {
		return reason, false
	}
	q.l3, q.l4, q.end = uint16(l3), uint16(l4), uint16(end)
	b := frame[l4:end]
	switch q.proto {
	case packet.ProtoTCP, packet.ProtoUDP, packet.ProtoSCTP, packet.ProtoICMP, packet.ProtoICMPv6:
		if len(b) < 8 {
			return drop.NATErrorTruncated, false
		}
	default:
		return drop.None, true
	}
	if q.proto == packet.ProtoICMP || q.proto == packet.ProtoICMPv6 {
		switch b[0] {
		case icmpEcho, icmpEchoReply, icmp6Echo, icmp6EchoReply:
			q.srcPort = binary.BigEndian.Uint16(b[4:6])
			return drop.None, (b[0] < 128) == (q.proto == packet.ProtoICMP)
		}
		return drop.None, false
	}
	q.srcPort, q.dstPort = binary.BigEndian.Uint16(b[0:2]), binary.BigEndian.Uint16(b[2:4])
	return drop.None, true
}

func quoted4(b []byte, l3 int, q *quotation) (l4 int, reason drop.Reason, ok bool) {
	h := b[l3:]
	if len(h) < packet.IPv4HeaderLen {
		return 0, drop.NATErrorTruncated, false
	}
	size := int(h[0]&15) * 4
	if h[0]>>4 != 4 || size < packet.IPv4HeaderLen {
		return 0, drop.NATErrorBad, false
	}
	if len(h) < size {
		return 0, drop.NATErrorTruncated, false
	}
	if packet.Checksum(h[:size], 0) != 0 {
		return 0, drop.NATErrorBad, false
	}
	q.src, q.dst = packet.AddrFrom4(binary.BigEndian.Uint32(h[12:16])), packet.AddrFrom4(binary.BigEndian.Uint32(h[16:20]))
	q.proto = h[9]
	return l3 + size, drop.None, binary.BigEndian.Uint16(h[6:8])&0x1fff == 0
}

func quoted6(b []byte, l3 int, q *quotation) (l4 int, reason drop.Reason, ok bool) {
	h := b[l3:]
	if len(h) < packet.IPv6HeaderLen {
		return 0, drop.NATErrorTruncated, false
	}
	if h[0]>>4 != 6 {
		return 0, drop.NATErrorBad, false
	}
	q.src = packet.Addr{Hi: binary.BigEndian.Uint64(h[8:16]), Lo: binary.BigEndian.Uint64(h[16:24])}
	q.dst = packet.Addr{Hi: binary.BigEndian.Uint64(h[24:32]), Lo: binary.BigEndian.Uint64(h[32:40])}
	if q.src.Is4() || q.dst.Is4() {
		return 0, drop.NATErrorBad, false
	}
	next, off := h[6], l3+packet.IPv6HeaderLen
	for range 8 {
		size := 0
		switch next {
		case packet.ProtoHopByHop, packet.ProtoRouting, packet.ProtoDestination, packet.ProtoAH, packet.ProtoFragment:
			if len(b) < off+8 {
				return 0, drop.NATErrorTruncated, false
			}
			x := b[off:]
			switch next {
			case packet.ProtoFragment:
				if binary.BigEndian.Uint16(x[2:4])&^7 != 0 {
					return 0, drop.None, false
				}
				size = 8
			case packet.ProtoAH:
				size = (int(x[1]) + 2) * 4
			default:
				size = (int(x[1]) + 1) * 8
			}
			next = x[0]
		default:
			q.proto = next
			return off, drop.None, true
		}
		if off += size; off > len(b) {
			return 0, drop.NATErrorTruncated, false
		}
	}
	return 0, drop.NATErrorBad, false
}

// errorInbound is Inbound for ICMP errors. What matches no session is the host's: it may be about a packet of its own.
func (t *Translator) errorInbound(tb *table, node packet.Addr, p *packet.Packet, frame []byte, v *View) {
	var q quotation
	reason, ok := quoted(p, frame, &q)
	v.inner = q.inner
	if !ok || q.src != node {
		*v = View{pod: NoPod, Action: NotOurs}
		if reason != drop.None {
			v.Action, v.Reason = Refuse, reason
		}
		return
	}
	k := tuple{remote: q.dst, proto: q.proto, extPort: q.srcPort, remPort: q.dstPort}
	n := tb.findIn(&k)
	if n != 0 && (tb.recs[n-1].flags&flagMapping != 0 || t.over(&tb.recs[n-1])) {
		n = 0
	}
	if n == 0 {
		*v = View{pod: NoPod, Action: NotOurs}
		return
	}
	v.Action, v.n, v.Addr, v.Port, v.Pod = Translate, n, tb.insideOf(n), tb.recs[n-1].inPort, int32(tb.recs[n-1].pod)
}

// errorOutbound is Outbound for ICMP errors: one that a pod sends about a packet that came to it.
func (t *Translator) errorOutbound(tb *table, p *packet.Packet, frame []byte, v *View) {
	_, node := t.tableOf(p.Kind)
	var q quotation
	reason, ok := quoted(p, frame, &q)
	v.inner = q.inner
	if !ok {
		*v = View{pod: v.pod, Reason: reason}
		if reason == drop.None {
			v.Reason = drop.NATNoSession
		}
		return
	}
	if q.dst != p.Src || q.src != p.Dst {
		*v = View{pod: v.pod, Reason: drop.NATErrorMismatch}
		return
	}
	k := tuple{inside: q.dst, remote: q.src, proto: q.proto, inPort: q.dstPort, remPort: q.srcPort}
	if q.proto == packet.ProtoICMP || q.proto == packet.ProtoICMPv6 {
		k.inPort, k.remPort = q.srcPort, 0
	}
	n := tb.findOut(&k)
	if n != 0 && t.over(&tb.recs[n-1]) {
		n = 0
	}
	if n == 0 && t.cfg.Mapping == EndpointIndependent {
		n = tb.findOut(mappingKey(&k)) // about a packet that the mapping let in
	}
	if n == 0 {
		*v = View{pod: v.pod, Reason: drop.NATNoSession}
		return
	}
	if tb.recs[n-1].flags&flagPin != 0 {
		v.Action = ToHost
		return
	}
	v.Action, v.Addr, v.Port, v.Hairpin = Translate, node, tb.recs[n-1].extPort, p.Dst == node
}

// translateErrorIn gives an inbound error to the pod: inside, the packet that the pod sent; outside, the pod's address. Type, code and
// what follows the quotation stay (RFC 5508 section 4.2, RFC 4884).
func (t *Translator) translateErrorIn(node packet.Addr, p *packet.Packet, frame []byte, v *View) {
	restore(frame, &v.inner, p.Kind, v.Addr, v.Port, deltaOf(node, v.Addr), true)
	putAddress(frame, p, v.Addr, false)
	p.Dst = v.Addr
	finishError(frame, p)
	t.counts.ErrorsIn++
}

// translateErrorOut sends a pod's error to where the packet it quotes came from.
func (t *Translator) translateErrorOut(node packet.Addr, p *packet.Packet, frame []byte, v *View) {
	restore(frame, &v.inner, p.Kind, node, v.Port, deltaOf(p.Src, node), false)
	putAddress(frame, p, node, true)
	p.Src = node
	finishError(frame, p)
	t.counts.ErrorsOut++
}

// restore rewrites the quoted packet: its source (of an inbound error) or its destination. Its checksums are adjusted, where they are quoted at all, so that
// they stay as right or wrong as they were.
func restore(frame []byte, q *inner, kind packet.Kind, to packet.Addr, port uint16, delta uint16, source bool) {
	h := frame[q.l3:q.end]
	at4, at6, portAt := 16, 24, 2
	if source {
		at4, at6, portAt = 12, 8, 0
	}
	if kind == packet.KindIPv4 {
		binary.BigEndian.PutUint32(h[at4:], to.V4())
		adjust(h[10:12], uint32(delta))
	} else {
		binary.BigEndian.PutUint64(h[at6:], to.Hi)
		binary.BigEndian.PutUint64(h[at6+8:], to.Lo)
	}
	l4 := frame[q.l4:q.end]
	field, d := 0, uint32(delta)
	switch q.proto {
	case packet.ProtoTCP:
		field = 16
	case packet.ProtoUDP:
		field = 6
	case packet.ProtoICMP:
		field, portAt, d = 2, 4, 0
	case packet.ProtoICMPv6:
		field, portAt = 2, 4
	default:
		return
	}
	was := binary.BigEndian.Uint16(l4[portAt:])
	binary.BigEndian.PutUint16(l4[portAt:], port)
	if was != port {
		d += uint32(^was) + uint32(port)
	}
	if len(l4) < field+2 || q.proto == packet.ProtoUDP && l4[6]|l4[7] == 0 {
		return
	}
	adjust(l4[field:field+2], d)
}

// putAddress writes an error's own source or destination.
func putAddress(frame []byte, p *packet.Packet, a packet.Addr, source bool) {
	if p.Kind == packet.KindIPv6 {
		at := int(p.L3) + 24
		if source {
			at = int(p.L3) + 8
		}
		binary.BigEndian.PutUint64(frame[at:], a.Hi)
		binary.BigEndian.PutUint64(frame[at+8:], a.Lo)
		return
	}
	h := frame[p.L3:][:packet.IPv4HeaderLen]
	was, at := p.Dst, 16
	if source {
		was, at = p.Src, 12
	}
	binary.BigEndian.PutUint32(h[at:], a.V4())
	adjust(h[10:12], uint32(deltaOf(was, a)))
}

// finishError computes the error's checksum anew: it was right before.
func finishError(frame []byte, p *packet.Packet) {
	m := frame[p.L4 : int(p.L3)+int(p.Length)]
	m[2], m[3] = 0, 0
	var sum uint64
	if p.Kind == packet.KindIPv6 {
		sum = packet.PseudoHeader(p.Src, p.Dst, packet.ProtoICMPv6, uint32(len(m)))
	}
	binary.BigEndian.PutUint16(m[2:4], packet.Checksum(m, sum))
}
