package dataplane

import (
	"encoding/binary"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

func parse(t testing.TB, b []byte) packet.Packet {
	var p packet.Packet
	packet.Parse(&p, b, len(b))
	require.Equal(t, drop.None, p.Reason)
	return p
}

// fromOutside is a packet that the router brings to the node's address.
func fromOutside(src, dst string, proto layers.IPProtocol, l4 gopacket.SerializableLayer, payload int) ip {
	return ip{src: src, dst: dst, ttl: 64, ethSrc: routerMAC, ethDst: uplinkMAC, proto: proto, l4: []gopacket.SerializableLayer{l4}, payload: make([]byte, payload)}
}

func TestPodReachesOutsideWithTheNodesAddress(t *testing.T) {
	for _, f := range families {
		for _, proto := range []string{"tcp", "udp", "icmp"} {
			t.Run(f.name+" "+proto, func(t *testing.T) {
				n := newNode(t, withSNAT)
				out := fromPod(0, f.outside, 30)
				switch {
				case proto == "tcp":
					out.proto, out.l4 = layers.IPProtocolTCP, []gopacket.SerializableLayer{&layers.TCP{SrcPort: 1000, DstPort: 2000, SYN: true, Window: 100}}
				case proto == "icmp" && f.name == "ipv4":
					out.proto, out.l4 = layers.IPProtocolICMPv4, []gopacket.SerializableLayer{&layers.ICMPv4{TypeCode: layers.ICMPv4TypeEchoRequest << 8, Id: 1000, Seq: 1}}
				case proto == "icmp":
					out.proto, out.payload = layers.IPProtocolICMPv6, nil // gopacket loses an ICMPv6 echo's payload
					out.l4 = []gopacket.SerializableLayer{&layers.ICMPv6{TypeCode: layers.ICMPv6TypeEchoRequest << 8}, &layers.ICMPv6Echo{Identifier: 1000, SeqNumber: 1}}
				}
				n.inject(n.pods[0], out.bytes(t))
				s := n.sent(n.uplink)
				got := decode(t, s.Bytes)
				require.EqualValues(t, 63, hopLimit(got))
				p := parse(t, s.Bytes)
				require.Equal(t, routerMAC, p.EthDst)
				require.Equal(t, addr(f.self), p.Src)
				require.Equal(t, addr(f.outside), p.Dst)
				require.GreaterOrEqual(t, p.SrcPort, uint16(10000))
				require.Less(t, p.SrcPort, uint16(30000))

				back := fromOutside(f.outside, f.self, out.proto, nil, len(out.payload))
				switch proto {
				case "tcp":
					back.l4 = []gopacket.SerializableLayer{&layers.TCP{SrcPort: 2000, DstPort: layers.TCPPort(p.SrcPort), SYN: true, ACK: true, Window: 100}}
				case "udp":
					back.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: 2000, DstPort: layers.UDPPort(p.SrcPort)}}
				default:
					back.l4 = []gopacket.SerializableLayer{&layers.ICMPv4{TypeCode: layers.ICMPv4TypeEchoReply << 8, Id: p.SrcPort, Seq: 1}}
					if f.name == "ipv6" {
						back.l4 = []gopacket.SerializableLayer{&layers.ICMPv6{TypeCode: layers.ICMPv6TypeEchoReply << 8}, &layers.ICMPv6Echo{Identifier: p.SrcPort, SeqNumber: 1}}
					}
				}
				n.inject(n.uplink, back.bytes(t))
				s = n.sent(n.pods[0])
				got = decode(t, s.Bytes)
				require.EqualValues(t, 63, hopLimit(got))
				p = parse(t, s.Bytes)
				require.Equal(t, podMACs[0], p.EthDst)
				require.Equal(t, addr(f.podA), p.Dst)
				require.Equal(t, uint16(1000), p.DstPort)
			})
		}
	}
}

func TestUnsolicitedPacketsDoNotReachPods(t *testing.T) {
	for _, f := range families {
		n := newNode(t, withSNAT)
		n.inject(n.uplink, fromOutside(f.outside, f.self, layers.IPProtocolUDP, &layers.UDP{SrcPort: 2000, DstPort: 12345}, 10).bytes(t),
			fromOutside(f.outside, f.self, layers.IPProtocolTCP, &layers.TCP{SrcPort: 2000, DstPort: 12345, SYN: true}, 10).bytes(t))
		require.EqualValues(t, 2, n.drops(UplinkSlot, drop.NATNoSession))
		for _, p := range append(n.pods, n.host) {
			require.Empty(t, p.Sent(0))
		}
	}
}

