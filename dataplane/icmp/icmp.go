// Package icmp makes the errors a router must send, and limits their rate.
//
// The forwarding loop decides that a packet cannot go on and names the [Error]. [Limiter.Allow] says whether the budget has room for an answer;
// [Build] writes it into a frame of its own, quoting the packet as RFC 1812 and RFC 4443 ask, or refuses where an error must not
// be sent. The caller fills in the Ethernet addresses and sends the frame by its second exit, so that errors never hold up traffic.
package icmp

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// Error is one kind of error, the same for both families. The zero value is none and builds nothing.
type Error uint8

// The errors. In parentheses: type and code of ICMP (RFC 792, RFC 1812) and of ICMPv6 (RFC 4443).
const (
	None            Error = iota
	TimeExceeded          // the hop limit ran out on the way (11/0, 3/0)
	NetUnreachable        // no route (3/0, 1/0)
	HostUnreachable       // a route, but nobody there (3/1, 1/3)
	AdminProhibited       // forbidden by policy (3/13, 1/1)
	PacketTooBig          // longer than the next hop's MTU: fragmentation needed, packet too big (3/4, 2/0)

	NumErrors // the number of errors
)

var errorNames = [NumErrors]string{"none", "time_exceeded", "net_unreachable", "host_unreachable", "admin_prohibited", "packet_too_big"}

// String is the error's stable name, for counters and people.
func (e Error) String() string {
	if e < NumErrors {
		return errorNames[e]
	}
	return "invalid"
}

// typeCode is what an error is in the two families.
type typeCode struct{ type4, code4, type6, code6 uint8 }

var typeCodes = [NumErrors]typeCode{
	TimeExceeded:    {11, 0, 3, 0},
	NetUnreachable:  {3, 0, 1, 0},
	HostUnreachable: {3, 1, 1, 3},
	AdminProhibited: {3, 13, 1, 1},
	PacketTooBig:    {3, 4, 2, 0},
}

// Most bytes of an error's IP packet: RFC 1812 section 4.3.2.3, and RFC 4443 section 2.4(c) with RFC 8200 section 5.
const (
	maxLen4 = 576
	maxLen6 = 1280
)

// MaxFrame is the most bytes Build writes: an IPv6 error with its Ethernet header.
const MaxFrame = packet.EthernetHeaderLen + maxLen6

// Build writes to dst the frame of an ICMP or ICMPv6 error about the packet in frame and returns its length. The Ethernet addresses (the first 12 bytes)
// are left for the caller, the EtherType is written. src is the router's address of the packet's family; mtu, in bytes of IP packet, is for
// PacketTooBig only. frame is the packet's first buffer and p what Parse said of it; as much of the packet as frame holds and the
// error may carry is quoted as it stands, an unfinished checksum included. dst does not overlap frame; MaxFrame bytes are always enough.
//
// ok is false, and dst untouched, where no error may be sent (RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7, RFC 4443 section 2.4(e)): about ICMP errors and
// redirects, fragments other than the first, packets for groups (but packet too big in IPv6), from no single host, malformed ones;
// and if src is of the wrong family or dst too short. No allocation; p and frame are only read.
func Build(dst []byte, kind Error, mtu int, src packet.Addr, p *packet.Packet, frame []byte) (n int, ok bool) {
	if kind == None || kind >= NumErrors || !mayAnswer(kind, p, frame) {
		return 0, false
	}
	quoted := frame[p.L3:min(len(frame), int(p.L3)+int(p.Length))]
	const l3 = packet.EthernetHeaderLen
	if p.Kind == packet.KindIPv4 {
		const l4 = l3 + packet.IPv4HeaderLen
		quoted = quoted[:min(len(quoted), maxLen4-packet.IPv4HeaderLen-packet.ICMPHeaderLen)]
		n = l4 + packet.ICMPHeaderLen + len(quoted)
		if !src.Is4() || len(dst) < n {
			return 0, false
		}
		binary.BigEndian.PutUint16(dst[12:14], packet.EtherTypeIPv4)
		// Precedence 6, internetwork control, for errors: RFC 1812 section 4.3.2.5.
		packet.PutIPv4(dst[l3:l4], src, p.Src, packet.ProtoICMP, 0xc0, n-l4)
		m := dst[l4:n]
		putHeader(m, typeCodes[kind].type4, typeCodes[kind].code4)
		if kind == PacketTooBig {
			binary.BigEndian.PutUint16(m[6:8], uint16(min(mtu, 0xffff))) // RFC 1191 section 4
		}
		copy(m[packet.ICMPHeaderLen:], quoted)
		binary.BigEndian.PutUint16(m[2:4], packet.Checksum(m, 0))
		return n, true
	}
	const l4 = l3 + packet.IPv6HeaderLen
	quoted = quoted[:min(len(quoted), maxLen6-packet.IPv6HeaderLen-packet.ICMPHeaderLen)]
	n = l4 + packet.ICMPHeaderLen + len(quoted)
	if src.Is4() || src == (packet.Addr{}) || len(dst) < n {
		return 0, false
	}
	binary.BigEndian.PutUint16(dst[12:14], packet.EtherTypeIPv6)
	packet.PutIPv6(dst[l3:l4], src, p.Src, packet.ProtoICMPv6, 64, n-l4)
	m := dst[l4:n]
	putHeader(m, typeCodes[kind].type6, typeCodes[kind].code6)
	if kind == PacketTooBig {
		binary.BigEndian.PutUint32(m[4:8], uint32(mtu))
	}
	copy(m[packet.ICMPHeaderLen:], quoted)
	binary.BigEndian.PutUint16(m[2:4], packet.Checksum(m, packet.PseudoHeader(src, p.Src, packet.ProtoICMPv6, uint32(n-l4))))
	return n, true
}

// putHeader writes type and code and zeroes the checksum and the four bytes whose meaning is the type's. That keeps RFC 4884's length
// field 0: no extension follows the quotation.
func putHeader(m []byte, typ, code uint8) {
	binary.BigEndian.PutUint64(m[0:8], uint64(typ)<<56|uint64(code)<<48)
}

// mayAnswer says whether an error of this kind may be sent about the packet.
func mayAnswer(kind Error, p *packet.Packet, frame []byte) bool {
	if p.Reason != drop.None || p.Flags&(packet.FlagFragment|packet.FlagFirst) == packet.FlagFragment {
		return false
	}
	group := p.Flags&packet.FlagMulticast != 0 || frame[0]&1 != 0 // the IP or the Ethernet destination is one
	switch p.Kind {
	case packet.KindIPv4:
		// Parse has let no group and no unspecified source pass; 240.0.0.0/4 is what remains of those that are no single host.
		return !group && p.Src.V4()>>28 != 0xf && !(p.Proto == packet.ProtoICMP && isError4(p.ICMPType))
	case packet.KindIPv6:
		if group && kind != PacketTooBig || p.Src == (packet.Addr{}) {
			return false
		}
		// Errors are the types below 128 (RFC 4443 section 2.1).
		return !(p.Proto == packet.ProtoICMPv6 && (p.ICMPType < 128 || p.Flags&packet.FlagND != 0))
	}
	return false
}

// isError4 says whether an ICMP message is an error or of a type that might be one. The queries of RFC 792, RFC 950 and RFC 1256 are not, nor is
// extended echo (RFC 8335).
func isError4(t uint8) bool {
	switch t {
	case 0, 8, 9, 10, 13, 14, 15, 16, 17, 18, 42, 43:
		return false
	}
	return true
}
