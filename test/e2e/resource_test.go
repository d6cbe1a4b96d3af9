package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

const (
	chunkBytes = 4096 // of an ordinary frame
	largeBytes = 64 << 10
	tickHertz  = 100 // USER_HZ, which every architecture's /proc uses
)

// A full node: 250 pods, one worker, TAPs whatever the cell is. Not beside other tests: it measures the daemon's time, and a daemon looks at its pods whenever a network
// namespace of the machine comes or goes.
func TestResourcesOfAFullNode(t *testing.T) {
	l := newLab(t, lab.Options{Nodes: 1, Pods: 1, PodPort: "tap", Workers: 1})
	n1 := l.Nodes[0]
	ctx := testContext(t)
	pid := n1.Pid()
	filesBefore, threadsBefore := openFiles(t, pid), statusField(t, pid, "Threads")
	begin := time.Now()
	for len(n1.Pods) < 250 {
		_, err := n1.AddPod(ctx)
		require.NoError(t, err)
	}
	t.Logf("249 pods attached in %.1f s", time.Since(begin).Seconds())
	require.NoError(t, n1.WaitProgrammed(ctx))
	requireReachable(t, n1.Pods[0].End(), n1.Pods[249].End())
	requireReachable(t, n1.Pods[137].End(), n1.End())

	t.Run("memory", func(t *testing.T) {
		if builtWithRaceDetector(t) {
			t.Skip("the race detector multiplies memory")
		}
		frameKiB := 0
		for _, w := range status(t, n1).Workers {
			frameKiB += (int(w.FramesTotal)*chunkBytes + int(w.LargeTotal)*largeBytes) >> 10
		}
		require.NotZero(t, frameKiB)
		resident := statusField(t, pid, "VmRSS")
		t.Logf("resident %d KiB (anonymous %d, files %d, shared %d), frame memory %d KiB", resident,
			statusField(t, pid, "RssAnon"), statusField(t, pid, "RssFile"), statusField(t, pid, "RssShmem"), frameKiB)
		require.Less(t, resident-frameKiB, 64<<10)
	})
	t.Run("idle", func(t *testing.T) { requireIdle(t, pid, 8*time.Second) })
	t.Run("restart", func(t *testing.T) {
		require.NoError(t, n1.Stop())
		begin := time.Now()
		require.NoError(t, n1.Start(ctx))
		require.NoError(t, n1.WaitProgrammed(ctx))
		t.Logf("250 pods adopted in %.1f s", time.Since(begin).Seconds())
		require.EqualValues(t, 250, status(t, n1).PodCount)
		requireReachable(t, n1.Pods[0].End(), n1.Pods[249].End())
		pid = n1.Pid()
	})
	t.Run("nothing_leaks", func(t *testing.T) {
		for _, p := range n1.Pods[1:] {
			require.NoError(t, p.Detach(ctx))
		}
		require.Eventually(t, func() bool { return openFiles(t, pid) <= filesBefore }, 10*time.Second, 100*time.Millisecond,
			"%d descriptors before, %d after", filesBefore, openFiles(t, pid))
		require.Less(t, statusField(t, pid, "Threads"), threadsBefore+10)
		require.True(t, status(t, n1).Ready)
		for _, w := range status(t, n1).Workers {
			require.Equal(t, w.LargeTotal, w.LargeFree, "no buffer is lost with a port")
		}
		for _, p := range n1.Pods[1:] {
			require.NotContains(t, interfaces(t, p.Netns()), "eth0")
		}
	})
}

// requireIdle checks that a process with nothing to do takes 1 % of a core at most, and the clock's granule.
func requireIdle(t *testing.T, pid int, span time.Duration) {
	t.Helper()
	inRealTime(t)
	time.Sleep(time.Second)
	before := cpuTicks(t, pid)
	time.Sleep(span)
	used := cpuTicks(t, pid) - before
	t.Logf("%d ticks of 10 ms in %v: %.2f %% of a core", used, span, float64(used)/tickHertz/span.Seconds()*100)
	require.LessOrEqual(t, float64(used)/tickHertz, span.Seconds()/100+1.0/tickHertz, "an idle daemon uses 1 %% of a core at most (and the clock's granule)")
}

// cpuTicks is user and system time of a process so far.
func cpuTicks(t *testing.T, pid int) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	require.NoError(t, err)
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	var user, system int
	_, err = fmt.Sscan(fields[11]+" "+fields[12], &user, &system)
	require.NoError(t, err)
	return user + system
}
