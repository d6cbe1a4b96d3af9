package packet

import (
	"bytes"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/test/captures"
)

var (
	gateway4   = testAddr("169.254.1.1")
	gateway6   = testAddr("fe80::1")
	gatewayMAC = MAC{0x02, 0xee, 0, 0, 0, 0x01}
	probeGroup = testAddr("ff02::1:ff00:1") // solicited-node multicast of fe80::1
)

func TestARPReply(t *testing.T) {
	other := testAddr("169.254.1.2")
	for _, c := range []struct {
		name    string
		request []byte
		ok      bool
		reason  drop.Reason
	}{
		{name: "request for the gateway", request: testARP(1, testSrcMAC, testSrc4, gateway4), ok: true},
		{name: "probe, RFC 5227", request: testARP(1, testSrcMAC, AddrFrom4(0), gateway4), ok: true},
		{name: "padded", request: append(testARP(1, testSrcMAC, testSrc4, gateway4), make([]byte, 18)...), ok: true},
		{name: "tagged", request: testEthernet(EtherTypeVLAN, testVLAN(EtherTypeARP, testARP(1, testSrcMAC, testSrc4, gateway4)[14:])), ok: true},
		{name: "request for another", request: testARP(1, testSrcMAC, testSrc4, other)},
		{name: "gratuitous", request: testARP(1, testSrcMAC, testSrc4, testSrc4)},
		{name: "announcement of the gateway's address", request: testARP(1, testSrcMAC, gateway4, gateway4)},
		{name: "reply", request: testARP(2, testSrcMAC, testSrc4, gateway4)},
		{name: "reverse request", request: testARP(3, testSrcMAC, testSrc4, gateway4)},
		{name: "sender is a group", request: testARP(1, MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, testSrc4, gateway4), reason: drop.ARPBad},
		{name: "sender is zero", request: testARP(1, MAC{}, testSrc4, gateway4), reason: drop.ARPBad},
		{name: "no ARP", request: ip4{proto: ProtoUDP, dst: gateway4}.frame(testUDP(0, nil))},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, inPlace := range []bool{false, true} {
				request := bytes.Clone(c.request)
				dst := make([]byte, 42)
				if inPlace {
					dst = request
				}
				var p Packet
				Parse(&p, request, len(request))
				sender := p.Src
				n, ok := ARPReply(dst, request, &p, gateway4, gatewayMAC)
				require.Equal(t, c.ok, ok)
				require.Equal(t, c.reason.String(), p.Reason.String())
				if !ok {
					require.Zero(t, n)
					require.Equal(t, c.request, request, "untouched")
					continue
				}
				require.Equal(t, 42, n)
				pk := gopacket.NewPacket(dst[:n], layers.LayerTypeEthernet, gopacket.Default)
				require.Nil(t, pk.ErrorLayer())
				eth := pk.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
				require.Equal(t, testSrcMAC[:], []byte(eth.DstMAC))
				require.Equal(t, gatewayMAC[:], []byte(eth.SrcMAC))
				arp := pk.Layer(layers.LayerTypeARP).(*layers.ARP)
				require.Equal(t, uint16(2), arp.Operation)
				require.Equal(t, gatewayMAC[:], arp.SourceHwAddress)
				require.Equal(t, []byte{169, 254, 1, 1}, arp.SourceProtAddress)
				require.Equal(t, testSrcMAC[:], arp.DstHwAddress)
				require.Equal(t, sender, AddrFrom(netip.AddrFrom4([4]byte(arp.DstProtAddress))))
			}
		})
	}
	var p Packet
	request := testARP(1, testSrcMAC, testSrc4, gateway4)
	Parse(&p, request, len(request))
	_, ok := ARPReply(make([]byte, 41), request, &p, gateway4, gatewayMAC)
	require.False(t, ok, "no room")
}

// solicitation makes a neighbour solicitation; change alters the packet before its checksum is made.
func solicitation(src, dst, target Addr, options []byte, change func(frame []byte)) []byte {
	body := make([]byte, 20)
	putAddr16(body[4:], target)
	m := testICMP(icmp6NeighborSol, 0, concat(body, options)...)
	frame := ip6{next: ProtoICMPv6, src: &src, dst: &dst, hopLimit: 255}.frame(m)
	if change != nil {
		change(frame)
	}
	var p Packet
	Parse(&p, frame, len(frame))
	if p.Reason == drop.None {
		finishL4(frame)
	}
	return frame
}

