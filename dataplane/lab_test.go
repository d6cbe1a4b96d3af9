package dataplane

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/mem"
	"github.com/overplane/overplane/snat"
)

// The node under test is n1 of the lab (overplane lab), with the lab's addresses, so that frames captured there mean here what they meant there.
//
//	pods a 10.244.1.2 fd12:3456:789a:0:1::2, b ...3 --- worker --- uplink 10.240.0.11 fd00:240::11 --- n2 10.240.0.12, block 10.244.2.0/24
//	                                                      |                                         --- gateway
//	                                                     host
var (
	gatewayMAC  = packet.MAC{0x02, 0x4f, 0x56, 0x50, 0x47, 0x57}
	uplinkMAC   = packet.MAC{0x02, 0x4f, 0x56, 0x00, 0x00, 0x01}
	hostMAC     = packet.MAC{0x02, 0x4f, 0x56, 0x50, 0x48, 0x50}
	node2MAC    = packet.MAC{0x02, 0x4f, 0x56, 0x00, 0x00, 0x02}
	routerMAC   = packet.MAC{0x02, 0x4f, 0x56, 0xff, 0x00, 0x01}
	podMACs     = []packet.MAC{{0x0a, 0x95, 0xda, 0x59, 0x4c, 0xbd}, {0x0a, 0x95, 0xda, 0x59, 0x4b, 0x61}}
	podAddrs4   = []string{"10.244.1.2", "10.244.1.3"}
	podAddrs6   = []string{"fd12:3456:789a:0:1::2", "fd12:3456:789a:0:1::3"}
	tapCaps     = port.Caps{Checksum: true, TSO4: true, TSO6: true, USO: true, Chains: true}
	noCaps      = port.Caps{}
	uplinkMTU   = 1500
	testPool    = port.PoolConfig{Chunks: 256, ChunkSize: 2048, LargeBuffers: 4}
	node2Block4 = "10.244.2.0/24"
)

func addr(s string) packet.Addr { return packet.AddrFrom(netip.MustParseAddr(s)) }

// node is a data plane of one worker over memory ports.
type node struct {
	t                 testing.TB
	d                 *Dataplane
	w                 *Worker
	pool              *port.Pool
	uplink, host      *mem.Port
	pods              []*mem.Port
	snap              *Snapshot
	chunks, large     int
	podCaps, linkCaps port.Caps
	translator        *snat.Translator // nil: none
}

type nodeOption func(*node)

func withPodCaps(c port.Caps) nodeOption { return func(n *node) { n.podCaps = c } }

// withSNAT gives the node a translator of few sessions.
func withSNAT(n *node) {
	a, err := snat.NewAllocator(snat.AllocatorConfig{MaxPods: 4})
	require.NoError(n.t, err)
	n.translator, err = snat.New(snat.Config{Sessions4: 256, Sessions6: 256, FragmentedDatagrams: 64, HeldFragments: 16}, a)
	require.NoError(n.t, err)
	n.t.Cleanup(func() { require.NoError(n.t, n.translator.Close()) })
}

func newNode(t testing.TB, options ...nodeOption) *node {
	n := &node{t: t, podCaps: tapCaps, linkCaps: noCaps}
	for _, o := range options {
		o(n)
	}
	var err error
	n.pool, err = port.NewPool(make([]byte, testPool.Size()), testPool)
	require.NoError(t, err)
	pools := []*port.Pool{n.pool}
	n.uplink = mem.New(mem.Config{Name: "eth0", Pools: pools, Caps: n.linkCaps})
	n.host = mem.New(mem.Config{Name: "ovp0", Pools: pools, Caps: tapCaps})
	for _, name := range []string{"a", "b"} {
		n.pods = append(n.pods, mem.New(mem.Config{Name: name, Pools: pools, Caps: n.podCaps}))
	}
	n.d, err = New(Config{Workers: []WorkerConfig{{Pool: n.pool, CPU: -1, Translator: n.translator}}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.d.Stop(context.Background())) })
	n.w = n.d.Workers()[0]
	n.snap = n.snapshot()
	n.d.Publish(n.snap)
	n.w.Poll()
	n.chunks, n.large = n.pool.Available()
	return n
}

func (n *node) snapshot() *Snapshot {
	s := &Snapshot{
		Ports: []PortInfo{
			UplinkSlot: {Kind: PortUplink, Port: n.uplink, Name: "eth0", MAC: uplinkMAC},
			HostSlot:   {Kind: PortHost, Port: n.host, Name: "ovp0", MAC: hostMAC},
		},
		Node4: addr("10.240.0.11"), Node6: addr("fd00:240::11"),
		GatewayMAC: gatewayMAC, Gateway4: addr("169.254.1.1"), Gateway6: addr("fe80::1"),
	}
	for i := range n.pods {
		s.Ports = append(s.Ports, PortInfo{Kind: PortPod, Port: n.pods[i], Name: n.pods[i].Name(), MAC: podMACs[i],
			Addr4: addr(podAddrs4[i]), Addr6: addr(podAddrs6[i])})
	}
	s.FIB = testFIB()
	return s
}

