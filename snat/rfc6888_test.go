package snat

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

func TestRFC6888_REQ4_PortsPerPod(t *testing.T) {
	// One pod takes what it can; the others still get their guarantee, and more.
	ports := 20000
	if testing.Short() {
		ports = 4000
	}
	for _, proto := range []uint8{tcp, udp, packet.ProtoICMP} {
		forFamiliesOn(t, AllocatorConfig{First: 10000, Last: uint16(9999 + ports)}, Config{Sessions4: 1 << 16, Sessions6: 1 << 16, HalfOpen: 1 << 16}, func(t *testing.T, w *world) {
			open := func(pod, most int) (n int) {
				for n < most {
					_, r := w.out(pod, w.to(pod, proto, uint16(1000+n), 0, 53))
					if r.Action != Translate {
						require.Equal(t, drop.NATNoPort, r.Reason)
						require.True(t, r.v.Unreachable)
						return n
					}
					n++
				}
				return n
			}
			alone := open(0, 1<<15)
			require.Greater(t, alone, ports/2, "one pod alone may use most")
			require.Less(t, alone, ports*7/10)
			second := open(1, 1<<15)
			require.Greater(t, second, ports/10, "who comes later finds something, too")
			require.Greater(t, open(2, 1<<15), ports/50)
			require.Positive(t, open(3, 1<<15))
		})
	}
}

func TestRFC6888_REQ5_SessionsPerPod(t *testing.T) {
	forFamilies(t, Config{Sessions4: 2510, Sessions6: 2510}, func(t *testing.T, w *world) {
		open := func(pod int) (n int) {
			for i := range 5000 {
				_, r := w.out(pod, w.to(pod, udp, uint16(1000+i), i, 53))
				if r.Action != Translate {
					require.Equal(t, drop.NATSessionLimit, r.Reason)
					return n
				}
				n++
			}
			return n
		}
		var all []int
		for pod := range 4 {
			all = append(all, open(pod))
			if pod > 0 {
				require.GreaterOrEqual(t, all[pod], w.tr.Config().SessionGuarantee)
			}
		}
		require.Greater(t, all[0], 2510/2)
		sum := 0
		for _, n := range all {
			sum += n
		}
		require.LessOrEqual(t, sum, 2510)
	})
}

func TestRFC6888_REQ5_HalfOpenPerPod(t *testing.T) {
	forFamilies(t, Config{HalfOpen: 100}, func(t *testing.T, w *world) {
		flood := 0
		for i := range 500 { // a SYN flood from one pod
			_, r := w.out(0, w.to(0, tcp, uint16(1000+i), i, 80))
			if r.Action == Translate {
				flood++
			} else {
				require.Equal(t, drop.NATHalfOpenLimit, r.Reason)
			}
		}
		require.InDelta(t, 66, flood, 3)
		for i := range 500 { // others connect, and connections that are open do not count
			w.connect(1, uint16(1000+i), i, 80)
		}
		w.mustOut(0, w.to(0, udp, 1000, 0, 53)) // nor does UDP
		w.pass(241)
		w.connect(0, 1, 0, 80)
	})
}

func TestRFC6888_REQ6_NoTranslateByDestination(t *testing.T) { testRules(t) }

func TestRFC6888_REQ8_PortRests(t *testing.T) {
	ac := AllocatorConfig{First: 10000, Last: 10001, MaxPods: 1, Workers: 1} // two ports
	forFamiliesOn(t, ac, eim, func(t *testing.T, w *world) {
		one := func(port uint16, proto uint8) (uint16, bool) {
			g, r := w.out(0, w.to(0, proto, port, 0, 53))
			return g.sport, r.Action == Translate
		}
		a, ok := one(4000, udp)
		require.True(t, ok)
		w.pass(301) // the mapping ends, its port rests
		b, ok := one(4001, udp)
		require.True(t, ok)
		require.NotEqual(t, a, b)
		_, ok = one(4002, udp)
		require.False(t, ok, "one port is taken, the other rests")
		w.pass(118)
		_, ok = one(4002, udp)
		require.False(t, ok)
		w.pass(3)
		c, ok := one(4002, udp)
		require.True(t, ok)
		require.Equal(t, a, c)

		// Not if TCP has seen both FINs: nothing of the old connection is under way.
		a, ok = one(4000, tcp)
		require.True(t, ok)
		f := w.to(0, tcp, 4000, 0, 53)
		g := w.connect(0, 4000, 0, 53)
		w.mustOut(0, f.flags(tcpFIN|tcpACK))
		w.reaches(g.back().flags(tcpFIN|tcpACK), 0, 4000)
		b, ok = one(4001, tcp)
		require.True(t, ok)
		require.NotEqual(t, a, b)
		w.mustOut(0, w.to(0, tcp, 4001, 0, 53))
		w.reaches(flow{src: w.far(0), dst: w.node, proto: tcp, sport: 53, dport: b, tcp: tcpSYN | tcpACK}, 0, 4001)
		w.mustOut(0, w.to(0, tcp, 4001, 0, 53).flags(tcpACK))
		w.pass(241)
		c, ok = one(4002, tcp)
		require.True(t, ok)
		require.Equal(t, a, c)
	})
}