func TestNDReply(t *testing.T) {
	pod := testAddr("fe80::55")
	unspecified := Addr{}
	sllao := []byte{1, 1, 2, 0, 0, 0, 0, 0x55}
	nonce := []byte{14, 1, 1, 2, 3, 4, 5, 6}
	for _, c := range []struct {
		name   string
		frame  []byte
		ok     bool
		probe  bool
		reason drop.Reason
	}{
		{name: "to the group", frame: solicitation(pod, probeGroup, gateway6, sllao, nil), ok: true},
		{name: "to the gateway, reachability check", frame: solicitation(pod, gateway6, gateway6, nil, nil), ok: true},
		{name: "from a global address", frame: solicitation(testSrc6, probeGroup, gateway6, concat(nonce, sllao), nil), ok: true},
		{name: "duplicate address detection of the gateway's address", frame: solicitation(unspecified, probeGroup, gateway6, nonce, nil), ok: true, probe: true},
		{name: "duplicate address detection of the pod's address", frame: solicitation(unspecified, testAddr("ff02::1:ff00:55"), pod, nil, nil)},
		{name: "for another", frame: solicitation(pod, probeGroup, testAddr("fe80::2"), sllao, nil)},
		{name: "hop limit 254", frame: solicitation(pod, probeGroup, gateway6, sllao, func(f []byte) { f[21] = 254 }), reason: drop.NDBad},
		{name: "code 1", frame: solicitation(pod, probeGroup, gateway6, sllao, func(f []byte) { f[55] = 1 }), reason: drop.NDBad},
		{name: "group as target", frame: solicitation(pod, probeGroup, probeGroup, sllao, nil), reason: drop.NDBad},
		{name: "option of length 0", frame: solicitation(pod, probeGroup, gateway6, []byte{1, 0, 0, 0, 0, 0, 0, 0}, nil), reason: drop.NDBad},
		{name: "option too long", frame: solicitation(pod, probeGroup, gateway6, []byte{1, 2, 0, 0, 0, 0, 0, 0}, nil), reason: drop.NDBad},
		{name: "half an option", frame: solicitation(pod, probeGroup, gateway6, []byte{1}, nil), reason: drop.NDBad},
		{name: "probe with a source link-layer address", frame: solicitation(unspecified, probeGroup, gateway6, sllao, nil), reason: drop.NDBad},
		{name: "probe to another group", frame: solicitation(unspecified, testAddr("ff02::1"), gateway6, nil, nil), reason: drop.NDBad},
		{name: "no target", frame: finishL4(ip6{next: ProtoICMPv6, src: &pod, dst: &probeGroup, hopLimit: 255}.frame(testICMP(icmp6NeighborSol, 0, make([]byte, 16)...))), reason: drop.NDBad},
		{name: "bad checksum", frame: ip6{next: ProtoICMPv6, src: &pod, dst: &probeGroup, hopLimit: 255}.frame(testICMP(icmp6NeighborSol, 0, make([]byte, 20)...)), reason: drop.NDBad},
		{name: "atomic fragment, RFC 6980", frame: ip6{next: ProtoFragment, src: &pod, dst: &probeGroup, hopLimit: 255}.
			frame(concat(testFragment(ProtoICMPv6, 0, false, 1), testICMP(icmp6NeighborSol, 0, make([]byte, 20)...))), reason: drop.NDBad},
		{name: "advertisement", frame: finishL4(ip6{next: ProtoICMPv6, src: &pod, dst: &gateway6, hopLimit: 255}.frame(testICMP(icmp6NeighborAdv, 0, make([]byte, 20)...)))},
		{name: "router solicitation", frame: finishL4(ip6{next: ProtoICMPv6, src: &pod, dst: with(testAddr("ff02::2")), hopLimit: 255}.frame(testICMP(icmp6RouterSol, 0, make([]byte, 4)...)))},
		{name: "echo request", frame: finishL4(ip6{next: ProtoICMPv6, dst: &gateway6}.frame(testICMP(icmp6EchoRequest, 0, make([]byte, 4)...)))},
		{name: "IPv4", frame: ip4{proto: ProtoUDP}.frame(testUDP(0, nil))},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, inPlace := range []bool{false, true} {
				frame := append(bytes.Clone(c.frame), make([]byte, 20)...)
				dst := make([]byte, 86)
				if inPlace {
					dst = frame
				}
				var p Packet
				Parse(&p, frame, len(frame))
				require.Equal(t, drop.None.String(), p.Reason.String())
				n, ok := NDReply(dst, frame, &p, gateway6, gatewayMAC)
				require.Equal(t, c.ok, ok)
				require.Equal(t, c.reason.String(), p.Reason.String())
				if !ok {
					require.Zero(t, n)
					require.Equal(t, c.frame, frame[:len(c.frame)], "untouched")
					continue
				}
				require.Equal(t, 86, n)
				checkAdvertisement(t, dst[:n], p.Src, c.probe)
			}
		})
	}
	frame := solicitation(pod, probeGroup, gateway6, nil, nil)
	var p Packet
	Parse(&p, frame, len(frame))
	_, ok := NDReply(make([]byte, 85), frame, &p, gateway6, gatewayMAC)
	require.False(t, ok, "no room")
}

