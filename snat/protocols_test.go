package snat

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// VPP's unknown_proto: what has no ports is translated by address pair or dropped by name.
func TestUnknownProtocols(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{packet.ProtoESP, protoGRE} {
			g := w.mustOut(0, w.to(0, proto, 0, 0, 0))
			require.Equal(t, w.node, g.src)
			w.reaches(g.back(), 0, 0)
			_, r := w.out(1, w.to(1, proto, 0, 0, 0))
			require.Equal(t, drop.NATPortTaken, r.Reason, "one pod a peer")
			require.True(t, r.v.Unreachable)
			h := w.mustOut(1, w.to(1, proto, 0, 1, 0))
			w.reaches(h.back(), 1, 0)
			b := g.back()
			b.src = w.far(9)
			_, r = w.in(b)
			require.Equal(t, NotOurs, r.Action, "the node may have tunnels of its own")
		}
		for _, proto := range []uint8{4, 33, 41, 51, 136, 253} { // DCCP and UDP-Lite among them
			if proto == 51 && w.node.Is6() {
				continue // AH is an extension header there
			}
			f := w.to(0, proto, 0, 0, 0)
			f.payload = make([]byte, 40)
			_, r := w.out(0, f)
			require.Equal(t, drop.NATProtocol, r.Reason, "protocol %d", proto)
			_, r = w.in(flow{src: w.far(0), dst: w.node, proto: proto, payload: make([]byte, 40)})
			require.Equal(t, NotOurs, r.Action)
		}
		for _, f := range []flow{w.to(0, udp, 0, 0, 53), w.to(0, udp, 4000, 0, 0), w.to(0, tcp, 0, 0, 80)} {
			_, r := w.out(0, f)
			require.Equal(t, drop.NATProtocol, r.Reason, "port 0")
		}
	})
}

func TestSCTPAddressOnly(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, sctp, 4000, 0, 3868)
		sent := f.frame()
		r := w.outFrame(0, sent)
		require.Equal(t, Translate, r.Action)
		require.Equal(t, uint16(4000), r.p.SrcPort, "the CRC covers the port")
		require.Equal(t, sent[r.p.L4:], r.frame[r.p.L4:], "the SCTP packet is untouched")
		g := w.mustOut(0, f)
		w.reaches(g.back(), 0, 4000)
		_, x := w.out(1, w.to(1, sctp, 4000, 0, 3868))
		require.Equal(t, drop.NATPortTaken, x.Reason)
		w.mustOut(1, w.to(1, sctp, 4001, 0, 3868))
		w.mustOut(1, w.to(1, sctp, 4000, 1, 3868))
		w.a.SetHostPorts(sctp, []uint16{5000})
		_, x = w.out(0, w.to(0, sctp, 5000, 0, 3868))
		require.Equal(t, drop.NATPortTaken, x.Reason, "a socket of the node has it")

		events, lost := w.tr.Events()
		require.False(t, lost)
		require.Len(t, events, 3)
		require.Equal(t, FlowEvent{true, sctp, packet.AddrFrom(w.far(0)), 3868, 4000}, events[0])
		w.pass(601)
		events, _ = w.tr.Events()
		require.Len(t, events, 3)
		require.False(t, events[0].Began)
		w.mustOut(1, w.to(1, sctp, 4000, 0, 3868))
	})
}

func TestTCPWithoutSession(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, flags := range []uint8{0, tcpACK, tcpRST, tcpFIN, tcpSYN | tcpACK, tcpSYN | tcpRST, tcpSYN | tcpFIN, 0x3f} {
			_, r := w.out(0, w.to(0, tcp, 4000, 0, 80).flags(flags))
			require.Equal(t, drop.NATNoSYN, r.Reason, "flags %x", flags)
		}
		require.Empty(t, w.sessions())
	})
}

func TestNoExternalAddress(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		w.mustOut(0, w.to(0, udp, 1, 0, 53))
		require.Equal(t, 1, w.tr.SetNodeAddresses(packet.Addr{}, packet.Addr{}))
		_, r := w.out(0, w.to(0, udp, 4000, 0, 53))
		require.Equal(t, drop.NATNoAddress, r.Reason)
	})
}

func TestUDPChecksumOfZero(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, udp, 4000, 0, 53)
		f.noSum = true
		r := w.outFrame(0, f.frame())
		require.Equal(t, []byte{0, 0}, r.frame[r.p.L4+6:r.p.L4+8], "none stays none")
		// A sum that becomes zero is sent as ones: try payloads until it does.
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
		f.noSum, f.payload = false, []byte{0, 0}
		for i := range 1 << 16 {
			binary.BigEndian.PutUint16(f.payload, uint16(i))
			want := f
			want.src, want.sport = g.src, g.sport
			b := want.frame()
			p := w.parse(b)
			if binary.BigEndian.Uint16(b[p.L4+6:]) == 0xffff {
				r = w.outFrame(0, f.frame())
				require.Equal(t, []byte{0xff, 0xff}, r.frame[p.L4+6:p.L4+8])
				return
			}
		}
		t.Fatal("no payload found")
	})
}