// What the steering program could not tell apart goes back to the kernel as it came.
func TestTheNodesOwnReturnsToTheKernel(t *testing.T) {
	for _, f := range families {
		n := newNode(t, withSNAT)
		b := fromOutside(f.outside, f.self, layers.IPProtocolUDP, &layers.UDP{SrcPort: 53, DstPort: 40000}, 10).bytes(t)
		n.inject(n.uplink, b)
		require.Equal(t, b, n.sent(n.host).Bytes)
		// From another node's pod it is the cluster's, and goes by the host port.
		b = fromNode2(f.remotePod, f.self, 10).bytes(t)
		n.inject(n.uplink, b)
		p := parse(t, n.sent(n.host).Bytes)
		require.Equal(t, hostMAC, p.EthDst)
	}
}

// cut makes IPv4 fragments of a packet.
func cut(t testing.TB, b []byte, mtu int) (out [][]byte) {
	p := parse(t, b)
	var fr packet.Fragmenter
	require.True(t, fr.Init(&p, b, nil, mtu))
	for more := true; more; {
		buffer := make([]byte, 2048)
		var n int
		n, more = fr.Next(buffer)
		out = append(out, buffer[:n])
	}
	return out
}

func TestFragmentsAreTranslatedInAnyOrder(t *testing.T) {
	f := families[0]
	for _, order := range [][]int{{0, 1, 2}, {2, 1, 0}, {1, 0, 2}} {
		for _, together := range []bool{true, false} {
			n := newNode(t, withSNAT)
			out := fromPod(0, f.outside, 1300)
			out.df = false
			pieces := cut(t, out.bytes(t), 576)
			require.Len(t, pieces, 3)
			var in [][]byte
			for _, i := range order {
				in = append(in, pieces[i])
			}
			if together {
				for _, b := range in {
					require.NoError(t, n.pods[0].Inject(0, b, port.Offload{}))
				}
				n.poll()
			} else {
				for _, b := range in {
					require.NoError(t, n.pods[0].Inject(0, b, port.Offload{}))
					for n.w.Poll() > 0 {
					}
				}
				n.check()
			}
			sent := n.uplink.Sent(0)
			require.Len(t, sent, 3, "order %v, together %v", order, together)
			ids := map[uint32]bool{}
			for _, s := range sent {
				p := parse(t, s.Bytes)
				require.Equal(t, addr(f.self), p.Src)
				ids[p.FragmentID] = true
			}
			require.Len(t, ids, 1)
		}
	}
}

func TestFragmentWithoutItsFirstDiesInTime(t *testing.T) {
	f := families[0]
	n := newNode(t, withSNAT)
	out := fromPod(0, f.outside, 1300)
	out.df = false
	pieces := cut(t, out.bytes(t), 576)
	require.NoError(t, n.pods[0].Inject(0, pieces[1], port.Offload{}))
	for n.w.Poll() > 0 {
	}
	chunks, _ := n.pool.Available()
	require.Equal(t, n.chunks-1, chunks, "one waits")
	n.w.clock.base += 3e9
	n.poll()
	require.EqualValues(t, 1, n.drops(FirstPodSlot, drop.NATFragmentTimeout))
}

// A large TCP write leaves in segments with the node's address and right checksums.
func TestGSOFrameIsTranslated(t *testing.T) {
	for _, f := range families {
		n := newNode(t, withSNAT)
		syn := fromPod(0, f.outside, 0)
		syn.proto, syn.l4 = layers.IPProtocolTCP, []gopacket.SerializableLayer{&layers.TCP{SrcPort: 1000, DstPort: 2000, SYN: true, Window: 100}}
		n.inject(n.pods[0], syn.bytes(t))
		port0 := parse(t, n.sent(n.uplink).Bytes).SrcPort
		b, o := gsoFrame(t, f.podA, f.outside, podMACs[0], gatewayMAC, 4000, 1000)
		require.NoError(t, n.pods[0].Inject(0, b, o))
		n.poll()
		sent := n.uplink.Sent(0)
		require.Len(t, sent, 4)
		for _, s := range sent {
			decode(t, s.Bytes)
			p := parse(t, s.Bytes)
			require.Equal(t, addr(f.self), p.Src)
			require.Equal(t, port0, p.SrcPort)
		}
	}
}

func TestHairpin(t *testing.T) {
	for _, f := range families {
		n := newNode(t, withSNAT)
		// Both pods send to where the other's mapping will be: with address-and-port-dependent mapping only the exact reverse tuple gets through, which nobody can foresee.
		n.inject(n.pods[0], func() []byte {
			p := fromPod(0, f.self, 10)
			p.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: 1000, DstPort: 12345}}
			return p.bytes(t)
		}())
		require.EqualValues(t, 1, n.drops(FirstPodSlot, drop.NATNoSession))
		require.Empty(t, n.host.Sent(0), "an external port is never the host's")

		a, err := snat.NewAllocator(snat.AllocatorConfig{MaxPods: 4})
		require.NoError(t, err)
		n = newNode(t, func(n *node) {
			n.translator, err = snat.New(snat.Config{Sessions4: 256, Sessions6: 256, Mapping: snat.EndpointIndependent, Filtering: snat.FilterNone}, a)
			require.NoError(t, err)
			t.Cleanup(func() { n.translator.Close() })
		})
		n.inject(n.pods[1], fromPod(1, f.outside, 10).bytes(t))
		external := parse(t, n.sent(n.uplink).Bytes).SrcPort
		p := fromPod(0, f.self, 10)
		p.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: 1000, DstPort: layers.UDPPort(external)}}
		n.inject(n.pods[0], p.bytes(t))
		s := n.sent(n.pods[1])
		require.EqualValues(t, 63, hopLimit(decode(t, s.Bytes)))
		got := parse(t, s.Bytes)
		require.Equal(t, addr(f.self), got.Src, "RFC 4787 REQ-9: the source seen is external")
		require.Equal(t, addr(f.podB), got.Dst)
		require.Equal(t, uint16(1000), got.DstPort)
	}
}

