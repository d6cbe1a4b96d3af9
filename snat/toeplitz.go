package snat

import (
	"encoding/binary"
	"math/bits"

	"github.com/overplane/overplane/dataplane/packet"
)

// RSS describes how a NIC spreads what it receives over its queues: receive side scaling with the Toeplitz hash, as ethtool shows it. It is read
// only and may be shared.
type RSS struct {
	Key   []byte   // 40 bytes or more
	Table []uint16 // indirection table, a power of two entries: queue numbers
	// PortsTCP and PortsUDP say whether the ports are hashed, too (ethtool -n DEV rx-flow-hash tcp4). If not, all ports are alike.
	PortsTCP, PortsUDP bool
}

// Queue is the receive queue of a packet with these addresses and, if ports, these ports.
func (r *RSS) Queue(src, dst packet.Addr, srcPort, dstPort uint16, ports bool) int {
	if len(r.Table) == 0 {
		return 0
	}
	return int(r.Table[int(Toeplitz(r.Key, src, dst, srcPort, dstPort, ports))&(len(r.Table)-1)])
}

// Toeplitz is the hash that Microsoft's "RSS Hashing Functions" (NDIS 6) defines over addresses and, if ports, ports. A key that is too short hashes to 0.
func Toeplitz(key []byte, src, dst packet.Addr, srcPort, dstPort uint16, ports bool) uint32 {
	var in [36]byte
	n := 8
	if src.Is4() {
		binary.BigEndian.PutUint32(in[0:], src.V4())
		binary.BigEndian.PutUint32(in[4:], dst.V4())
	} else {
		n = 32
		binary.BigEndian.PutUint64(in[0:], src.Hi)
		binary.BigEndian.PutUint64(in[8:], src.Lo)
		binary.BigEndian.PutUint64(in[16:], dst.Hi)
		binary.BigEndian.PutUint64(in[24:], dst.Lo)
	}
	if ports {
		binary.BigEndian.PutUint16(in[n:], srcPort)
		binary.BigEndian.PutUint16(in[n+2:], dstPort)
		n += 4
	}
	if len(key) < n+4 {
		return 0
	}
	var h uint32
	for i, b := range in[:n] {
		// 40 bits of the key, of which 32 count for each bit of b.
		window := uint64(binary.BigEndian.Uint32(key[i:]))<<8 | uint64(append40(key, i+4))
		for b != 0 {
			lead := bits.LeadingZeros8(b)
			h ^= uint32(window >> (8 - lead))
			b &^= 0x80 >> lead
		}
	}
	return h
}

// append40 is byte i of the key, 0 behind its end.
func append40(key []byte, i int) byte {
	if i < len(key) {
		return key[i]
	}
	return 0
}
