package snat

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

const benchPods = 250

// benchWorld is a translator with benchPods pods and room for n sessions of each family.
func benchWorld(tb testing.TB, fam int, n int, cfg Config) *world {
	a, err := NewAllocator(AllocatorConfig{})
	require.NoError(tb, err)
	cfg.Sessions4, cfg.Sessions6, cfg.HalfOpen = n, n, n
	tr, err := New(cfg, a)
	require.NoError(tb, err)
	tb.Cleanup(func() { tr.Close() })
	w := &world{family: &families[fam], t: tb, a: a, tr: tr, now: 1000 * second}
	tr.Expire(w.now, 1)
	tr.SetNodeAddresses(packet.AddrFrom(families[0].node), packet.AddrFrom(families[1].node))
	for i := range benchPods {
		w.addPod(i)
	}
	return w
}

// nth is packet number i of n flows, as parsed, without the work of building frames: pods take turns.
func nth(p *packet.Packet, fam *family, i int) {
	pod, rest := i%benchPods, i/benchPods
	p.Src, p.Dst = packet.AddrFrom(fam.podBase), packet.AddrFrom(fam.farBase)
	p.Src.Lo += uint64(pod) + 2
	p.Dst.Lo += uint64(rest >> 4)
	p.SrcPort = 32768 + uint16(rest&15)
}

// fill opens n UDP sessions.
func fill(tb testing.TB, w *world, n int) (p packet.Packet, frame []byte) {
	frame = w.to(0, udp, 4000, 0, 443).frame()
	p = w.parse(frame)
	var v View
	for i := range n {
		nth(&p, w.family, i)
		w.tr.Outbound(&p, frame, i%benchPods, &v)
		if v.Action == Create {
			w.tr.Create(&p, &v)
		}
		if v.Action != Translate {
			tb.Fatalf("session %d: %v", i, v.Reason)
		}
	}
	return p, frame
}

// BenchmarkEstablished takes batches of 64 packets through prefetching, the view and the translation, each packet with a frame of its own, as a worker does. Making
// the packets what they were before is part of the measured time: dir=none is that alone.
func BenchmarkEstablished(b *testing.B) {
	const batch = 64
	for fam := range families {
		for _, n := range []int{1000, 1000000} {
			distinct := min(1<<16, 1<<bits.Len(uint(n)))
			for _, dir := range []string{"none", "out", "in"} {
				for _, prefetch := range []bool{false, true} {
					if dir == "none" && prefetch {
						continue
					}
					b.Run(fmt.Sprintf("family=%d/sessions=%d/dir=%s/prefetch=%v", 4+2*fam, n, dir, prefetch), func(b *testing.B) {
						w := benchWorld(b, fam, 1<<20, Config{})
						model, frame := fill(b, w, n)
						r := rand.New(rand.NewPCG(1, 2))
						list := w.sessions()
						from, pods := make([]packet.Packet, distinct), make([]int, distinct)
						for i := range from {
							s := &list[r.IntN(n)]
							p := model
							if dir == "out" {
								p.Src, p.Dst, p.SrcPort, p.DstPort = s.Inside, s.Remote, s.InsidePort, s.RemotePort
							} else {
								p.Src, p.Dst, p.SrcPort, p.DstPort = s.Remote, s.External, s.RemotePort, s.ExternalPort
							}
							from[i], pods[i] = p, s.Pod
						}
						var ps [batch]packet.Packet
						var vs [batch]View
						var asked []*packet.Packet
						frames := make([]byte, batch*128)
						for i := range batch {
							copy(frames[i*128:], frame)
							asked = append(asked, &ps[i])
						}
						b.ReportAllocs()
						b.ResetTimer()
						for i := 0; i < b.N; i += batch {
							at := i & (distinct - 1)
							copy(ps[:], from[at:at+batch])
							if dir == "none" {
								continue
							}
							if prefetch && w.tr.PrefetchPays() {
								w.tr.Prefetch(asked, dir == "out")
							}
							for j := range ps {
								if dir == "out" {
									w.tr.Outbound(&ps[j], frames[j*128:(j+1)*128], pods[at+j], &vs[j])
								} else {
									w.tr.Inbound(&ps[j], frames[j*128:(j+1)*128], &vs[j])
								}
							}
							for j := range ps {
								if vs[j].Action != Translate {
									b.Fatal(vs[j].Action, vs[j].Reason)
								}
								if dir == "out" {
									w.tr.TranslateOut(&ps[j], frames[j*128:(j+1)*128], &vs[j], Offload{})
								} else {
									w.tr.TranslateIn(&ps[j], frames[j*128:(j+1)*128], &vs[j], Offload{})
								}
							}
						}
					})
				}
			}
		}
	}
}