func checkAdvertisement(t *testing.T, frame []byte, to Addr, probe bool) {
	var r Packet
	Parse(&r, frame, len(frame))
	require.Equal(t, drop.None.String(), r.Reason.String())
	require.True(t, VerifyL4(&r, frame, nil), "checksum")
	pk := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, pk.ErrorLayer())
	eth := pk.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	ip := pk.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
	na := pk.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
	require.Equal(t, gatewayMAC[:], []byte(eth.SrcMAC))
	require.Equal(t, "fe80::1", ip.SrcIP.String())
	require.Equal(t, uint8(255), ip.HopLimit)
	require.Equal(t, "fe80::1", na.TargetAddress.String())
	require.True(t, na.Router() && na.Override())
	require.Equal(t, !probe, na.Solicited())
	require.Equal(t, layers.ICMPv6Options{{Type: layers.ICMPv6OptTargetAddress, Data: gatewayMAC[:]}}, na.Options)
	if probe {
		require.Equal(t, "ff02::1", ip.DstIP.String())
		require.Equal(t, "33:33:00:00:00:01", eth.DstMAC.String())
		return
	}
	require.Equal(t, to, r.Dst)
	require.Equal(t, testSrcMAC[:], []byte(eth.DstMAC))
}

func TestEchoReply(t *testing.T) {
	data := []byte{0x12, 0x34, 0, 7, 'p', 'i', 'n', 'g', '!'}
	frames := map[string]struct {
		frame []byte
		ok    bool
	}{
		"icmp":          {finishL4(ip4{proto: ProtoICMP, dst: gateway4, ttl: 3}.frame(testICMP(8, 0, data...))), true},
		"icmpv6":        {finishL4(ip6{next: ProtoICMPv6, dst: &gateway6, hopLimit: 3}.frame(testICMP(128, 0, data...))), true},
		"padded":        {append(finishL4(ip4{proto: ProtoICMP, dst: gateway4}.frame(testICMP(8, 0, data...))), 0, 0, 0), true},
		"options":       {finishL4(ip4{proto: ProtoICMP, dst: gateway4, options: []byte{148, 4, 0, 0}}.frame(testICMP(8, 0, data...))), true},
		"extension":     {ip6{next: ProtoDestination, dst: &gateway6}.frame(concat(testExtension(ProtoICMPv6, 0, nil), testICMP(128, 0, data...))), true},
		"tagged":        {testEthernet(EtherTypeVLAN, testVLAN(EtherTypeIPv4, finishL4(ip4{proto: ProtoICMP, dst: gateway4}.frame(testICMP(8, 0, data...)))[14:])), true},
		"reply":         {ip4{proto: ProtoICMP, dst: gateway4}.frame(testICMP(0, 0, data...)), false},
		"code 1":        {ip4{proto: ProtoICMP, dst: gateway4}.frame(testICMP(8, 1, data...)), false},
		"unreachable":   {ip6{next: ProtoICMPv6, dst: &gateway6}.frame(testICMP(1, 0, data...)), false},
		"fragment":      {ip4{proto: ProtoICMP, dst: gateway4, frag: ipv4MF}.frame(testICMP(8, 0, append(data[:4:4], make([]byte, 8)...)...)), false},
		"last fragment": {ip4{proto: ProtoICMP, dst: gateway4, frag: 4}.frame(testICMP(8, 0, data...)), false},
		"broadcast":     {ip4{proto: ProtoICMP, dst: testAddr("255.255.255.255")}.frame(testICMP(8, 0, data...)), false},
		"group":         {ip6{next: ProtoICMPv6, dst: with(testAddr("ff02::1"))}.frame(testICMP(128, 0, data...)), false},
		"udp":           {ip4{proto: ProtoUDP, dst: gateway4}.frame(testUDP(0, nil)), false},
	}
	for name, c := range frames {
		t.Run(name, func(t *testing.T) {
			for _, inPlace := range []bool{false, true} {
				frame := bytes.Clone(c.frame)
				dst := make([]byte, 100)
				if inPlace {
					dst = frame
				}
				var p Packet
				Parse(&p, frame, len(frame))
				require.Equal(t, drop.None.String(), p.Reason.String())
				wasRight := VerifyL4(&p, frame, nil)
				n, ok := EchoReply(dst, frame, &p)
				require.Equal(t, c.ok, ok)
				if !ok {
					require.Zero(t, n)
					require.Equal(t, c.frame, frame, "untouched")
					continue
				}
				var r Packet
				Parse(&r, dst[:n], n)
				require.Equal(t, drop.None.String(), r.Reason.String())
				require.Equal(t, int(r.Length)+14, n)
				require.Equal(t, wasRight, VerifyL4(&r, dst[:n], nil), "checksum")
				require.Equal(t, [2]Addr{p.Dst, p.Src}, [2]Addr{r.Src, r.Dst})
				require.Equal(t, [2]MAC{p.EthSrc, p.EthDst}, [2]MAC{r.EthDst, r.EthSrc})
				require.Equal(t, uint8(64), r.TTL)
				require.Equal(t, uint16(0x1234), r.SrcPort)
				require.Contains(t, []uint8{icmpEchoReply, icmp6EchoReply}, r.ICMPType)
				require.Equal(t, data, dst[r.L4+4:n])
			}
		})
	}
	frame := frames["icmp"].frame
	var p Packet
	Parse(&p, frame, len(frame))
	_, ok := EchoReply(make([]byte, len(frame)-1), frame, &p)
	require.False(t, ok, "no room")
	_, ok = EchoReply(make([]byte, 100), frame[:len(frame)-1], &p)
	require.False(t, ok, "data in another buffer")
}

