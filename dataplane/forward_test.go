package dataplane

import (
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/mem"
)

// peer addresses of both families.
var families = []struct {
	name, podA, podB, remotePod, self, node2, unused, outside, service string
}{
	{"ipv4", "10.244.1.2", "10.244.1.3", "10.244.2.7", "10.240.0.11", "10.240.0.12", "10.244.9.1", "198.51.100.10", "10.96.0.1"},
	{"ipv6", "fd12:3456:789a:0:1::2", "fd12:3456:789a:0:1::3", "fd12:3456:789a:0:2::7", "fd00:240::11", "fd00:240::12", "fd12:3456:789a:0:9::1", "2001:db8:100::10", ""},
}

func hopLimit(p gopacket.Packet) uint8 {
	if l, ok := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4); ok {
		return l.TTL
	}
	return p.Layer(layers.LayerTypeIPv6).(*layers.IPv6).HopLimit
}

// decode checks with an implementation that is not ours that the packet is whole, and that its checksums are right.
func decode(t *testing.T, b []byte) gopacket.Packet {
	t.Helper()
	p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, p.ErrorLayer(), "%v", p)
	again := gopacket.NewSerializeBuffer()
	var ls []gopacket.SerializableLayer
	var network gopacket.NetworkLayer
	for _, l := range p.Layers() {
		if n, ok := l.(gopacket.NetworkLayer); ok {
			network = n
		}
		switch l := l.(type) {
		case *layers.UDP:
			require.NoError(t, l.SetNetworkLayerForChecksum(network))
		case *layers.TCP:
			require.NoError(t, l.SetNetworkLayerForChecksum(network))
		case *layers.ICMPv6:
			require.NoError(t, l.SetNetworkLayerForChecksum(network))
		}
		s, ok := l.(gopacket.SerializableLayer)
		if !ok {
			return p
		}
		ls = append(ls, s)
	}
	require.NoError(t, gopacket.SerializeLayers(again, gopacket.SerializeOptions{ComputeChecksums: true}, ls...))
	require.Equal(t, again.Bytes(), b, "checksums")
	return p
}

func TestForward(t *testing.T) {
	type where int
	const (
		pod where = iota
		uplink
		host
	)
	for _, f := range families {
		for _, c := range []struct {
			name         string
			from         where
			src, dst     string
			to           where
			ethDst       packet.MAC
			ethSrc       packet.MAC
			hops         uint8
			viaSecondPod bool
		}{
			{name: "pod to local pod", from: pod, src: f.podA, dst: f.podB, to: pod, ethDst: podMACs[1], ethSrc: gatewayMAC, hops: 1, viaSecondPod: true},
			{name: "pod to remote pod", from: pod, src: f.podA, dst: f.remotePod, to: uplink, ethDst: node2MAC, ethSrc: uplinkMAC, hops: 1},
			{name: "pod to remote node", from: pod, src: f.podA, dst: f.node2, to: uplink, ethDst: node2MAC, ethSrc: uplinkMAC, hops: 1},
			{name: "pod to own node", from: pod, src: f.podA, dst: f.self, to: host, ethDst: hostMAC, ethSrc: gatewayMAC},
			{name: "pod to service", from: pod, src: f.podA, dst: f.service, to: host, ethDst: hostMAC, ethSrc: gatewayMAC},
			{name: "remote pod to pod", from: uplink, src: f.remotePod, dst: f.podA, to: pod, ethDst: podMACs[0], ethSrc: gatewayMAC, hops: 1},
			{name: "remote node to pod", from: uplink, src: f.node2, dst: f.podA, to: pod, ethDst: podMACs[0], ethSrc: gatewayMAC, hops: 1},
			{name: "remote pod to own node", from: uplink, src: f.remotePod, dst: f.self, to: host, ethDst: hostMAC, ethSrc: gatewayMAC},
			{name: "own node to pod", from: host, src: f.self, dst: f.podA, to: pod, ethDst: podMACs[0], ethSrc: gatewayMAC},
			{name: "own node to remote pod", from: host, src: f.self, dst: f.remotePod, to: uplink, ethDst: node2MAC, ethSrc: uplinkMAC},
		} {
			if c.dst == "" {
				continue
			}
			t.Run(f.name+"/"+c.name, func(t *testing.T) {
				n := newNode(t)
				ports := map[where]*mem.Port{pod: n.pods[0], uplink: n.uplink, host: n.host}
				p := udp(c.src, c.dst, podMACs[0], gatewayMAC, 100)
				if c.from == uplink {
					p.ethSrc, p.ethDst = node2MAC, uplinkMAC
				}
				n.inject(ports[c.from], p.bytes(t))
				to := ports[c.to]
				if c.viaSecondPod {
					to = n.pods[1]
				}
				got := decode(t, n.sent(to).Bytes)
				eth := got.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
				require.Equal(t, c.ethDst[:], []byte(eth.DstMAC))
				require.Equal(t, c.ethSrc[:], []byte(eth.SrcMAC))
				require.Equal(t, 64-c.hops, hopLimit(got), "hops counted")
				require.Len(t, got.Layer(layers.LayerTypeUDP).LayerPayload(), 100)
			})
		}
	}
}

