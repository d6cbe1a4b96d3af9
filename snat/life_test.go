package snat

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// handOverFile is the memfd as another process would get it.
func handOverFile(t testing.TB, w *world) *os.File {
	fd, err := unix.Dup(int(w.tr.File().Fd()))
	require.NoError(t, err)
	return os.NewFile(uintptr(fd), "sessions")
}

func (w *world) adopted() (pods []AdoptedPod) {
	for i := range 4 {
		pods = append(pods, AdoptedPod{i, packet.AddrFrom(families[0].pod(i)), packet.AddrFrom(families[1].pod(i))})
	}
	return pods
}

func TestAdoption(t *testing.T) {
	for name, cfg := range map[string]Config{"EDM": {}, "EIM": eim, "EIM, by address": with(eim, func(c *Config) { c.Filtering = FilterAddress })} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, cfg, func(t *testing.T, w *world) {
				type live struct {
					f, g flow
					pod  int
				}
				var all []live
				for i := range 300 {
					pod, proto := i%3, []uint8{tcp, udp, packet.ProtoICMP}[i/3%3]
					f := w.to(pod, proto, uint16(1000+i/20), i, 80)
					var g flow
					if proto == tcp {
						g = w.connect(pod, f.sport, i, 80)
						f = f.flags(tcpACK)
					} else {
						g = w.mustOut(pod, f)
					}
					all = append(all, live{f, g, pod})
					if i == 150 {
						w.pass(30)
					}
				}
				in := flow{src: w.far(0), dst: w.pod(0), proto: tcp, sport: 5000, dport: 8080, tcp: tcpACK}
				p := w.parse(in.frame())
				require.Equal(t, drop.None, w.tr.Pin(&p, 0))
				before := w.sessions()

				file := handOverFile(t, w)
				a, err := NewAllocator(w.a.Config())
				require.NoError(t, err)
				tr, st, err := Adopt(w.tr.cfg, a, file, w.now, w.adopted()[:3])
				require.NoError(t, err)
				defer tr.Close()
				require.Equal(t, AdoptStats{Sessions: len(before), Pins: 1}, st)
				x := &world{family: w.family, t: t, a: a, tr: tr, now: w.now}
				require.Zero(t, tr.SetNodeAddresses(packet.AddrFrom(families[0].node), packet.AddrFrom(families[1].node)))
				require.ElementsMatch(t, before, x.sessions())
				require.Equal(t, w.tr.v4.used+w.tr.v6.used, tr.v4.used+tr.v6.used)
				for _, l := range all {
					x.reaches(l.g.back(), l.pod, l.f.sport)
					require.Equal(t, l.g.sport, x.mustOut(l.pod, l.f).sport, "the same port as before")
				}
				var v View
				b := in.back().frame()
				p = x.parse(b)
				tr.Pinned(&p, b, &v)
				require.Equal(t, ToHost, v.Action)
				// New sessions get ports of their own, and everything ends as it should.
				for i := range 200 {
					x.mustOut(1, x.to(1, udp, uint16(30000+i), 5000+i, 80))
				}
				for pod := range 3 {
					tr.RemovePod(pod)
				}
				x.pass(1)
				require.Empty(t, x.sessions())
				require.Zero(t, tr.v4.used+tr.v6.used)
				x.pass(1)
				for c := range NumClasses {
					require.Zero(t, a.Usage(c).Leased)
				}
			})
		})
	}
}

func TestAdoptionRefuses(t *testing.T) {
	w := newWorld(t, AllocatorConfig{Workers: 2}, Config{Sessions4: 64, Sessions6: 64})
	base := w.tr.cfg
	for name, edit := range map[string]func(*Config, *AllocatorConfig){
		"worker":  func(c *Config, _ *AllocatorConfig) { c.Worker = 1 },
		"workers": func(_ *Config, a *AllocatorConfig) { a.Workers = 3 },
		"mapping": func(c *Config, _ *AllocatorConfig) { c.Mapping = EndpointIndependent },
		"size":    func(c *Config, _ *AllocatorConfig) { c.Sessions4 = 65 },
		"ports":   func(_ *Config, a *AllocatorConfig) { a.First = 11000 },
	} {
		t.Run(name, func(t *testing.T) {
			c, ac := base, w.a.Config()
			edit(&c, &ac)
			a, err := NewAllocator(ac)
			require.NoError(t, err)
			_, _, err = Adopt(c, a, handOverFile(t, w), w.now, nil)
			require.ErrorContains(t, err, "handed over")
		})
	}
	t.Run("not a memfd of ours", func(t *testing.T) {
		f, err := os.CreateTemp(t.TempDir(), "x")
		require.NoError(t, err)
		require.NoError(t, f.Truncate(1<<20))
		_, _, err = Adopt(base, w.a, f, w.now, nil)
		require.Error(t, err)
		f, err = os.CreateTemp(t.TempDir(), "x")
		require.NoError(t, err)
		_, _, err = Adopt(base, w.a, f, w.now, nil)
		require.Error(t, err)
	})
}

