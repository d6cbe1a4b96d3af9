package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// procStatus is a line of proc_pid_status(5) in kB.
func (d *daemon) procStatus(name string) int {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(d.cmd.Process.Pid), "status"))
	require.NoError(d.m.t, err)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			require.NoError(d.m.t, err)
			return n
		}
	}
	d.m.t.Fatalf("no %s", name)
	return 0
}

// cpuShare is how much of a core the daemon takes over some seconds.
func (d *daemon) cpuShare(over time.Duration) float64 {
	ticks := func() float64 {
		data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(d.cmd.Process.Pid), "stat"))
		require.NoError(d.m.t, err)
		fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+2:]))
		user, _ := strconv.ParseFloat(fields[11], 64)
		system, _ := strconv.ParseFloat(fields[12], 64)
		return (user + system) / 100 // USER_HZ
	}
	before, start := ticks(), time.Now()
	time.Sleep(over)
	return (ticks() - before) / time.Since(start).Seconds()
}

// An idle daemon costs less than 1 % of a core.
func TestRealDaemonIsIdleWhenNothingIsToDo(t *testing.T) {
	_, d1, _ := pair(t)
	time.Sleep(time.Second)
	share := d1.cpuShare(6 * time.Second)
	t.Logf("%.2f %% of a core", share*100)
	require.Less(t, share, 0.01)
}

// A node full of pods: resident memory stays under 64 MiB beside the frames, and a restart takes all of them over.
func TestRealDaemonWith250Pods(t *testing.T) {
	const pods = 250
	m := newMachine(t)
	s := m.state(1)
	require.NoError(t, api.WriteFile(m.stateFile(1), s))
	var batch strings.Builder
	for p := 1; p <= pods; p++ {
		fmt.Fprintf(&batch, "netns add %s\n", m.podNS(1, p))
	}
	cmd := exec.Command("ip", "-batch", "-")
	cmd.Stdin = strings.NewReader(batch.String())
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)

	d := m.start(1, "OVERPLANE_WORKERS=1")
	start := time.Now()
	for p := 1; p <= pods; p++ {
		d.attach(p)
	}
	t.Logf("attached %d pods in %v", pods, time.Since(start))
	m.reaches(m.podNS(1, 1), "10.244.1.251")
	m.reaches(m.podNS(1, 250), "fd12:3456:789a:0:1::2")
	// Frames are a shared mapping; what else is resident is the daemon's own.
	other := d.procStatus("RssAnon") + d.procStatus("RssFile")
	t.Logf("resident beside frames: %d KiB anonymous, %d KiB of files; frames %d KiB", d.procStatus("RssAnon"), d.procStatus("RssFile"), d.procStatus("RssShmem"))
	require.Less(t, other, 64<<10)
	time.Sleep(5 * time.Second) // the pods' kernels still join multicast groups
	share := d.cpuShare(8 * time.Second)
	t.Logf("idle: %.2f %% of a core", share*100)
	require.Less(t, share, 0.01)

	require.NoError(t, d.end(unix.SIGTERM))
	start = time.Now()
	d = m.start(1, "OVERPLANE_WORKERS=1")
	t.Logf("restarted with %d pods in %v, up to a second of it the client's back-off", pods, time.Since(start))
	require.EqualValues(t, pods, d.status().GetPodCount())
	require.True(t, d.status().GetReady(), "%v", d.status().GetProblems())
	m.reaches(m.podNS(1, 250), "10.244.1.2")

	start = time.Now()
	for p := 1; p <= pods; p++ {
		_, err := d.client.DetachPod(t.Context(), &controlv1.DetachPodRequest{Name: fmt.Sprintf("p%d", p)})
		require.NoError(t, err)
	}
	t.Logf("detached %d pods in %v", pods, time.Since(start))
	require.True(t, d.status().GetReady())
	for _, w := range d.status().GetWorkers() {
		require.Equal(t, w.GetLargeTotal(), w.GetLargeFree(), "no buffer is lost with a port")
	}
}
