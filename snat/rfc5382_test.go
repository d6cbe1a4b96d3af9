package snat

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
)

// state is the state and the time left of the one TCP session there is.
func (w *world) state() (string, float64) {
	w.t.Helper()
	list := w.sessions()
	require.Len(w.t, list, 1)
	return list[0].State, list[0].Left.Seconds()
}

// stands requires state and time left of the one session.
func (w *world) stands(state string, seconds float64) {
	w.t.Helper()
	s, left := w.state()
	require.Equal(w.t, state, s)
	require.InDelta(w.t, seconds, left, 0.6)
}

func TestRFC5382_REQ1_EndpointIndependentMapping(t *testing.T) {
	forFamilies(t, eim, func(t *testing.T, w *world) {
		a, b := w.connect(0, 4000, 0, 80), w.connect(0, 4000, 1, 443)
		require.Equal(t, a.sport, b.sport)
	})
}

func TestRFC5382_REQ2_HandshakeAndSimultaneousOpen(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, tcp, 4000, 0, 80)
		g := w.mustOut(0, f)
		w.stands("opening", 240)
		w.reaches(g.back(), 0, 4000) // SYN, ACK
		w.stands("opening", 240)
		w.mustOut(0, f.flags(tcpACK))
		w.stands("established", 7440)
	})
	t.Run("simultaneous", func(t *testing.T) {
		forFamilies(t, Config{}, func(t *testing.T, w *world) {
			f := w.to(0, tcp, 4000, 0, 80)
			g := w.mustOut(0, f)
			w.reaches(g.back().flags(tcpSYN), 0, 4000)
			w.mustOut(0, f.flags(tcpSYN|tcpACK))
			w.reaches(g.back().flags(tcpSYN|tcpACK), 0, 4000)
			w.mustOut(0, f.flags(tcpACK))
			w.stands("established", 7440)
		})
	})
	t.Run("a connection from outside through a mapping", func(t *testing.T) {
		forFamilies(t, with(eim, func(c *Config) { c.Filtering = FilterNone }), func(t *testing.T, w *world) {
			g := w.mustOut(0, w.to(0, tcp, 4000, 0, 80))
			w.pass(1)
			b := g.back().flags(tcpSYN)
			b.src, b.sport = w.far(3), 999
			w.reaches(b, 0, 4000)
			f := w.to(0, tcp, 4000, 3, 999)
			h := w.mustOut(0, f.flags(tcpSYN|tcpACK))
			require.Equal(t, g.sport, h.sport)
			w.reaches(b.flags(tcpACK), 0, 4000)
			for _, s := range w.sessions() {
				if s.RemotePort == 999 {
					require.Equal(t, "established", s.State)
				}
			}
		})
	})
}

func TestRFC5382_REQ4_UnsolicitedSYN(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 80)) // an address to look at
		for _, port := range []uint16{10000, 15000, g.sport, 29999} {
			f := flow{src: w.far(0), dst: w.node, proto: tcp, sport: 80, dport: port, tcp: tcpSYN}
			if w.a.Ours(tcp, port) {
				w.refused(f, drop.NATNoSession) // in silence: never to the host, which would reset it
			}
		}
		f := flow{src: w.far(0), dst: w.node, proto: tcp, sport: 80, dport: 22, tcp: tcpSYN}
		_, r := w.in(f)
		require.Equal(t, NotOurs, r.Action, "the node's own services are reachable")
		// Simultaneous open, the other side first: its SYN is dropped, ours makes the session, its next one passes.
		h := w.to(0, tcp, 4000, 0, 80)
		require.Equal(t, NotOurs, func() Action {
			var v View
			p := w.parse(flow{src: w.far(0), dst: w.node2, proto: tcp, sport: 80, dport: 15000, tcp: tcpSYN}.frame())
			w.tr.Inbound(&p, nil, &v)
			return v.Action
		}(), "another address of the node")
		out := w.mustOut(0, h)
		w.reaches(out.back().flags(tcpSYN), 0, 4000)
	})
}

func TestRFC5382_REQ5_Timers(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		g := w.connect(0, 4000, 0, 80)
		w.pass(7439)
		w.reaches(g.back(), 0, 4000)
		w.pass(7441)
		w.refused(g.back(), drop.NATNoSession)
		// Half open.
		g = w.mustOut(0, w.to(0, tcp, 4001, 0, 80))
		w.pass(239)
		w.reaches(g.back(), 0, 4001)
		w.pass(241)
		w.refused(g.back(), drop.NATNoSession)
	})
	t.Run("configured", func(t *testing.T) {
		forFamilies(t, Config{Timers: Timers{TCPOpening: 30 * time.Second, TCPEstablished: 4 * time.Hour, TCPClosing: 10 * time.Second}}, func(t *testing.T, w *world) {
			w.connect(0, 4000, 0, 80)
			w.stands("established", 4*3600)
			w.pass(4*3600 - 1)
			w.stands("established", 1)
		})
	})
}

func TestRFC5382_REQ6_NoApplicationGateways(t *testing.T) { TestRFC4787_REQ10_NoApplicationGateways(t) }

func TestRFC5382_REQ8_Hairpin(t *testing.T) {
	forFamilies(t, with(eim, func(c *Config) { c.Filtering = FilterNone }), func(t *testing.T, w *world) {
		b := w.mustOut(1, w.to(1, tcp, 5000, 0, 80))
		f := w.to(0, tcp, 4000, 0, 0)
		f.dst, f.dport = w.node, b.sport
		g, r := w.out(0, f) // SYN
		require.Equal(t, Translate, r.Action)
		require.Equal(t, w.pod(1), g.dst)
		require.Equal(t, w.node, g.src)
		h, r := w.out(1, g.back()) // SYN, ACK
		require.Equal(t, Translate, r.Action, "%v", r.Reason)
		require.Equal(t, w.pod(0), h.dst)
		require.Equal(t, uint16(4000), h.dport)
		g, r = w.out(0, f.flags(tcpACK))
		require.Equal(t, Translate, r.Action)
		require.Equal(t, uint16(5000), g.dport)
		_, r = w.out(1, g.back())
		require.Equal(t, Translate, r.Action)
		established := 0
		for _, s := range w.sessions() {
			if s.State == "established" {
				established++
			}
		}
		require.Equal(t, 2, established)
	})
}

func TestRFC5382_REQ9_HairpinnedICMPErrors(t *testing.T) { testHairpinnedError(t, tcp) }

func TestRFC5382_REQ10_ICMPDoesNotEndConnections(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		g := w.connect(0, 4000, 0, 80)
		r := w.outFrame(0, w.to(0, tcp, 4000, 0, 80).flags(tcpACK).frame())
		for code := range byte(5) {
			e := w.inFrame(w.quote(w.far(9), w.node, w.unreach, code, 0, r.frame, 0))
			require.Equal(t, Translate, e.Action)
		}
		w.stands("established", 7440)
		w.reaches(g.back(), 0, 4000)
	})
}
