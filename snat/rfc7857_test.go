package snat

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

func TestRFC7857_States(t *testing.T) {
	type step struct {
		out     bool
		flags   uint8
		state   string
		seconds float64
	}
	const finACK = tcpFIN | tcpACK
	open := []step{{true, tcpSYN, "opening", 240}, {false, tcpSYN | tcpACK, "opening", 240}, {true, tcpACK, "established", 7440}}
	closed := append(append([]step{}, open...), step{true, finACK, "established", 7440}, step{false, finACK, "closing", 240})
	rst := append(append([]step{}, open...), step{false, tcpRST | tcpACK, "reset", 240})
	for name, steps := range map[string][]step{
		"tcp_session_open_retransmit": {{true, tcpSYN, "opening", 240}, {true, tcpSYN, "opening", 240}, {false, tcpSYN | tcpACK, "opening", 240},
			{false, tcpSYN | tcpACK, "opening", 240}, {true, tcpACK, "established", 7440}},
		"tcp_session_close_in":             append(append([]step{}, open...), step{true, finACK, "established", 7440}, step{false, tcpACK, "established", 7440}, step{false, finACK, "closing", 240}, step{true, tcpACK, "closing", 240}),
		"tcp_session_close_out":            append(append([]step{}, open...), step{false, finACK, "established", 7440}, step{true, finACK, "closing", 240}, step{false, tcpACK, "closing", 240}),
		"tcp_session_close_simultaneous":   append(append([]step{}, open...), step{true, finACK, "established", 7440}, step{false, finACK, "closing", 240}, step{true, tcpACK, "closing", 240}, step{false, tcpACK, "closing", 240}),
		"tcp_session_half_reopen_inside":   append(append([]step{}, closed...), step{true, tcpSYN, "opening", 240}),
		"tcp_session_half_reopen_outside":  append(append([]step{}, closed...), step{false, tcpSYN, "opening", 240}),
		"tcp_session_reopen":               append(append([]step{}, closed...), open...),
		"session_rst_timeout":              rst,
		"reset, then traffic":              append(append([]step{}, rst...), step{true, tcpACK, "established", 7440}),
		"reset, then traffic from outside": append(append([]step{}, rst...), step{false, tcpACK, "established", 7440}),
		"reset, then a new connection":     append(append([]step{}, rst...), open...),
		"refused":                          {{true, tcpSYN, "opening", 240}, {false, tcpRST | tcpACK, "reset", 240}},
		"refused, tried again":             {{true, tcpSYN, "opening", 240}, {false, tcpRST | tcpACK, "reset", 240}, {true, tcpSYN, "opening", 240}},
		"reset while closing":              append(append([]step{}, closed...), step{true, tcpRST, "reset", 240}),
		"half-closed goes on":              append(append([]step{}, open...), step{true, finACK, "established", 7440}, step{false, tcpACK, "established", 7440}),
		"segments of no opening":           {{true, tcpSYN, "opening", 240}, {false, tcpACK, "opening", 240}, {true, tcpACK, "opening", 240}},
	} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, Config{}, func(t *testing.T, w *world) {
				f := w.to(0, tcp, 4000, 0, 80)
				var g flow
				for i, s := range steps {
					if s.out {
						g = w.mustOut(0, f.flags(s.flags))
					} else {
						b := g.back()
						w.reaches(b.flags(s.flags), 0, 4000)
					}
					state, left := w.state()
					require.Equal(t, s.state, state, "step %d", i)
					require.InDelta(t, s.seconds, left, 0.6, "step %d", i)
				}
			})
		})
	}
}

func TestRFC7857_ClosingIsNotExtended(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, tcp, 4000, 0, 80)
		g := w.connect(0, 4000, 0, 80)
		w.mustOut(0, f.flags(tcpFIN|tcpACK))
		w.reaches(g.back().flags(tcpFIN|tcpACK), 0, 4000)
		w.pass(200)
		w.mustOut(0, f.flags(tcpACK))
		w.stands("closing", 40)
		w.pass(41)
		require.Empty(t, w.sessions())
	})
}

// VPP's session_rst_established_timeout, too.
func TestRFC7857_RST(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, tcp, 4000, 0, 80)
		g := w.connect(0, 4000, 0, 80)
		b := g.back().flags(tcpRST)
		w.reaches(b, 0, 4000) // translated
		w.pass(239)
		w.reaches(b, 0, 4000) // another RST is no traffic
		w.stands("reset", 1)
		w.mustOut(0, f.flags(tcpACK))
		w.stands("established", 7440)
		w.reaches(b, 0, 4000)
		w.pass(241)
		w.refused(b, drop.NATNoSession)
	})
}