// An error about a translated packet finds its way to the pod that sent it.
func TestErrorsFindTheirWayBack(t *testing.T) {
	f := families[0]
	n := newNode(t, withSNAT)
	n.inject(n.pods[0], fromPod(0, f.outside, 30).bytes(t))
	quoted := n.sent(n.uplink).Bytes[14:]
	e := fromOutside("203.0.113.1", f.self, layers.IPProtocolICMPv4, &layers.ICMPv4{TypeCode: layers.ICMPv4TypeTimeExceeded << 8}, 0)
	e.payload = quoted
	n.inject(n.uplink, e.bytes(t))
	s := n.sent(n.pods[0])
	p := parse(t, s.Bytes)
	require.Equal(t, addr(f.podA), p.Dst)
	inner := s.Bytes[int(p.L4)+8:]
	require.Equal(t, []byte{10, 244, 1, 2}, inner[12:16])
	require.Equal(t, uint16(1000), binary.BigEndian.Uint16(inner[20:]))
}

func TestRemovedPodsSessionsEndAndItsIndexIsFree(t *testing.T) {
	n := newNode(t, withSNAT)
	f := families[0]
	n.inject(n.pods[0], fromPod(0, f.outside, 30).bytes(t))
	external := parse(t, n.sent(n.uplink).Bytes).SrcPort
	s := n.snapshot()
	s.Ports[FirstPodSlot] = PortInfo{}
	n.d.Publish(s)
	for n.w.Poll() > 0 {
	}
	before := n.w.collect().Packets
	require.NoError(t, n.uplink.Inject(0, fromOutside(f.outside, f.self, layers.IPProtocolUDP, &layers.UDP{SrcPort: 2000, DstPort: layers.UDPPort(external)}, 10).bytes(t), port.Offload{}))
	for n.w.Poll() > 0 {
	}
	require.EqualValues(t, 1, n.w.collect().Packets-before)
	require.EqualValues(t, 1, n.drops(UplinkSlot, drop.NATNoSession))
	require.Zero(t, n.translator.Stats().Sessions4)
	n.d.Publish(n.snapshot())
	for n.w.Poll() > 0 {
	}
	require.NoError(t, n.pods[0].Inject(0, fromPod(0, f.outside, 30).bytes(t), port.Offload{}))
	for n.w.Poll() > 0 {
	}
	n.sent(n.uplink)
}

func TestRulesLetDestinationsSeePods(t *testing.T) {
	n := newNode(t, withSNAT)
	s := n.snapshot()
	s.SNAT = snat.NewRules(snat.RulesConfig{NoMasquerade: nil, Nodes: nil})
	for _, f := range families {
		s.SNAT = snat.NewRules(snat.RulesConfig{Off: true})
		n.d.Publish(s)
		n.inject(n.pods[0], fromPod(0, f.outside, 30).bytes(t))
		require.Equal(t, addr(f.podA), parse(t, n.sent(n.uplink).Bytes).Src)
	}
}

func TestTranslationAllocatesNothing(t *testing.T) {
	for _, f := range families {
		n := newNode(t, withSNAT)
		b := fromPod(0, f.outside, 30).bytes(t)
		n.inject(n.pods[0], b)
		external := parse(t, n.sent(n.uplink).Bytes).SrcPort
		back := fromOutside(f.outside, f.self, layers.IPProtocolUDP, &layers.UDP{SrcPort: 2000, DstPort: layers.UDPPort(external)}, 10).bytes(t)
		out := &sink{pool: n.pool, frames: [][]byte{b}}
		in := &sink{pool: n.pool, frames: [][]byte{back}}
		for _, p := range n.w.slots {
			if p.tx != nil {
				p.tx, p.flusher = out, nil
			}
		}
		require.Zero(t, testing.AllocsPerRun(100, func() {
			w := n.w
			w.receive(&source{slot: w.slots[FirstPodSlot], queue: out})
			w.receive(&source{slot: w.slots[UplinkSlot], queue: in})
		}))
	}
}
