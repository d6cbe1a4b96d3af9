package snat

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/packet"
)

// Offload is what a frame's sender left to others, as far as translation must know.
type Offload struct {
	// Unfinished: the L4 checksum field holds only the sum of the pseudo-header, not complemented (virtio-net's NEEDS_CSUM). It is adjusted for
	// addresses and never for ports, which are not in it.
	Unfinished bool
	// Segments is how many packets a GSO frame stands for; 0 counts as 1. Each gets an IPv4 identification.
	Segments uint32
}

// TranslateOut does to an outbound packet what its view says, Translate or ToHost: source address, port or identifier, identification of
// IPv4 packets that may be fragmented (RFC 6864), checksums incrementally (RFC 1624); and notes what the packet means to its session. frame is the
// packet's first buffer, with all its headers. p follows what was done to the frame.
func (t *Translator) TranslateOut(p *packet.Packet, frame []byte, v *View, o Offload) {
	tb, node := t.tableOf(p.Kind)
	if v.inner.l3 != 0 {
		if v.Action == Translate {
			t.translateErrorOut(node, p, frame, v)
		}
		return
	}
	t.touch(tb, v.n, p, true)
	if v.Action == ToHost {
		return
	}
	r := &tb.recs[v.n-1]
	if p.Kind == packet.KindIPv4 {
		h := frame[p.L3:][:packet.IPv4HeaderLen]
		binary.BigEndian.PutUint32(h[12:16], uint32(node.Lo))
		d := uint32(r.deltaAddr)
		if p.Flags&packet.FlagDF == 0 {
			d += t.identify4(p, h, o.Segments)
		}
		adjust(h[10:12], d)
	} else {
		h := frame[p.L3:][:packet.IPv6HeaderLen]
		binary.BigEndian.PutUint64(h[8:16], node.Hi)
		binary.BigEndian.PutUint64(h[16:24], node.Lo)
		if p.Flags&packet.FlagFragment != 0 {
			binary.BigEndian.PutUint32(frame[p.FragmentHeader+4:], p.FragmentID)
		}
	}
	p.Src = node
	if p.Flags&packet.FlagL4 != 0 {
		rewriteL4(p, frame, 0, r.extPort, uint32(r.deltaAddr), o.Unfinished)
	}
	p.SrcPort = r.extPort
	if isICMP(p) {
		p.DstPort = r.extPort
	}
}

// TranslateIn is TranslateOut for an inbound packet with the action Translate: destination address, port or identifier.
func (t *Translator) TranslateIn(p *packet.Packet, frame []byte, v *View, o Offload) {
	tb, node := t.tableOf(p.Kind)
	if v.inner.l3 != 0 {
		t.translateErrorIn(node, p, frame, v)
		return
	}
	inside := v.Addr
	var back uint32
	if v.n != 0 {
		t.touch(tb, v.n, p, false)
		back = uint32(^tb.recs[v.n-1].deltaAddr)
	} else {
		back = uint32(deltaOf(node, inside))
	}
	if p.Kind == packet.KindIPv4 {
		h := frame[p.L3:][:packet.IPv4HeaderLen]
		binary.BigEndian.PutUint32(h[16:20], inside.V4())
		adjust(h[10:12], back)
	} else {
		h := frame[p.L3:][:packet.IPv6HeaderLen]
		binary.BigEndian.PutUint64(h[24:32], inside.Hi)
		binary.BigEndian.PutUint64(h[32:40], inside.Lo)
	}
	p.Dst = inside
	if p.Flags&packet.FlagL4 != 0 {
		rewriteL4(p, frame, 2, v.Port, back, o.Unfinished)
	}
	p.DstPort = v.Port
	if isICMP(p) {
		p.SrcPort = v.Port
	}
}

// rewriteL4 writes the port at offset at of the L4 header, or the identifier of an echo message, and adjusts the checksum, delta being what
// the change of address adds to it.
func rewriteL4(p *packet.Packet, frame []byte, at int, port uint16, delta uint32, unfinished bool) {
	l4 := frame[p.L4:]
	field := 16
	switch p.Proto {
	case packet.ProtoTCP:
	case packet.ProtoUDP:
		field = 6
		if l4[6]|l4[7] == 0 { // none
			binary.BigEndian.PutUint16(l4[at:], port)
			return
		}
	case packet.ProtoICMP:
		field, at, delta = 2, 4, 0
	case packet.ProtoICMPv6:
		field, at = 2, 4
	default: // SCTP: its CRC covers no addresses, and its ports stay
		return
	}
	was, sum := binary.BigEndian.Uint16(l4[at:]), binary.BigEndian.Uint16(l4[field:])
	binary.BigEndian.PutUint16(l4[at:], port)
	switch {
	case unfinished:
		sum = ^adjusted(^sum, delta)
	case was == port:
		sum = adjusted(sum, delta)
	default:
		sum = adjusted(sum, delta+uint32(^was)+uint32(port))
	}
	if sum == 0 && p.Proto == packet.ProtoUDP {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(l4[field:], sum)
}

// adjusted is a checksum after words changed that it covers, delta being the sum of the new ones and of the complements of the old (RFC 1624,
// equation 3).
func adjusted(sum uint16, delta uint32) uint16 {
	s := uint32(^sum) + delta
	s = s>>16 + s&0xffff
	return ^uint16(s>>16 + s)
}

// adjust is adjusted for a field.
func adjust(field []byte, delta uint32) {
	binary.BigEndian.PutUint16(field, adjusted(binary.BigEndian.Uint16(field), delta))
}

// identifiers gives out the identifications of packets that leave with the node's address. Each worker has a part of the number space of its own, so that
// no two packets under way share one until the part is used up (RFC 6864 section 4.2).
type identifiers struct {
	base4, span4, next4 uint32
	base6, span6, next6 uint64
}

func (x *identifiers) init(r interface{ Uint64() uint64 }, worker, workers int) {
	x.span4, x.span6 = 1<<16/uint32(workers), 1<<32/uint64(workers)
	x.base4, x.base6 = uint32(worker)*x.span4, uint64(worker)*x.span6
	x.next4, x.next6 = uint32(r.Uint64()%uint64(x.span4)), r.Uint64()%x.span6
}

// take4 reserves n consecutive identifications and returns the first.
func (x *identifiers) take4(n uint32) uint16 {
	n = max(1, n)
	if x.next4+n > x.span4 {
		x.next4 = 0
	}
	id := x.base4 + x.next4
	x.next4 += n
	return uint16(id)
}

func (x *identifiers) take6() uint32 {
	if x.next6++; x.next6 >= x.span6 {
		x.next6 = 0
	}
	return uint32(x.base6 + x.next6)
}

// identify4 writes the identification of an IPv4 packet that is or may become fragments, and returns what that adds to the header's sum. A
// fragment's is the one that Fragment noted in p.
func (t *Translator) identify4(p *packet.Packet, h []byte, segments uint32) uint32 {
	was := binary.BigEndian.Uint16(h[4:6])
	id := uint16(p.FragmentID)
	if p.Flags&packet.FlagFragment == 0 {
		id = t.ids.take4(segments)
	}
	if id == was {
		return 0
	}
	binary.BigEndian.PutUint16(h[4:6], id)
	return uint32(^was) + uint32(id)
}
