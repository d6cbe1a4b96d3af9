package snat

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

var eim = Config{Mapping: EndpointIndependent}

func with(c Config, f func(*Config)) Config { f(&c); return c }

func TestRFC4787_REQ1_EndpointIndependentMapping(t *testing.T) {
	forFamilies(t, eim, func(t *testing.T, w *world) {
		for _, proto := range []uint8{udp, tcp, packet.ProtoICMP} {
			a := w.mustOut(0, w.to(0, proto, 4000, 0, 80))
			b := w.mustOut(0, w.to(0, proto, 4000, 1, 81))
			require.Equal(t, a.sport, b.sport, "one external port for all destinations")
			w.reaches(a.back(), 0, 4000)
			w.reaches(b.back(), 0, 4000)
			require.NotEqual(t, a.sport, w.mustOut(0, w.to(0, proto, 4001, 0, 80)).sport)
		}
	})
}

func TestRFC4787_REQ2_PairedAddress(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for i := range uint16(20) {
			require.Equal(t, w.node, w.mustOut(0, w.to(0, udp, 4000+i, int(i), 53)).src)
			require.Equal(t, w.node, w.mustOut(0, w.to(0, tcp, 4000+i, int(i), 53)).src)
		}
	})
}

func TestRFC4787_REQ3_NoPortOverloading(t *testing.T) {
	// In both mappings: a port is one pod's, because chunks are. The class of ports 0-1023 has no counterpart in the range: unsupported.
	for _, cfg := range []Config{eim, {}} {
		forFamilies(t, cfg, func(t *testing.T, w *world) {
			owner := map[uint16]int{}
			for pod := range 3 {
				for i := range uint16(300) {
					g := w.mustOut(pod, w.to(pod, udp, 1000+i, int(i), 53))
					if o, ok := owner[g.sport]; ok {
						require.Equal(t, pod, o)
					}
					owner[g.sport] = pod
					_, who, ok := w.a.Owner(ClassUDP, g.sport)
					require.True(t, ok)
					require.Equal(t, pod, who, "port to pod is answered from the chunks")
				}
			}
		})
	}
}

func TestRFC4787_REQ5_UDPTimer(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
		w.pass(119)
		w.reaches(g.back(), 0, 4000)
		w.pass(300 - 119 - 0.3)
		w.reaches(g.back(), 0, 4000)
		w.pass(0.6)
		w.refused(g.back(), drop.NATNoSession)
		require.Zero(t, w.tr.Stats().Sessions4+w.tr.Stats().Sessions6)
	})
	t.Run("configured", func(t *testing.T) {
		forFamilies(t, Config{Timers: Timers{UDP: 600 * time.Second}}, func(t *testing.T, w *world) {
			g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
			w.pass(599)
			w.reaches(g.back(), 0, 4000)
			w.pass(1.5)
			w.refused(g.back(), drop.NATNoSession)
		})
	})
	t.Run("without Expire", func(t *testing.T) {
		// The wheel may be behind: a session is over when its time is.
		forFamilies(t, Config{}, func(t *testing.T, w *world) {
			g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
			w.now += 301 * second
			w.tr.SetNow(w.now)
			w.refused(g.back(), drop.NATNoSession)
			require.Equal(t, 1, w.tr.v4.used+w.tr.v6.used)
			w.mustOut(0, w.to(0, udp, 4000, 0, 53))
			require.Equal(t, 1, w.tr.v4.used+w.tr.v6.used)
		})
	})
}

func TestRFC4787_REQ6_Refresh(t *testing.T) {
	for _, inbound := range []bool{false, true} {
		forFamilies(t, Config{RefreshInbound: inbound}, func(t *testing.T, w *world) {
			f := w.to(0, udp, 4000, 0, 53)
			g := w.mustOut(0, f)
			for range 10 { // outbound packets refresh
				w.pass(200)
				w.mustOut(0, f)
			}
			w.pass(200)
			w.reaches(g.back(), 0, 4000)
			w.pass(200)
			if inbound {
				w.reaches(g.back(), 0, 4000)
			} else {
				w.refused(g.back(), drop.NATNoSession)
			}
		})
	}
}