func TestUnfinishedChecksums(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP} {
			if proto == packet.ProtoICMP && w.node.Is4() {
				continue // has no pseudo-header
			}
			f := w.to(0, proto, 4000, 0, 80)
			g := w.mustOut(0, f)
			unfinished := func(f flow) []byte {
				b := f.frame()
				p := w.parse(b)
				at := map[uint8]uint16{tcp: 16, udp: 6, packet.ProtoICMPv6: 2}[p.Proto]
				sum := packet.Fold(packet.PseudoHeader(p.Src, p.Dst, p.Proto, p.Length-uint32(p.L4-p.L3)))
				binary.BigEndian.PutUint16(b[p.L4+at:], sum)
				return b
			}
			b := unfinished(f)
			p := w.parse(b)
			var v View
			w.tr.Outbound(&p, b, 0, &v)
			w.tr.TranslateOut(&p, b, &v, Offload{Unfinished: true})
			packet.FinishChecksum(&p, b, nil)
			require.True(t, packet.VerifyL4(&p, b, nil))
			require.Equal(t, g.frame()[p.L4:], b[p.L4:])
			b = unfinished(g.back())
			p = w.parse(b)
			w.tr.Inbound(&p, b, &v)
			require.Equal(t, Translate, v.Action)
			w.tr.TranslateIn(&p, b, &v, Offload{Unfinished: true})
			packet.FinishChecksum(&p, b, nil)
			require.True(t, packet.VerifyL4(&p, b, nil))
		}
	})
}

func TestWrongChecksumsStayWrong(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP} {
			b := w.to(0, proto, 4000, 0, 80).frame()
			b[len(b)-1] ^= 0x10
			r := w.outFrame(0, b) // checked there
			require.Equal(t, Translate, r.Action)
			require.False(t, packet.VerifyL4(&r.p, r.frame, nil))
		}
	})
}

// IPv6 extension headers are walked, in packets and in what errors quote.
func TestNAT66_ExtensionHeaders(t *testing.T) {
	w := newWorld(t, AllocatorConfig{}, Config{})
	w.family = &families[1]
	plain := w.to(0, udp, 4000, 0, 53).frame()
	b := append(append([]byte{}, plain[:54]...), append([]byte{packet.ProtoUDP, 0, 1, 4, 0, 0, 0, 0}, plain[54:]...)...)
	b[20] = packet.ProtoDestination
	binary.BigEndian.PutUint16(b[18:], uint16(len(b)-54))
	r := w.outFrame(0, b)
	require.Equal(t, Translate, r.Action)
	require.Equal(t, w.node, r.p.Src.Netip())
	e := w.inFrame(w.quote(w.far(7), w.node, 1, 0, 0, r.frame, 0))
	require.Equal(t, Translate, e.Action)
	require.Equal(t, b[14:], e.frame[w.quotation():])
	// A first fragment without the whole chain is none: the parser says so.
	b[20], b[54] = packet.ProtoFragment, packet.ProtoDestination
	b[56], b[57] = 0, 1
	var p packet.Packet
	packet.Parse(&p, b[:62+4], 62+4)
	require.NotEqual(t, drop.None, p.Reason)
}

func TestPins(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		require.Zero(t, w.tr.Stats().Pins)
		pinned := func(f flow) Action {
			b := f.frame()
			p := w.parse(b)
			var v View
			w.tr.Pinned(&p, b, &v)
			if v.Action == ToHost {
				w.tr.TranslateOut(&p, b, &v, Offload{})
				require.Equal(t, f.frame(), b, "untranslated")
			}
			return v.Action
		}
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP, sctp} {
			// An external client's flow that the node's kernel sent to a pod: the reply goes back to the kernel.
			in := flow{src: w.far(0), dst: w.pod(0), proto: proto, sport: 5000, dport: 8080, tcp: tcpSYN}
			p := w.parse(in.frame())
			require.Equal(t, drop.None, w.tr.Pin(&p, 0))
			require.Positive(t, w.tr.Stats().Pins)
			reply := in.back()
			require.Equal(t, ToHost, pinned(reply))
			_, r := w.out(0, reply)
			require.Equal(t, ToHost, r.Action, "also where Outbound is asked")
			other := reply
			other.sport++
			if proto == packet.ProtoICMP {
				other.sport, other.dport = 9, 9
			}
			require.Equal(t, NotOurs, pinned(other))
			// The pod's error about it goes the same way.
			if proto != sctp {
				e := w.quote(w.pod(0), w.far(0), w.unreach, 3, 0, in.frame(), 0)
				p := w.parse(e)
				var v View
				w.tr.Pinned(&p, e, &v)
				require.Equal(t, ToHost, v.Action)
			}
		}
		// A pod's flow to a service, translated to a remote pod: the reply comes from the uplink.
		in := flow{src: w.pod(1), dst: plus(w.podBase, 999), proto: tcp, sport: 5000, dport: 80, tcp: tcpSYN}
		p := w.parse(in.frame())
		require.Equal(t, drop.None, w.tr.Pin(&p, NoPod))
		require.Equal(t, ToHost, pinned(in.back()))
		// Both directions keep it alive; it ends like any session.
		p = w.parse(in.flags(tcpACK).frame())
		w.tr.Pin(&p, NoPod)
		w.pass(7000)
		require.Equal(t, ToHost, pinned(in.back().flags(tcpACK)))
		w.pass(7000)
		require.Equal(t, ToHost, pinned(in.back().flags(tcpACK)))
		list := w.sessions()
		require.Len(t, list, 1)
		require.True(t, list[0].Pin)
		require.Equal(t, NoPod, list[0].Pod)
		w.pass(7441)
		require.Zero(t, w.tr.Stats().Pins)
		require.Equal(t, NotOurs, pinned(in.back()))
		// In the middle of a connection: after a restart without the table.
		p = w.parse(in.flags(tcpACK).frame())
		w.tr.Pin(&p, NoPod)
		w.stands("established", 7440)
	})
}