// testFIB is the node's table. It is immutable, so every test may have the same.
var testFIB = sync.OnceValue(func() *fib.Table {
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	b := fib.NewBuilder()
	must(b.AddPool(netip.MustParsePrefix("10.244.0.0/16"), 24))
	must(b.AddPool(netip.MustParsePrefix("fd12:3456:789a::/64"), 80))
	add := func(prefix string, k fib.Kind, a fib.Adjacency) {
		i, err := b.AddAdjacency(a)
		must(err)
		must(b.Add(netip.MustParsePrefix(prefix), fib.MakeEntry(k, i)))
	}
	mtu := uint16(uplinkMTU)
	for i := range podMACs {
		a := fib.Adjacency{Dst: podMACs[i], Src: gatewayMAC, Port: uint16(FirstPodSlot + i), MTU: mtu}
		add(podAddrs4[i]+"/32", fib.Pod, a)
		add(podAddrs6[i]+"/128", fib.Pod, a)
	}
	host := fib.Adjacency{Dst: hostMAC, Src: gatewayMAC, Port: HostSlot, MTU: mtu}
	add("10.240.0.11/32", fib.Host, host)
	add("fd00:240::11/128", fib.Host, host)
	add("10.96.0.0/12", fib.Host, host)
	node2 := fib.Adjacency{Dst: node2MAC, Src: uplinkMAC, Port: UplinkSlot, MTU: mtu}
	add(node2Block4, fib.Node, node2)
	add("fd12:3456:789a:0:2::/80", fib.Node, node2)
	add("10.240.0.12/32", fib.Member, node2)
	add("fd00:240::12/128", fib.Member, node2)
	router := fib.Adjacency{Dst: routerMAC, Src: uplinkMAC, Port: UplinkSlot, MTU: mtu}
	add("0.0.0.0/0", fib.Outside, router)
	add("::/0", fib.Outside, router)
	return b.Build()
})

// inject, poll, and check afterwards that no frame leaked and every packet is accounted for.
func (n *node) inject(from *mem.Port, frames ...[]byte) {
	n.t.Helper()
	for _, f := range frames {
		require.NoError(n.t, from.Inject(0, f, port.Offload{}))
	}
	n.poll()
}

func (n *node) poll() {
	n.t.Helper()
	for n.w.Poll() > 0 {
	}
	n.check()
}

func (n *node) check() {
	n.t.Helper()
	chunks, large := n.pool.Available()
	require.Equal(n.t, [2]int{n.chunks, n.large}, [2]int{chunks, large}, "frames leaked")
	s := n.w.collect()
	var in, out, drops uint64
	for _, sl := range s.Slots {
		in += sl.In.Packets
		out += sl.Out.Packets
		for r := range sl.DropsIn {
			drops += sl.DropsIn[r] + sl.DropsOut[r]
		}
	}
	require.Equal(n.t, in, out+drops+s.Answers.Sum()-s.Generated, "packets unaccounted for: in %d, out %d, drops %d, answers %+v, generated %d", in, out, drops, s.Answers, s.Generated)
}

// drops returns the count of one reason, in and out, at a port.
func (n *node) drops(slot int, r drop.Reason) uint64 {
	return n.w.slots[slot].dropsIn[r] + n.w.slots[slot].dropsOut[r]
}

// sent returns the only packet sent on a port.
func (n *node) sent(p *mem.Port) mem.Packet {
	n.t.Helper()
	s := p.Sent(0)
	require.Len(n.t, s, 1, "packets sent to %s", p.Name())
	return s[0]
}

// Packets, made by gopacket: an implementation that is not ours.

type ip struct {
	src, dst string
	ttl      uint8
	df       bool
	ethSrc   packet.MAC
	ethDst   packet.MAC
	l4       []gopacket.SerializableLayer
	payload  []byte
	proto    layers.IPProtocol
}

func (p ip) bytes(t testing.TB) []byte {
	src, dst := net.ParseIP(p.src), net.ParseIP(p.dst)
	eth := &layers.Ethernet{SrcMAC: p.ethSrc[:], DstMAC: p.ethDst[:]}
	ls := []gopacket.SerializableLayer{eth}
	var network gopacket.NetworkLayer
	if src.To4() != nil {
		eth.EthernetType = layers.EthernetTypeIPv4
		l := &layers.IPv4{Version: 4, IHL: 5, TTL: p.ttl, Protocol: p.proto, SrcIP: src, DstIP: dst, Id: 7}
		if p.df {
			l.Flags = layers.IPv4DontFragment
		}
		ls, network = append(ls, l), l
	} else {
		eth.EthernetType = layers.EthernetTypeIPv6
		l := &layers.IPv6{Version: 6, HopLimit: p.ttl, NextHeader: p.proto, SrcIP: src, DstIP: dst}
		ls, network = append(ls, l), l
	}
	for _, l := range p.l4 {
		switch l := l.(type) {
		case *layers.TCP:
			require.NoError(t, l.SetNetworkLayerForChecksum(network))
		case *layers.UDP:
			require.NoError(t, l.SetNetworkLayerForChecksum(network))
		case *layers.ICMPv6:
			require.NoError(t, l.SetNetworkLayerForChecksum(network))
		}
		ls = append(ls, l)
	}
	ls = append(ls, gopacket.Payload(p.payload))
	b := gopacket.NewSerializeBuffer()
	require.NoError(t, gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ls...))
	return append([]byte(nil), b.Bytes()...)
}

func udp(src, dst string, from, to packet.MAC, payload int) ip {
	return ip{src: src, dst: dst, ttl: 64, ethSrc: from, ethDst: to, proto: layers.IPProtocolUDP, df: true,
		l4: []gopacket.SerializableLayer{&layers.UDP{SrcPort: 1000, DstPort: 2000}}, payload: make([]byte, payload)}
}

// fromPod is a UDP packet of pod i.
func fromPod(i int, dst string, payload int) ip {
	src := podAddrs4[i]
	if netip.MustParseAddr(dst).Is6() {
		src = podAddrs6[i]
	}
	return udp(src, dst, podMACs[i], gatewayMAC, payload)
}

// fromNode2 is a UDP packet that comes in from the uplink.
func fromNode2(src, dst string, payload int) ip {
	return udp(src, dst, node2MAC, uplinkMAC, payload)
}
