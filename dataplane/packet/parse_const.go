package packet

// Lengths of headers, in bytes.
const (
	EthernetHeaderLen = 14
	VLANTagLen        = 4
	IPv4HeaderLen     = 20 // without options
	IPv6HeaderLen     = 40
	TCPHeaderLen      = 20 // without options
	UDPHeaderLen      = 8
	ICMPHeaderLen     = 8 // ICMP and ICMPv6, the part all messages share
	SCTPHeaderLen     = 12
	ARPLen            = 28 // of an Ethernet/IPv4 ARP packet
)

// EtherTypes (IEEE 802 numbers, as registered with IANA).
const (
	EtherTypeIPv4       uint16 = 0x0800
	EtherTypeARP        uint16 = 0x0806
	EtherTypeVLAN       uint16 = 0x8100 // customer tag, IEEE 802.1Q
	EtherTypeServiceTag uint16 = 0x88a8 // service tag, IEEE 802.1ad
	EtherTypeIPv6       uint16 = 0x86dd
)

// Protocol numbers and IPv6 next header values (IANA "Assigned Internet Protocol Numbers").
const (
	ProtoHopByHop    uint8 = 0
	ProtoICMP        uint8 = 1
	ProtoTCP         uint8 = 6
	ProtoUDP         uint8 = 17
	ProtoRouting     uint8 = 43
	ProtoFragment    uint8 = 44
	ProtoESP         uint8 = 50
	ProtoAH          uint8 = 51
	ProtoICMPv6      uint8 = 58
	ProtoNone        uint8 = 59
	ProtoDestination uint8 = 60
	ProtoSCTP        uint8 = 132
)

// ICMP and ICMPv6 message types that the parser and the answers to neighbours look at.
const (
	icmpEchoReply   = 0
	icmpEchoRequest = 8

	icmp6EchoRequest = 128
	icmp6EchoReply   = 129
	icmp6MLDReport   = 131
	icmp6MLDDone     = 132
	icmp6RouterSol   = 133
	icmp6NeighborSol = 135
	icmp6NeighborAdv = 136
	icmp6Redirect    = 137
	icmp6MLDv2Report = 143
)

// Bits of the word that holds IPv4's fragment flags and offset.
const (
	ipv4DF         = 0x4000
	ipv4MF         = 0x2000
	ipv4OffsetMask = 0x1fff // in units of 8 bytes
)

// maxExtensionHeaders is how many IPv6 extension headers a packet may carry. RFC 8200 section 4.1 lists seven at most; more is an attack on
// the parser (RFC 8504 section 5.3 lets nodes set such limits).
const maxExtensionHeaders = 8
