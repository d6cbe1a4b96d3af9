package packet

import (
	"encoding/binary"
	"net/netip"

	"github.com/overplane/overplane/dataplane/drop"
)

// Addr is an IP address of either family as two words: IPv6 in network order, IPv4 in its mapped form (::ffff:a.b.c.d), so that one
// comparison serves both. The zero Addr is the IPv6 unspecified address.
type Addr struct {
	Hi, Lo uint64
}

const v4Prefix = 0xffff << 32

// AddrFrom4 makes the Addr of an IPv4 address in host byte order.
func AddrFrom4(v uint32) Addr { return Addr{Lo: v4Prefix | uint64(v)} }

// AddrFrom converts a netip.Addr. The invalid netip.Addr becomes the zero Addr.
func AddrFrom(a netip.Addr) Addr {
	if !a.IsValid() {
		return Addr{}
	}
	b := a.As16()
	return Addr{Hi: binary.BigEndian.Uint64(b[:8]), Lo: binary.BigEndian.Uint64(b[8:])}
}

// Is4 reports whether the address is an IPv4 one.
func (a Addr) Is4() bool { return a.Hi == 0 && a.Lo>>32 == 0xffff }

// V4 is the IPv4 address in host byte order; only for Is4 addresses.
func (a Addr) V4() uint32 { return uint32(a.Lo) }

// Netip converts back, IPv4 unmapped.
func (a Addr) Netip() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], a.Hi)
	binary.BigEndian.PutUint64(b[8:], a.Lo)
	return netip.AddrFrom16(b).Unmap()
}

// Kind is what a frame carries above Ethernet.
type Kind uint8

// The kinds of frame.
const (
	KindOther Kind = iota // not parsed any further; Packet.Reason says why
	KindIPv4
	KindIPv6
	KindARP
)

// Flags of a parsed packet.
type Flags uint16

const (
	FlagFragment  Flags = 1 << iota // part of a fragmented datagram
	FlagFirst                       // its first fragment (L4 header present)
	FlagMore                        // more fragments follow
	FlagDF                          // IPv4: don't fragment. Always set for IPv6
	FlagL4                          // the L4 header was parsed: ports or ICMP type are valid
	FlagOptions                     // IPv4 options or IPv6 extension headers present
	FlagND                          // ICMPv6 neighbour or router discovery (types 133-137)
	FlagMulticast                   // destination is multicast or IPv4 broadcast
	FlagCompleted                   // a fragment whose ports another worker filled in. Never set by Parse
)

// Packet is what Parse found out about one frame. It borrows nothing: all fields are values, offsets count from the frame's first byte.
// Fields below a layer are valid only when that layer was parsed without a Reason.
type Packet struct {
	Src, Dst Addr

	EthDst, EthSrc MAC // from the frame; valid unless Reason is EthTruncated

	Reason drop.Reason // None, or why the frame is malformed
	Kind   Kind
	Proto  uint8 // L4 protocol, after IPv6 extension headers
	TTL    uint8 // TTL or hop limit

	L3      uint16 // offset of the IP or ARP header (14, or 18 with a VLAN tag)
	L4      uint16 // offset of the L4 header, or of the fragment's data
	Payload uint16 // offset of the L4 payload; valid with FlagL4
	Flags   Flags
	Length  uint32 // bytes of the IP packet: header and payload, without Ethernet and its padding. A GSO frame's whole length

	// SrcPort and DstPort are TCP, UDP and SCTP ports; for ICMP and ICMPv6 echo both are the identifier. Valid with FlagL4.
	SrcPort, DstPort   uint16
	TCPFlags           uint8  // byte 13 of the TCP header
	ICMPType, ICMPCode uint8  // ICMP, ICMPv6
	FragmentOffset     uint16 // bytes
	FragmentHeader     uint16 // IPv6: offset of the fragment header, 0 if none
	FragmentID         uint32
}

// MAC is an Ethernet address.
type MAC [6]byte
