package packet

import (
	"bytes"
	"encoding/binary"

	"pgregory.net/rapid"
)

// gsoSpec describes a TCP or UDP packet: the golden models of segmentation and coalescing work on descriptions and build each packet
// from scratch, with a checksum routine of their own.
type gsoSpec struct {
	v6, udp, vlan, df bool
	tos, ttl          uint8
	id                uint16
	extra             []byte // IPv4 options (multiple of 4), or the whole of an IPv6 destination options header but its first byte (8n-1)
	host              uint8  // last byte of the source address
	srcPort           uint16
	seq, ack          uint32
	flags             uint8
	window            uint16
	options           []byte // TCP (multiple of 4)
	payload           []byte
}

// slowSum is RFC 1071 by the letter: 16-bit words, end-around carry after each.
func slowSum(parts ...[]byte) uint16 {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	if len(all)%2 != 0 {
		all = append(all, 0)
	}
	var sum uint32
	for i := 0; i < len(all); i += 2 {
		sum += uint32(all[i])<<8 | uint32(all[i+1])
		if sum > 0xffff {
			sum -= 0xffff
		}
	}
	return uint16(sum)
}

func (g gsoSpec) addresses() []byte {
	if g.v6 {
		a := bytes.Repeat([]byte{0xfd, 0x12}, 16)
		a[15], a[31] = g.host, 2
		return a
	}
	return []byte{10, 244, 1, g.host, 10, 244, 2, 2}
}

func (g gsoSpec) proto() uint8 {
	if g.udp {
		return ProtoUDP
	}
	return ProtoTCP
}

func (g gsoSpec) pseudo(l4 int) []byte {
	b := append([]byte{}, g.addresses()...)
	b = binary.BigEndian.AppendUint32(b, uint32(l4))
	return append(b, 0, 0, 0, g.proto())
}

// l4 is the L4 header and payload; its checksum is complete or, unfinished, the sum of the pseudo-header.
func (g gsoSpec) l4(unfinished bool) []byte {
	b := binary.BigEndian.AppendUint16(nil, g.srcPort)
	b = binary.BigEndian.AppendUint16(b, 443)
	at := 6
	if g.udp {
		b = binary.BigEndian.AppendUint16(b, uint16(8+len(g.payload)))
		b = append(b, 0, 0)
	} else {
		at = 16
		b = binary.BigEndian.AppendUint32(b, g.seq)
		b = binary.BigEndian.AppendUint32(b, g.ack)
		b = append(b, uint8(5+len(g.options)/4)<<4, g.flags)
		b = binary.BigEndian.AppendUint16(b, g.window)
		b = append(b, 0, 0, 0, 0)
		b = append(b, g.options...)
	}
	b = append(b, g.payload...)
	sum := slowSum(g.pseudo(len(b)))
	if !unfinished {
		sum = ^slowSum(g.pseudo(len(b)), b)
		if g.udp && sum == 0 {
			sum = 0xffff
		}
	}
	binary.BigEndian.PutUint16(b[at:], sum)
	return b
}

// build is the frame.
func (g gsoSpec) build(unfinished bool) []byte {
	b := []byte{2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1}
	if g.vlan {
		b = append(b, 0x81, 0, 0, 7)
	}
	l4 := g.l4(unfinished)
	if g.v6 {
		b = append(b, 0x86, 0xdd)
		b = binary.BigEndian.AppendUint32(b, 6<<28|uint32(g.tos)<<20|0x12345)
		var ext []byte
		next := g.proto()
		if len(g.extra) > 0 {
			ext, next = append([]byte{next}, g.extra...), ProtoDestination
		}
		b = binary.BigEndian.AppendUint16(b, uint16(len(ext)+len(l4)))
		b = append(b, next, g.ttl)
		b = append(b, g.addresses()...)
		b = append(b, ext...)
		return append(b, l4...)
	}
	b = append(b, 8, 0)
	h := []byte{0x40 | uint8(5+len(g.extra)/4), g.tos}
	h = binary.BigEndian.AppendUint16(h, uint16(20+len(g.extra)+len(l4)))
	h = binary.BigEndian.AppendUint16(h, g.id)
	h = append(h, 0, 0, g.ttl, g.proto(), 0, 0)
	if g.df {
		h[6] = 0x40
	}
	h = append(h, g.addresses()...)
	h = append(h, g.extra...)
	binary.BigEndian.PutUint16(h[10:], ^slowSum(h))
	return append(append(b, h...), l4...)
}

// headerLen is the length of everything before the payload.
func (g gsoSpec) headerLen() int { return len(g.build(false)) - len(g.payload) }

// offload is the metadata that Linux gives the frame (unfinished, as one GSO frame).
func (g gsoSpec) offload(size int) Offload {
	o := Offload{Flags: needsChecksum, GSO: gsoTCP4, HeaderLen: uint16(g.headerLen()), SegmentSize: uint16(size), ChecksumOffset: 16}
	o.ChecksumStart = uint16(g.headerLen() - 20 - len(g.options))
	if g.v6 {
		o.GSO = gsoTCP6
	}
	if g.udp {
		o.ChecksumStart = uint16(g.headerLen() - 8)
		o.GSO, o.ChecksumOffset = gsoUDP, 6
	}
	return o
}

// segments is the golden model of segmentation: the packets that the GSO frame stands for.
func (g gsoSpec) segments(size int) []gsoSpec {
	var all []gsoSpec
	for done := 0; done < len(g.payload); done += size {
		s := g
		s.payload = g.payload[done:min(done+size, len(g.payload))]
		s.id += uint16(len(all))
		s.seq += uint32(done)
		if done > 0 {
			s.flags &^= tcpCWR
		}
		if done+size < len(g.payload) {
			s.flags &^= tcpFIN | tcpPSH
		}
		all = append(all, s)
	}
	return all
}

// testPayload is n bytes that differ from their neighbours.
func testPayload(n int, seed uint32) []byte {
	b := make([]byte, n)
	for i := range b {
		seed = seed*1664525 + 1013904223
		b[i] = uint8(seed >> 24)
	}
	return b
}

var tcpTimestamps = []byte{1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4}

// drawSpec draws a packet without payload. extras: perhaps with a VLAN tag and IP options.
func drawSpec(t *rapid.T, extras bool) gsoSpec {
	g := gsoSpec{
		v6:      rapid.Bool().Draw(t, "v6"),
		udp:     rapid.Bool().Draw(t, "udp"),
		df:      rapid.Bool().Draw(t, "df"),
		tos:     rapid.SampledFrom([]uint8{0, 2, 0xb8}).Draw(t, "tos"),
		ttl:     64,
		id:      rapid.Uint16().Draw(t, "id"),
		host:    1,
		srcPort: rapid.Uint16().Draw(t, "port"),
		seq:     rapid.Uint32().Draw(t, "seq"),
		ack:     rapid.Uint32().Draw(t, "ack"),
		window:  rapid.Uint16().Draw(t, "window"),
		flags:   tcpACK,
	}
	if !g.udp && rapid.Bool().Draw(t, "timestamps") {
		g.options = tcpTimestamps
	}
	if extras {
		g.vlan = rapid.Bool().Draw(t, "vlan")
		if rapid.Bool().Draw(t, "options") {
			g.extra = []byte{1, 1, 1, 0} // no-operation, end of options
			if g.v6 {
				g.extra = []byte{0, 1, 4, 0, 0, 0, 0} // PadN
			}
		}
	}
	return g
}