func TestDrop(t *testing.T) {
	for _, f := range families {
		for _, c := range []struct {
			name   string
			from   int // slot
			packet ip
			edit   func([]byte)
			reason drop.Reason
			reply  string // ICMP error expected at the source's port: v4 type/code as text of icmp.Error, or ""
		}{
			{name: "spoofed by a pod", from: FirstPodSlot, packet: udp(f.podB, f.remotePod, podMACs[0], gatewayMAC, 10), reason: drop.SourceNotPods},
			{name: "pod with the node's address", from: FirstPodSlot, packet: udp(f.self, f.remotePod, podMACs[0], gatewayMAC, 10), reason: drop.SourceNotPods},
			{name: "not for the gateway", from: FirstPodSlot, packet: udp(f.podA, f.remotePod, podMACs[0], podMACs[1], 10), reason: drop.EthNotForUs},
			{name: "from outside", from: UplinkSlot, packet: udp(f.outside, f.podA, node2MAC, uplinkMAC, 10), reason: drop.SourceNotMember},
			{name: "member's address from another's card", from: UplinkSlot, packet: udp(f.remotePod, f.podA, routerMAC, uplinkMAC, 10), reason: drop.SourceNotMember},
			{name: "our pod's address from the wire", from: UplinkSlot, packet: udp(f.podB, f.podA, node2MAC, uplinkMAC, 10), reason: drop.SourceNotMember},
			{name: "transit", from: UplinkSlot, packet: udp(f.remotePod, f.remotePod, node2MAC, uplinkMAC, 10), reason: drop.HairpinUplink},
			{name: "host with a foreign address", from: HostSlot, packet: udp(f.outside, f.podA, hostMAC, gatewayMAC, 10), reason: drop.SourceNotHosts},
			{name: "unused pod address", from: FirstPodSlot, packet: udp(f.podA, f.unused, podMACs[0], gatewayMAC, 10), reason: drop.Unreachable, reply: "host_unreachable"},
			{name: "outside without translator", from: FirstPodSlot, packet: udp(f.podA, f.outside, podMACs[0], gatewayMAC, 10), reason: drop.OutsideNoSNAT, reply: "admin_prohibited"},
			{name: "hop limit", from: FirstPodSlot, packet: func() ip { p := udp(f.podA, f.remotePod, podMACs[0], gatewayMAC, 10); p.ttl = 1; return p }(), reason: drop.HopLimitExceeded, reply: "time_exceeded"},
			{name: "too big", from: FirstPodSlot, packet: udp(f.podA, f.remotePod, podMACs[0], gatewayMAC, 1600), reason: drop.TooBig, reply: "packet_too_big"},
		} {
			t.Run(f.name+"/"+c.name, func(t *testing.T) {
				n := newNode(t)
				ports := []*mem.Port{n.uplink, n.host, n.pods[0]}
				n.inject(ports[c.from], c.packet.bytes(t))
				require.EqualValues(t, 1, n.drops(c.from, c.reason), "%v", c.reason)
				for i, p := range ports {
					if i == c.from && c.reply != "" {
						continue
					}
					require.Empty(t, p.Sent(0))
				}
				if c.reply != "" {
					got := decode(t, n.sent(ports[c.from]).Bytes)
					require.Equal(t, c.packet.src, got.NetworkLayer().NetworkFlow().Dst().String())
					require.Equal(t, f.self, got.NetworkLayer().NetworkFlow().Src().String())
					sent := n.w.collect().ICMPErrors
					for e, count := range sent {
						if count > 0 {
							require.Equal(t, c.reply, errorName(e))
						}
					}
				}
			})
		}
	}
}

