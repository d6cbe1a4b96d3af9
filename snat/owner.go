package snat

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/packet"
)

// OwnerHash says which worker a session belongs to: hash modulo workers. It is a function of the session's inside end, and simple enough for a steering program
// in BPF: all in 32-bit words, an IPv6 address as the exclusive or of its four.
func OwnerHash(addr packet.Addr, port uint16, proto uint8) uint32 {
	w := addr.Lo
	if !addr.Is4() {
		w ^= w>>32 ^ addr.Hi ^ addr.Hi>>32
	}
	h := uint32(w) ^ (uint32(port)<<16 | uint32(proto))
	h *= 0x9e3779b1
	h ^= h >> 15
	h *= 0x85ebca77
	return h ^ h>>13
}

// OwnerOut is the worker that owns the session of an outbound packet. Sessions without translated ports (SCTP, ESP, GRE) belong to the worker of their remote
// address: both directions show it, and one worker must see all that compete for one peer. An ICMP error belongs to the session that it
// quotes. frame is the packet's first buffer; a fragment's ports are complete.
func OwnerOut(p *packet.Packet, frame []byte, workers int) int {
	switch p.Proto {
	case packet.ProtoTCP, packet.ProtoUDP:
		return int(OwnerHash(p.Src, p.SrcPort, p.Proto) % uint32(workers))
	case packet.ProtoICMP, packet.ProtoICMPv6:
		if isICMP(p) && messageOf(p) == messageError {
			if proto, _, dst, _, port, ok := quotedPorts(p, frame); ok {
				if _, ported := ClassOf(proto); ported {
					return int(OwnerHash(dst, port, proto) % uint32(workers))
				}
				return int(OwnerHash(p.Dst, 0, proto) % uint32(workers))
			}
		}
		return int(OwnerHash(p.Src, p.SrcPort, p.Proto) % uint32(workers))
	}
	return int(OwnerHash(p.Dst, 0, p.Proto) % uint32(workers))
}

// OwnerIn is the worker that owns the session of a packet to the node's external address; -1 if nobody does, and any worker may refuse the packet.
func (a *Allocator) OwnerIn(p *packet.Packet, frame []byte) int {
	proto, port, remote := p.Proto, p.DstPort, p.Src
	if isICMP(p) && messageOf(p) == messageError {
		var ok bool
		if proto, _, remote, port, _, ok = quotedPorts(p, frame); !ok {
			return -1
		}
	}
	if class, ok := ClassOf(proto); ok {
		if worker, _, ok := a.Owner(class, port); ok {
			return worker
		}
		return -1
	}
	return int(OwnerHash(remote, 0, proto) % uint32(a.cfg.Workers))
}

// Worker is the index of the worker that owns the translator.
func (t *Translator) Worker() int { return t.cfg.Worker }

// OwnerOut is the function of that name; OwnerIn is that of the allocator, with this worker in the place of nobody. OwnerOfFragment is the worker that tracks the
// datagram of a fragment, as it was received.
func (t *Translator) OwnerOut(p *packet.Packet, frame []byte) int {
	if t.alloc.cfg.Workers == 1 {
		return 0
	}
	return OwnerOut(p, frame, t.alloc.cfg.Workers)
}

// OwnerIn: see OwnerOut.
func (t *Translator) OwnerIn(p *packet.Packet, frame []byte) int {
	if t.alloc.cfg.Workers == 1 {
		return 0
	}
	if w := t.alloc.OwnerIn(p, frame); w >= 0 {
		return w
	}
	return t.cfg.Worker
}

// OwnerOfFragment: see OwnerOut.
func (t *Translator) OwnerOfFragment(p *packet.Packet) int {
	if t.alloc.cfg.Workers == 1 {
		return 0
	}
	return int(FragmentHash(p) % uint32(t.alloc.cfg.Workers))
}

// quotedPorts reads the tuple of the packet that an error quotes, without judging it: that is the owner's business. An echo message's identifier stands for both ports.
func quotedPorts(p *packet.Packet, frame []byte) (proto uint8, src, dst packet.Addr, srcPort, dstPort uint16, ok bool) {
	var q quotation
	l3, end := int(p.L4)+packet.ICMPHeaderLen, min(len(frame), int(p.L3)+int(p.Length))
	if p.Flags&packet.FlagFragment != 0 || l3 > end {
		return
	}
	var l4 int
	if p.Kind == packet.KindIPv4 {
		l4, _, ok = quoted4(frame[:end], l3, &q)
	} else {
		l4, _, ok = quoted6(frame[:end], l3, &q)
	}
	if !ok {
		return
	}
	if b := frame[l4:end]; len(b) >= 8 {
		switch q.proto {
		case packet.ProtoICMP, packet.ProtoICMPv6:
			srcPort = binary.BigEndian.Uint16(b[4:6])
			dstPort = srcPort
		case packet.ProtoTCP, packet.ProtoUDP, packet.ProtoSCTP:
			srcPort, dstPort = binary.BigEndian.Uint16(b[0:2]), binary.BigEndian.Uint16(b[2:4])
		}
	}
	return q.proto, q.src, q.dst, srcPort, dstPort, true
}
