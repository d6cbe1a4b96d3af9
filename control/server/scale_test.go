package server_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/control/server"
	"github.com/overplane/overplane/ipam"
)

// TestScale is a look at thousands of nodes in this process, the controller included: OVERPLANE_SCALE_NODES=5000.
func TestScale(t *testing.T) {
	nodes, err := strconv.Atoi(os.Getenv("OVERPLANE_SCALE_NODES"))
	if err != nil || nodes <= 0 {
		t.Skip("OVERPLANE_SCALE_NODES is not set")
	}
	c := newCluster(t, ipam.Ranges{Pods: []ipam.PodRange{{CIDR: netip.MustParsePrefix("10.0.0.0/11"), BlockBits: 24}}}, func(cfg *server.Config) { cfg.AckTimeout = time.Minute })
	a := ipam.NewAllocator(c.store, ipam.Config{})
	facts := func(i int) syncclient.Facts {
		return syncclient.Facts{IPv4: fmt.Sprintf("10.240.%d.%d", i/250, i%250+1), MAC: fmt.Sprintf("02:00:00:00:%02x:%02x", i/256, i%256)}
	}
	start := time.Now()
	for i := range nodes {
		f := facts(i)
		_, err := a.Register(t.Context(), ipam.Facts{Name: fmt.Sprintf("n%d", i), IPv4: netip.MustParseAddr(f.IPv4), MAC: f.MAC})
		require.NoError(t, err)
		c.issue(pki.Node, fmt.Sprintf("n%d", i), 0)
	}
	t.Logf("%d nodes registered in %v", nodes, time.Since(start))

	shared := syncclient.NewShared()
	var programmed atomic.Int64
	var mu sync.Mutex
	var at []time.Time
	var want atomic.Uint64
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	start = time.Now()
	for i := range nodes {
		f := facts(i)
		cl, err := syncclient.New(syncclient.Config{
			Node: fmt.Sprintf("n%d", i), Addresses: []string{c.node}, TLS: c.files(fmt.Sprintf("n%d", i)),
			Facts: func() (syncclient.Facts, error) { return f, nil }, Shared: shared,
		})
		require.NoError(t, err)
		wg.Go(func() {
			first := true
			_ = cl.Run(ctx, func(_ context.Context, s *controlv1.NodeState) error {
				if first {
					programmed.Add(1)
					first = false
				}
				if w := want.Load(); w != 0 && s.GetVersion().GetRevision() >= w {
					mu.Lock()
					at = append(at, time.Now())
					mu.Unlock()
				}
				return nil
			})
		})
	}
	for programmed.Load() < int64(nodes) {
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("cold start: %d nodes programmed after %v", nodes, time.Since(start))
	admin := c.admin()
	for round := range 5 {
		c.eventually(func() bool {
			r, err := admin.GetConvergence(ctx, &controlv1.GetConvergenceRequest{})
			return err == nil && int(r.GetConverged()) == nodes
		}, "no convergence")
		mu.Lock()
		at = nil
		mu.Unlock()
		before, _ := c.store.Latest(ctx)
		want.Store(uint64(before) + 1)
		start = time.Now()
		_, err = admin.SetStaticRoute(ctx, &controlv1.SetStaticRouteRequest{Route: &controlv1.Route{
			Prefix: fmt.Sprintf("10.99.%d.0/24", round), Target: &controlv1.Route_Unreachable{Unreachable: true},
		}})
		require.NoError(t, err)
		c.eventually(func() bool { mu.Lock(); defer mu.Unlock(); return len(at) >= nodes }, "the change does not arrive")
		var d []time.Duration
		for _, x := range at {
			d = append(d, x.Sub(start))
		}
		slices.Sort(d)
		t.Logf("one change: p50 %v p99 %v max %v", d[len(d)/2], d[len(d)*99/100], d[len(d)-1])
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("heap %d MiB, stacks %d MiB, %d goroutines", m.HeapInuse>>20, m.StackInuse>>20, runtime.NumGoroutine())
}