func TestSegmentToUplink(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t)
			const mss, payload = 1400, 60000
			b, o := gsoFrame(t, f.podA, f.remotePod, podMACs[0], gatewayMAC, payload, mss)
			require.NoError(t, n.pods[0].Inject(0, b, o))
			n.poll()
			total := 0
			for i, s := range n.uplink.Sent(0) {
				p := decode(t, s.Bytes)
				tcp := p.Layer(layers.LayerTypeTCP).(*layers.TCP)
				require.EqualValues(t, 1+i*mss, tcp.Seq)
				require.EqualValues(t, 63, hopLimit(p))
				total += len(tcp.Payload)
			}
			require.Equal(t, payload, total)
			require.EqualValues(t, 1, n.w.slots[FirstPodSlot].in.Frames)
			require.EqualValues(t, (payload+mss-1)/mss, n.w.slots[FirstPodSlot].in.Packets)
			require.EqualValues(t, (payload+mss-1)/mss, n.w.slots[UplinkSlot].sent.Packets)
		})
	}
}

func TestGSOFrameStaysWholeBetweenPods(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t)
			b, o := gsoFrame(t, f.podA, f.podB, podMACs[0], gatewayMAC, 60000, 1400)
			require.NoError(t, n.pods[0].Inject(0, b, o))
			n.poll()
			s := n.sent(n.pods[1])
			require.Len(t, s.Bytes, len(b))
			require.Equal(t, o.GSO, s.Offload.GSO)
			require.EqualValues(t, 1400, s.Offload.SegmentSize)
		})
	}
}

func TestTrainFromUplinkIsCoalesced(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t)
			for i := range 20 {
				require.NoError(t, n.uplink.Inject(0, tcpSegment(t, f.remotePod, f.podA, node2MAC, uplinkMAC, 1+i*1000, make([]byte, 1000)), port.Offload{}))
			}
			n.poll()
			s := n.sent(n.pods[0])
			require.Len(t, s.Bytes, 14+headerLen(f.name)+20+20000)
			require.NotZero(t, s.Offload.GSO)
			require.EqualValues(t, 20, n.w.slots[FirstPodSlot].sent.Packets)
			require.EqualValues(t, 1, n.w.slots[FirstPodSlot].sent.Frames)
		})
	}
}

func TestUnfinishedChecksumIsFinishedForTheWire(t *testing.T) {
	n := newNode(t)
	whole := fromPod(0, "10.244.2.7", 99).bytes(t)
	unfinished := append([]byte(nil), whole...)
	sum := packet.Fold(packet.PseudoHeader(addr("10.244.1.2"), addr("10.244.2.7"), 17, 99+8))
	unfinished[14+20+6], unfinished[14+20+7] = byte(sum>>8), byte(sum)
	require.NoError(t, n.pods[0].Inject(0, unfinished, port.Offload{Flags: port.NeedsChecksum, ChecksumStart: 34, ChecksumOffset: 6}))
	n.poll()
	decode(t, n.sent(n.uplink).Bytes)
}

func TestFragmentsWithoutDF(t *testing.T) {
	n := newNode(t)
	p := fromPod(0, "10.244.2.7", 1700)
	p.df = false
	n.inject(n.pods[0], p.bytes(t))
	s := n.uplink.Sent(0)
	require.Len(t, s, 2)
	for _, s := range s {
		require.LessOrEqual(t, len(s.Bytes), 1514)
		decode(t, s.Bytes)
	}
}

