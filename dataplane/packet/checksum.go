package packet

import (
	"encoding/binary"
	"math/bits"
)

// Sum adds the bytes of b, as big-endian 16-bit words, to the partial sum initial and returns the new partial sum (RFC 1071). An odd last
// byte counts as if a zero byte followed it, so of several slices summed one after the other only the last may be of odd length.
// Partial sums are added with +, and become a checksum by Checksum or Fold.
//
// Pure function; safe for concurrent use.
func Sum(b []byte, initial uint64) uint64 {
	// The ones' complement sum may be taken over wider words and in the machine's byte order, and be folded and swapped once at the end
	// (RFC 1071, section 2). Two sums, so that the two chains of add-with-carry do not wait for each other.
	var s0, s1, c uint64
	for len(b) >= 64 {
		s0, c = bits.Add64(s0, binary.LittleEndian.Uint64(b[0:8]), 0)
		s0, c = bits.Add64(s0, binary.LittleEndian.Uint64(b[8:16]), c)
		s0, c = bits.Add64(s0, binary.LittleEndian.Uint64(b[16:24]), c)
		s0, c = bits.Add64(s0, binary.LittleEndian.Uint64(b[24:32]), c)
		s0 += c
		s1, c = bits.Add64(s1, binary.LittleEndian.Uint64(b[32:40]), 0)
		s1, c = bits.Add64(s1, binary.LittleEndian.Uint64(b[40:48]), c)
		s1, c = bits.Add64(s1, binary.LittleEndian.Uint64(b[48:56]), c)
		s1, c = bits.Add64(s1, binary.LittleEndian.Uint64(b[56:64]), c)
		s1 += c
		b = b[64:]
	}
	s0, c = bits.Add64(s0, s1, 0)
	s0 += c
	for len(b) >= 8 {
		s0, c = bits.Add64(s0, binary.LittleEndian.Uint64(b), 0)
		s0 += c
		b = b[8:]
	}
	if len(b) > 0 {
		var tail uint64
		if len(b) >= 4 {
			tail = uint64(binary.LittleEndian.Uint32(b))
			b = b[4:]
			s0, c = bits.Add64(s0, tail, 0)
			s0 += c
		}
		tail = 0
		if len(b) >= 2 {
			tail = uint64(binary.LittleEndian.Uint16(b))
			b = b[2:]
			if len(b) > 0 {
				tail += uint64(b[0])
			}
		} else if len(b) > 0 {
			tail = uint64(b[0])
		}
		s0, c = bits.Add64(s0, tail, 0)
		s0 += c
	}
	return initial + uint64(bits.ReverseBytes16(Fold(s0)))
}

// Fold reduces a partial sum to the 16-bit ones' complement sum. Its complement is the checksum.
func Fold(sum uint64) uint16 {
	sum = sum>>32 + sum&0xffffffff // at most 33 bits
	sum = sum>>16 + sum&0xffff     // at most 18 bits
	sum = sum>>16 + sum&0xffff
	return uint16(sum>>16 + sum)
}

// Checksum is the internet checksum of b and what the partial sum initial already covers, ready to be stored in big-endian order. The checksum
// field itself must be zero in b. UDP stores 0xffff in place of 0 (RFC 768, RFC 8200 section 8.1); that is the caller's business.
func Checksum(b []byte, initial uint64) uint16 { return ^Fold(Sum(b, initial)) }

// PseudoHeader is the partial sum of the pseudo-header of TCP, UDP and ICMPv6 (RFC 793, RFC 768, RFC 8200 section 8.1). src and dst are of the
// same family; length is the L4 header and payload in bytes.
//
// The mapped form of an IPv4 address adds only the word 0xffff, which is a zero of the ones' complement sum: both families sum alike.
func PseudoHeader(src, dst Addr, proto uint8, length uint32) uint64 {
	s, c := bits.Add64(src.Hi, src.Lo, 0)
	s, c = bits.Add64(s, dst.Hi, c)
	s, c = bits.Add64(s, dst.Lo, c)
	s, c = bits.Add64(s, uint64(proto)+uint64(length), c)
	s += c
	// Folded half way, so that partial sums can be added without regard to carries.
	return s>>32 + s&0xffffffff
}

// UpdateChecksum16 returns what the checksum becomes when one of the 16-bit words it covers changes (RFC 1624, equation 3). A bad
// checksum stays bad by the same amount. For UDP over IPv4 the caller leaves a checksum of 0 (none) alone.
func UpdateChecksum16(sum, from, to uint16) uint16 {
	return ^Fold(uint64(^sum) + uint64(^from) + uint64(to))
}
