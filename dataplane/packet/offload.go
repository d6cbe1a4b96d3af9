package packet

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/drop"
)

// Offload is a packet's virtio-net metadata. It is port.Offload field for field, so that each converts to the other, and is repeated
// here because this package imports no ports.
type Offload struct {
	Flags          uint8
	GSO            uint8
	HeaderLen      uint16
	SegmentSize    uint16
	ChecksumStart  uint16
	ChecksumOffset uint16
}

// Values of Offload.Flags and Offload.GSO (linux/virtio_net.h). Package port exports them.
const (
	needsChecksum uint8 = 1
	dataValid     uint8 = 2

	gsoNone uint8 = 0
	gsoTCP4 uint8 = 1
	gsoTCP6 uint8 = 4
	gsoUDP  uint8 = 5
	gsoECN  uint8 = 0x80
)

// Bounds on the packets one GSO frame may become. A frame is paid for once when it is received, but sent segment by segment: without a
// bound, 64 KiB with a segment size of one byte would be 65,000 packets.
const (
	// MaxTCPSegments leaves room for every frame that a Linux sender makes at a reasonable MSS (64 KiB at the smallest, 48 bytes, would be
	// 1,365 segments, but nothing fills such a frame).
	MaxTCPSegments = 1024
	// MinTCPSegmentSize is Linux's TCP_MIN_GSO_SIZE: the smallest MSS it sends with, 48, less 40 bytes of options.
	MinTCPSegmentSize = 8
	// MaxUDPSegments is Linux's UDP_MAX_SEGMENTS, which every UDP_SEGMENT sender is held to.
	MaxUDPSegments = 128
)

// Where the checksum stands in its header.
const (
	tcpChecksumOffset    = 16
	udpChecksumOffset    = 6
	icmpv6ChecksumOffset = 2
)

// CheckOffload decides whether the metadata o describes the parsed packet, and puts it into the one form the rest of the data plane relies on.
// What comes from a pod is hostile, so nothing in o is believed that the packet does not confirm. head is the packet's first buffer, rest what
// follows it (nil if nothing). p was parsed from them without a Reason. After None:
//
//   - o is zero, a complete packet; or it has NeedsChecksum, ChecksumStart is p.L4 and ChecksumOffset the place of the checksum of TCP, UDP or
//     ICMPv6, HeaderLen is p.Payload;
//   - with a GSO type, moreover, NeedsChecksum is set, the type is that of the packet, and the payload is of at least two segments of
//     SegmentSize bytes and at most MaxTCPSegments or MaxUDPSegments, and ends where the frame ends.
//
// A checksum that was left unfinished inside a tunnel (kernels from 6.17 on leave a VXLAN or GRE packet's inner checksum, and GRE's own, to a TAP
// device) is completed on the spot: the tunnel's packet is complete then, and no later stage has to tell inner from outer.
//
// Otherwise the reason is OffloadBad (unknown flags, metadata for what is no IP packet), OffloadBadGSO (type or size
// impossible for this packet) or OffloadBadChecksum (checksum not where the packet has one).
func CheckOffload(p *Packet, head, rest []byte, o *Offload) drop.Reason {
	if o.Flags&^dataValid|o.GSO == 0 {
		// DataValid is what the sender's driver thinks; no receiver of ours relies on it.
		*o = Offload{}
		return drop.None
	}
	end := int(p.L3) + int(p.Length)
	if o.Flags&^(needsChecksum|dataValid) != 0 || p.Kind != KindIPv4 && p.Kind != KindIPv6 || p.Reason != drop.None || end > len(head)+len(rest) {
		return drop.OffloadBad
	}
	if o.Flags&needsChecksum == 0 {
		return drop.OffloadBadGSO // GSO without: no sender that means it (VIRTIO 1.2, section 5.1.6.2) has finished the sum over all segments
	}
	offset, ok := checksumOffset(p)
	if !ok || o.ChecksumStart != p.L4 || o.ChecksumOffset != offset {
		if o.GSO == gsoNone && finishInner(p, head, rest, o) {
			*o = Offload{}
			return drop.None
		}
		return drop.OffloadBadChecksum
	}
	if p.Proto == ProtoUDP && int(binary.BigEndian.Uint16(head[p.L4+4:])) != end-int(p.L4) {
		return drop.OffloadBadChecksum // bytes behind the datagram: the sum cannot both skip and cover them
	}
	if o.GSO != gsoNone {
		if !gsoMatches(p, o.GSO) || o.SegmentSize == 0 || end != len(head)+len(rest) {
			return drop.OffloadBadGSO
		}
		payload, size := end-int(p.Payload), int(o.SegmentSize)
		if payload <= size {
			// One segment is no GSO frame; Linux takes it so, too (virtio_net_hdr_to_skb).
			o.GSO = gsoNone
		} else if p.Proto == ProtoTCP {
			if size < MinTCPSegmentSize || payload > size*MaxTCPSegments {
				return drop.OffloadBadGSO
			}
		} else if payload > size*MaxUDPSegments {
			return drop.OffloadBadGSO
		}
	}
	if o.GSO == gsoNone {
		o.SegmentSize = 0
	}
	o.Flags = needsChecksum
	o.HeaderLen = p.Payload
	return drop.None
}

