package packet

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/drop"
)

// parseAny is the whole parser, for every frame that is not of the common kinds Parse does itself. The checks come in this order, and the
// first that fails gives the Reason: Ethernet; IP version, header length, length, checksum; options or extension headers; addresses;
// fragmentation; L4.
//
//go:noinline
func parseAny(p *Packet, head []byte, total int) {
	*p = Packet{}
	p.Reason = parseEthernet(p, head, total)
}

func parseEthernet(p *Packet, head []byte, total int) drop.Reason {
	if len(head) < EthernetHeaderLen {
		return drop.EthTruncated
	}
	p.EthDst, p.EthSrc = MAC(head[0:6]), MAC(head[6:12])
	p.L3 = EthernetHeaderLen
	etherType := binary.BigEndian.Uint16(head[12:14])
	if etherType == EtherTypeVLAN {
		if len(head) < EthernetHeaderLen+VLANTagLen {
			return drop.EthTruncated
		}
		p.L3 = EthernetHeaderLen + VLANTagLen
		etherType = binary.BigEndian.Uint16(head[16:18])
	}
	switch etherType {
	case EtherTypeIPv4:
		p.Kind = KindIPv4
		return parseIPv4(p, head, total)
	case EtherTypeIPv6:
		p.Kind = KindIPv6
		return parseIPv6(p, head, total)
	case EtherTypeARP:
		p.Kind = KindARP
		return parseARP(p, head)
	case EtherTypeVLAN, EtherTypeServiceTag:
		// A service tag stands in front of a customer tag; on its own it is a provider's traffic and not ours either.
		return drop.VLANStacked
	}
	return drop.EthUnknownType
}

// parseARP fills in Src and Dst with the sender's and the target's protocol addresses (RFC 826).
func parseARP(p *Packet, head []byte) drop.Reason {
	a := head[p.L3:]
	if len(a) < ARPLen {
		return drop.ARPBad
	}
	// Hardware type Ethernet, protocol type IPv4, address lengths 6 and 4.
	if binary.BigEndian.Uint64(a)>>16 != 0x0001_0800_0604 {
		return drop.ARPBad
	}
	p.Length = ARPLen
	p.Src = AddrFrom4(binary.BigEndian.Uint32(a[14:18]))
	p.Dst = AddrFrom4(binary.BigEndian.Uint32(a[24:28]))
	return drop.None
}

func parseIPv4(p *Packet, head []byte, total int) drop.Reason {
	l3 := int(p.L3)
	h := head[l3:]
	if len(h) < IPv4HeaderLen {
		return drop.IPTruncated
	}
	if h[0]>>4 != 4 {
		return drop.IPBadVersion
	}
	headerLen := int(h[0]&15) * 4
	if headerLen < IPv4HeaderLen {
		return drop.IPBadHeaderLength
	}
	length := int(binary.BigEndian.Uint16(h[2:4]))
	if length < headerLen || l3+length > total {
		return drop.IPBadLength
	}
	if len(h) < headerLen {
		return drop.IPTruncated
	}
	if Fold(Sum(h[:headerLen], 0)) != 0xffff {
		return drop.IPBadChecksum
	}
	p.Length = uint32(length)
	p.TTL = h[8]
	p.Proto = h[9]
	src, dst := binary.BigEndian.Uint32(h[12:16]), binary.BigEndian.Uint32(h[16:20])
	p.Src, p.Dst = AddrFrom4(src), AddrFrom4(dst)
	p.L4 = uint16(l3 + headerLen)
	if headerLen > IPv4HeaderLen {
		p.Flags |= FlagOptions
		if r := checkIPv4Options(h[IPv4HeaderLen:headerLen]); r != drop.None {
			return r
		}
	}
	if r := checkIPv4Addresses(p, src, dst); r != drop.None {
		return r
	}
	frag := binary.BigEndian.Uint16(h[6:8])
	if frag&ipv4DF != 0 {
		p.Flags |= FlagDF
	}
	if frag&(ipv4MF|ipv4OffsetMask) == 0 {
		return parseL4(p, head, l3+length)
	}

	p.FragmentID = uint32(binary.BigEndian.Uint16(h[4:6]))
	offset := int(frag&ipv4OffsetMask) * 8
	data := length - headerLen
	if r := setFragment(p, offset, data, frag&ipv4MF != 0); r != drop.None {
		return r
	}
	if headerLen+offset+data > 65535 {
		return drop.FragmentBad
	}
	if offset != 0 {
		// RFC 1858 and RFC 3128: a fragment that starts within a TCP header can only be there to overwrite it.
		if p.Proto == ProtoTCP && offset < TCPHeaderLen {
			return drop.FragmentBad
		}
		return drop.None
	}
	return parseFirstFragment(p, head, l3+length)
}

// setFragment checks what both families ask of a fragment of data bytes at offset, and sets the flags.
func setFragment(p *Packet, offset, data int, more bool) drop.Reason {
	p.Flags |= FlagFragment
	p.FragmentOffset = uint16(offset)
	if offset == 0 {
		p.Flags |= FlagFirst
	}
	if more {
		p.Flags |= FlagMore
	}
	if data == 0 || more && data%8 != 0 {
		return drop.FragmentBad
	}
	return drop.None
}

// parseFirstFragment parses the L4 header of a first fragment, which must be whole: RFC 7112 demands it of IPv6, and a tiny first fragment of IPv4
// hides its ports from every check (RFC 1858).
func parseFirstFragment(p *Packet, head []byte, end int) drop.Reason {
	r := parseL4(p, head, end)
	if r == drop.L4Truncated || r == drop.L4BadHeaderLength {
		return drop.FragmentBad
	}
	return r
}

// Option types of IPv4 (RFC 791 section 3.1).
const (
	ipv4OptionEnd      = 0
	ipv4OptionNop      = 1
	ipv4OptionLSRR     = 131
	ipv4OptionSSRR     = 137
	ipv4OptionCopyFlag = 0x80
)

// checkIPv4Options walks the options. Source routes are refused: they would let a sender choose a way around the checks (RFC 7126 section 4.3).
func checkIPv4Options(o []byte) drop.Reason {
	for len(o) > 0 {
		switch o[0] {
		case ipv4OptionEnd:
			return drop.None
		case ipv4OptionNop:
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return drop.IPBadOptions
		}
		if o[0] == ipv4OptionLSRR || o[0] == ipv4OptionSSRR {
			return drop.IPSourceRoute
		}
		o = o[o[1]:]
	}
	return drop.None
}

// checkIPv4Addresses refuses addresses that may never be on a wire (RFC 1122 section 3.2.1.3, RFC 1812 section 5.3.7) and sets FlagMulticast.
// 240.0.0.0/4 passes, as in Linux, but for the limited broadcast address.
func checkIPv4Addresses(p *Packet, src, dst uint32) drop.Reason {
	const broadcast = 0xffffffff
	switch top := src >> 24; {
	case top == 0, top == 127, top >= 224 && top < 240, src == broadcast:
		return drop.IPBadSource
	}
	switch top := dst >> 24; {
	case top == 0, top == 127:
		return drop.IPBadDestination
	case top >= 224 && top < 240, dst == broadcast:
		p.Flags |= FlagMulticast
	}
	return drop.None
}
