package e2e

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

func TestClusterForwards(t *testing.T) {
	t.Parallel()
	for _, workers := range []int{1, 2} {
		for _, forward := range []int{0, 1} {
			t.Run(fmt.Sprintf("workers=%d/ip_forward=%d", workers, forward), func(t *testing.T) {
				workersPossible(t, workers)
				l := newLab(t, lab.Options{Nodes: 3, Pods: 2, Workers: workers, IPForward: forward})
				for _, n := range l.Nodes {
					s := status(t, n)
					require.Len(t, s.Workers, workers)
					require.EqualValues(t, workers, s.Uplink.Queues)
				}
				// Strict reverse-path filtering must be left alone and must not hurt.
				for _, n := range l.Nodes {
					require.NoError(t, lab.SetSysctl(n.Netns(), "net/ipv4/conf/all/rp_filter", "1"))
				}
				frames := freeFrames(t, l)
				before := map[int]uint64{}
				for _, family := range families {
					count, err := l.KernelForwarded(family)
					require.NoError(t, err)
					before[family] = count
				}
				requireProofs(t, l)
				eachFamily(t, func(t *testing.T, family int) {
					count, err := l.KernelForwarded(family)
					require.NoError(t, err)
					require.Equal(t, before[family], count, "the nodes' kernels forwarded packets")
				})
				t.Run("no_frame_is_leaked", func(t *testing.T) {
					requireNoLeak(t, l, frames)
				})
				t.Run("watchdog_is_fed", func(t *testing.T) {
					for _, n := range l.Nodes {
						require.Eventually(t, func() bool { return n.Watchdogs() > 0 }, 5*time.Second, 50*time.Millisecond)
					}
				})
			})
		}
	}
}

// freeFrames is how many frames all workers of all nodes have in their pools.
func freeFrames(t *testing.T, l *lab.Lab) int {
	t.Helper()
	free := 0
	for _, n := range l.Nodes {
		for _, w := range status(t, n).Workers {
			free += int(w.FramesFree + w.LargeFree)
		}
	}
	return free
}

func TestBulkTransferArrivesWhole(t *testing.T) {
	t.Parallel()
	size := int64(1 << 30)
	if testing.Short() {
		size = bulk(64 << 20)
	}
	for _, mtu := range []int{1500, 9000} {
		t.Run(fmt.Sprintf("mtu=%d", mtu), func(t *testing.T) {
			l := newLab(t, lab.Options{Nodes: 2, Pods: 1, Workers: 1, MTU: mtu})
			for _, n := range l.Nodes {
				require.EqualValues(t, mtu, status(t, n).Uplink.Mtu)
			}
			eachFamily(t, func(t *testing.T, family int) {
				d, err := lab.Transfer(testContext(t), l.Nodes[0].Pods[0].End(), l.Nodes[1].Pods[0].End(), family, size)
				require.NoError(t, err)
				t.Logf("%d MiB in %.2f s: %.2f Gbit/s", size>>20, d.Seconds(), float64(size)*8/d.Seconds()/1e9)
			})
		})
	}
}
