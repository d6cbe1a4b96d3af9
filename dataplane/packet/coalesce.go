package packet

import "encoding/binary"

// Accept says which trains an output port takes: a bit for each kind of GSO frame.
type Accept uint8

// Bits of Accept.
const (
	AcceptTCP4 Accept = 1 << iota // TCP over IPv4
	AcceptTCP6                    // TCP over IPv6
	AcceptUDP                     // UDP over both
)

// MaxCoalesce is how many packets a Coalescer holds between two calls of Reset.
const MaxCoalesce = 256

// maxTrain is the most segments of one train: a train is sent as a chain of as many frames (port.MaxChain).
const maxTrain = 64

// Coalescer merges the TCP segments and UDP datagrams of one batch that continue each other into trains, each of which leaves as one GSO
// frame: what a NIC's LRO or Linux's GRO (net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c) does before a packet's receiver pays for it. A
// batch goes through it like this:
//
//	c.Reset()
//	c.Add(...)                              every packet of the batch, in order, for all output ports together or for one
//	for c.Next(&t) {                        every packet to send, in order
//		if t.Segments > 1 {
//			offload = c.Finish(&t, head)    the headers of the first packet become those of the train
//		}
//		c.NextSegment(&t)                   and the payload of each further segment is appended to it
//	}
//
// Nothing is copied: a train is its first frame and the payloads of the others, for the caller to send as a chain.
//
// Order: a train leaves at the place of its first packet. So a segment may overtake packets of other flows, but never one of
// its own, because whatever of a flow cannot be appended to the flow's train ends that train. A segmenter that cuts the train again
// gives the packets that came in, byte for byte, but for things that mean nothing, which Linux lets go, too: IPv4 packets with DF that all
// had the same identification get counted ones (RFC 6864), a padded last one loses its Ethernet padding, and a checksum
// may change between the two zeros of ones' complement.
//
// A Coalescer belongs to one goroutine and is reused. Its size is fixed (9 KiB). The zero value is ready for use.
type Coalescer struct {
	n       int  // entries in use
	cursor  int  // next entry for Next
	active  int  // open trains
	udp     bool // a train of UDP may be open
	victim  uint8
	entries [MaxCoalesce]entry
	keys    [flowSets * flowWays]uint64 // of the open trains by flow; 0: none
	flows   [flowSets * flowWays]train
}

// Open trains are found by a hash of their flow, in a set-associative table: a bounded search that no choice of flows can make longer,
// and where a flow that finds its set full merely ends another's train early.
const (
	flowSets = 8
	flowWays = 4
)

// entry is one packet as it was added.
type entry struct {
	handle, out uint32
	next        uint16 // the entry behind it in its train, 0 if none (entry 0 is never behind another)
	segments    uint8  // of the train it is the first of; 0: it was appended to one
	accept      Accept // kind of train
	payload     uint16 // where its payload starts in its frame
	bytes       uint16 // of payload
	l3, l4      uint16
	ending      uint8 // TCP flags the last segment adds: FIN, PSH
	length      int32 // bytes of the IP packet that the train is
}

// train is an open train.
type train struct {
	head        []byte // the first packet
	first, last uint16 // entries
	l3, l4      uint16
	size        uint16 // payload bytes of each segment
	id          uint16 // IPv4: identification of the last packet
	step        uint16 // IPv4: what the identification grows by, if segments > 1
	seq         uint32 // TCP: the sequence number that continues it. UDP: 0
	verified    bool   // the checksum of head is good
}

// Train is one packet to send: a packet as it was added, or several that became one.
type Train struct {
	Out, Handle uint32 // of the first packet, as given to Add
	Segments    int    // 1: the packet is as it was
	entry       uint16
	next        uint16
}

// Reset forgets all packets, and the bytes borrowed from them.
func (c *Coalescer) Reset() {
	c.n, c.cursor, c.udp = 0, 0, false
	if c.active != 0 {
		c.active = 0
		clear(c.keys[:])
	}
}