func TestPortFailures(t *testing.T) {
	for _, c := range []struct {
		status port.TxStatus
		reason drop.Reason
		lost   uint64
	}{
		{port.TxFull, drop.PortFull, 3},
		{port.TxDown, drop.PortDown, 3},
		{port.TxRejected, drop.PortRejected, 3},
	} {
		n := newNode(t)
		n.uplink.SetTransmit(0, 2, c.status)
		for range 5 {
			require.NoError(t, n.pods[0].Inject(0, fromPod(0, "10.244.2.7", 10).bytes(t), port.Offload{}))
		}
		n.poll()
		require.Len(t, n.uplink.Sent(0), 2)
		require.EqualValues(t, c.lost, n.drops(UplinkSlot, c.reason))
	}
}

func TestPortAway(t *testing.T) {
	n := newNode(t)
	s := n.snapshot()
	s.Ports[UplinkSlot].Port = nil
	n.d.Publish(s)
	n.inject(n.pods[0], fromPod(0, "10.244.2.7", 10).bytes(t))
	require.EqualValues(t, 1, n.drops(UplinkSlot, drop.PortDown))
	n.d.Publish(n.snapshot())
	n.inject(n.pods[0], fromPod(0, "10.244.2.7", 10).bytes(t))
	require.Len(t, n.uplink.Sent(0), 1)
	require.EqualValues(t, 1, n.drops(UplinkSlot, drop.PortDown), "counters outlive the device")
}

func TestErrorsHaveABudget(t *testing.T) {
	n := newNode(t)
	for range 200 {
		n.inject(n.pods[0], fromPod(0, "10.244.9.1", 10).bytes(t))
	}
	require.EqualValues(t, 200, n.drops(FirstPodSlot, drop.Unreachable))
	require.Less(t, len(n.pods[0].Sent(0)), 100)
	require.NotZero(t, n.w.icmpRefused)
}

func TestPollAllocatesNothing(t *testing.T) {
	n := newNode(t)
	gso, o := gsoFrame(t, "10.244.1.2", "10.244.2.7", podMACs[0], gatewayMAC, 60000, 1400)
	quiet := &sink{pool: n.pool}
	s := n.snapshot()
	for i := range s.Ports {
		s.Ports[i].Port = &sinkPort{Port: s.Ports[i].Port, q: quiet}
	}
	quiet.frames = [][]byte{fromPod(0, "10.244.2.7", 10).bytes(t), fromPod(0, "10.244.1.3", 10).bytes(t), fromPod(0, "10.244.9.1", 10).bytes(t), gso}
	quiet.offload = o
	n.d.Publish(s)
	n.w.Poll()
	require.Zero(t, testing.AllocsPerRun(100, func() { n.w.Poll() }))
}

func TestWorkerCountsPacketsReceived(t *testing.T) {
	n := newNode(t)
	n.inject(n.pods[0], fromPod(0, "10.244.2.7", 10).bytes(t), fromPod(0, "10.244.9.1", 10).bytes(t))
	require.EqualValues(t, 2, n.w.collect().Packets)
}

func TestOrderWithinFlow(t *testing.T) {
	n := newNode(t, withPodCaps(port.Caps{Checksum: true, TSO4: true, TSO6: true, Chains: true})) // takes TCP trains, but no UDP ones
	small := func(id byte) []byte {
		p := udp("10.244.1.2", "10.244.1.3", podMACs[0], gatewayMAC, 20)
		p.payload[0] = id
		return p.bytes(t)
	}
	large := udp("10.244.1.2", "10.244.1.3", podMACs[0], gatewayMAC, 300).bytes(t)
	sum := packet.Fold(packet.PseudoHeader(addr("10.244.1.2"), addr("10.244.1.3"), 17, 308))
	large[40], large[41] = byte(sum>>8), byte(sum)
	require.NoError(t, n.pods[0].Inject(0, small(1), port.Offload{}))
	require.NoError(t, n.pods[0].Inject(0, large, port.Offload{Flags: port.NeedsChecksum, GSO: port.GSOUDP, SegmentSize: 100, ChecksumStart: 34, ChecksumOffset: 6}))
	require.NoError(t, n.pods[0].Inject(0, small(2), port.Offload{}))
	n.poll()
	var lengths []int
	for _, s := range n.pods[1].Sent(0) {
		lengths = append(lengths, len(s.Bytes)-42)
	}
	require.Equal(t, []int{20, 100, 100, 100, 20}, lengths)
}
