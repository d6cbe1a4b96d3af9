package packet

import (
	"encoding/binary"
	"math/bits"
)

// segment is what of a packet decides whether it may be part of a train.
type segment struct {
	seq    uint32 // TCP: its sequence number. UDP: 0
	next   uint32 // TCP: the sequence number that follows it. UDP: 0
	bytes  uint16 // of payload
	id     uint16 // IPv4 identification
	ending uint8  // TCP: FIN and PSH
	last   bool   // no segment may follow it
}

// read fills in s and reports whether the packet may be in a train at all. p is TCP or UDP without options or extension headers.
func (s *segment) read(p *Packet, frame []byte) bool {
	end := int(p.L3) + int(p.Length)
	if end > len(frame) {
		return false
	}
	s.bytes = uint16(end - int(p.Payload))
	if p.Kind == KindIPv4 {
		s.id = binary.BigEndian.Uint16(frame[p.L3+4:])
	}
	h := frame[p.L4:p.Payload]
	if p.Proto == ProtoUDP {
		// A datagram without a checksum has nothing to verify, and a train's has one; one that is shorter than its IP packet has a
		// surplus (RFC 9868) that would end up in the next datagram.
		return binary.BigEndian.Uint16(h[6:8]) != 0 && int(binary.BigEndian.Uint16(h[4:6])) == end-int(p.L4)
	}
	s.seq = binary.BigEndian.Uint32(h[4:8])
	s.next = s.seq + uint32(s.bytes)
	flags := h[13]
	s.ending = flags & (tcpFIN | tcpPSH)
	s.last = s.ending != 0
	// Nothing but acknowledgement and the end of what was written: all else (SYN, RST, URG, ECE, CWR, and the flag and reserved bits in byte
	// 12) means this one packet.
	return flags&^(tcpFIN|tcpPSH) == tcpACK && h[12]&0x0f == 0
}

// sameHeaders reports whether two packets of the same layout differ in nothing but what segments of one train differ in: lengths, IPv4
// identification, checksums, sequence number, FIN and PSH. Acknowledgement and window must be equal, and the options to the byte.
func sameHeaders(p *Packet, a, b []byte) bool {
	if string(a[:p.L3]) != string(b[:p.L3]) {
		return false
	}
	x, y := a[p.L3:p.L4], b[p.L3:p.L4]
	if p.Kind == KindIPv4 {
		// Version to TOS; fragment flags, TTL and protocol; addresses.
		if len(x) != IPv4HeaderLen || len(y) != IPv4HeaderLen || binary.BigEndian.Uint16(x) != binary.BigEndian.Uint16(y) ||
			binary.BigEndian.Uint32(x[6:10]) != binary.BigEndian.Uint32(y[6:10]) ||
			binary.BigEndian.Uint64(x[12:20]) != binary.BigEndian.Uint64(y[12:20]) {
			return false
		}
	} else {
		// Version to flow label; next header and hop limit; addresses.
		if len(x) != IPv6HeaderLen || len(y) != IPv6HeaderLen || binary.BigEndian.Uint32(x) != binary.BigEndian.Uint32(y) ||
			string(x[6:]) != string(y[6:]) {
			return false
		}
	}
	x, y = a[p.L4:], b[p.L4:]
	if binary.BigEndian.Uint32(x) != binary.BigEndian.Uint32(y) {
		return false
	}
	if p.Proto == ProtoUDP {
		return true
	}
	// Bytes 8 to 12: acknowledgement and header length; 14: window; 18: urgent pointer; options.
	n := int(p.Payload - p.L4)
	return binary.BigEndian.Uint32(x[8:12]) == binary.BigEndian.Uint32(y[8:12]) && x[12] == y[12] &&
		binary.BigEndian.Uint16(x[14:16]) == binary.BigEndian.Uint16(y[14:16]) && string(x[18:n]) == string(y[18:n])
}

// flowKey is a hash of the packet's flow that is never 0. p has FlagL4. The same key of two flows does no harm but to end a train early.
func flowKey(p *Packet) uint64 {
	hi, lo := bits.Mul64(p.Src.Hi^bits.RotateLeft64(p.Dst.Hi, 32)^0x9e3779b97f4a7c15, p.Src.Lo^bits.RotateLeft64(p.Dst.Lo, 32)^0xbf58476d1ce4e5b9)
	ports := uint64(p.SrcPort)<<32 | uint64(p.DstPort)<<16 | uint64(p.Proto)
	hi, lo = bits.Mul64(hi^lo^ports, 0xd6e8feb86659fd93)
	return hi ^ lo | 1<<63
}

// find returns the slot of the open train with that key, or -1.
func (c *Coalescer) find(key uint64) int {
	set := int(key%flowSets) * flowWays
	for w, k := range c.keys[set : set+flowWays] {
		if k == key {
			return set + w
		}
	}
	return -1
}

// free returns a free slot for a train with that key, ending another's if there is none.
func (c *Coalescer) free(key uint64) int {
	set := int(key%flowSets) * flowWays
	for w, k := range c.keys[set : set+flowWays] {
		if k == 0 {
			return set + w
		}
	}
	w := set + int(c.victim%flowWays)
	c.victim++
	c.end(w)
	return w
}

// end ends the train in the slot: nothing can be appended to it any more.
func (c *Coalescer) end(w int) {
	c.keys[w] = 0
	c.active--
}