func TestAdoptionSortsOut(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		w.mustOut(0, w.to(0, udp, 4000, 0, 53)) // over by then
		w.pass(200)
		w.mustOut(1, w.to(1, udp, 4000, 0, 53)) // its pod is gone
		w.mustOut(2, w.to(2, udp, 4000, 0, 53)) // goes on
		w.mustOut(2, w.to(2, udp, 4001, 0, 53)) // half written
		tb := w.tr.v4
		if w.node.Is6() {
			tb = w.tr.v6
		}
		tb.recs[3].extPort = 5
		a, err := NewAllocator(w.a.Config())
		require.NoError(t, err)
		tr, st, err := Adopt(w.tr.cfg, a, handOverFile(t, w), w.now+200*second, w.adopted()[2:])
		require.NoError(t, err)
		defer tr.Close()
		require.Equal(t, AdoptStats{Sessions: 1, Over: 1, Orphans: 1, Broken: 1}, st)
		x := &world{family: w.family, t: t, a: a, tr: tr, now: w.now + 200*second}
		for i := range 100 { // the records are free again
			x.mustOut(2, x.to(2, udp, uint16(5000+i), i, 53))
		}
		// Another address than before: nothing can come back.
		require.Equal(t, 101, tr.SetNodeAddresses(packet.AddrFrom(families[0].node2), packet.AddrFrom(families[1].node2)))
	})
}

func TestNodeAddressChangeFlushes(t *testing.T) {
	forFamilies(t, eim, func(t *testing.T, w *world) {
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
		w.mustOut(0, w.to(0, udp, 4001, 0, 53))
		require.Zero(t, w.tr.SetNodeAddresses(packet.AddrFrom(families[0].node), packet.AddrFrom(families[1].node)))
		require.Equal(t, 2, w.tr.SetNodeAddresses(packet.AddrFrom(families[0].node2), packet.AddrFrom(families[1].node2)))
		require.Empty(t, w.sessions())
		require.Equal(t, uint64(2), w.tr.Counts().Flushed)
		_, r := w.in(g.back())
		require.Equal(t, NotOurs, r.Action)
		require.Equal(t, w.node2, w.mustOut(0, w.to(0, udp, 4000, 0, 53)).src)
	})
}

func TestHostPorts(t *testing.T) {
	for _, cfg := range []Config{{}, eim} {
		forFamiliesOn(t, AllocatorConfig{First: 10000, Last: 10063, MaxPods: 1}, cfg, func(t *testing.T, w *world) {
			w.a.SetHostPorts(tcp, []uint16{10000, 10001})
			var held []uint16
			for p := uint16(10000); p < 10064; p += 2 {
				held = append(held, p)
			}
			w.a.SetHostPorts(udp, held)
			require.True(t, w.a.HostPort(udp, 10000))
			require.False(t, w.a.Ours(udp, 10000))
			require.True(t, w.a.Ours(udp, 10001))
			require.False(t, w.a.Ours(tcp, 10001))
			require.False(t, w.a.Ours(sctp, 10001))
			require.False(t, w.a.Ours(udp, 9999))
			var all []flow
			for i := range 100 {
				g, r := w.out(0, w.to(0, udp, uint16(1000+i), 0, 53))
				if r.Action == Translate {
					require.True(t, g.sport&1 == 1, "never the host's")
					all = append(all, g)
				}
			}
			require.NotEmpty(t, all)
			// A packet to the host's service never reaches a pod (port shadowing).
			_, r := w.in(flow{src: w.far(0), dst: w.node, proto: udp, sport: 53, dport: 10000})
			require.Equal(t, NotOurs, r.Action)
			// The host takes a port that is in use: it is the host's at once, the session ends.
			taken := all[0]
			w.a.SetHostPorts(udp, append(held, taken.sport))
			_, r = w.in(taken.back())
			require.Equal(t, NotOurs, r.Action)
			w.pass(0.3)
			require.Len(t, w.sessions(), len(all)-1)
			require.Equal(t, uint64(1), w.tr.Counts().HostPort)
			for _, g := range all[1:] {
				w.in(g.back())
			}
			// And gives them back.
			w.a.SetHostPorts(udp, nil)
			require.True(t, w.a.Ours(udp, 10000))
		})
	}
}

