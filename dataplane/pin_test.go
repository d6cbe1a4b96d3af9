package dataplane

import (
	"math/rand/v2"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// serviceCase is a flow that the node's kernel sends to a pod, translated, and where the pod's reply comes from.
type serviceCase struct {
	name, client, server string
	sport, dport         uint16
	remote               bool // the server is another node's pod, or node
}

func (c *serviceCase) there() ip {
	p := udp(c.client, c.server, hostMAC, gatewayMAC, 30)
	p.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: layers.UDPPort(c.sport), DstPort: layers.UDPPort(c.dport)}}
	return p
}

func (c *serviceCase) back() ip {
	p := udp(c.server, c.client, node2MAC, uplinkMAC, 30)
	if !c.remote {
		p.ethSrc, p.ethDst = podMACs[1], gatewayMAC
	}
	p.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: layers.UDPPort(c.dport), DstPort: layers.UDPPort(c.sport)}}
	return p
}

// serviceCases are what kube-proxy's rules make. Pod B is the local server.
func serviceCases(f int) []serviceCase {
	x := families[f]
	return []serviceCase{
		{"cluster address to a local pod", x.podA, x.podB, 40000, 8080, false},
		{"cluster address to a remote pod", x.podA, x.remotePod, 40000, 8080, true},
		{"cluster address to another node", x.podA, x.node2, 40000, 6443, true},
		{"node port of the outside, client's address kept", x.outside, x.podB, 40000, 8080, false},
		{"node port of another node, client's address kept", x.node2, x.podB, 40000, 8080, false},
		{"node port of a remote pod, client's address kept", x.remotePod, x.podB, 40000, 8080, false},
		{"masqueraded with a port of the range, local", x.self, x.podB, 12345, 8080, false},
		{"masqueraded with a port of the range, remote", x.self, x.remotePod, 12345, 8080, true},
		{"the node's own", x.self, x.podB, 40000, 8080, false},
	}
}

func TestRepliesToServiceFlowsReturnToTheKernel(t *testing.T) {
	for f := range families {
		for _, c := range serviceCases(f) {
			t.Run(families[f].name+" "+c.name, func(t *testing.T) {
				n := newNode(t, withSNAT)
				in, out := n.pods[1], n.pods[1]
				if c.remote {
					in, out = n.uplink, n.uplink
				}
				for range 3 {
					n.inject(n.host, c.there().bytes(t))
					s := n.sent(out)
					require.EqualValues(t, 64, hopLimit(decode(t, s.Bytes)), "the kernel has counted the hop")
					require.Equal(t, addr(c.client), parse(t, s.Bytes).Src)
					n.inject(in, c.back().bytes(t))
					s = n.sent(n.host)
					require.EqualValues(t, 64, hopLimit(decode(t, s.Bytes)))
					p := parse(t, s.Bytes)
					enters := hostMAC
					if c.server == families[f].node2 { // by the uplink, which is where the kernel's way back leads
						enters = uplinkMAC
					}
					require.Equal(t, enters, p.EthDst)
					require.Equal(t, addr(c.client), p.Dst)
					require.Equal(t, c.sport, p.DstPort)
				}
				want := 1
				if c.name == "the node's own" {
					want = 0
				}
				require.Equal(t, want, n.translator.Stats().Pins)
			})
		}
	}
}

// The kernel may send pods what it forwards, and others what pods sent; nothing else.
func TestTheKernelIsNoWayThrough(t *testing.T) {
	for _, f := range families {
		n := newNode(t, withSNAT)
		n.inject(n.host, udp(f.outside, f.remotePod, hostMAC, gatewayMAC, 30).bytes(t), udp(f.remotePod, f.unused, hostMAC, gatewayMAC, 30).bytes(t),
			udp(f.outside, f.node2, hostMAC, gatewayMAC, 30).bytes(t))
		require.EqualValues(t, 3, n.drops(HostSlot, drop.SourceNotHosts))
		n.inject(n.host, udp(f.self, f.node2, hostMAC, gatewayMAC, 30).bytes(t), udp(f.podA, f.outside, hostMAC, gatewayMAC, 30).bytes(t))
		require.EqualValues(t, 2, n.drops(HostSlot, drop.DestinationNotOurs))
		require.Zero(t, n.translator.Stats().Pins)
	}
}

func TestErrorsAboutServiceFlowsReachTheKernel(t *testing.T) {
	for f := range families {
		for _, c := range serviceCases(f) {
			n := newNode(t, withSNAT)
			there := c.there()
			n.inject(n.host, there.bytes(t))
			in := n.pods[1]
			if c.remote {
				in = n.uplink
			}
			in.Sent(0)
			// The server's own: port unreachable.
			quoted := there.bytes(t)[14:]
			e := c.back()
			e.proto, e.payload = layers.IPProtocolICMPv4, quoted
			e.l4 = []gopacket.SerializableLayer{&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(3, 3)}}
			if families[f].name == "ipv6" {
				e.proto, e.payload = layers.IPProtocolICMPv6, append(make([]byte, 4), quoted...)
				e.l4 = []gopacket.SerializableLayer{&layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(1, 4)}}
			}
			n.inject(in, e.bytes(t))
			p := parse(t, n.sent(n.host).Bytes)
			require.Equal(t, addr(c.client), p.Dst, c.name)
			// Ours: too big for the way. Told to the kernel, whatever the source is.
			big := c.there()
			big.payload = make([]byte, 1600)
			n.inject(n.host, big.bytes(t))
			s := n.sent(n.host)
			p = parse(t, s.Bytes)
			require.Equal(t, addr(c.client), p.Dst, c.name)
			require.Equal(t, hostMAC, p.EthDst)
		}
	}
}

