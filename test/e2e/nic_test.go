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

// What a machine with NICs to spare, made for these tests (test/kernels), has and must grant on them. Unset on every other machine.
const (
	wiresVariable = "OVERPLANE_E2E_WIRES" // pairs of NICs that are connected with each other: lab.ParseWires. A suite that runs for one cell uses them.
	nicVariable   = "OVERPLANE_E2E_NIC"   // the rung that OVERPLANE_UPLINK_MODE=auto gets on them
	hookVariable  = "OVERPLANE_E2E_HOOK"  // how tun's programs are attached: "tcx" or "clsact"
)

// wires are the machine's.
func wires(t *testing.T) []lab.Wire {
	t.Helper()
	list := os.Getenv(wiresVariable)
	if list == "" {
		return nil
	}
	w, err := lab.ParseWires(list)
	require.NoError(t, err, wiresVariable)
	return w
}

// Nodes whose uplinks are NICs with a driver of their own, by the rung that the kernel must grant on it, by the one below, and by tun.
func TestNIC(t *testing.T) {
	inCell(t)
	best := os.Getenv(nicVariable)
	if best == "" || wires(t) == nil {
		t.Skipf("needs a machine with NICs to spare, as test/kernels boots: %s and %s are not set", nicVariable, wiresVariable)
	}
	for _, c := range []struct{ mode, rung, podPort string }{
		{"auto", best, "tap"},
		{"xdp", best, "veth"},
		{"xdp-copy", "xdp-copy", "tap"},
		{"tun", "tun", "tap"},
	} {
		if c.mode == "xdp-copy" && best == "xdp-copy" && testing.Short() {
			continue // the first one was that
		}
		t.Run(c.mode+"/"+c.podPort, func(t *testing.T) {
			l := newLab(t, lab.Options{Name: "ovptnic", Nodes: 2, Pods: 1, Uplink: c.mode, PodPort: c.podPort, Wires: wires(t)})
			n1, n2 := l.Nodes[0], l.Nodes[1]
			for _, n := range l.Nodes {
				s := status(t, n)
				t.Logf("GRANTED %s by OVERPLANE_UPLINK_MODE=%s", s.Uplink.Rung, c.mode) // test/kernels reads it
				if c.mode == "auto" && len(s.Uplink.WhyNotMore) > 0 {
					t.Log(s.Uplink.WhyNotMore)
				}
				require.Equal(t, c.rung, s.Uplink.Rung, "%v", s.Uplink.WhyNotMore)
				t.Log(requireSockets(t, n, c.rung))
				if c.rung == "tun" {
					filters := strings.Contains(Exec(t, n.Netns(), "tc", "qdisc", "show", "dev", "eth0"), "clsact")
					require.Equal(t, os.Getenv(hookVariable) == "clsact", filters, "filters of clsact are there")
				}
			}
			frames := freeFrames(t, l)
			requireProofs(t, l)
			requireNoLeak(t, l, frames)

			// Killed and started again, connections go on.
			f := openFlow(t, n1.Pods[0].End(), n2.Pods[0].End(), 4)
			require.NoError(t, n2.Kill())
			require.NoError(t, n2.Start(testContext(t)))
			require.NoError(t, n2.WaitProgrammed(testContext(t)))
			require.Equal(t, c.rung, status(t, n2).Uplink.Rung)
			f.requireAlive(t, 30*time.Second)
		})
	}
}

// requireSockets checks that the AF_XDP sockets of a node's uplink are of the kind that a rung stands for, by what the kernel says of them, not the daemon.
func requireSockets(t *testing.T, n *lab.Node, rung string) string {
	t.Helper()
	mark, ok := map[string]string{"xdp-zerocopy": "zc:1", "xdp-copy": "zc:0"}[rung]
	if !ok {
		return ""
	}
	sockets := Exec(t, n.Netns(), "ss", "--xdp", "--all", "--extended")
	ours, at := 0, fmt.Sprintf("ifindex:%d,", device(t, n.Netns(), "eth0").Index)
	for line := range strings.Lines(sockets) {
		if strings.Contains(line, at) {
			ours++
			require.Contains(t, line, mark)
		}
	}
	if rung == "xdp-zerocopy" { // not every kernel has the diagnostics (CONFIG_XDP_SOCKETS_DIAG); those that must grant this do
		require.Positive(t, ours, "AF_XDP sockets on eth0")
	}
	return sockets
}

// requireNoLeak waits until as many frames are free as there were before the traffic. virtio-net completes what it sent with the next
// transmission or when three quarters of its ring are used: that many may be away at any time.
func requireNoLeak(t *testing.T, l *lab.Lab, before int) {
	t.Helper()
	if len(l.Wires) > 0 {
		const ring = 256
		before -= ring * len(l.Nodes)
	}
	var now int
	require.Eventually(t, func() bool { now = freeFrames(t, l); return now >= before }, 5*time.Second, 50*time.Millisecond,
		"frames leak: %d or more were to be free", before)
	t.Logf("%d frames are free, of at least %d", now, before)
}

// carrierFollows skips where the far end of a node's wire goes down without the node's noticing.
func carrierFollows(t *testing.T, l *lab.Lab) {
	t.Helper()
	if len(l.Wires) > 0 {
		t.Skip("NICs of an emulated machine do not lose their carrier with each other")
	}
}

// inRealTime skips what says something only where instructions take the time that they take on hardware.
func inRealTime(t *testing.T) {
	t.Helper()
	if emulated() {
		t.Skip("the processor is emulated: its time says nothing")
	}
}

// emulated says whether the processor is.
func emulated() bool {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && strings.Contains(string(cpu), "QEMU TCG")
}

// bulk is how much a test transfers that wants a number of bytes to be many: an emulated processor takes minutes for what takes a second on hardware.
func bulk(bytes int64) int64 {
	if emulated() {
		return bytes / 16
	}
	return bytes
}
