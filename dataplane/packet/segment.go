package packet

import "encoding/binary"

// TCP flags (RFC 9293 section 3.1).
const (
	tcpFIN = 0x01
	tcpSYN = 0x02
	tcpRST = 0x04
	tcpPSH = 0x08
	tcpACK = 0x10
	tcpURG = 0x20
	tcpCWR = 0x80
)

// Segmenter cuts one GSO frame into the frames it stands for, as Linux does (tcp_gso_segment, __udp_gso_segment, inet_gso_segment):
//
//	Init              once a frame: everything that is the same in all segments is summed
//	Next, Next, ...   each copies the headers, corrects them, copies the payload and sums it
//
// It is a value for the caller's stack. The bytes given to Init are borrowed, and must not change, until Next has returned 0. Not for concurrent use.
type Segmenter struct {
	headers []byte // Ethernet, IP, L4
	first   []byte // the payload in the first buffer
	rest    []byte // the payload behind it

	done    int // payload bytes written
	payload int // payload bytes in all
	size    int // payload bytes of each segment but the last
	index   int // segments written

	seq     uint32 // TCP: sequence number of the frame
	ipSum   uint64 // IPv4 header without total length, identification and checksum
	l4Sum   uint64 // pseudo-header without length, and L4 header without what changes from segment to segment
	pseudo  uint64 // pseudo-header without length
	id      uint16 // IPv4 identification of the frame
	l3, l4  uint16
	v6, udp bool
	flags   uint8 // TCP flags of the frame
	offset  uint8 // TCP: byte 12

	unfinished bool
	out        Offload
}

// Init starts on the frame of p, whose Offload o passed CheckOffload and has a GSO type. The payload is head from p.Payload on, then rest (nil if
// nothing). The frame's checksum field holds the sum of its pseudo-header, as NeedsChecksum says.
//
// With unfinished, the segments' checksums are left to the output port in the same manner (Offload says so); else they are complete.
func (s *Segmenter) Init(p *Packet, head, rest []byte, o *Offload, unfinished bool) {
	payload := int(p.Payload)
	*s = Segmenter{
		headers: head[:payload:payload],
		first:   head[payload:],
		rest:    rest,
		payload: len(head) - payload + len(rest),
		size:    int(o.SegmentSize),
		l3:      p.L3, l4: p.L4,
		v6: p.Kind == KindIPv6, udp: p.Proto == ProtoUDP,
		unfinished: unfinished,
	}
	l3, l4 := s.headers[p.L3:], s.headers[p.L4:]
	if !s.v6 {
		s.id = binary.BigEndian.Uint16(l3[4:6])
		s.ipSum = Sum(l3[:2], 0) + Sum(l3[6:10], 0) + Sum(l3[12:p.L4-p.L3], 0)
	}
	// The pseudo-header is taken from the field, not computed anew: it is right also behind an IPv6 routing header, and what its sender got wrong
	// stays wrong. Its length, that of the whole frame, is taken out: the ones' complement subtracts it.
	length := uint16(len(l4) + s.payload)
	if s.udp {
		s.pseudo = uint64(binary.BigEndian.Uint16(l4[6:8])) + uint64(^length)
		s.l4Sum = s.pseudo + Sum(l4[0:4], 0)
	} else {
		s.seq = binary.BigEndian.Uint32(l4[4:8])
		s.offset, s.flags = l4[12], l4[13]
		s.pseudo = uint64(binary.BigEndian.Uint16(l4[16:18])) + uint64(^length)
		s.l4Sum = s.pseudo + Sum(l4[0:4], 0) + Sum(l4[8:12], 0) + Sum(l4[14:16], 0) + Sum(l4[18:], 0)
	}
	if unfinished {
		s.out = Offload{Flags: needsChecksum, HeaderLen: p.Payload, ChecksumStart: p.L4, ChecksumOffset: o.ChecksumOffset}
	}
}

// Segments is how many frames Next writes in all.
func (s *Segmenter) Segments() int { return (s.payload + s.size - 1) / s.size }

// Size is how many bytes the largest segment has, Ethernet header included.
func (s *Segmenter) Size() int { return len(s.headers) + s.size }

// Offload is the metadata of each segment: zero, unless they are unfinished.
func (s *Segmenter) Offload() Offload { return s.out }

// Next writes the next segment to dst, which has room for Size bytes and overlaps nothing given to Init. It returns the bytes written, 0 if
// there are no more segments.
func (s *Segmenter) Next(dst []byte) int {
	n := min(s.size, s.payload-s.done)
	if n <= 0 {
		return 0
	}
	headerLen := len(s.headers)
	dst = dst[:headerLen+n]
	copy(dst, s.headers)
	body := dst[headerLen:]
	s.copyPayload(body)
	var sum uint64
	if !s.unfinished {
		sum = Sum(body, 0) // right behind the copy, from the first-level cache: as fast as summing while copying
	}
	s.setL3(dst[s.l3:])
	if s.udp {
		s.setUDP(dst[s.l4:], sum)
	} else {
		s.setTCP(dst[s.l4:], sum, s.done+n == s.payload)
	}
	s.done += n
	s.index++
	return len(dst)
}

// copyPayload copies the payload from s.done on to fill dst.
func (s *Segmenter) copyPayload(dst []byte) {
	from := s.done
	if from < len(s.first) {
		n := copy(dst, s.first[from:])
		dst, from = dst[n:], from+n
	}
	if len(dst) > 0 {
		copy(dst, s.rest[from-len(s.first):])
	}
}

// setL3 sets the lengths, and IPv4's identification and header checksum. h begins with the IP header and ends with the segment.
func (s *Segmenter) setL3(h []byte) {
	if s.v6 {
		binary.BigEndian.PutUint16(h[4:6], uint16(len(h)-IPv6HeaderLen))
		return
	}
	length, id := uint16(len(h)), s.id+uint16(s.index)
	binary.BigEndian.PutUint16(h[2:4], length)
	binary.BigEndian.PutUint16(h[4:6], id)
	binary.BigEndian.PutUint16(h[10:12], ^Fold(s.ipSum+uint64(length)+uint64(id)))
}

// setTCP sets sequence number, flags and checksum. sum is the payload's. FIN and PSH are the last segment's, CWR the first's (RFC 3168 section 6.1.2:
// one packet of a window).
func (s *Segmenter) setTCP(h []byte, sum uint64, last bool) {
	seq, flags := s.seq+uint32(s.done), s.flags
	if !last {
		flags &^= tcpFIN | tcpPSH
	}
	if s.index > 0 {
		flags &^= tcpCWR
	}
	binary.BigEndian.PutUint32(h[4:8], seq)
	h[13] = flags
	if s.unfinished {
		binary.BigEndian.PutUint16(h[16:18], Fold(s.pseudo+uint64(len(h))))
		return
	}
	sum += s.l4Sum + uint64(len(h)) + uint64(seq) + uint64(s.offset)<<8 + uint64(flags)
	binary.BigEndian.PutUint16(h[16:18], ^Fold(sum))
}

// setUDP sets length and checksum. sum is the payload's.
func (s *Segmenter) setUDP(h []byte, sum uint64) {
	length := uint64(len(h))
	binary.BigEndian.PutUint16(h[4:6], uint16(length))
	if s.unfinished {
		binary.BigEndian.PutUint16(h[6:8], Fold(s.pseudo+length))
		return
	}
	// The length counts twice: in the pseudo-header and in the UDP header.
	binary.BigEndian.PutUint16(h[6:8], nonZero(^Fold(sum+s.l4Sum+2*length)))
}
