// Package drop names the causes packets die of: one line each, used by counters, the local API and people.
package drop

// Reason is why a packet was dropped. The zero value is no reason: the packet lives.
// Values index counter arrays and are not stable across versions; names are.
type Reason uint8

//go:generate go tool stringer -type=Reason -linecomment
const (
	None Reason = iota // none

	// What the packet itself is.
	EthTruncated       // eth_truncated
	EthUnknownType     // eth_unknown_type
	EthNotForUs        // eth_not_for_us
	VLANStacked        // vlan_stacked
	IPTruncated        // ip_truncated
	IPBadVersion       // ip_bad_version
	IPBadHeaderLength  // ip_bad_header_length
	IPBadLength        // ip_bad_length
	IPBadChecksum      // ip_bad_checksum
	IPBadOptions       // ip_bad_options
	IPSourceRoute      // ip_source_route
	IPBadSource        // ip_bad_source
	IPBadDestination   // ip_bad_destination
	IPMulticast        // ip_multicast
	IP6BadExtension    // ip6_bad_extension
	IP6TooManyHeaders  // ip6_too_many_headers
	IP6RoutingHeader   // ip6_routing_header
	FragmentBad        // fragment_bad
	L4Truncated        // l4_truncated
	L4BadHeaderLength  // l4_bad_header_length
	OffloadBad         // offload_bad
	OffloadBadGSO      // offload_bad_gso
	OffloadBadChecksum // offload_bad_checksum
	FrameTooLong       // frame_too_long
	ARPBad             // arp_bad
	NDBad              // nd_bad

	// Who sent it.
	SourceNotPods   // source_not_pods
	SourceNotMember // source_not_member
	SourceNotHosts  // source_not_hosts

	// Where it wanted to go.
	DestinationNotOurs // destination_not_ours
	Unreachable        // unreachable
	OutsideNoSNAT      // outside_no_snat
	HairpinUplink      // hairpin_uplink
	LinkLocal          // link_local
	HopLimitExceeded   // hop_limit_exceeded
	TooBig             // too_big
	PolicyDenied       // policy_denied

	// What address translation said.
	NATProtocol         // nat_protocol
	NATICMPType         // nat_icmp_type
	NATNoAddress        // nat_no_address
	NATNoSession        // nat_no_session
	NATFiltered         // nat_filtered
	NATNoSYN            // nat_no_syn
	NATNoPort           // nat_no_port
	NATPortTaken        // nat_port_taken
	NATSessionLimit     // nat_session_limit
	NATHalfOpenLimit    // nat_half_open_limit
	NATTableFull        // nat_table_full
	NATErrorBad         // nat_error_bad
	NATErrorTruncated   // nat_error_truncated
	NATErrorMismatch    // nat_error_mismatch
	NATFragmentLimit    // nat_fragment_limit
	NATFragmentConflict // nat_fragment_conflict
	NATFragmentTimeout  // nat_fragment_timeout
	HandoverFull        // handover_full

	// What was missing on the way.
	NoFrame      // no_frame
	NoNeighbour  // no_neighbour
	PortDown     // port_down
	PortFull     // port_full
	PortRejected // port_rejected
	PortGone     // port_gone

	// Packets that were for the data plane itself and are consumed by it are no drops: ARP, ND and ping for the gateway are counted as answered.

	NumReasons // the number of reasons
)