// Add takes the next packet of the batch. frame is the packet's one buffer, parsed into p without a Reason, rewritten and ready to send; it is borrowed until
// Reset. out and handle are the caller's names for the output port and the packet. accept is what kinds of trains that port takes, and
// 0 for a packet that may be in none whatever its kind: a chain, one with an Offload (of these frame may be nil).
//
// It reports whether there was room; if not, the packet was not taken: send what is there, Reset, and add it again.
func (c *Coalescer) Add(p *Packet, frame []byte, out uint32, accept Accept, handle uint32) bool {
	if c.n == MaxCoalesce {
		return false
	}
	i := c.n
	c.n++
	e := &c.entries[i]
	e.handle, e.out, e.next, e.segments = handle, out, 0, 1

	if Mergeable(p, accept) {
		c.place(p, frame, uint16(i))
	} else if c.active != 0 && (p.Proto == ProtoTCP || p.Proto == ProtoUDP && c.udp) {
		c.pass(p)
	}
	return true
}

// Mergeable reports whether the packet may be in a train that a port with accept takes, by the parsed packet alone: most packets that will not, such
// as pure acknowledgements, and UDP without USO, are told here. A batch with fewer than two mergeable packets needs no Coalescer.
func Mergeable(p *Packet, accept Accept) bool {
	return kindOf(p)&accept != 0 && uint32(p.Payload-p.L3) < p.Length
}

// kindOf is the kind of train that the packet could be in, by its headers' kinds.
func kindOf(p *Packet) Accept {
	if p.Flags&(FlagL4|FlagFragment|FlagOptions) != FlagL4 {
		return 0
	}
	switch p.Proto {
	case ProtoTCP:
		if p.Kind == KindIPv4 {
			return AcceptTCP4
		}
		return AcceptTCP6
	case ProtoUDP:
		return AcceptUDP
	}
	return 0
}

// pass ends the open train of the packet's flow, so that none that comes later overtakes it.
func (c *Coalescer) pass(p *Packet) {
	if p.Flags&FlagL4 == 0 || p.Flags&FlagFragment != 0 {
		// Which flow a fragment is of only its first knows. They are rare enough to end all.
		c.active = 0
		clear(c.keys[:])
		return
	}
	key := flowKey(p)
	if w := c.find(key); w >= 0 {
		c.end(w)
	}
}

// place appends the packet to its flow's open train, or opens one with it.
func (c *Coalescer) place(p *Packet, frame []byte, i uint16) {
	kind, key := kindOf(p), flowKey(p)
	w := -1
	if c.active != 0 {
		w = c.find(key)
	}
	var s segment
	if !s.read(p, frame) {
		if w >= 0 {
			c.end(w)
		}
		return
	}
	if w >= 0 {
		t := &c.flows[w]
		if c.append(t, &s, p, frame, i) {
			if s.last || s.bytes < t.size || c.entries[t.first].segments == maxTrain {
				c.end(w)
			}
			return
		}
		c.end(w)
	}
	if s.last || int(p.L3)+int(p.Length) != len(frame) || s.bytes < MinTCPSegmentSize && kind != AcceptUDP {
		return // nothing may follow it; or padding, which may not stand inside a train; or segments that CheckOffload would find too small
	}
	e := &c.entries[i]
	e.accept, e.l3, e.l4, e.payload, e.bytes, e.length, e.ending = kind, p.L3, p.L4, p.Payload, s.bytes, int32(p.Length), 0
	w = c.free(key)
	c.keys[w] = key
	c.active++
	c.udp = c.udp || kind == AcceptUDP
	c.flows[w] = train{head: frame, first: i, last: i, l3: p.L3, l4: p.L4, size: s.bytes, id: s.id, seq: s.next}
}

