package packet

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/drop"
)

// multicast6 is the smallest first word of an IPv6 multicast address (ff00::/8).
const multicast6 = 0xff << 56

func parseIPv6(p *Packet, head []byte, total int) drop.Reason {
	l3 := int(p.L3)
	h := head[l3:]
	if len(h) < IPv6HeaderLen {
		return drop.IPTruncated
	}
	if h[0]>>4 != 6 {
		return drop.IPBadVersion
	}
	payload := int(binary.BigEndian.Uint16(h[4:6]))
	next := h[6]
	// Payload length 0 is a jumbogram (RFC 2675), which no port here can carry, unless nothing is meant to follow.
	if payload == 0 && next != ProtoNone || l3+IPv6HeaderLen+payload > total {
		return drop.IPBadLength
	}
	p.Length = uint32(IPv6HeaderLen + payload)
	p.TTL = h[7]
	p.Proto = next
	p.Src = Addr{binary.BigEndian.Uint64(h[8:16]), binary.BigEndian.Uint64(h[16:24])}
	p.Dst = Addr{binary.BigEndian.Uint64(h[24:32]), binary.BigEndian.Uint64(h[32:40])}
	p.L4 = uint16(l3 + IPv6HeaderLen)
	p.Flags |= FlagDF
	if p.Dst.Hi >= multicast6 {
		p.Flags |= FlagMulticast
	}
	end := l3 + IPv6HeaderLen + payload
	if r := parseExtensions(p, head, end); r != drop.None {
		return r
	}
	if r := checkIPv6Addresses(p); r != drop.None {
		return r
	}
	switch {
	case p.Flags&FlagFragment == 0:
		if r := parseL4(p, head, end); r != drop.None {
			return r
		}
	case p.Flags&FlagFirst != 0:
		if r := parseFirstFragment(p, head, end); r != drop.None {
			return r
		}
	}
	if p.Src == (Addr{}) && !mayBeUnspecified(p) {
		return drop.IPBadSource
	}
	return drop.None
}

// parseExtensions walks the extension headers (RFC 8200 section 4, AH: RFC 4302) up to the upper-layer header or, in a fragment that is not the
// first, its data. It sets L4, Proto and what there is to know of a fragment. end is where the packet ends in the frame.
func parseExtensions(p *Packet, head []byte, end int) drop.Reason {
	off := int(p.L4)
	next := p.Proto
	for n := 0; ; n++ {
		var size int
		switch next {
		case ProtoHopByHop, ProtoRouting, ProtoDestination, ProtoAH, ProtoFragment:
		default:
			p.Proto = next
			p.L4 = uint16(off)
			return drop.None
		}
		p.Flags |= FlagOptions
		if n == maxExtensionHeaders {
			return drop.IP6TooManyHeaders
		}
		if next == ProtoHopByHop && n > 0 {
			return drop.IP6BadExtension
		}
		if r := extensionFits(p, head, off+8, end); r != drop.None {
			return r
		}
		x := head[off:]
		switch next {
		case ProtoFragment:
			if p.FragmentHeader != 0 {
				return drop.IP6BadExtension
			}
			p.FragmentHeader = uint16(off)
			p.FragmentID = binary.BigEndian.Uint32(x[4:8])
			word := binary.BigEndian.Uint16(x[2:4])
			next = x[0]
			off += 8
			// Offset 0 and nothing more to come: an atomic fragment, a packet like any other (RFC 6946).
			if word&^6 != 0 {
				p.Proto = next
				p.L4 = uint16(off)
				if r := parseIPv6Fragment(p, word, end); r != drop.None || p.FragmentOffset != 0 {
					return r
				}
			}
			continue
		case ProtoRouting:
			if x[2] == 0 {
				return drop.IP6RoutingHeader // RFC 5095
			}
			size = (int(x[1]) + 1) * 8
		case ProtoAH:
			size = (int(x[1]) + 2) * 4
		default:
			size = (int(x[1]) + 1) * 8
		}
		if r := extensionFits(p, head, off+size, end); r != drop.None {
			return r
		}
		next = x[0]
		off += size
	}
}

// extensionFits says whether an extension header that ends at off lies within packet and buffer.
func extensionFits(p *Packet, head []byte, off, end int) drop.Reason {
	switch {
	case off <= end && off <= len(head):
		return drop.None
	case p.Flags&FlagFirst != 0:
		return drop.FragmentBad // RFC 7112: a first fragment carries the whole header chain
	case off > end:
		return drop.IP6BadExtension
	}
	return drop.IPTruncated
}

// parseIPv6Fragment takes in the offset and flag of the fragment header that ends at p.L4.
func parseIPv6Fragment(p *Packet, word uint16, end int) drop.Reason {
	offset := int(word &^ 7)
	data := end - int(p.L4)
	if r := setFragment(p, offset, data, word&1 != 0); r != drop.None {
		return r
	}
	// RFC 8200 section 4.5: the payload length of the reassembled packet must stay below 65,536. The fragment header is not part of it.
	unfragmentable := int(p.FragmentHeader) - int(p.L3) - IPv6HeaderLen
	if unfragmentable+offset+data > 65535 {
		return drop.FragmentBad
	}
	return drop.None
}

// checkIPv6Addresses refuses addresses that may never be on a wire (RFC 4291 section 2.5). IPv4-mapped ones are among them (they would be taken
// for the IPv4 address). The unspecified source is left for mayBeUnspecified.
func checkIPv6Addresses(p *Packet) drop.Reason {
	if p.Src.Hi >= multicast6 || p.Src == (Addr{Lo: 1}) || p.Src.Is4() {
		return drop.IPBadSource
	}
	if p.Dst.Hi == 0 && p.Dst.Lo <= 1 || p.Dst.Is4() {
		return drop.IPBadDestination
	}
	return drop.None
}

// mayBeUnspecified says whether the packet is one of those that a host without an address yet sends to a group: duplicate address detection
// and router solicitations (RFC 4861), multicast listener reports (RFC 3590). None of them is ever forwarded.
func mayBeUnspecified(p *Packet) bool {
	if p.Flags&(FlagL4|FlagMulticast|FlagFragment) != FlagL4|FlagMulticast || p.Proto != ProtoICMPv6 {
		return false
	}
	switch p.ICMPType {
	case icmp6NeighborSol, icmp6RouterSol, icmp6MLDReport, icmp6MLDDone, icmp6MLDv2Report:
		return true
	}
	return false
}
