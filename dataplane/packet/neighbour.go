package packet

import (
	"encoding/binary"

	"github.com/overplane/overplane/dataplane/drop"
)

// Lengths of the answers, Ethernet header included.
const (
	arpReplyLen = EthernetHeaderLen + ARPLen
	ndReplyLen  = EthernetHeaderLen + IPv6HeaderLen + 32 // neighbour advertisement with one option of 8 bytes
)

// ARPReply writes to dst the answer to an ARP request for the gateway's IPv4 address (RFC 826) and returns its length. p was filled from request by Parse.
// ok is false for what asks for no answer: replies, requests for other addresses, announcements (a sender that claims the
// gateway's own address), and then dst is untouched; p.Reason is ARPBad if the packet is malformed. Probes (RFC 5227, sender
// address 0) are answered. dst may be request itself.
func ARPReply(dst, request []byte, p *Packet, gateway Addr, gatewayMAC MAC) (n int, ok bool) {
	const opRequest, opReply = 1, 2
	if p.Kind != KindARP || p.Reason != drop.None || p.Dst != gateway || p.Src == gateway || len(dst) < arpReplyLen {
		return 0, false
	}
	a := request[p.L3:][:ARPLen]
	if op := binary.BigEndian.Uint16(a[6:8]); op != opRequest {
		return 0, false
	}
	sender := MAC(a[8:14])
	if !sender.unicast() {
		p.Reason = drop.ARPBad
		return 0, false
	}
	dst = dst[:arpReplyLen]
	putEthernet(dst, MAC(request[6:12]), gatewayMAC, EtherTypeARP)
	r := dst[EthernetHeaderLen:]
	binary.BigEndian.PutUint64(r[0:8], 0x0001_0800_0604_0000|opReply)
	copy(r[8:14], gatewayMAC[:])
	binary.BigEndian.PutUint32(r[14:18], gateway.V4())
	copy(r[18:24], sender[:])
	binary.BigEndian.PutUint32(r[24:28], p.Src.V4())
	return arpReplyLen, true
}

// NDReply writes to dst the neighbour advertisement that answers a neighbour solicitation for the gateway's IPv6 address (RFC 4861 section 7.2.4)
// and returns its length. p was filled from request by Parse. ok is false for all other messages, router solicitations among them,
// and then dst is untouched; p.Reason is NDBad if the message is not valid (RFC 4861 section 7.1.1, RFC 6980). A solicitation from
// the unspecified address (duplicate address detection) is answered to all nodes. dst may be request itself.
func NDReply(dst, request []byte, p *Packet, gateway Addr, gatewayMAC MAC) (n int, ok bool) {
	const solicitationLen = 24
	if p.Kind != KindIPv6 || p.Reason != drop.None || p.Flags&FlagND == 0 {
		return 0, false
	}
	length := int(p.Length) - int(p.L4-p.L3)
	if p.TTL != 255 || p.ICMPCode != 0 || p.FragmentHeader != 0 || int(p.L4)+length > len(request) || !VerifyL4(p, request, nil) {
		p.Reason = drop.NDBad
		return 0, false
	}
	if p.ICMPType != icmp6NeighborSol {
		return 0, false
	}
	m := request[p.L4:][:length]
	if len(m) < solicitationLen {
		p.Reason = drop.NDBad
		return 0, false
	}
	target := addr16(m[8:24])
	probe := p.Src == Addr{}
	if target.Hi >= multicast6 || !validNDOptions(m[solicitationLen:], probe) || probe && p.Dst != solicitedNode(target) {
		p.Reason = drop.NDBad
		return 0, false
	}
	if target != gateway || len(dst) < ndReplyLen {
		return 0, false
	}

	const router, solicited, override = 0x80, 0x40, 0x20
	to, toMAC, flags := p.Src, MAC(request[6:12]), byte(router|solicited|override)
	if probe {
		to = Addr{Hi: 0xff02 << 48, Lo: 1}
		toMAC = MAC{0x33, 0x33, 0, 0, 0, 1}
		flags = router | override
	}
	dst = dst[:ndReplyLen]
	putEthernet(dst, toMAC, gatewayMAC, EtherTypeIPv6)
	h := dst[EthernetHeaderLen:]
	PutIPv6(h, gateway, to, ProtoICMPv6, 255, 32)
	r := h[IPv6HeaderLen:]
	clear(r)
	r[0] = icmp6NeighborAdv
	r[4] = flags
	putAddr16(r[8:24], gateway)
	r[24], r[25] = 2, 1 // target link-layer address, 8 bytes
	copy(r[26:32], gatewayMAC[:])
	binary.BigEndian.PutUint16(r[2:4], Checksum(r, PseudoHeader(gateway, to, ProtoICMPv6, uint32(len(r)))))
	return ndReplyLen, true
}

// validNDOptions walks the options of a solicitation: none has length 0, and a probe names no source link-layer address.
func validNDOptions(o []byte, probe bool) bool {
	const sourceLinkLayer = 1
	for len(o) > 0 {
		if len(o) < 2 || o[1] == 0 || int(o[1])*8 > len(o) || probe && o[0] == sourceLinkLayer {
			return false
		}
		o = o[int(o[1])*8:]
	}
	return true
}

// EchoReply writes to dst the answer to an ICMP or ICMPv6 echo request and returns its length; the caller has seen that the request is for
// the gateway. p was filled from frame, which holds the whole packet, by Parse. ok is false if it is no unicast echo request, a fragment,
// or does not fit dst. IP options and extension headers are not sent back. The ICMP checksum is updated, not verified: a damaged request
// makes a reply that its sender will find damaged. dst may be frame itself.
func EchoReply(dst, frame []byte, p *Packet) (n int, ok bool) {
	if p.Reason != drop.None || p.Flags&(FlagL4|FlagFragment|FlagMulticast) != FlagL4 {
		return 0, false
	}
	request, reply := byte(icmpEchoRequest), byte(icmpEchoReply)
	l4 := EthernetHeaderLen + IPv4HeaderLen
	switch {
	case p.Kind == KindIPv4 && p.Proto == ProtoICMP:
	case p.Kind == KindIPv6 && p.Proto == ProtoICMPv6:
		request, reply = icmp6EchoRequest, icmp6EchoReply
		l4 = EthernetHeaderLen + IPv6HeaderLen
	default:
		return 0, false
	}
	length := int(p.Length) - int(p.L4-p.L3)
	n = l4 + length
	if p.ICMPType != request || p.ICMPCode != 0 || int(p.L4)+length > len(frame) || n > len(dst) {
		return 0, false
	}
	to, from := MAC(frame[6:12]), MAC(frame[0:6])
	tos := frame[p.L3+1]
	m := dst[l4:n]
	copy(m, frame[p.L4:int(p.L4)+length])
	m[0] = reply
	sum := binary.BigEndian.Uint16(m[2:4])
	binary.BigEndian.PutUint16(m[2:4], UpdateChecksum16(sum, uint16(request)<<8, uint16(reply)<<8))
	if p.Kind == KindIPv4 {
		putEthernet(dst, to, from, EtherTypeIPv4)
		PutIPv4(dst[EthernetHeaderLen:l4], p.Dst, p.Src, ProtoICMP, tos, length)
	} else {
		putEthernet(dst, to, from, EtherTypeIPv6)
		PutIPv6(dst[EthernetHeaderLen:l4], p.Dst, p.Src, ProtoICMPv6, 64, length)
	}
	return n, true
}