func TestRFC4787_REQ8_Filtering(t *testing.T) {
	type admits struct{ none, otherPort, otherAddress bool }
	for filtering, want := range map[Filtering]admits{
		FilterNone: {true, true, true}, FilterAddress: {true, true, false}, FilterAddressAndPort: {true, false, false},
	} {
		forFamilies(t, with(eim, func(c *Config) { c.Filtering = filtering }), func(t *testing.T, w *world) {
			for _, proto := range []uint8{udp, tcp} {
				g := w.mustOut(0, w.to(0, proto, 4000, 0, 53))
				try := func(far int, port uint16, want bool) {
					b := g.back()
					b.src, b.sport = w.far(far), port
					if proto == tcp {
						b.tcp = tcpSYN
					}
					if want {
						w.reaches(b, 0, 4000)
					} else {
						w.refused(b, drop.NATFiltered)
					}
				}
				try(0, 53, want.none)
				try(0, 54, want.otherPort)
				try(1, 53, want.otherAddress)
				w.mustOut(0, w.to(0, proto, 4000, 1, 99)) // now the other address was sent to
				try(1, 53, filtering != FilterAddressAndPort)
				try(1, 99, true)
			}
		})
	}
	t.Run("endpoint-independent filtering leaves no state", func(t *testing.T) {
		forFamilies(t, with(eim, func(c *Config) { c.Filtering = FilterNone }), func(t *testing.T, w *world) {
			g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
			before := w.tr.v4.used + w.tr.v6.used
			for i := range 200 {
				b := g.back()
				b.src = w.far(i)
				w.reaches(b, 0, 4000)
			}
			require.Equal(t, before, w.tr.v4.used+w.tr.v6.used)
		})
	})
	t.Run("address-and-port-dependent mapping", func(t *testing.T) {
		forFamilies(t, Config{Filtering: FilterNone}, func(t *testing.T, w *world) {
			g := w.mustOut(0, w.to(0, udp, 4000, 0, 53)).back()
			g.sport++
			w.refused(g, drop.NATNoSession)
		})
	})
}

func TestRFC4787_REQ9_Hairpin(t *testing.T) {
	t.Run("endpoint-independent", func(t *testing.T) {
		forFamilies(t, with(eim, func(c *Config) { c.Filtering = FilterNone }), func(t *testing.T, w *world) {
			b := w.mustOut(1, w.to(1, udp, 5000, 0, 53))
			f := w.to(0, udp, 4000, 0, 0)
			f.dst, f.dport = w.node, b.sport
			g, r := w.out(0, f)
			require.Equal(t, Translate, r.Action)
			require.Equal(t, w.pod(1), g.dst)
			require.Equal(t, uint16(5000), g.dport)
			require.Equal(t, w.node, g.src, "the source that is seen is the external one")
			require.NotEqual(t, uint16(4000), g.sport)
			// And back.
			h, r := w.out(1, g.back())
			require.Equal(t, Translate, r.Action)
			require.Equal(t, w.pod(0), h.dst)
			require.Equal(t, uint16(4000), h.dport)
			require.Equal(t, b.sport, h.sport)
		})
	})
	t.Run("address-and-port-dependent: the exact reverse tuple", func(t *testing.T) {
		forFamilies(t, Config{Choice: ChoosePreserve}, func(t *testing.T, w *world) {
			a, b := w.to(0, udp, 10100, 0, 0), w.to(1, udp, 20200, 0, 0)
			a.dst, a.dport, b.dst, b.dport = w.node, 20200, w.node, 10100
			_, r := w.out(0, a)
			require.Equal(t, drop.NATNoSession, r.Reason, "the other side has not opened")
			g, r := w.out(1, b)
			require.Equal(t, Translate, r.Action)
			require.Equal(t, w.pod(0), g.dst)
			require.Equal(t, uint16(10100), g.dport)
			require.Equal(t, w.node, g.src)
			require.Equal(t, uint16(20200), g.sport)
			g, r = w.out(0, a)
			require.Equal(t, Translate, r.Action)
			require.Equal(t, w.pod(1), g.dst)
		})
	})
}