// checksumOffset is where in its L4 header a packet has the checksum that a sender may leave unfinished. Never in fragments (a sum
// over the whole datagram), nor in SCTP (a CRC, which virtio-net cannot leave unfinished) and ICMP (has no pseudo-header).
func checksumOffset(p *Packet) (uint16, bool) {
	if p.Flags&(FlagL4|FlagFragment) != FlagL4 {
		return 0, false
	}
	switch p.Proto {
	case ProtoTCP:
		return tcpChecksumOffset, true
	case ProtoUDP:
		return udpChecksumOffset, true
	case ProtoICMPv6:
		return icmpv6ChecksumOffset, true
	}
	return 0, false
}

func gsoMatches(p *Packet, gso uint8) bool {
	switch gso {
	case gsoTCP4, gsoTCP4 | gsoECN:
		return p.Proto == ProtoTCP && p.Kind == KindIPv4
	case gsoTCP6, gsoTCP6 | gsoECN:
		return p.Proto == ProtoTCP && p.Kind == KindIPv6
	case gsoUDP:
		return p.Proto == ProtoUDP
	}
	return false
}

// finishInner completes a checksum inside the payload of a tunnel: of any protocol that is not one of those with ports of their own, or
// UDP. Whatever o says, only bytes behind the IP header are read and written, which the sender could have chosen anyway.
func finishInner(p *Packet, head, rest []byte, o *Offload) bool {
	if p.Flags&FlagFragment != 0 {
		return false
	}
	least := int(p.L4)
	switch p.Proto {
	case ProtoTCP, ProtoICMP, ProtoICMPv6, ProtoSCTP:
		return false
	case ProtoUDP:
		if p.Flags&FlagL4 == 0 {
			return false
		}
		least = int(p.Payload)
	}
	head, rest = cut(p, head, rest)
	start := int(o.ChecksumStart)
	at := start + int(o.ChecksumOffset)
	if start < least || at+2 > len(head)+len(rest) {
		return false
	}
	if at < len(head) != (at+1 < len(head)) {
		return false // astride two buffers; no Linux driver cuts headers so
	}
	// An outer UDP checksum is right already: its sender knew what the inner one would be (Linux, Documentation/networking/checksum-offloads).
	finishSum(head, rest, start, at)
	return true
}

// FinishChecksum completes in place the checksum of a packet whose Offload CheckOffload left with NeedsChecksum and without GSO: its field
// holds the sum of the pseudo-header. head is the packet's first buffer, rest what follows it (nil if nothing).
func FinishChecksum(p *Packet, head, rest []byte) {
	if offset, ok := checksumOffset(p); ok {
		head, rest = cut(p, head, rest)
		finishSum(head, rest, int(p.L4), int(p.L4)+int(offset))
	}
}

// cut returns the bytes of the frame up to the end of the IP packet: without padding.
func cut(p *Packet, head, rest []byte) ([]byte, []byte) {
	end := int(p.L3) + int(p.Length)
	if end <= len(head) {
		return head[:end], nil
	}
	return head, rest[:end-len(head)]
}

// finishSum stores at offset at the checksum of everything from start on. As in Linux (skb_checksum_help) a sum of 0 is
// stored as 0xffff: UDP must (RFC 768) and the others may, since both are zero in ones' complement.
func finishSum(head, rest []byte, start, at int) {
	var sum uint64
	if start < len(head) {
		sum = sumParts(head[start:], rest)
	} else {
		sum = Sum(rest[start-len(head):], 0)
	}
	field := head
	if at >= len(head) {
		field, at = rest, at-len(head)
	}
	binary.BigEndian.PutUint16(field[at:], nonZero(^Fold(sum)))
}

// nonZero is the checksum c as UDP stores it.
func nonZero(c uint16) uint16 {
	if c == 0 {
		return 0xffff
	}
	return c
}

// sumParts is the partial sum of a and b, one after the other.
func sumParts(a, b []byte) uint64 {
	sum := Sum(a, 0)
	if len(b) == 0 {
		return sum
	}
	return sum + atParity(Sum(b, 0), len(a))
}

// atParity is the partial sum of bytes that stand at offset in what is summed: at an odd one every byte is in the other half of its word
// (RFC 1071, section 2B).
func atParity(sum uint64, offset int) uint64 {
	if offset&1 == 0 {
		return sum
	}
	f := Fold(sum)
	return uint64(f>>8 | f<<8)
}