func BenchmarkNewSessions(b *testing.B) {
	for fam := range families {
		b.Run(fmt.Sprintf("family=%d/sessions=1000000", 4+2*fam), func(b *testing.B) {
			const n = 1000000
			w := benchWorld(b, fam, 1<<20, Config{})
			p, frame := fill(b, w, n) // the pages are there
			var v View
			b.ReportAllocs()
			left := 0
			b.ResetTimer()
			for i := range b.N {
				if left == 0 {
					b.StopTimer()
					w.pass(301)
					left = n
					b.StartTimer()
				}
				left--
				nth(&p, w.family, i%n)
				w.tr.Outbound(&p, frame, i%n%benchPods, &v)
				if v.Action != Create || w.tr.Create(&p, &v) != drop.None {
					b.Fatal(v.Action, v.Reason)
				}
				w.tr.TranslateOut(&p, frame, &v, Offload{})
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sessions/s")
		})
	}
}

// BenchmarkExpire has a million sessions end at once, and reports the longest call of Expire.
func BenchmarkExpire(b *testing.B) {
	for _, budget := range []int{64, 256} {
		b.Run(fmt.Sprintf("sessions=1000000/budget=%d", budget), func(b *testing.B) {
			longest, calls := time.Duration(0), 0
			for range b.N {
				b.StopTimer()
				w := benchWorld(b, 0, 1<<20, Config{})
				fill(b, w, 1000000)
				b.StartTimer()
				w.now += 301 * second
				for more := true; more; calls++ {
					start := time.Now()
					more = w.tr.Expire(w.now, budget)
					longest = max(longest, time.Since(start))
				}
				require.Zero(b, w.tr.v4.used)
			}
			b.ReportMetric(float64(longest.Nanoseconds()), "ns-longest-poll")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1e6, "ns/session")
			b.ReportMetric(float64(calls)/float64(b.N), "polls")
		})
	}
}

// BenchmarkAdopt: a new process takes over a million sessions.
func BenchmarkAdopt(b *testing.B) {
	w := benchWorld(b, 0, 1<<20, Config{})
	fill(b, w, 1000000)
	var pods []AdoptedPod
	for i := range benchPods {
		pods = append(pods, AdoptedPod{i, packet.AddrFrom(families[0].pod(i)), packet.AddrFrom(families[1].pod(i))})
	}
	for b.Loop() {
		a, err := NewAllocator(AllocatorConfig{})
		require.NoError(b, err)
		tr, st, err := Adopt(w.tr.cfg, a, handOverFile(b, w), w.now, pods)
		require.NoError(b, err)
		require.Equal(b, 1000000, st.Sessions)
		b.StopTimer()
		tr.Close()
		b.StartTimer()
	}
}

func BenchmarkToeplitz(b *testing.B) {
	key := make([]byte, 40)
	for i := range key {
		key[i] = byte(i * 7)
	}
	for b.Loop() {
		Toeplitz(key, packet.AddrFrom4(0x0a000001), packet.AddrFrom4(0xc0000201), 443, 10000, true)
	}
}