func TestAllHostPortsTaken(t *testing.T) {
	forFamiliesOn(t, AllocatorConfig{First: 10000, Last: 10000, MaxPods: 1}, Config{}, func(t *testing.T, w *world) { // VPP's port_range, nft_nat's one-port range
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
		require.Equal(t, uint16(10000), g.sport)
		w.mustOut(0, w.to(0, udp, 4000, 1, 53))
		_, r := w.out(0, w.to(0, udp, 4001, 0, 53))
		require.Equal(t, drop.NATNoPort, r.Reason)
		w.a.SetHostPorts(udp, []uint16{10000})
		w.pass(1)
		require.Empty(t, w.sessions())
		_, r = w.out(0, w.to(0, udp, 4002, 0, 54))
		require.Equal(t, drop.NATNoPort, r.Reason)
	})
}

// Two workers share the range: no port is both's, and replies find their worker.
func TestWorkersShareTheRange(t *testing.T) {
	a, err := NewAllocator(AllocatorConfig{Workers: 2})
	require.NoError(t, err)
	var ws [2]*world
	for i := range ws {
		tr, err := New(Config{Worker: i, Sessions4: 8192, Sessions6: 8192, HalfOpen: 8192}, a)
		require.NoError(t, err)
		defer tr.Close()
		tr.SetNow(second)
		tr.SetNodeAddresses(packet.AddrFrom(families[0].node), packet.AddrFrom(families[1].node))
		ws[i] = &world{t: t, a: a, tr: tr, now: second, family: &families[0]}
		ws[i].addPod(0)
		ws[i].addPod(1)
	}
	owners := map[uint16]int{}
	for i := range 3000 {
		f := ws[0].to(i%2, tcp, uint16(1000+i), 0, 80)
		p := ws[0].parse(f.frame())
		worker := OwnerOut(&p, nil, 2)
		g := ws[worker].mustOut(i%2, f)
		require.Equal(t, worker, OwnerOut(&p, nil, 2))
		if o, ok := owners[g.sport]; ok {
			require.Equal(t, o, worker)
		}
		owners[g.sport] = worker
		b := g.back().frame()
		p = ws[0].parse(b)
		require.Equal(t, worker, a.OwnerIn(&p, b))
		e := ws[0].quote(ws[0].far(5), ws[0].node, 3, 1, 0, g.frame(), 0)
		p = ws[0].parse(e)
		require.Equal(t, worker, a.OwnerIn(&p, e), "errors go to the session they quote")
		e = ws[0].quote(ws[0].pod(i%2), f.dst, 3, 1, 0, f.back().frame(), 0)
		p = ws[0].parse(e)
		require.Equal(t, worker, OwnerOut(&p, e, 2))
	}
	// ESP and SCTP compete for their peer: all on the peer's worker, both ways.
	for far := range 20 {
		for _, proto := range []uint8{packet.ProtoESP, sctp} {
			var seen []int
			for pod := range 2 {
				b := ws[0].to(pod, proto, 4000, far, 3868).frame()
				p := ws[0].parse(b)
				seen = append(seen, OwnerOut(&p, b, 2))
			}
			b := flow{src: ws[0].far(far), dst: ws[0].node, proto: proto, sport: 3868, dport: 4000}.frame()
			p := ws[0].parse(b)
			require.Equal(t, []int{seen[0], seen[0]}, []int{seen[1], a.OwnerIn(&p, b)})
		}
	}
	b := flow{src: ws[0].far(0), dst: ws[0].node, proto: udp, sport: 1, dport: 15000}.frame()
	p := ws[0].parse(b)
	require.Equal(t, -1, a.OwnerIn(&p, b))
}