// append puts the packet behind the train t if it continues it.
func (c *Coalescer) append(t *train, s *segment, p *Packet, frame []byte, i uint16) bool {
	first, e := &c.entries[t.first], &c.entries[i]
	if s.bytes > t.size || s.seq != t.seq || e.out != first.out || first.length+int32(s.bytes) > 65535 {
		return false
	}
	if p.L3 != t.l3 || p.L4 != t.l4 || !sameHeaders(p, t.head, frame) {
		return false
	}
	step := s.id - t.id
	if p.Kind == KindIPv4 {
		switch {
		case first.segments > 1 && step != t.step:
			return false
		case step > 1 || step == 0 && p.Flags&FlagDF == 0:
			return false
		}
	}
	// The costly check last. A train needs good checksums in all its segments, for it will have but one, which its receiver may never look at.
	if !t.verified {
		q := *p // the same layout and addresses
		q.Length = uint32(first.length)
		if t.verified = VerifyL4(&q, t.head, nil); !t.verified {
			return false
		}
	}
	if !VerifyL4(p, frame, nil) {
		return false
	}
	c.entries[t.last].next = i
	e.segments, e.payload, e.bytes = 0, p.Payload, s.bytes
	first.segments++
	first.length += int32(s.bytes)
	first.ending = s.ending
	t.last, t.id, t.step, t.seq = i, s.id, step, s.next
	return true
}

// Next gives the next packet to send, and reports whether there is one. Call it after the last Add.
func (c *Coalescer) Next(t *Train) bool {
	for c.cursor < c.n {
		i := c.cursor
		e := &c.entries[i]
		c.cursor++
		if e.segments != 0 {
			t.Out, t.Handle, t.Segments, t.entry, t.next = e.out, e.handle, int(e.segments), uint16(i), e.next
			return true
		}
	}
	return false
}

// NextSegment gives the next segment of the train behind its first packet: its payload is bytes [off, off+n) of the packet named by handle. ok is
// false if there is none.
func (c *Coalescer) NextSegment(t *Train) (handle uint32, off, n int, ok bool) {
	if t.next == 0 {
		return 0, 0, 0, false
	}
	e := &c.entries[t.next]
	t.next = e.next
	return e.handle, int(e.payload), int(e.bytes), true
}

// Finish makes the headers in head, the bytes of the packet named by t.Handle, those of the whole train, which has more than one segment, and returns its
// metadata: a GSO frame as CheckOffload leaves one. To be called once for each train.
func (c *Coalescer) Finish(t *Train, head []byte) Offload {
	e := &c.entries[t.entry]
	h := head[e.l3:]
	o := Offload{Flags: needsChecksum, HeaderLen: e.payload, SegmentSize: e.bytes, ChecksumStart: e.l4}
	pseudo := uint64(uint16(e.length) - (e.l4 - e.l3))
	l4 := head[e.l4:]
	if h[0]>>4 == 6 {
		o.GSO = gsoTCP6
		binary.BigEndian.PutUint16(h[4:6], uint16(e.length-IPv6HeaderLen))
		pseudo = Sum(h[8:40], pseudo)
	} else {
		o.GSO = gsoTCP4
		was, sum := binary.BigEndian.Uint16(h[2:4]), binary.BigEndian.Uint16(h[10:12])
		binary.BigEndian.PutUint16(h[2:4], uint16(e.length))
		binary.BigEndian.PutUint16(h[10:12], UpdateChecksum16(sum, was, uint16(e.length)))
		pseudo = Sum(h[12:20], pseudo)
	}
	if e.accept == AcceptUDP {
		o.GSO, o.ChecksumOffset = gsoUDP, udpChecksumOffset
		binary.BigEndian.PutUint16(l4[4:6], uint16(e.length)-(e.l4-e.l3))
		binary.BigEndian.PutUint16(l4[6:8], Fold(pseudo+uint64(ProtoUDP)))
	} else {
		o.ChecksumOffset = tcpChecksumOffset
		l4[13] |= e.ending
		binary.BigEndian.PutUint16(l4[16:18], Fold(pseudo+uint64(ProtoTCP)))
	}
	return o
}