func TestRFC7857_Overlap(t *testing.T) {
	// One port for different destinations: a pod with 64 ports opens many more connections.
	for _, proto := range []uint8{tcp, udp, packet.ProtoICMP} {
		forFamiliesOn(t, AllocatorConfig{First: 10000, Last: 10063, MaxPods: 1}, Config{HalfOpen: 4096}, func(t *testing.T, w *world) {
			ports := map[uint16]int{}
			for i := range 1000 {
				g := w.mustOut(0, w.to(0, proto, uint16(1000+i), i%50, 80))
				ports[g.sport]++
			}
			require.LessOrEqual(t, len(ports), 64)
			require.GreaterOrEqual(t, len(w.sessions()), 1000)
		})
	}
}

func TestRFC7857_RefreshNotByAnswers(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		// UDP and an ICMP error in answer to inbound traffic.
		f := w.to(0, udp, 4000, 0, 53)
		g := w.mustOut(0, f)
		w.pass(200)
		back := g.back()
		_, r := w.in(back)
		e := w.outFrame(0, w.quote(w.pod(0), w.far(0), w.unreach, 3, 0, r.frame, 0))
		require.Equal(t, Translate, e.Action)
		w.stands("active", 100)
		w.pass(101)
		// TCP and a RST.
		h := w.connect(0, 4000, 0, 80)
		w.pass(7400)
		w.mustOut(0, w.to(0, tcp, 4000, 0, 80).flags(tcpRST))
		w.stands("reset", 40)
		w.pass(41)
		w.refused(h.back(), drop.NATNoSession)
	})
}

func TestRFC7857_UnpredictablePorts(t *testing.T) {
	// RFC 6056: no order, no repetition of the sequence, and the whole range is used.
	forFamiliesOn(t, AllocatorConfig{MaxPods: 4}, Config{HalfOpen: 4096}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP} {
			var next, bits int
			last, seen := uint16(0), map[uint16]bool{}
			for i := range 400 {
				g := w.mustOut(0, w.to(0, proto, uint16(1000+i), i, 80))
				if g.sport == last+1 {
					next++
				}
				if g.sport&1 == 1 {
					bits++
				}
				last = g.sport
				seen[g.sport] = true
			}
			require.Less(t, next, 20)
			require.InDelta(t, 200, bits, 60)
			require.Greater(t, len(seen), 200, "of at least 512 ports")
		}
	})
}

func TestRFC6056_HashAndPreserve(t *testing.T) {
	forFamilies(t, Config{Choice: ChooseHash}, func(t *testing.T, w *world) {
		w.mustOut(0, w.to(0, udp, 999, 5, 53)) // keeps the ports leased
		f := w.to(0, udp, 4000, 0, 53)
		a := w.mustOut(0, f)
		w.pass(200)
		w.mustOut(0, w.to(0, udp, 999, 5, 53))
		w.pass(200)
		require.Equal(t, a.sport, w.mustOut(0, f).sport, "the same flow, the same port")
	})
	forFamilies(t, Config{Choice: ChoosePreserve}, func(t *testing.T, w *world) {
		require.Equal(t, uint16(12345), w.mustOut(0, w.to(0, udp, 12345, 0, 53)).sport)
		require.Equal(t, uint16(12345), w.mustOut(0, w.to(0, udp, 12345, 1, 53)).sport)
		g := w.mustOut(1, w.to(1, udp, 12345, 0, 53))
		require.NotEqual(t, uint16(12345), g.sport, "another pod's")
		require.True(t, w.a.InRange(w.mustOut(0, w.to(0, udp, 40000, 0, 53)).sport), "outside the range: at random")
		w.a.SetHostPorts(udp, []uint16{10250})
		require.NotEqual(t, uint16(10250), w.mustOut(0, w.to(0, udp, 10250, 0, 53)).sport, "the host's")
	})
}

func TestRFC6864_Identification(t *testing.T) {
	w := newWorld(t, AllocatorConfig{Workers: 3}, Config{Worker: 1})
	seen := map[uint32]bool{}
	for i := range 2000 {
		f := w.to(i%4, udp, 4000, i%7, 53)
		f.df, f.id = false, 7 // every pod counts for itself
		r := w.outFrame(i%4, f.frame())
		require.Equal(t, Translate, r.Action)
		id := uint32(r.frame[18])<<8 | uint32(r.frame[19])
		require.False(t, seen[id], "repeated after %d packets", i)
		seen[id] = true
		require.Equal(t, 1, int(id/(65536/3)), "each worker has identifications of its own")
	}
	// Atomic datagrams keep theirs: it means nothing.
	f := w.to(0, udp, 4000, 0, 53)
	f.id = 7
	r := w.outFrame(0, f.frame())
	require.Equal(t, []byte{0, 7}, r.frame[18:20])
	// A GSO frame takes one for each of its segments.
	f.df = false
	frame := f.frame()
	p := w.parse(frame)
	var v View
	w.tr.Outbound(&p, frame, 0, &v)
	w.tr.TranslateOut(&p, frame, &v, Offload{Segments: 40})
	first := uint16(frame[18])<<8 | uint16(frame[19])
	r = w.outFrame(0, f.frame())
	require.Equal(t, first+40, uint16(r.frame[18])<<8|uint16(r.frame[19]))
}
