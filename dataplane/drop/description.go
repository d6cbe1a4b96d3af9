package drop

// descriptions are one sentence a reason, for people.
var descriptions = [NumReasons]string{
	None:               "not dropped",
	EthTruncated:       "the frame ends within its Ethernet header",
	EthUnknownType:     "the frame carries neither IP nor ARP",
	EthNotForUs:        "the frame is addressed to another Ethernet address",
	VLANStacked:        "the frame has more than one VLAN tag",
	IPTruncated:        "the packet ends within its IP header",
	IPBadVersion:       "the IP version is not that of the EtherType",
	IPBadHeaderLength:  "the IP header's length cannot be right",
	IPBadLength:        "the IP packet claims to be longer than the frame",
	IPBadChecksum:      "the IPv4 header's checksum is wrong",
	IPBadOptions:       "the IPv4 options are malformed",
	IPSourceRoute:      "the packet wants to choose its own route (IPv4 source route options)",
	IPBadSource:        "the source is no address that a packet may come from",
	IPBadDestination:   "the destination is no address that a packet may go to",
	IPMulticast:        "multicast and broadcast are not forwarded",
	IP6BadExtension:    "an IPv6 extension header is malformed",
	IP6TooManyHeaders:  "the packet has too many IPv6 extension headers",
	IP6RoutingHeader:   "the packet has a deprecated IPv6 routing header (RFC 5095)",
	FragmentBad:        "the fragment cannot be part of any datagram",
	L4Truncated:        "the packet ends within its transport header",
	L4BadHeaderLength:  "the transport header's length cannot be right",
	OffloadBad:         "the virtio-net header contradicts the packet",
	OffloadBadGSO:      "the virtio-net header asks for a segmentation that the packet does not allow",
	OffloadBadChecksum: "the virtio-net header asks for a checksum outside the packet",
	FrameTooLong:       "the frame is longer than any buffer",
	ARPBad:             "the ARP message is malformed",
	NDBad:              "the neighbour discovery message is malformed",
	SourceNotPods:      "a pod sent from an address that is not its own",
	SourceNotMember:    "the underlay delivered a packet from no member of the cluster, or with another member's source",
	SourceNotHosts:     "the node's kernel sent from an address that is not the node's own",
	DestinationNotOurs: "the destination is nothing that packets from this port may reach",
	Unreachable:        "no route: the address belongs to no pod, node or service",
	OutsideNoSNAT:      "the packet would leave the cluster, and address translation is not available",
	HairpinUplink:      "the packet came from the underlay and would go back to it",
	LinkLocal:          "link-local addresses do not leave their link",
	HopLimitExceeded:   "the TTL or hop limit ran out",
	TooBig:             "the packet is longer than the next hop's MTU and may not be fragmented",
	PolicyDenied:       "policy denies the packet",
	NoFrame:            "the worker had no free frame",
	NoNeighbour:        "the next hop's Ethernet address is not known",
	PortDown:           "the port it was to leave by is down or has no device",
	PortFull:           "the port it was to leave by had no room",
	PortRejected:       "the device refused the packet",
	PortGone:           "the port was removed while the packet waited",
}

// Description is one sentence about the reason, without a full stop.
func (r Reason) Description() string {
	if r < NumReasons {
		return descriptions[r]
	}
	return "unknown"
}
