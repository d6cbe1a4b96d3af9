package packet

import "github.com/overplane/overplane/dataplane/drop"

// parseCase is a frame, and what is to come out of it. Seeds of FuzzParse, too.
type parseCase struct {
	name   string
	frame  []byte
	cut    int // bytes of frame in the first buffer; 0: all
	reason drop.Reason
	want   func(p *Packet) // sets the fields that differ from those of a plain packet of its kind
}

func with[T any](v T) *T { return &v }

func parseCases() []parseCase {
	tcp := testTCP(5, 0x12, nil, []byte("payload"))
	udp := testUDP(0, []byte("query"))
	long := make([]byte, 2000)
	rh := func(typ, left byte) []byte {
		x := testExtension(ProtoUDP, 2, make([]byte, 16))
		x[2], x[3] = typ, left
		return x
	}
	ah := testExtension(ProtoTCP, 2, nil)[:24]
	ah[1] = 4 // (4+2)*4 bytes
	var eight, nine []byte
	for range 7 {
		eight = append(eight, testExtension(ProtoDestination, 0, nil)...)
	}
	nine = concat(eight, testExtension(ProtoDestination, 0, nil), testExtension(ProtoUDP, 0, nil))
	eight = append(eight, testExtension(ProtoUDP, 0, nil)...)
	v4 := func(f ip4, body []byte) []byte { return f.frame(body) }
	v6 := func(f ip6, body []byte) []byte { return f.frame(body) }
	addr := func(s string) *Addr { return with(testAddr(s)) }
	ns := testICMP(icmp6NeighborSol, 0, make([]byte, 20)...)

	return []parseCase{
		// Ethernet
		{name: "empty", frame: nil, reason: drop.EthTruncated},
		{name: "ethernet header cut", frame: make([]byte, 13), reason: drop.EthTruncated},
		{name: "vlan tag cut", frame: testEthernet(EtherTypeVLAN, []byte{0, 1, 8}), reason: drop.EthTruncated},
		{name: "unknown ethertype", frame: testEthernet(0x88cc, make([]byte, 60)), reason: drop.EthUnknownType},
		{name: "802.3 length", frame: testEthernet(60, make([]byte, 60)), reason: drop.EthUnknownType},
		{name: "one vlan tag", frame: testEthernet(EtherTypeVLAN, testVLAN(EtherTypeIPv4, ip4{proto: ProtoTCP}.packet(tcp)))},
		{name: "two vlan tags", frame: testEthernet(EtherTypeVLAN, testVLAN(EtherTypeVLAN, testVLAN(EtherTypeIPv4, ip4{proto: ProtoTCP}.packet(tcp)))), reason: drop.VLANStacked},
		{name: "service tag", frame: testEthernet(EtherTypeServiceTag, testVLAN(EtherTypeIPv4, ip4{proto: ProtoTCP}.packet(tcp))), reason: drop.VLANStacked},

		// ARP
		{name: "arp", frame: testARP(1, testSrcMAC, testSrc4, testDst4)},
		{name: "arp cut", frame: testARP(1, testSrcMAC, testSrc4, testDst4)[:41], reason: drop.ARPBad},
		{name: "arp of another hardware", frame: testEthernet(EtherTypeARP, concat([]byte{0, 6, 8, 0, 6, 4}, make([]byte, 22))), reason: drop.ARPBad},

		// IPv4
		{name: "tcp4", frame: v4(ip4{proto: ProtoTCP}, tcp)},
		{name: "tcp4 syn-ack flags", frame: v4(ip4{proto: ProtoTCP, frag: ipv4DF}, tcp), want: func(p *Packet) { p.TCPFlags = 0x12; p.Flags = FlagDF | FlagL4 }},
		{name: "tcp4 options", frame: v4(ip4{proto: ProtoTCP}, testTCP(8, 0x10, make([]byte, 12), []byte("x")))},
		{name: "udp4", frame: v4(ip4{proto: ProtoUDP}, udp)},
		{name: "udp4 with ethernet padding", frame: append(v4(ip4{proto: ProtoUDP}, udp), make([]byte, 13)...), want: func(p *Packet) { p.Length = 33 }},
		{name: "udp4 empty", frame: v4(ip4{proto: ProtoUDP}, testUDP(0, nil))},
		{name: "udp4 shorter than ip", frame: v4(ip4{proto: ProtoUDP}, testUDP(10, []byte("queryoptions")))},
		{name: "udp4 longer than ip", frame: v4(ip4{proto: ProtoUDP}, testUDP(14, []byte("query"))), reason: drop.L4BadHeaderLength},
		{name: "udp4 length below 8", frame: v4(ip4{proto: ProtoUDP}, testUDP(7, []byte("query"))), reason: drop.L4BadHeaderLength},
		{name: "udp4 cut", frame: v4(ip4{proto: ProtoUDP}, udp[:7]), reason: drop.L4Truncated},
		{name: "tcp4 cut by ip length", frame: v4(ip4{proto: ProtoTCP}, tcp[:19]), reason: drop.L4Truncated},
		{name: "tcp4 data offset 4", frame: v4(ip4{proto: ProtoTCP}, testTCP(4, 0, nil, long)), reason: drop.L4BadHeaderLength},
		{name: "tcp4 data offset beyond the packet", frame: append(v4(ip4{proto: ProtoTCP}, testTCP(8, 0, nil, []byte("x"))), long...), reason: drop.L4BadHeaderLength},
		{name: "tcp4 header beyond the first buffer", frame: v4(ip4{proto: ProtoTCP}, testTCP(8, 0, make([]byte, 12), long)), cut: 60, reason: drop.L4Truncated},
		{name: "tcp4 chain", frame: v4(ip4{proto: ProtoTCP}, testTCP(5, 0x10, nil, long)), cut: 54},
		{name: "tcp4 64 KiB chain", frame: v4(ip4{proto: ProtoTCP}, testTCP(5, 0x10, nil, make([]byte, 65495))), cut: 2048, want: func(p *Packet) { p.Length = 65535 }},
		{name: "ip4 header cut", frame: v4(ip4{proto: ProtoTCP}, nil)[:33], reason: drop.IPTruncated},
		{name: "ip4 options beyond the first buffer", frame: v4(ip4{proto: ProtoTCP, options: make([]byte, 8)}, tcp), cut: 40, reason: drop.IPTruncated},
		{name: "ip4 version", frame: v4(ip4{proto: ProtoTCP, versionIHL: 0x55}, tcp), reason: drop.IPBadVersion},
		{name: "ip4 header length 4", frame: v4(ip4{proto: ProtoTCP, versionIHL: 0x44}, tcp), reason: drop.IPBadHeaderLength},
		{name: "ip4 header longer than the packet", frame: v4(ip4{proto: ProtoTCP, versionIHL: 0x4f, length: 47}, tcp), reason: drop.IPBadLength},
		{name: "ip4 length beyond the frame", frame: v4(ip4{proto: ProtoTCP, length: 48}, tcp), reason: drop.IPBadLength},
		{name: "ip4 checksum", frame: v4(ip4{proto: ProtoTCP, sumError: 1}, tcp), reason: drop.IPBadChecksum},
		{name: "ip4 unknown protocol", frame: v4(ip4{proto: 253}, nil)},
		{name: "ip4 icmpv6 is unknown", frame: v4(ip4{proto: ProtoICMPv6}, testICMP(135, 0, 1, 2, 3, 4))},
		{name: "icmp echo", frame: v4(ip4{proto: ProtoICMP}, testICMP(8, 0, 0x12, 0x34, 0, 1)), want: func(p *Packet) { p.SrcPort, p.DstPort, p.ICMPType = 0x1234, 0x1234, 8 }},
		{name: "icmp unreachable", frame: v4(ip4{proto: ProtoICMP}, testICMP(3, 4, 0, 0, 5, 0xdc)), want: func(p *Packet) { p.ICMPType, p.ICMPCode = 3, 4 }},
		{name: "icmp cut", frame: v4(ip4{proto: ProtoICMP}, testICMP(8, 0, 0, 0, 0)), reason: drop.L4Truncated},
		{name: "sctp4", frame: v4(ip4{proto: ProtoSCTP}, append([]byte{0x12, 0x34, 0x56, 0x78}, make([]byte, 8)...))},
		{name: "sctp4 cut", frame: v4(ip4{proto: ProtoSCTP}, make([]byte, 11)), reason: drop.L4Truncated},

		{name: "ip4 router alert", frame: v4(ip4{proto: ProtoUDP, options: []byte{148, 4, 0, 0}}, udp)},
		{name: "ip4 options end early", frame: v4(ip4{proto: ProtoUDP, options: []byte{1, 0, 131, 0}}, udp)},
		{name: "ip4 loose source route", frame: v4(ip4{proto: ProtoUDP, options: []byte{1, 131, 3, 4}}, udp), reason: drop.IPSourceRoute},
		{name: "ip4 strict source route", frame: v4(ip4{proto: ProtoUDP, options: []byte{137, 7, 4, 1, 2, 3, 4, 0}}, udp), reason: drop.IPSourceRoute},
		{name: "ip4 option of length 0", frame: v4(ip4{proto: ProtoUDP, options: []byte{7, 0, 0, 0}}, udp), reason: drop.IPBadOptions},
		{name: "ip4 option of length 1", frame: v4(ip4{proto: ProtoUDP, options: []byte{7, 1, 0, 0}}, udp), reason: drop.IPBadOptions},
		{name: "ip4 option beyond the header", frame: v4(ip4{proto: ProtoUDP, options: []byte{1, 7, 4, 0}}, udp), reason: drop.IPBadOptions},
		{name: "ip4 option without length", frame: v4(ip4{proto: ProtoUDP, options: []byte{1, 1, 1, 7}}, udp), reason: drop.IPBadOptions},

		{name: "ip4 source this network", frame: v4(ip4{proto: ProtoUDP, src: testAddr("0.1.2.3")}, udp), reason: drop.IPBadSource},
		{name: "ip4 source loopback", frame: v4(ip4{proto: ProtoUDP, src: testAddr("127.0.0.1")}, udp), reason: drop.IPBadSource},
		{name: "ip4 source multicast", frame: v4(ip4{proto: ProtoUDP, src: testAddr("224.0.0.1")}, udp), reason: drop.IPBadSource},
		{name: "ip4 source broadcast", frame: v4(ip4{proto: ProtoUDP, src: testAddr("255.255.255.255")}, udp), reason: drop.IPBadSource},
		{name: "ip4 source class E", frame: v4(ip4{proto: ProtoUDP, src: testAddr("250.0.0.1")}, udp)},
		{name: "ip4 destination this network", frame: v4(ip4{proto: ProtoUDP, dst: testAddr("0.0.0.0")}, udp), reason: drop.IPBadDestination},
		{name: "ip4 destination loopback", frame: v4(ip4{proto: ProtoUDP, dst: testAddr("127.9.9.9")}, udp), reason: drop.IPBadDestination},
		{name: "ip4 destination multicast", frame: v4(ip4{proto: ProtoUDP, dst: testAddr("239.1.1.1")}, udp), want: func(p *Packet) { p.Flags = FlagMulticast | FlagL4 }},
		{name: "ip4 destination broadcast", frame: v4(ip4{proto: ProtoUDP, dst: testAddr("255.255.255.255")}, udp), want: func(p *Packet) { p.Flags = FlagMulticast | FlagL4 }},

		{name: "ip4 first fragment", frame: v4(ip4{proto: ProtoUDP, id: 7, frag: ipv4MF}, testUDP(3000, make([]byte, 1000))),
			want: func(p *Packet) { p.Flags = FlagFragment | FlagFirst | FlagMore | FlagL4; p.FragmentID = 7 }},
		{name: "ip4 middle fragment", frame: v4(ip4{proto: ProtoUDP, id: 7, frag: ipv4MF | 126}, make([]byte, 1008)),
			want: func(p *Packet) {
				p.Flags = FlagFragment | FlagMore
				p.FragmentID, p.FragmentOffset, p.Payload = 7, 1008, 0
			}},
		{name: "ip4 last fragment", frame: v4(ip4{proto: ProtoTCP, id: 7, frag: 252}, make([]byte, 3)),
			want: func(p *Packet) { p.Flags = FlagFragment; p.FragmentID, p.FragmentOffset, p.Payload = 7, 2016, 0 }},
		{name: "ip4 fragment not a multiple of 8", frame: v4(ip4{proto: ProtoUDP, frag: ipv4MF}, testUDP(3000, make([]byte, 1001))), reason: drop.FragmentBad},
		{name: "ip4 fragment without data", frame: v4(ip4{proto: ProtoUDP, frag: 5}, nil), reason: drop.FragmentBad},
		{name: "ip4 ping of death", frame: v4(ip4{proto: ProtoICMP, frag: 0x1ffe}, make([]byte, 500)), reason: drop.FragmentBad},
		{name: "ip4 datagram of 65,535 bytes with its header", frame: v4(ip4{proto: ProtoUDP, id: 7, frag: 8186}, make([]byte, 27))},
		{name: "ip4 datagram of 65,536 bytes with its header", frame: v4(ip4{proto: ProtoUDP, id: 7, frag: 8186}, make([]byte, 28)), reason: drop.FragmentBad},
		{name: "ip4 tiny first fragment", frame: v4(ip4{proto: ProtoTCP, frag: ipv4MF}, tcp[:16]), reason: drop.FragmentBad},
		{name: "ip4 fragment inside the tcp header", frame: v4(ip4{proto: ProtoTCP, frag: ipv4MF | 1}, tcp[:16]), reason: drop.FragmentBad},

		// IPv6
		{name: "tcp6", frame: v6(ip6{next: ProtoTCP}, tcp)},
		{name: "udp6", frame: v6(ip6{next: ProtoUDP}, udp)},
		{name: "udp6 with ethernet padding", frame: append(v6(ip6{next: ProtoUDP}, udp), 0, 0), want: func(p *Packet) { p.Length = 53 }},
		{name: "udp6 longer than ip", frame: v6(ip6{next: ProtoUDP}, testUDP(14, []byte("query"))), reason: drop.L4BadHeaderLength},
		{name: "udp6 jumbo length 0", frame: v6(ip6{next: ProtoUDP}, testUDP(65536, []byte("query"))), reason: drop.L4BadHeaderLength},
		{name: "tcp6 options cut by the buffer", frame: v6(ip6{next: ProtoTCP}, testTCP(8, 0, make([]byte, 12), long)), cut: 80, reason: drop.L4Truncated},
		{name: "ip6 header cut", frame: v6(ip6{next: ProtoUDP}, nil)[:53], reason: drop.IPTruncated},
		{name: "ip6 version", frame: v6(ip6{next: ProtoUDP, version: 4}, udp), reason: drop.IPBadVersion},
		{name: "ip6 payload length beyond the frame", frame: v6(ip6{next: ProtoUDP, length: with(14)}, udp), reason: drop.IPBadLength},
		{name: "ip6 jumbogram", frame: v6(ip6{next: ProtoHopByHop, length: with(0)}, concat(testExtension(ProtoUDP, 0, nil), udp)), reason: drop.IPBadLength},
		{name: "ip6 nothing", frame: v6(ip6{next: ProtoNone}, nil)},
		{name: "ip6 icmp is unknown", frame: v6(ip6{next: ProtoICMP}, testICMP(8, 0, 1, 2, 3, 4))},
		{name: "ip6 esp", frame: v6(ip6{next: ProtoESP}, make([]byte, 20))},
		{name: "sctp6", frame: v6(ip6{next: ProtoSCTP}, make([]byte, 12))},
		{name: "icmpv6 echo", frame: v6(ip6{next: ProtoICMPv6}, testICMP(129, 0, 0x12, 0x34, 0, 1)), want: func(p *Packet) { p.SrcPort, p.DstPort, p.ICMPType = 0x1234, 0x1234, 129 }},

		{name: "ip6 source unspecified", frame: v6(ip6{next: ProtoUDP, src: addr("::")}, udp), reason: drop.IPBadSource},
		{name: "ip6 source loopback", frame: v6(ip6{next: ProtoUDP, src: addr("::1")}, udp), reason: drop.IPBadSource},
		{name: "ip6 source multicast", frame: v6(ip6{next: ProtoUDP, src: addr("ff02::1")}, udp), reason: drop.IPBadSource},
		{name: "ip6 source mapped", frame: v6(ip6{next: ProtoUDP, src: addr("::ffff:10.244.1.2")}, udp), reason: drop.IPBadSource},
		{name: "ip6 destination unspecified", frame: v6(ip6{next: ProtoUDP, dst: addr("::")}, udp), reason: drop.IPBadDestination},
		{name: "ip6 destination loopback", frame: v6(ip6{next: ProtoUDP, dst: addr("::1")}, udp), reason: drop.IPBadDestination},
		{name: "ip6 destination mapped", frame: v6(ip6{next: ProtoUDP, dst: addr("::ffff:10.244.1.2")}, udp), reason: drop.IPBadDestination},
		{name: "ip6 destination multicast", frame: v6(ip6{next: ProtoUDP, dst: addr("ff02::fb")}, udp), want: func(p *Packet) { p.Flags = FlagMulticast | FlagDF | FlagL4 }},

		{name: "ip6 destination in the lowest multicast range", frame: v6(ip6{next: ProtoUDP, dst: addr("ff00::1")}, udp), want: func(p *Packet) { p.Flags = FlagMulticast | FlagDF | FlagL4 }},
		{name: "nd solicitation", frame: v6(ip6{next: ProtoICMPv6}, ns), want: func(p *Packet) { p.Flags = FlagND | FlagDF | FlagL4; p.ICMPType = 135 }},
		{name: "nd duplicate address detection", frame: v6(ip6{next: ProtoICMPv6, src: addr("::"), dst: addr("ff02::1:ff00:1")}, ns),
			want: func(p *Packet) { p.Flags = FlagND | FlagDF | FlagL4 | FlagMulticast; p.ICMPType = 135 }},
		{name: "nd solicitation from nowhere to one host", frame: v6(ip6{next: ProtoICMPv6, src: addr("::")}, ns), reason: drop.IPBadSource},
		{name: "nd advertisement from nowhere", frame: v6(ip6{next: ProtoICMPv6, src: addr("::"), dst: addr("ff02::1")}, testICMP(136, 0, make([]byte, 20)...)), reason: drop.IPBadSource},
		{name: "mld report from nowhere", frame: v6(ip6{next: ProtoHopByHop, src: addr("::"), dst: addr("ff02::16"), hopLimit: 1},
			concat(testExtension(ProtoICMPv6, 0, nil), testICMP(143, 0, 0, 0, 0, 0))),
			want: func(p *Packet) {
				p.Flags = FlagDF | FlagL4 | FlagMulticast | FlagOptions
				p.ICMPType, p.TTL = 143, 1
			}},

		{name: "ip6 hop-by-hop, destination", frame: v6(ip6{next: ProtoHopByHop}, concat(testExtension(ProtoDestination, 1, nil), testExtension(ProtoUDP, 0, nil), udp))},
		{name: "ip6 hop-by-hop not first", frame: v6(ip6{next: ProtoDestination}, concat(testExtension(ProtoHopByHop, 0, nil), testExtension(ProtoUDP, 0, nil), udp)), reason: drop.IP6BadExtension},
		{name: "ip6 authentication header", frame: v6(ip6{next: ProtoAH}, concat(ah, tcp))},
		{name: "ip6 routing header 0", frame: v6(ip6{next: ProtoRouting}, concat(rh(0, 1), udp)), reason: drop.IP6RoutingHeader},
		{name: "ip6 segment routing header", frame: v6(ip6{next: ProtoRouting}, concat(rh(4, 1), udp))},
		{name: "ip6 eight extension headers", frame: v6(ip6{next: ProtoDestination}, concat(eight, udp))},
		{name: "ip6 nine extension headers", frame: v6(ip6{next: ProtoDestination}, concat(nine, udp)), reason: drop.IP6TooManyHeaders},
		{name: "ip6 extension header beyond the packet", frame: append(v6(ip6{next: ProtoDestination}, testExtension(ProtoUDP, 4, nil)[:32]), long...), reason: drop.IP6BadExtension},
		{name: "ip6 extension header cut", frame: v6(ip6{next: ProtoDestination}, []byte{17, 0, 0, 0, 0, 0, 0}), reason: drop.IP6BadExtension},
		{name: "ip6 extension header beyond the first buffer", frame: v6(ip6{next: ProtoDestination}, concat(testExtension(ProtoUDP, 30, nil), udp)), cut: 200, reason: drop.IPTruncated},

		{name: "ip6 atomic fragment", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoUDP, 0, false, 9), udp)),
			want: func(p *Packet) {
				p.Flags = FlagDF | FlagL4 | FlagOptions
				p.FragmentHeader, p.FragmentID = 54, 9
			}},
		{name: "ip6 first fragment", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoUDP, 0, true, 9), testUDP(3000, make([]byte, 1000)))),
			want: func(p *Packet) {
				p.Flags = FlagDF | FlagL4 | FlagOptions | FlagFragment | FlagFirst | FlagMore
				p.FragmentHeader, p.FragmentID = 54, 9
			}},
		{name: "ip6 last fragment", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoTCP, 1008, false, 9), []byte("end"))),
			want: func(p *Packet) {
				p.Flags = FlagDF | FlagOptions | FlagFragment
				p.FragmentHeader, p.FragmentID, p.FragmentOffset, p.Payload = 54, 9, 1008, 0
			}},
		{name: "ip6 fragment not a multiple of 8", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoUDP, 0, true, 9), testUDP(3000, make([]byte, 1001)))), reason: drop.FragmentBad},
		{name: "ip6 fragment beyond 64 KiB", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoUDP, 65528, false, 9), make([]byte, 8))), reason: drop.FragmentBad},
		{name: "ip6 first fragment without l4 header", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoTCP, 0, true, 9), tcp[:16])), reason: drop.FragmentBad},
		{name: "ip6 first fragment ends in its header chain", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoDestination, 0, true, 9), testExtension(ProtoUDP, 2, nil)[:16])), reason: drop.FragmentBad},
		{name: "ip6 two fragment headers", frame: v6(ip6{next: ProtoFragment}, concat(testFragment(ProtoFragment, 0, false, 9), testFragment(ProtoUDP, 0, false, 9), udp)), reason: drop.IP6BadExtension},
	}
}
