package packet

import (
	"encoding/binary"
	"math/bits"
)

// VerifyL4 reports whether the L4 checksum of a whole packet is right. head is the frame's first buffer, as parsed; rest the buffers that
// continue it, nil for none. True also where there is nothing to verify: other protocols than TCP, UDP, ICMP and ICMPv6, UDP over
// IPv4 without a checksum, fragments, IPv6 packets with a routing header that has not reached its end. The packet was parsed without a Reason.
//
// It reads the whole payload and is for the slow paths: coalescing candidates, answers to neighbours, tests.
func VerifyL4(p *Packet, head []byte, rest [][]byte) bool {
	if p.Flags&FlagL4 == 0 || p.Flags&FlagFragment != 0 || p.onRoute(head) {
		return true
	}
	length := p.Length - uint32(p.L4-p.L3)
	var sum uint64
	switch p.Proto {
	case ProtoUDP:
		udp := head[p.L4:p.Payload]
		if binary.BigEndian.Uint16(udp[6:8]) == 0 {
			return p.Kind == KindIPv4 // RFC 8200 section 8.1: IPv6 does not do without
		}
		length = uint32(binary.BigEndian.Uint16(udp[4:6]))
		sum = PseudoHeader(p.Src, p.Dst, p.Proto, length)
	case ProtoTCP, ProtoICMPv6:
		sum = PseudoHeader(p.Src, p.Dst, p.Proto, length)
	case ProtoICMP:
	default:
		return true
	}

	left := int(length)
	b := head[p.L4:]
	odd := false // whether the next buffer starts in the middle of a 16-bit word
	for i := -1; ; i++ {
		if i >= 0 {
			if i == len(rest) {
				return false // the buffers hold less than the packet claims
			}
			b = rest[i]
		}
		b = b[:min(left, len(b))]
		s := Sum(b, 0)
		if odd {
			s = uint64(bits.ReverseBytes16(Fold(s))) // RFC 1071 section 2 (B): the sum of swapped bytes is the swapped sum
		}
		sum += s
		odd = odd != (len(b)&1 != 0)
		left -= len(b)
		if left == 0 {
			return Fold(sum) == 0xffff
		}
	}
}

// onRoute says whether an IPv6 packet carries a routing header with segments left: its checksum is made with the last address of the
// route, which only the routing type's own specification tells where to find.
func (p *Packet) onRoute(head []byte) bool {
	if p.Kind != KindIPv6 || p.Flags&FlagOptions == 0 {
		return false
	}
	next, off := head[p.L3+6], int(p.L3)+IPv6HeaderLen
	for off < int(p.L4) {
		x := head[off:]
		size := (int(x[1]) + 1) * 8
		switch next {
		case ProtoRouting:
			if x[3] != 0 {
				return true
			}
		case ProtoAH:
			size = (int(x[1]) + 2) * 4
		case ProtoFragment:
			size = 8
		}
		next = x[0]
		off += size
	}
	return false
}
