package snat

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

func TestRFC5508_REQ1_Ping(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, packet.ProtoICMP, 777, 0, 0)
		g := w.mustOut(0, f)
		require.Equal(t, w.node, g.src)
		require.True(t, w.a.InRange(g.sport))
		w.reaches(g.back(), 0, 777)
		// Two pods, one identifier.
		h := w.mustOut(1, w.to(1, packet.ProtoICMP, 777, 0, 0))
		require.NotEqual(t, g.sport, h.sport)
		w.reaches(h.back(), 1, 777)
		// A reply nobody waits for may be the host's.
		b := g.back()
		b.src = w.far(1)
		_, r := w.in(b)
		require.Equal(t, NotOurs, r.Action)
		// So is a request.
		b.reply = false
		_, r = w.in(b)
		require.Equal(t, NotOurs, r.Action)
		// A pod cannot send replies to nobody's requests.
		_, r = w.out(0, flow{src: w.pod(0), dst: w.far(9), proto: packet.ProtoICMP, sport: 5, reply: true})
		require.Equal(t, drop.NATNoSession, r.Reason)
	})
}

func TestRFC5508_REQ2_QueryTimer(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		g := w.mustOut(0, w.to(0, packet.ProtoICMP, 777, 0, 0))
		w.pass(59)
		w.reaches(g.back(), 0, 777)
		w.pass(2)
		_, r := w.in(g.back())
		require.Equal(t, NotOurs, r.Action)
	})
}

// icmp_echo_reply_trailer: an echo reply padded to the smallest Ethernet frame; the trailer is not part of the checksum.
func TestRFC5508_EchoReplyTrailer(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, packet.ProtoICMP, 777, 0, 0)
		f.payload = nil
		g := w.mustOut(0, f)
		frame := append(g.back().frame(), 0xff, 0x55, 0xff, 0x55, 0xff)
		r := w.inFrame(frame)
		require.Equal(t, Translate, r.Action)
		require.Equal(t, []byte{0xff, 0x55, 0xff, 0x55, 0xff}, r.frame[len(r.frame)-5:])
	})
}

func TestRFC5508_REQ3_BadErrors(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP} {
			r := w.outFrame(0, w.to(0, proto, 4000, 0, 80).frame())
			good := w.quote(w.far(7), w.node, w.unreach, 1, 0, r.frame, 0)
			require.Equal(t, Translate, w.inFrame(good).Action)

			bad := bytes.Clone(good) // the error's own checksum
			bad[w.quotation()-6] ^= 1
			require.Equal(t, drop.NATErrorBad, w.inFrame(bad).Reason)

			if w.node.Is4() {
				inner := bytes.Clone(r.frame) // the quoted IP header's checksum
				inner[14+10] ^= 1
				require.Equal(t, drop.NATErrorBad, w.inFrame(w.quote(w.far(7), w.node, w.unreach, 1, 0, inner, 0)).Reason)
			}

			inner := bytes.Clone(r.frame) // the quoted L4 checksum is ignored, and stays as wrong as it was
			inner[len(inner)-1] ^= 1
			e := w.inFrame(w.quote(w.far(7), w.node, w.unreach, 1, 0, inner, 0))
			require.Equal(t, Translate, e.Action)

			inner = bytes.Clone(r.frame) // another version inside
			inner[14] = 0x55
			require.Equal(t, drop.NATErrorBad, w.inFrame(w.quote(w.far(7), w.node, w.unreach, 1, 0, inner, 0)).Reason)
			for _, n := range []int{0, 1, 19, 27, 39} { // a truncated quotation
				if n == 27 && w.node.Is6() {
					n = 47
				} else if n == 39 && w.node.Is4() {
					continue
				}
				about := r.frame[:14+n]
				q := w.quote(w.far(7), w.node, w.unreach, 1, 0, about, 0)
				require.Equal(t, drop.NATErrorTruncated, w.inFrame(q).Reason, "%d bytes", n)
			}
		}
	})
}

// RFC 4884: what follows the quotation, and the length field in front of it, survive.
func TestRFC5508_REQ3_ExtensionsSurvive(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, udp, 33434, 0, 33434)
		f.payload = make([]byte, 100)
		r := w.outFrame(0, f.frame())
		about := append(bytes.Clone(r.frame), 0x20, 0, 0x12, 0x34, 0, 8, 1, 1, 0, 1, 1, 1) // an MPLS label
		e := w.inFrame(w.quote(w.far(7), w.node, w.exceeded, 0, 0x00200000, about, 0))
		require.Equal(t, Translate, e.Action)
		require.Equal(t, about[len(about)-12:], e.frame[len(e.frame)-12:])
		require.Equal(t, byte(0x20), e.frame[w.quotation()-3])
	})
}