func TestRFC4787_REQ10_NoApplicationGateways(t *testing.T) {
	// What looks like FTP's or SIP's addresses stays as it is.
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, c := range []struct {
			proto uint8
			port  uint16
		}{{tcp, 21}, {udp, 5060}, {udp, 69}, {tcp, 1723}} {
			f := w.to(0, c.proto, 4000, 0, c.port)
			f.payload = []byte("PORT 10,244,0,2,15,160 c=IN IP4 10.244.0.2 ")
			_, r := w.out(0, f)
			require.Equal(t, Translate, r.Action)
			require.Equal(t, f.payload, r.frame[len(r.frame)-len(f.payload):])
		}
	})
}

func TestRFC4787_REQ11_Deterministic(t *testing.T) {
	// Mapping and filtering stay the same when inside ports collide and when ports run short.
	forFamilies(t, eim, func(t *testing.T, w *world) {
		seen := map[uint16]int{}
		for pod := range 3 {
			g := w.mustOut(pod, w.to(pod, udp, 4000, 0, 53)) // all from the same port
			_, twice := seen[g.sport]
			require.False(t, twice)
			seen[g.sport] = pod
		}
		for i := range uint16(1200) {
			w.out(0, w.to(0, udp, 10000+i, 0, 53))
		}
		for port, pod := range seen {
			g := w.mustOut(pod, w.to(pod, udp, 4000, 9, 99))
			require.Equal(t, port, g.sport)
			g.src, g.dst, g.sport, g.dport = w.far(5), w.node, 1, port
			w.refused(g, drop.NATFiltered)
		}
	})
}

func TestRFC4787_REQ12_ICMPNeitherEndsNorRefreshes(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		for _, proto := range []uint8{udp, tcp, packet.ProtoICMP} {
			f := w.to(0, proto, 4000, 0, 53)
			_, r := w.out(0, f)
			g, _ := w.out(0, f)
			router := w.far(77) // from any router on the way
			life := func() time.Duration {
				for _, s := range w.sessions() {
					if s.RemotePort == g.dport || s.Proto == w.icmp {
						return s.Left
					}
				}
				return 0
			}
			before := life()
			w.pass(30)
			e := w.inFrame(w.quote(router, w.node, w.unreach, 0, 0, r.frame, 0))
			require.Equal(t, Translate, e.Action)
			require.InDelta(t, before-30*time.Second, life(), 0.3*float64(time.Second), "neither refreshed nor ended")
			w.reaches(g.back(), 0, 4000)
			w.pass(10000)
		}
	})
}

// Row 4787-13, packets that are too big, is the forwarding's: what it fragments carries the identification that translation gave it.
func TestRFC4787_REQ13_FragmentedAfterTranslation(t *testing.T) {
	w := newWorld(t, AllocatorConfig{}, Config{})
	f := w.to(0, udp, 4000, 0, 53)
	f.df, f.payload = false, make([]byte, 3000)
	_, r := w.out(0, f)
	var fr packet.Fragmenter
	require.True(t, fr.Init(&r.p, r.frame, nil, 1500))
	at := 0
	for more := true; more; {
		var b [2000]byte
		var n int
		n, more = fr.Next(b[:])
		q := w.parse(b[:n])
		require.Equal(t, w.node, q.Src.Netip())
		require.Equal(t, at, int(q.FragmentOffset), "in order")
		require.Equal(t, uint32(r.frame[18])<<8|uint32(r.frame[19]), q.FragmentID)
		at += int(q.Length) - 20
	}
	require.Equal(t, 3008, at)
}