func TestRFC6888_REQ8_RemovedPodsPortsRest(t *testing.T) {
	forFamiliesOn(t, AllocatorConfig{First: 10000, Last: 10003, MaxPods: 2}, Config{}, func(t *testing.T, w *world) {
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
		w.tr.RemovePod(0)
		require.True(t, w.tr.Leaving(0))
		require.Error(t, w.tr.AddPod(0, packet.Addr{}, packet.Addr{}))
		_, r := w.out(0, w.to(0, udp, 4001, 0, 53))
		require.Equal(t, drop.NATNoSession, r.Reason)
		w.pass(0.3)
		require.False(t, w.tr.Leaving(0))
		w.refused(g.back(), drop.NATNoSession)
		_, _, held := w.a.Owner(ClassUDP, g.sport)
		require.False(t, held)
		for i := range 20 {
			h, r := w.out(1, w.to(1, udp, uint16(4000+i), i, 53))
			if r.Action == Translate {
				require.NotEqual(t, g.sport, h.sport)
			}
		}
		w.addPod(0)
		w.pass(121)
		w.mustOut(0, w.to(0, udp, 4000, 0, 53))
	})
}

func TestRFC6888_REQ11_NoSessionLeft(t *testing.T) { TestRFC5508_REQ8_Exhaustion(t) }

func TestRFC6888_REQ12_BlockLog(t *testing.T) {
	// RFC 7422: from the blocks alone, who had a port when; no destination is logged.
	a, err := NewAllocator(AllocatorConfig{})
	require.NoError(t, err)
	var log []Lease
	a.OnLease(func(l Lease) { log = append(log, l) })
	tr, err := New(Config{Sessions4: 1000, Sessions6: 1000}, a)
	require.NoError(t, err)
	defer tr.Close()
	w := &world{t: t, a: a, tr: tr, now: second, family: &families[0]}
	tr.SetNow(w.now)
	tr.SetNodeAddresses(packet.AddrFrom(w.node), packet.Addr{})
	w.addPod(0)
	w.addPod(1)
	for i := range 400 {
		g := w.mustOut(i%2, w.to(i%2, udp, uint16(1000+i), i, 53))
		owner := -1
		for _, l := range log {
			if l.Class == ClassUDP && l.First <= g.sport && g.sport <= l.Last {
				owner = l.Pod
			}
		}
		require.Equal(t, i%2, owner)
	}
	require.Less(t, len(log), 100, "blocks, not sessions")
	w.pass(301)
	for range 2000 { // unused blocks go back after their idle time
		w.pass(0.3)
	}
	returned := 0
	for _, l := range log {
		if l.Returned {
			returned++
		}
	}
	require.Equal(t, len(log), 2*returned)
	require.Zero(t, a.Usage(ClassUDP).Leased)
}

func TestRFC6888_REQ13_Counters(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		g := w.connect(0, 4000, 0, 80)
		w.reaches(g.back(), 0, 4000)
		w.mustOut(1, w.to(1, udp, 4000, 0, 53))
		list := w.sessions()
		require.Len(t, list, 2)
		require.Equal(t, Session{Proto: tcp, Inside: packet.AddrFrom(w.pod(0)), Remote: packet.AddrFrom(w.far(0)), External: packet.AddrFrom(w.node),
			InsidePort: 4000, RemotePort: 80, ExternalPort: g.sport, Pod: 0, State: "established", Left: list[0].Left, PacketsOut: 2, PacketsIn: 2}, list[0])
		require.InDelta(t, 7440*time.Second, list[0].Left, float64(time.Second))
		w.pass(301)
		c := w.tr.Counts()
		require.Equal(t, uint64(2), c.Created)
		require.Equal(t, uint64(1), c.Expired)
		st := w.tr.Stats()
		require.Equal(t, 1, st.Sessions4+st.Sessions6)
		require.Equal(t, 1, st.PodSessions4[0]+st.PodSessions6[0])
	})
}