func TestSnapshotInPieces(t *testing.T) {
	w := newWorld(t, AllocatorConfig{}, Config{})
	for i := range 100 {
		for f := range families {
			w.family = &families[f]
			w.mustOut(i%4, w.to(i%4, udp, uint16(1000+i), i, 53))
		}
	}
	var list []Session
	c, rounds := Cursor{}, 0
	for !c.Done {
		list, c = w.tr.Snapshot(list, c, 7)
		rounds++
	}
	require.Len(t, list, 200)
	require.Greater(t, rounds, 20)
	seen := map[Session]bool{}
	for _, s := range list {
		require.False(t, seen[s])
		seen[s] = true
	}
}

func TestSaturation(t *testing.T) {
	w := newWorld(t, AllocatorConfig{MaxPods: 4, First: 10000, Last: 10999}, Config{HalfOpen: 4096})
	for i := range 400 {
		w.out(0, w.to(0, tcp, uint16(1000+i), 0, 443))
	}
	w.mustOut(1, w.to(1, tcp, 1, 0, 443))
	d := Saturation(w.sessions(), w.a, 0.5)
	require.Len(t, d, 1)
	require.Equal(t, 0, d[0].Pod)
	require.Equal(t, w.far(0), d[0].Remote.Netip())
	require.Equal(t, uint16(443), d[0].Port)
	require.Greater(t, d[0].Ports, 300)
}

// However much is to be done at once, one call does no more than it may, and nothing is lost.
func TestExpireIsBounded(t *testing.T) {
	forFamilies(t, Config{Sessions4: 1 << 15, Sessions6: 1 << 15}, func(t *testing.T, w *world) {
		n := 0
		for i := range 12000 {
			if _, r := w.out(i%4, w.to(i%4, udp, uint16(1000+i/4), i, 53)); r.Action == Translate {
				n++
			}
		}
		require.Greater(t, n, 10000)
		w.now += 301 * second
		calls, ended := 0, uint64(0)
		for more := true; more; calls++ {
			more = w.tr.Expire(w.now, 100)
			c := w.tr.Counts().Expired
			require.LessOrEqual(t, c-ended, uint64(100))
			ended = c
		}
		require.Equal(t, uint64(n), ended)
		require.GreaterOrEqual(t, calls, n/100)
	})
}

func TestTimersAcrossTheWheel(t *testing.T) {
	for _, d := range []time.Duration{time.Second, 60 * time.Second, 69 * time.Second, 300 * time.Second, time.Hour, 4 * time.Hour} {
		for _, start := range []int64{0, 1, 1<<40 - 1, 1 << 60} {
			a, err := NewAllocator(AllocatorConfig{})
			require.NoError(t, err)
			tr, err := New(Config{Sessions4: 16, Sessions6: 16, Timers: Timers{UDP: d}}, a)
			require.NoError(t, err)
			w := &world{t: t, a: a, tr: tr, now: start, family: &families[0]}
			tr.SetNow(start)
			tr.SetNodeAddresses(packet.AddrFrom(w.node), packet.Addr{})
			w.addPod(0)
			g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
			end := start + int64(d)
			for w.now < end-1 {
				w.now = min(w.now+int64(d)/7+1, end-1)
				for tr.Expire(w.now, 1<<20) {
				}
				w.reaches(g.back(), 0, 4000)
			}
			w.now = end + 1<<tickShift
			for tr.Expire(w.now, 1<<20) {
			}
			require.Zero(t, tr.v4.used, "timer %v from %d", d, start)
			require.NoError(t, tr.Close())
		}
	}
}

func TestConfigErrors(t *testing.T) {
	a, err := NewAllocator(AllocatorConfig{})
	require.NoError(t, err)
	for _, c := range []Config{{Worker: 1}, {Worker: -1}, {Sessions4: 1 << 24}, {Mapping: 7}, {Timers: Timers{UDP: time.Millisecond}},
		{Timers: Timers{TCPEstablished: 5 * time.Hour}}, {FragmentedDatagrams: -1}} {
		_, err := New(c, a)
		require.Error(t, err, "%+v", c)
	}
	for _, c := range []AllocatorConfig{{First: 2, Last: 1}, {Workers: 300}, {MaxPods: -1}} {
		_, err := NewAllocator(c)
		require.Error(t, err, "%+v", c)
	}
}
