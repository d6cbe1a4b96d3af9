package packet

import "encoding/binary"

// DecrementTTL takes one off the TTL or hop limit of the packet in frame, and off p.TTL; the IPv4 header checksum is updated incrementally
// (RFC 1141, in the form of RFC 1624 that never makes a minus zero). The packet is IPv4 or IPv6, parsed without a Reason, and its TTL is not 0.
func DecrementTTL(p *Packet, frame []byte) {
	p.TTL--
	h := frame[p.L3:]
	if p.Kind == KindIPv4 {
		h = h[:12]
		h[8]--
		sum := uint32(binary.BigEndian.Uint16(h[10:12])) + 0x100
		sum += (sum + 1) >> 16
		binary.BigEndian.PutUint16(h[10:12], uint16(sum))
		return
	}
	h[7]--
}

// SetEthernet writes the Ethernet addresses of the frame. A VLAN tag is stripped: then the frame starts newStart = VLANTagLen bytes further on,
// all offsets of p are moved so that they count from there, and a checksum start kept beside the packet (virtio-net's csum_start) must
// shrink by as much. Otherwise newStart is 0. The packet is IPv4 or IPv6, parsed without a Reason.
func SetEthernet(frame []byte, p *Packet, dst, src MAC) (newStart int) {
	if p.L3 != EthernetHeaderLen {
		frame = stripVLAN(frame, p)
		newStart = VLANTagLen
	}
	*(*MAC)(frame[0:6]) = dst
	*(*MAC)(frame[6:12]) = src
	return newStart
}

// stripVLAN returns the frame without its first VLANTagLen bytes, the EtherType in its new place and p's offsets moved.
func stripVLAN(frame []byte, p *Packet) []byte {
	frame = frame[VLANTagLen:] // the inner EtherType already stands where it belongs, right in front of the IP header
	p.L3 -= VLANTagLen
	p.L4 -= VLANTagLen
	if p.Payload != 0 {
		p.Payload -= VLANTagLen
	}
	if p.FragmentHeader != 0 {
		p.FragmentHeader -= VLANTagLen
	}
	return frame
}
