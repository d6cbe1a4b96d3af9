package packet

import (
	"encoding/binary"
	"net/netip"
)

// Frames for tests are put together from the outside in: each function takes the bytes of the layer above.

var (
	testDstMAC = MAC{0x02, 0, 0, 0, 0, 0xdd}
	testSrcMAC = MAC{0x02, 0, 0, 0, 0, 0x55}
	testSrc4   = AddrFrom(netip.MustParseAddr("10.244.1.2"))
	testDst4   = AddrFrom(netip.MustParseAddr("10.244.2.3"))
	testSrc6   = AddrFrom(netip.MustParseAddr("fd12:3456:789a::1:2"))
	testDst6   = AddrFrom(netip.MustParseAddr("fd12:3456:789a::2:3"))
)

func testAddr(s string) Addr { return AddrFrom(netip.MustParseAddr(s)) }

func concat(parts ...[]byte) []byte {
	var b []byte
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

func testEthernet(etherType uint16, body []byte) []byte {
	h := make([]byte, EthernetHeaderLen)
	putEthernet(h, testDstMAC, testSrcMAC, etherType)
	return append(h, body...)
}

func testVLAN(etherType uint16, body []byte) []byte {
	return concat([]byte{0x20, 0x07, byte(etherType >> 8), byte(etherType)}, body)
}

// ip4 describes an IPv4 header; zero fields take the usual values.
type ip4 struct {
	src, dst Addr
	proto    uint8
	ttl      uint8
	id       uint16
	frag     uint16 // flags and offset as they stand in the header
	options  []byte // a multiple of 4
	length   int    // total length; 0: the right one
	versionIHL,
	sumError uint8
}

func (f ip4) packet(body []byte) []byte {
	h := make([]byte, 20, 60)
	h = append(h, f.options...)
	h[0] = 0x40 | byte(len(h)/4)
	if f.versionIHL != 0 {
		h[0] = f.versionIHL
	}
	if f.length == 0 {
		f.length = len(h) + len(body)
	}
	binary.BigEndian.PutUint16(h[2:], uint16(f.length))
	binary.BigEndian.PutUint16(h[4:], f.id)
	binary.BigEndian.PutUint16(h[6:], f.frag)
	h[8] = 64
	if f.ttl != 0 {
		h[8] = f.ttl
	}
	h[9] = f.proto
	if f.src == (Addr{}) {
		f.src = testSrc4
	}
	if f.dst == (Addr{}) {
		f.dst = testDst4
	}
	binary.BigEndian.PutUint32(h[12:], f.src.V4())
	binary.BigEndian.PutUint32(h[16:], f.dst.V4())
	binary.BigEndian.PutUint16(h[10:], goldenChecksum(h)+uint16(f.sumError))
	return append(h, body...)
}

func (f ip4) frame(body []byte) []byte { return testEthernet(EtherTypeIPv4, f.packet(body)) }

// ip6 describes an IPv6 header; zero fields take the usual values.
type ip6 struct {
	src, dst *Addr
	next     uint8
	hopLimit uint8
	length   *int
	version  uint8
}

func (f ip6) packet(body []byte) []byte {
	h := make([]byte, 40)
	src, dst, hops, length := testSrc6, testDst6, uint8(64), len(body)
	if f.src != nil {
		src = *f.src
	}
	if f.dst != nil {
		dst = *f.dst
	}
	if f.hopLimit != 0 {
		hops = f.hopLimit
	}
	if f.length != nil {
		length = *f.length
	}
	PutIPv6(h, src, dst, f.next, hops, length)
	if f.version != 0 {
		h[0] = f.version<<4 | h[0]&15
	}
	return append(h, body...)
}

func (f ip6) frame(body []byte) []byte { return testEthernet(EtherTypeIPv6, f.packet(body)) }

func testTCP(dataOffset, flags uint8, options, payload []byte) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h[0:], 40000)
	binary.BigEndian.PutUint16(h[2:], 443)
	h[12] = dataOffset << 4
	h[13] = flags
	return concat(h, options, payload)
}

// testUDP makes a datagram; length 0 stands for the right one.
func testUDP(length int, payload []byte) []byte {
	h := make([]byte, 8)
	binary.BigEndian.PutUint16(h[0:], 5353)
	binary.BigEndian.PutUint16(h[2:], 53)
	if length == 0 {
		length = 8 + len(payload)
	}
	binary.BigEndian.PutUint16(h[4:], uint16(length))
	return append(h, payload...)
}

func testICMP(typ, code uint8, rest ...byte) []byte {
	return append([]byte{typ, code, 0, 0}, rest...)
}

// testExtension is an extension header of 8*(words+1) bytes that starts with next.
func testExtension(next uint8, words int, body []byte) []byte {
	x := make([]byte, 8*(words+1))
	x[0], x[1] = next, byte(words)
	copy(x[8:], body)
	return x
}

func testFragment(next uint8, offset uint16, more bool, id uint32) []byte {
	x := make([]byte, 8)
	x[0] = next
	word := offset &^ 7
	if more {
		word |= 1
	}
	binary.BigEndian.PutUint16(x[2:], word)
	binary.BigEndian.PutUint32(x[4:], id)
	return x
}

func testARP(op uint16, senderMAC MAC, sender, target Addr) []byte {
	a := make([]byte, ARPLen)
	binary.BigEndian.PutUint64(a, 0x0001_0800_0604_0000|uint64(op))
	copy(a[8:], senderMAC[:])
	binary.BigEndian.PutUint32(a[14:], sender.V4())
	binary.BigEndian.PutUint32(a[24:], target.V4())
	return testEthernet(EtherTypeARP, a)
}

// finishL4 computes the L4 checksum of a TCP, UDP, ICMP or ICMPv6 frame without anything unusual in front of the L4 header.
func finishL4(frame []byte) []byte {
	var p Packet
	Parse(&p, frame, len(frame))
	field := map[uint8]int{ProtoTCP: 16, ProtoUDP: 6, ProtoICMP: 2, ProtoICMPv6: 2}[p.Proto]
	m := frame[p.L4 : uint32(p.L3)+p.Length]
	m[field], m[field+1] = 0, 0
	var pseudo []byte
	if p.Proto != ProtoICMP {
		pseudo = goldenPseudoHeader(p.Src.Netip(), p.Dst.Netip(), p.Proto, len(m))
	}
	sum := goldenChecksum(concat(pseudo, m))
	if sum == 0 && p.Proto == ProtoUDP {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(m[field:], sum)
	return frame
}