func TestPinAndSessionDoNotMix(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 53)) // the pod's own flow
		in := flow{src: w.far(0), dst: w.pod(0), proto: udp, sport: 53, dport: 4000}
		p := w.parse(in.frame())
		require.Equal(t, drop.None, w.tr.Pin(&p, 0))
		require.Zero(t, w.tr.Stats().Pins)
		w.reaches(g.back(), 0, 4000)
		// Pins are not flushed with the node's address, and are limited like sessions.
		in.sport++
		p = w.parse(in.frame())
		w.tr.Pin(&p, 0)
		require.Equal(t, 1, w.tr.SetNodeAddresses(packet.AddrFrom(families[0].node2), packet.AddrFrom(families[1].node2)))
		require.Positive(t, w.tr.Stats().Pins)
	})
	w := newWorld(t, AllocatorConfig{}, Config{Sessions4: 16, Sessions6: 16})
	reasons := map[drop.Reason]int{}
	for i := range 100 {
		p := w.parse(flow{src: w.far(i), dst: w.pod(0), proto: udp, sport: 53, dport: 4000}.frame())
		reasons[w.tr.Pin(&p, 0)]++
	}
	require.Positive(t, reasons[drop.NATSessionLimit])
}

// Microsoft's "Verifying the RSS Hash Calculation".
func TestToeplitzVectors(t *testing.T) {
	key, err := hex.DecodeString("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
	require.NoError(t, err)
	for _, c := range []struct {
		src, dst     string
		sport, dport uint16
		ports, addrs uint32
	}{
		{"66.9.149.187", "161.142.100.80", 2794, 1766, 0x51ccc178, 0x323e8fc2},
		{"199.92.111.2", "65.69.140.83", 14230, 4739, 0xc626b0ea, 0xd718262a},
		{"24.19.198.95", "12.22.207.184", 12898, 38024, 0x5c2b394a, 0xd2d0a5de},
		{"38.27.205.30", "209.142.163.6", 48228, 2217, 0xafc7327f, 0x82989176},
		{"153.39.163.191", "202.188.127.2", 44251, 1303, 0x10e828a2, 0x5d1809c5},
		{"3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", 2794, 1766, 0x40207d3d, 0x2cc18cd5},
		{"3ffe:501:8::260:97ff:fe40:efab", "ff02::1", 14230, 4739, 0xdde51bbf, 0x0f0c461c},
		{"3ffe:1900:4545:3:200:f8ff:fe21:67cf", "fe80::200:f8ff:fe21:67cf", 44251, 38024, 0x02d1feef, 0x4b61e985},
	} {
		src, dst := packet.AddrFrom(netip.MustParseAddr(c.src)), packet.AddrFrom(netip.MustParseAddr(c.dst))
		require.Equal(t, c.ports, Toeplitz(key, src, dst, c.sport, c.dport, true), c.src)
		require.Equal(t, c.addrs, Toeplitz(key, src, dst, c.sport, c.dport, false), c.src)
	}
	require.Zero(t, Toeplitz(key[:10], packet.AddrFrom4(1), packet.AddrFrom4(2), 3, 4, true))
}

func TestRSSPrefersOwnQueues(t *testing.T) {
	key := make([]byte, 40)
	for i := range key {
		key[i] = byte(i*37 + 11)
	}
	rss := &RSS{Key: key, Table: make([]uint16, 128), PortsTCP: true, PortsUDP: true}
	for i := range rss.Table {
		rss.Table[i] = uint16(i % 4)
	}
	forFamiliesOn(t, AllocatorConfig{Workers: 2}, Config{Worker: 1, RSS: rss}, func(t *testing.T, w *world) {
		ours := 0
		for i := range 200 {
			g := w.mustOut(0, w.to(0, udp, uint16(1000+i), i, 53))
			q := rss.Queue(packet.AddrFrom(g.dst), packet.AddrFrom(g.src), g.dport, g.sport, true)
			if q%2 == 1 {
				ours++
			}
		}
		require.Greater(t, ours, 195)
	})
}
