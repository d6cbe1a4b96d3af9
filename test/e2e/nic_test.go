package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// What a machine with two virtio-net NICs on one wire, made for these tests (test/kernels), must grant on them. Unset on every other machine.
const (
	nicVariable  = "OVERPLANE_E2E_NIC"  // the rung that OVERPLANE_UPLINK_MODE=auto gets
	hookVariable = "OVERPLANE_E2E_HOOK" // how tun's programs are attached: "tcx" or "clsact"
)

// Pods reach each other over a NIC with a driver of its own, by the rung that the kernel must grant on it, by the one below, and by tun.
func TestNIC(t *testing.T) {
	inCell(t)
	best := os.Getenv(nicVariable)
	if best == "" {
		t.Skipf("needs a machine with two virtio-net NICs to spare, as test/kernels boots: %s is not set", nicVariable)
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
			// Made with veths, which then give way to the NICs.
			l := newLab(t, lab.Options{Name: "ovptnic", Nodes: 2, Pods: 1, Uplink: c.mode, PodPort: c.podPort})
			nics := virtioNICs(t)
			for i, n := range l.Nodes {
				require.NoError(t, n.Stop())
				Exec(t, n.Netns(), "ip", "link", "del", "eth0")
				giveNIC(t, n, nics[i])
				t.Cleanup(func() { takeNIC(t, n, nics[i]) })
			}
			for _, n := range l.Nodes {
				require.NoError(t, n.Start(testContext(t)))
				require.NoError(t, n.WaitStatus(testContext(t), "ready", func(s *controlv1.GetStatusResponse) bool { return s.Ready && s.Uplink.Up }))
			}
			n1, n2 := l.Nodes[0], l.Nodes[1]
			for _, n := range l.Nodes {
				s := status(t, n)
				t.Logf("GRANTED %s by OVERPLANE_UPLINK_MODE=%s", s.Uplink.Rung, c.mode) // test/kernels reads it
				if c.mode == "auto" && len(s.Uplink.WhyNotMore) > 0 {
					t.Log(s.Uplink.WhyNotMore)
				}
				require.Equal(t, c.rung, s.Uplink.Rung, "%v", s.Uplink.WhyNotMore)
				if strings.HasPrefix(c.rung, "xdp-") {
					// What the kernel says of the sockets, not the daemon.
					sockets := Exec(t, n.Netns(), "ss", "--xdp", "--all", "--extended")
					t.Log(sockets)
					ours, at := 0, fmt.Sprintf("ifindex:%d,", device(t, n.Netns(), "eth0").Index)
					for line := range strings.Lines(sockets) {
						if strings.Contains(line, at) {
							ours++
							require.Contains(t, line, map[string]string{"xdp-zerocopy": "zc:1", "xdp-copy": "zc:0"}[c.rung])
						}
					}
					if c.rung == "xdp-zerocopy" { // not every kernel has the diagnostics (CONFIG_XDP_SOCKETS_DIAG); those that must grant this do
						require.Positive(t, ours, "AF_XDP sockets on eth0")
					}
				}
				if c.rung == "tun" {
					filters := strings.Contains(Exec(t, n.Netns(), "tc", "qdisc", "show", "dev", "eth0"), "clsact")
					require.Equal(t, os.Getenv(hookVariable) == "clsact", filters, "filters of clsact are there")
				}
			}
			for _, p := range lab.Proofs() {
				if strings.Contains(p.Name, "wire") || strings.Contains(p.Name, "MiB") {
					continue // the wire is out of the lab's sight; the transfer is a smaller one, below
				}
				eachFamily(t, func(t *testing.T, family int) {
					_, err := p.Check(testContext(t), l, family)
					require.NoError(t, err, p.Name)
				})
			}
			requirePing(t, n1.End(), n2.End(), 4) // passed on to the kernel
			frames := freeFrames(t, l)
			eachFamily(t, func(t *testing.T, family int) {
				d, err := lab.Transfer(testContext(t), n1.Pods[0].End(), n2.Pods[0].End(), family, 4<<20)
				require.NoError(t, err)
				t.Logf("4 MiB in %v", d)
			})
			// virtio-net completes what it sent with the next transmission or when three quarters of the ring are used: that many may be away at any time.
			const ring = 256
			require.Eventually(t, func() bool { return freeFrames(t, l) >= frames-2*ring }, 5*time.Second, 50*time.Millisecond, "frames leak")
			t.Logf("%d frames fewer are free than before", frames-freeFrames(t, l))

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

// virtioNICs are the names of the two NICs in the machine's first network namespace.
func virtioNICs(t *testing.T) []string {
	t.Helper()
	drivers, err := filepath.Glob("/sys/class/net/*/device/driver")
	require.NoError(t, err)
	var names []string
	for _, d := range drivers {
		if target, err := os.Readlink(d); err == nil && filepath.Base(target) == "virtio_net" {
			names = append(names, strings.Split(d, "/")[4])
		}
	}
	require.Len(t, names, 2, "virtio-net NICs")
	return names
}

// giveNIC makes a NIC of the machine the uplink of a node, with the node's addresses.
func giveNIC(t *testing.T, n *lab.Node, name string) {
	t.Helper()
	at := lab.NetnsPath(n.Netns())
	hostExec(t, "ip", "link", "set", name, "down")
	hostExec(t, "ip", "link", "set", name, "netns", at, "name", "eth0")
	Exec(t, n.Netns(), "ip", "link", "set", "eth0", "address", n.MAC)
	Exec(t, n.Netns(), "ip", "link", "set", "eth0", "up")
	for _, family := range families {
		Exec(t, n.Netns(), "ip", "addr", "add", n.Addr(family).String()+map[int]string{4: "/24", 6: "/64"}[family], "dev", "eth0", "nodad")
	}
}

// takeNIC ends the daemon, and gives the NIC back to the machine before the node's namespace goes.
func takeNIC(t *testing.T, n *lab.Node, name string) {
	t.Helper()
	_ = n.Kill()
	out, err := tryExec(t, n.Netns(), "ip", "link", "set", "eth0", "down")
	if err == nil {
		out, err = tryExec(t, n.Netns(), "ip", "link", "set", "eth0", "netns", "1", "name", name)
	}
	require.NoError(t, err, "%s", out)
}

// hostExec runs a program in the machine's first network namespace.
func hostExec(t *testing.T, argv ...string) {
	t.Helper()
	out, err := exec.CommandContext(testContext(t), tool(t, argv[0]), argv[1:]...).CombinedOutput()
	require.NoError(t, err, "%v: %s", argv, out)
}
