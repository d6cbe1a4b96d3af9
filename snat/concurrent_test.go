package snat

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
)

// Workers lease and return at the same time, the agent reads and sets host ports; the race detector looks on. In the end everything is back.
func TestAllocatorConcurrently(t *testing.T) {
	a, err := NewAllocator(AllocatorConfig{Workers: 4, MaxPods: 8, ChunkIdle: second})
	require.NoError(t, err)
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			tr, err := New(Config{Worker: i, Sessions4: 4096, Sessions6: 64}, a)
			if err != nil {
				t.Error(err)
				return
			}
			defer tr.Close()
			w := &world{t: t, a: a, tr: tr, now: second, family: &families[0]}
			tr.Expire(w.now, 1)
			tr.SetNodeAddresses(packet.AddrFrom(w.node), packet.Addr{})
			for pod := range 4 {
				w.addPod(pod)
			}
			for round := range 20 {
				for n := range 200 {
					g, r := w.out(n%4, w.to(n%4, udp, uint16(1000+n), round, 53))
					if r.Action != Translate {
						continue
					}
					if worker, pod, ok := a.Owner(ClassUDP, g.sport); !ok || worker != i || pod != n%4 {
						t.Errorf("port %d of worker %d and pod %d belongs to %d and %d", g.sport, i, n%4, worker, pod)
					}
				}
				w.pass(301)
				for range 200 {
					w.pass(0.3)
				}
			}
			for pod := range 4 {
				tr.RemovePod(pod)
			}
			w.pass(1)
		})
	}
	for i := range 100 {
		a.SetHostPorts(udp, []uint16{uint16(10000 + i), 20000})
		a.Usage(ClassUDP)
		a.Ours(udp, 15000)
	}
	wg.Wait()
	for c := range NumClasses {
		require.Zero(t, a.Usage(c).Leased)
		require.Zero(t, a.share[c].unmet)
	}
}