// Nothing is allocated for a packet: not for established sessions, new ones, errors, fragments or refusals.
func TestZeroAllocations(t *testing.T) {
	for _, cfg := range []Config{{}, {Mapping: EndpointIndependent, Filtering: FilterAddress}} {
		forFamilies(t, cfg, func(t *testing.T, w *world) {
			f := w.to(0, udp, 4000, 0, 53)
			g := w.mustOut(0, f)
			_, r := w.out(0, f)
			frames := map[string][]byte{"out": f.frame(), "in": g.back().frame(), "error": w.quote(w.far(7), w.node, w.unreach, 1, 0, r.frame, 0),
				"scan":       flow{src: w.far(0), dst: w.node, proto: tcp, sport: 80, dport: 15000, tcp: tcpSYN}.frame(),
				"no session": w.to(0, tcp, 1, 0, 80).flags(tcpACK).frame()}
			for name, frame := range frames {
				b := make([]byte, len(frame))
				require.Zero(t, testing.AllocsPerRun(200, func() {
					copy(b, frame)
					var p packet.Packet
					packet.Parse(&p, b, len(b))
					var v View
					if name == "out" || name == "no session" {
						w.tr.Outbound(&p, b, 0, &v)
						if v.Action == Translate {
							w.tr.TranslateOut(&p, b, &v, Offload{})
						}
					} else {
						w.tr.Inbound(&p, b, &v)
						if v.Action == Translate {
							w.tr.TranslateIn(&p, b, &v, Offload{})
						}
					}
				}), name)
			}
			ps := []*packet.Packet{{}, {}}
			packet.Parse(ps[0], frames["out"], len(frames["out"]))
			packet.Parse(ps[1], frames["in"], len(frames["in"]))
			require.Zero(t, testing.AllocsPerRun(200, func() { w.tr.Prefetch(ps, true); w.tr.Prefetch(ps, false) }))
			// New sessions, on ports the pod has; and their end.
			frame := f.frame()
			i := uint16(0)
			require.Zero(t, testing.AllocsPerRun(200, func() {
				var p packet.Packet
				packet.Parse(&p, frame, len(frame))
				i++
				p.DstPort = 1000 + i
				var v View
				w.tr.Outbound(&p, frame, 0, &v)
				w.tr.Create(&p, &v)
				if v.Action != Translate {
					panic(v.Reason.String())
				}
				w.now += second
				w.tr.Expire(w.now, 1000)
			}))
			frag := f
			frag.more, frag.payload, frag.df = true, make([]byte, 16), false
			first := frag.frame()
			frag.fragAt, frag.more = 24, false
			second := frag.frame()
			require.Zero(t, testing.AllocsPerRun(200, func() {
				for _, b := range [][]byte{second, first} {
					var p packet.Packet
					packet.Parse(&p, b, len(b))
					var fv FragmentView
					w.tr.Fragment(&p, 0, &fv)
					w.tr.TrackFragment(&p, &fv, 1)
					w.tr.ReleaseFragment(&fv)
				}
			}))
		})
	}
}

// TestMemoryOfASession is the account in table.go, of what is mapped for tables of the sizes people choose.
func TestMemoryOfASession(t *testing.T) {
	require.Equal(t, recordSize, sizeOf[record]())
	require.Equal(t, pairSize, sizeOf[addrPair]())
	for _, n := range []int{1 << 18, 1 << 20, 1000000, 800000, 1600000, 1<<20 + 1, 12345678} {
		l := layout(&Config{Sessions4: n, Sessions6: n})
		v4 := l.recs4.size + l.out4.size + l.in4.size + l.wheel4.size
		v6 := l.recs6.size + l.addrs6.size + l.out6.size + l.in6.size + l.wheel6.size
		require.LessOrEqual(t, v4, 96*n, "%d sessions: %.1f bytes each", n, float64(v4)/float64(n))
		require.LessOrEqual(t, v6, 128*n, "%d sessions: %.1f bytes each", n, float64(v6)/float64(n))
		require.LessOrEqual(t, l.total+l.idxTotal, v4+v6+10*pageSize, "nothing else")
		t.Logf("%d sessions: IPv4 %.1f, IPv6 %.1f bytes each", n, float64(v4)/float64(n), float64(v6)/float64(n))
	}
}