// Any worker sends a reply to the kernel, whatever queue it comes by.
func TestRepliesToServiceFlowsComeByAnyQueue(t *testing.T) {
	const workers = 3
	for f := range families {
		for _, c := range serviceCases(f) {
			w := newCrew(t, workers)
			in := w.pods[1]
			if c.remote {
				in = w.uplink
			}
			for flow := range 30 {
				c.sport++
				require.NoError(t, w.host.Inject(flow%workers, c.there().bytes(t), port.Offload{}))
				w.poll()
				require.Len(t, w.sent(in), 1, c.name)
				for q := range workers {
					require.NoError(t, in.Inject(q, c.back().bytes(t), port.Offload{}))
					w.poll()
					require.Len(t, w.sent(w.host), 1, c.name)
				}
			}
			// What is nobody's reply goes its own way at once.
			before := w.overs()
			for q := range workers {
				require.NoError(t, w.pods[0].Inject(q, fromPod(0, families[f].podB, 30).bytes(t), port.Offload{}))
			}
			w.poll()
			require.Len(t, w.sent(w.pods[1]), workers)
			require.Equal(t, before, w.overs())
		}
	}
}

// overs is how many packets were handed over.
func (c *crew) overs() (n uint64) {
	for _, w := range c.d.Workers() {
		n += w.handedOver
	}
	return n
}

func TestFragmentedRepliesToServiceFlows(t *testing.T) {
	const workers = 2
	for _, c := range serviceCases(0)[:4] {
		w := newCrew(t, workers)
		in := w.pods[1]
		if c.remote {
			in = w.uplink
		}
		there := c.there()
		there.df, there.payload = false, make([]byte, 1300)
		for _, b := range cut(t, there.bytes(t), 576) {
			require.NoError(t, w.host.Inject(0, b, port.Offload{}))
		}
		w.poll()
		require.Len(t, w.sent(in), 3, c.name)
		for id := range 20 {
			back := c.back()
			back.df, back.payload = false, make([]byte, 1300)
			b := back.bytes(t)
			b[18], b[24], b[25] = byte(id), 0, 0
			sum := packet.Checksum(b[14:34], 0)
			b[24], b[25] = byte(sum>>8), byte(sum)
			pieces := cut(t, b, 576)
			free := w.free
			w.free = 0
			for _, i := range rand.Perm(len(pieces)) {
				require.NoError(t, in.Inject(rand.IntN(workers), pieces[i], port.Offload{}))
				w.poll()
			}
			w.free = free
			w.poll()
			sent := w.sent(w.host)
			require.Len(t, sent, 3, c.name)
			for _, s := range sent {
				require.EqualValues(t, id<<8|7, parse(t, s.Bytes).FragmentID, "as the server sent them")
			}
		}
	}
}

// A pod's flows by the kernel are limited like those to the outside.
func TestServiceFlowsAreLimited(t *testing.T) {
	n := newNode(t, withSNAT)
	c := serviceCases(0)[0]
	for i := range 5000 {
		c.sport = uint16(30000 + i)
		n.inject(n.host, c.there().bytes(t))
		n.pods[1].Sent(0)
		n.host.Sent(0)
	}
	require.Positive(t, n.drops(HostSlot, drop.NATSessionLimit))
}

func TestDecideMatchesModelWithPins(t *testing.T) {
	n := newNode(t, withSNAT)
	m := newModel(n.snap)
	m.t = n.translator
	for f := range families {
		for _, c := range serviceCases(f) {
			n.inject(n.host, c.there().bytes(t))
			c.sport, c.dport = 1000, 2000
			n.inject(n.host, c.there().bytes(t))
		}
	}
	var frames [][]byte
	add := func(b []byte) { frames = append(frames, b) }
	pairs(t, add)
	for f := range families {
		for _, c := range serviceCases(f) {
			for _, size := range []int{10, 1600} {
				for _, p := range []ip{c.there(), c.back()} {
					p.payload = make([]byte, size)
					add(p.bytes(t))
					if families[f].name == "ipv4" {
						p.df = false
						frames = append(frames, cut(t, p.bytes(t), 576)...)
					}
				}
			}
		}
	}
	pinned, made := 0, 0
	for _, b := range frames {
		for slot := range n.snap.Ports {
			decideMatches(t, m, slot, 0, b)
			decideMatches(t, m, slot, 1501, b)
			var p packet.Packet
			packet.Parse(&p, b, len(b))
			var v Verdict
			Decide(n.snap, n.translator, &n.snap.Ports[slot], &p, b, p.Length, &v)
			switch {
			case v.Translation == MakePin:
				made++
			case v.Translation == TranslateOut && v.View.Action == snat.ToHost:
				pinned++
			}
		}
	}
	require.Positive(t, made)
	require.Positive(t, pinned)
}