func TestRFC5508_REQ4_InboundErrors(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP, sctp} {
			f := w.to(0, proto, 4000, 0, 80)
			sent := f.frame()
			r := w.outFrame(0, sent)
			require.Equal(t, Translate, r.Action)
			for _, quoted := range []int{0, len(sent) - 14 - len(f.payload) - (map[uint8]int{tcp: 12, sctp: 4}[proto])} { // all, and 8 bytes of L4
				for typ, word := range map[byte]uint32{w.unreach: 0, w.exceeded: 0, 2 + w.unreach/2: 1280} {
					if w.node.Is4() && typ == 2+w.unreach/2 {
						typ, word = 12, 0x05000000
					}
					e := w.inFrame(w.quote(w.far(7), w.node, typ, 2, word, r.frame, quoted))
					require.Equal(t, Translate, e.Action, "%v", e.Reason)
					require.Equal(t, int32(0), e.v.Pod)
					require.Equal(t, w.pod(0), e.p.Dst.Netip())
					require.Equal(t, w.far(7), e.p.Src.Netip(), "the router that sent it")
					require.Equal(t, typ, e.p.ICMPType)
					require.Equal(t, byte(2), e.p.ICMPCode)
					want := sent[14:]
					if quoted > 0 {
						want = want[:quoted]
					}
					require.Equal(t, want, e.frame[w.quotation():], "what the pod sent, byte for byte")
				}
			}
		}
		require.NotZero(t, w.tr.Counts().ErrorsIn)

		// Forged: another port inside, another peer, somebody else's address. The host may know about it.
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 80))
		for _, forge := range []func(*flow){func(f *flow) { f.sport ^= 1 }, func(f *flow) { f.dport++ }, func(f *flow) { f.dst = w.far(9) },
			func(f *flow) { f.src = w.pod(1) }} {
			x := g
			forge(&x)
			require.Equal(t, NotOurs, w.inFrame(w.quote(w.far(7), w.node, w.unreach, 1, 0, x.frame(), 0)).Action)
		}
		x := g
		x.fragAt, x.proto = 1480, udp // quoting a fragment without ports
		require.Equal(t, NotOurs, w.inFrame(w.quote(w.far(7), w.node, w.unreach, 1, 0, x.frame(), 0)).Action)
	})
}

// VPP #3728: an ICMP error that quotes GRE.
func TestRFC5508_ErrorsQuotingGRE(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{protoGRE, packet.ProtoESP} {
			f := w.to(0, proto, 0, 0, 0)
			sent := f.frame()
			r := w.outFrame(0, sent)
			require.Equal(t, Translate, r.Action)
			for _, n := range []int{0, len(sent) - 14 - 4, len(sent) - 14 - 8} {
				e := w.inFrame(w.quote(w.far(7), w.node, w.unreach, 2, 0, r.frame, n))
				require.Equal(t, Translate, e.Action)
				want := sent[14:]
				if n > 0 {
					want = want[:n]
				}
				require.Equal(t, want, e.frame[w.quotation():])
			}
		}
		g := w.to(0, protoGRE, 0, 5, 0)
		g.src = w.node
		require.Equal(t, NotOurs, w.inFrame(w.quote(w.far(7), w.node, w.unreach, 2, 0, g.frame(), 0)).Action)
	})
}

func TestRFC5508_REQ5_OutboundErrors(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP} {
			g := w.mustOut(0, w.to(0, proto, 4000, 0, 80))
			reply := g.back().frame()
			r := w.inFrame(reply)
			require.Equal(t, Translate, r.Action)
			e := w.outFrame(0, w.quote(w.pod(0), w.far(0), w.unreach, 3, 0, r.frame, 0))
			require.Equal(t, Translate, e.Action, "%v", e.Reason)
			require.Equal(t, w.node, e.p.Src.Netip())
			require.Equal(t, w.far(0), e.p.Dst.Netip())
			require.Equal(t, w.unreach, e.p.ICMPType)
			require.Equal(t, reply[14:], e.frame[w.quotation():], "what the far side sent, byte for byte")
			// About a packet that came to another pod, or to another host's peer.
			require.Equal(t, drop.NATErrorMismatch, w.outFrame(1, w.quote(w.pod(1), w.far(0), w.unreach, 3, 0, r.frame, 0)).Reason)
			require.Equal(t, drop.NATErrorMismatch, w.outFrame(0, w.quote(w.pod(0), w.far(1), w.unreach, 3, 0, r.frame, 0)).Reason)
			x := g.back()
			x.dst, x.dport = w.pod(0), 9999
			if proto == packet.ProtoICMP {
				x.sport = 9999
			}
			require.Equal(t, drop.NATNoSession, w.outFrame(0, w.quote(w.pod(0), w.far(0), w.unreach, 3, 0, x.frame(), 0)).Reason)
		}
		require.NotZero(t, w.tr.Counts().ErrorsOut)
	})
}

