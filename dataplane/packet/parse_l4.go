package packet

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/drop"
)

// parseL4 parses the L4 header at p.L4 of a packet that ends at end. Protocols it does not know pass without FlagL4.
func parseL4(p *Packet, head []byte, end int) drop.Reason {
	off := int(p.L4)
	b := head[off:min(end, len(head))]
	switch p.Proto {
	case ProtoTCP:
		if len(b) < TCPHeaderLen {
			return drop.L4Truncated
		}
		headerLen := int(b[12]>>4) * 4
		if headerLen < TCPHeaderLen || off+headerLen > end {
			return drop.L4BadHeaderLength
		}
		if headerLen > len(b) {
			return drop.L4Truncated
		}
		p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b[0:2]), binary.BigEndian.Uint16(b[2:4])
		p.TCPFlags = b[13]
		p.Payload = uint16(off + headerLen)
	case ProtoUDP:
		if len(b) < UDPHeaderLen {
			return drop.L4Truncated
		}
		// A shorter UDP length is legal: what follows is not UDP's (RFC 9868). In a fragment it speaks of the whole datagram.
		length := int(binary.BigEndian.Uint16(b[4:6]))
		if length < UDPHeaderLen || off+length > end && p.Flags&FlagFragment == 0 {
			return drop.L4BadHeaderLength
		}
		p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b[0:2]), binary.BigEndian.Uint16(b[2:4])
		p.Payload = uint16(off + UDPHeaderLen)
	case ProtoICMP:
		if p.Kind != KindIPv4 {
			return drop.None
		}
		if len(b) < ICMPHeaderLen {
			return drop.L4Truncated
		}
		p.ICMPType, p.ICMPCode = b[0], b[1]
		if b[0] == icmpEchoRequest || b[0] == icmpEchoReply {
			p.SrcPort = binary.BigEndian.Uint16(b[4:6])
			p.DstPort = p.SrcPort
		}
		p.Payload = uint16(off + ICMPHeaderLen)
	case ProtoICMPv6:
		if p.Kind != KindIPv6 {
			return drop.None
		}
		if len(b) < ICMPHeaderLen {
			return drop.L4Truncated
		}
		p.ICMPType, p.ICMPCode = b[0], b[1]
		switch {
		case b[0] == icmp6EchoRequest || b[0] == icmp6EchoReply:
			p.SrcPort = binary.BigEndian.Uint16(b[4:6])
			p.DstPort = p.SrcPort
		case b[0] >= icmp6RouterSol && b[0] <= icmp6Redirect:
			p.Flags |= FlagND
		}
		p.Payload = uint16(off + ICMPHeaderLen)
	case ProtoSCTP:
		if len(b) < SCTPHeaderLen {
			return drop.L4Truncated
		}
		p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b[0:2]), binary.BigEndian.Uint16(b[2:4])
		p.Payload = uint16(off + SCTPHeaderLen)
	default:
		return drop.None
	}
	p.Flags |= FlagL4
	return drop.None
}
