package packet

import "encoding/binary"

// unicast reports whether the address is one station's: not a group, not all zero.
func (m MAC) unicast() bool { return m[0]&1 == 0 && m != MAC{} }

func putEthernet(b []byte, dst, src MAC, etherType uint16) {
	copy(b[0:6], dst[:])
	copy(b[6:12], src[:])
	binary.BigEndian.PutUint16(b[12:14], etherType)
}

// PutIPv4 writes to h, 20 bytes, the header of a packet the router itself sends: TTL 64, no options, payload bytes behind it. It is an atomic datagram
// (DF set), so that its identification may be 0 (RFC 6864 section 4.1).
func PutIPv4(h []byte, src, dst Addr, proto, tos uint8, payload int) {
	h = h[:IPv4HeaderLen]
	h[0], h[1] = 4<<4|IPv4HeaderLen/4, tos
	binary.BigEndian.PutUint16(h[2:4], uint16(IPv4HeaderLen+payload))
	binary.BigEndian.PutUint32(h[4:8], ipv4DF)
	h[8], h[9], h[10], h[11] = 64, proto, 0, 0
	binary.BigEndian.PutUint32(h[12:16], src.V4())
	binary.BigEndian.PutUint32(h[16:20], dst.V4())
	binary.BigEndian.PutUint16(h[10:12], Checksum(h, 0))
}

// PutIPv6 writes to h, 40 bytes, the header of a packet the router itself sends, with hopLimit and payload bytes behind it.
func PutIPv6(h []byte, src, dst Addr, proto, hopLimit uint8, payload int) {
	h = h[:IPv6HeaderLen]
	binary.BigEndian.PutUint32(h[0:4], 6<<28)
	binary.BigEndian.PutUint16(h[4:6], uint16(payload))
	h[6], h[7] = proto, hopLimit
	putAddr16(h[8:24], src)
	putAddr16(h[24:40], dst)
}

func addr16(b []byte) Addr {
	return Addr{binary.BigEndian.Uint64(b[0:8]), binary.BigEndian.Uint64(b[8:16])}
}

func putAddr16(b []byte, a Addr) {
	binary.BigEndian.PutUint64(b[0:8], a.Hi)
	binary.BigEndian.PutUint64(b[8:16], a.Lo)
}

// solicitedNode is the solicited-node multicast address of a (RFC 4291 section 2.7.1).
func solicitedNode(a Addr) Addr {
	return Addr{Hi: 0xff02 << 48, Lo: 1<<32 | 0xff<<24 | a.Lo&0xffffff}
}