// FuzzNeighbour: no input makes the answers panic or be malformed.
func FuzzNeighbour(f *testing.F) {
	captures.Each(func(b []byte) { f.Add(b) })
	f.Add(testARP(1, testSrcMAC, testSrc4, gateway4))
	f.Add(solicitation(testAddr("fe80::55"), probeGroup, gateway6, []byte{1, 1, 2, 0, 0, 0, 0, 0x55}, nil))
	f.Add(finishL4(ip4{proto: ProtoICMP, dst: gateway4}.frame(testICMP(8, 0, 1, 2, 3, 4))))
	f.Add(finishL4(ip6{next: ProtoICMPv6, dst: &gateway6}.frame(testICMP(128, 0, 1, 2, 3, 4))))
	f.Fuzz(func(t *testing.T, frame []byte) {
		repairIPv4Checksum(frame)
		var p Packet
		Parse(&p, frame, len(frame))
		if p.Reason == drop.None && p.Kind == KindIPv6 && p.Flags&FlagND != 0 && p.Flags&FlagOptions == 0 {
			finishL4(frame)
		}
		dst := make([]byte, len(frame)+100)
		check := func(n int, ok bool) {
			if !ok {
				return
			}
			var r Packet
			Parse(&r, dst[:n], n)
			require.Equal(t, drop.None.String(), r.Reason.String())
			require.Equal(t, p.Kind, r.Kind)
		}
		q := p
		check(ARPReply(dst, frame, &q, gateway4, gatewayMAC))
		q = p
		check(NDReply(dst, frame, &q, gateway6, gatewayMAC))
		q = p
		check(EchoReply(dst, frame, &q))
	})
}

func TestNeighbourAnswersAllocateNothing(t *testing.T) {
	dst := make([]byte, 200)
	arp := testARP(1, testSrcMAC, testSrc4, gateway4)
	nd := solicitation(testAddr("fe80::55"), probeGroup, gateway6, nil, nil)
	echo := finishL4(ip4{proto: ProtoICMP, dst: gateway4}.frame(testICMP(8, 0, 1, 2, 3, 4)))
	var p Packet
	answered := 0
	require.Zero(t, testing.AllocsPerRun(10, func() {
		Parse(&p, arp, len(arp))
		if _, ok := ARPReply(dst, arp, &p, gateway4, gatewayMAC); ok {
			answered++
		}
		Parse(&p, nd, len(nd))
		if _, ok := NDReply(dst, nd, &p, gateway6, gatewayMAC); ok {
			answered++
		}
		Parse(&p, echo, len(echo))
		if _, ok := EchoReply(dst, echo, &p); ok {
			answered++
		}
	}))
	require.Equal(t, 33, answered)
}
