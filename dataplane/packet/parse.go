package packet

import (
	"encoding/binary"
	"math/bits"

	"github.com/overplane/overplane/dataplane/drop"
)

// Offsets in frames of the common kinds: no VLAN tag, no options, no extension headers.
const (
	fastL3  = EthernetHeaderLen
	fastL44 = fastL3 + IPv4HeaderLen
	fastL46 = fastL3 + IPv6HeaderLen
)

// Parse fills in p for one frame, overwriting all of it. head is the frame's first buffer, which must hold all headers (a packet whose
// headers are not in it is called truncated); total is the whole packet's length in bytes, Ethernet header included: len(head) for a
// packet of one buffer, the sum of all buffers for a chain.
//
// What is wrong with the frame, if anything, is p.Reason; L4 checksums are not looked at (VerifyL4 does). No allocation; head is only
// read and not kept.
//
// TCP and UDP without anything unusual are parsed right here, all else by parseAny: the two agree, and where this function is not sure it
// leaves the frame to the other.
func Parse(p *Packet, head []byte, total int) {
	if len(head) < fastL44+UDPHeaderLen {
		parseAny(p, head, total)
		return
	}
	if binary.BigEndian.Uint16(head[12:14]) != EtherTypeIPv4 || head[fastL3] != 4<<4|IPv4HeaderLen/4 {
		parseFast6(p, head, total)
		return
	}
	// The header checksum over the 20 bytes as they lie in memory: byte order does not matter to whether it is right (RFC 1071 section 2).
	sum, c := bits.Add64(binary.LittleEndian.Uint64(head[14:22]), binary.LittleEndian.Uint64(head[22:30]), 0)
	sum, c = bits.Add64(sum, uint64(binary.LittleEndian.Uint32(head[30:34])), c)
	sum += c
	length := int(binary.BigEndian.Uint16(head[16:18]))
	frag := binary.BigEndian.Uint16(head[20:22])
	src, dst := binary.BigEndian.Uint32(head[26:30]), binary.BigEndian.Uint32(head[30:34])
	end := fastL3 + length
	if end > total || frag&(ipv4MF|ipv4OffsetMask) != 0 || Fold(sum) != 0xffff || unusual4(src) || unusual4(dst) {
		parseAny(p, head, total)
		return
	}
	var payload int
	proto := head[23]
	switch {
	case proto == ProtoTCP && len(head) >= fastL44+TCPHeaderLen:
		headerLen := int(head[fastL44+12]>>4) * 4
		payload = fastL44 + headerLen
		if headerLen < TCPHeaderLen || payload > end || payload > len(head) {
			parseAny(p, head, total)
			return
		}
		p.TCPFlags = head[fastL44+13]
	case proto == ProtoUDP:
		udpLen := int(binary.BigEndian.Uint16(head[fastL44+4 : fastL44+6]))
		payload = fastL44 + UDPHeaderLen
		if udpLen < UDPHeaderLen || fastL44+udpLen > end {
			parseAny(p, head, total)
			return
		}
		p.TCPFlags = 0
	default:
		parseAny(p, head, total)
		return
	}
	p.Src = Addr{Lo: v4Prefix | uint64(src)}
	p.Dst = Addr{Lo: v4Prefix | uint64(dst)}
	p.EthDst = MAC(head[0:6])
	p.EthSrc = MAC(head[6:12])
	p.Reason = drop.None
	p.Kind = KindIPv4
	p.Proto = proto
	p.TTL = head[22]
	p.L3 = fastL3
	p.L4 = fastL44
	p.Payload = uint16(payload)
	p.Flags = FlagL4 | Flags(frag&ipv4DF)>>(14-3) // ipv4DF is bit 14, FlagDF bit 3
	p.Length = uint32(length)
	p.SrcPort = binary.BigEndian.Uint16(head[fastL44 : fastL44+2])
	p.DstPort = binary.BigEndian.Uint16(head[fastL44+2 : fastL44+4])
	p.ICMPType, p.ICMPCode = 0, 0
	p.FragmentOffset, p.FragmentHeader, p.FragmentID = 0, 0, 0
}

// unusual4 is true for the addresses that checkIPv4Addresses says something about, and some more.
func unusual4(a uint32) bool { top := a >> 24; return top-1 >= 223 || top == 127 }

// parseFast6 is Parse's part for IPv6. len(head) is at least 42.
func parseFast6(p *Packet, head []byte, total int) {
	if len(head) < fastL46+UDPHeaderLen || binary.BigEndian.Uint16(head[12:14]) != EtherTypeIPv6 || head[fastL3]>>4 != 6 {
		parseAny(p, head, total)
		return
	}
	payloadLen := int(binary.BigEndian.Uint16(head[18:20]))
	src := Addr{binary.BigEndian.Uint64(head[22:30]), binary.BigEndian.Uint64(head[30:38])}
	dst := Addr{binary.BigEndian.Uint64(head[38:46]), binary.BigEndian.Uint64(head[46:54])}
	end := fastL46 + payloadLen
	if end > total || unusual6(src.Hi) || unusual6(dst.Hi) {
		parseAny(p, head, total)
		return
	}
	var payload int
	proto := head[20]
	switch {
	case proto == ProtoTCP && len(head) >= fastL46+TCPHeaderLen:
		headerLen := int(head[fastL46+12]>>4) * 4
		payload = fastL46 + headerLen
		if headerLen < TCPHeaderLen || payload > end || payload > len(head) {
			parseAny(p, head, total)
			return
		}
		p.TCPFlags = head[fastL46+13]
	case proto == ProtoUDP:
		udpLen := int(binary.BigEndian.Uint16(head[fastL46+4 : fastL46+6]))
		payload = fastL46 + UDPHeaderLen
		if udpLen < UDPHeaderLen || fastL46+udpLen > end {
			parseAny(p, head, total)
			return
		}
		p.TCPFlags = 0
	default:
		parseAny(p, head, total)
		return
	}
	p.Src = src
	p.Dst = dst
	p.EthDst = MAC(head[0:6])
	p.EthSrc = MAC(head[6:12])
	p.Reason = drop.None
	p.Kind = KindIPv6
	p.Proto = proto
	p.TTL = head[21]
	p.L3 = fastL3
	p.L4 = fastL46
	p.Payload = uint16(payload)
	p.Flags = FlagL4 | FlagDF
	p.Length = uint32(IPv6HeaderLen + payloadLen)
	p.SrcPort = binary.BigEndian.Uint16(head[fastL46 : fastL46+2])
	p.DstPort = binary.BigEndian.Uint16(head[fastL46+2 : fastL46+4])
	p.ICMPType, p.ICMPCode = 0, 0
	p.FragmentOffset, p.FragmentHeader, p.FragmentID = 0, 0, 0
}

// unusual6 is true for the first words of the addresses that parseIPv6 says something about, and some more.
func unusual6(hi uint64) bool { return hi-1 >= multicast6-1 }