func TestRFC5508_REQ7_HairpinnedErrors(t *testing.T) { testHairpinnedError(t, udp) }

func testHairpinnedError(t *testing.T, proto uint8) {
	forFamilies(t, with(eim, func(c *Config) { c.Filtering = FilterNone }), func(t *testing.T, w *world) {
		b := w.mustOut(1, w.to(1, proto, 5000, 0, 53))
		f := w.to(0, proto, 4000, 0, 0)
		f.dst, f.dport = w.node, b.sport
		sent := f.frame()
		r := w.outFrame(0, sent)
		require.Equal(t, Translate, r.Action)
		if proto == udp { // the pod answers once: it makes the session that admits an error
			w.out(1, flow{src: w.pod(1), dst: r.p.Src.Netip(), proto: proto, sport: 5000, dport: r.p.SrcPort})
		}
		e := w.outFrame(1, w.quote(w.pod(1), w.node, w.unreach, 3, 0, r.frame, 0))
		require.Equal(t, Translate, e.Action, "%v", e.Reason)
		require.Equal(t, w.pod(0), e.p.Dst.Netip())
		require.Equal(t, w.node, e.p.Src.Netip())
		require.Equal(t, sent[14:], e.frame[w.quotation():])
	})
}

func TestRFC5508_REQ8_Exhaustion(t *testing.T) {
	forFamiliesOn(t, AllocatorConfig{First: 10000, Last: 10063, MaxPods: 4}, Config{}, func(t *testing.T, w *world) {
		var got []flow
		for i := range 64 {
			g, r := w.out(0, w.to(0, udp, uint16(1000+i), 0, 53))
			if r.Action == Translate {
				got = append(got, g)
				continue
			}
			require.Equal(t, drop.NATNoPort, r.Reason)
			require.True(t, r.v.Unreachable, "the pod is to be told: 3/13, 1/1")
		}
		require.NotEmpty(t, got)
		for i, g := range got {
			w.reaches(g.back(), 0, uint16(1000+i)) // live mappings are never evicted
		}
	})
	t.Run("sessions", func(t *testing.T) {
		forFamilies(t, Config{Sessions4: 64, Sessions6: 64}, func(t *testing.T, w *world) {
			var got []flow
			for i := range 100 {
				g, r := w.out(0, w.to(0, udp, uint16(1000+i), i, 53))
				if r.Action == Translate {
					got = append(got, g)
					continue
				}
				require.Equal(t, drop.NATSessionLimit, r.Reason)
				require.True(t, r.v.Unreachable)
			}
			require.Greater(t, len(got), 32, "one pod alone may use most")
			for i, g := range got {
				w.reaches(g.back(), 0, uint16(1000+i))
			}
		})
	})
}

// Row 5508-10: TTL exceeded is the forwarding's to send. What a router on the way says about a traceroute's probes must find back to it.
func TestRFC5508_REQ10_Traceroute(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{udp, tcp, packet.ProtoICMP} {
			for hop := range uint16(5) {
				f := w.to(0, proto, 40000, 0, 33434+hop)
				sent := f.frame()
				r := w.outFrame(0, sent)
				require.Equal(t, Translate, r.Action)
				e := w.inFrame(w.quote(w.far(50+int(hop)), w.node, w.exceeded, 0, 0, r.frame, 0))
				require.Equal(t, Translate, e.Action)
				require.Equal(t, w.far(50+int(hop)), e.p.Src.Netip())
				require.Equal(t, sent[14:], e.frame[w.quotation():])
			}
		}
	})
}

func TestRFC5508_REQ11_OtherMessages(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, typ := range []byte{5, 9, 10, 13, 14, 17, 42, 100} {
			if w.node.Is6() {
				typ += 128
				if typ >= 133 && typ <= 137 {
					continue // discovery never comes this far
				}
			}
			frame := w.quote(w.pod(0), w.far(0), typ, 0, 0, make([]byte, 14+40), 0)
			require.Equal(t, drop.NATICMPType, w.outFrame(0, frame).Reason, "type %d", typ)
			frame = w.quote(w.far(0), w.node, typ, 0, 0, make([]byte, 14+40), 0)
			require.Equal(t, NotOurs, w.inFrame(frame).Action, "the node's own")
		}
	})
}
