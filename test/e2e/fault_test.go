package e2e

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

func TestPodNamespaceDeletedUnderTheDaemon(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 2})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	victim := n2.Pods[0]
	before := openFiles(t, n2.Pid())

	// As `ip netns del` does. The daemon's descriptor of the device would keep the nameless namespace alive for ever.
	require.NoError(t, unix.Unmount(lab.NetnsPath(victim.Netns()), unix.MNT_DETACH))
	require.NoError(t, os.Remove(lab.NetnsPath(victim.Netns())))

	require.NoError(t, n2.WaitStatus(testContext(t), "aware of the loss", func(s *controlv1.GetStatusResponse) bool { return s.PodCount == 1 }))
	require.Eventually(t, func() bool { return openFiles(t, n2.Pid()) < before }, 10*time.Second, 50*time.Millisecond, "the device's descriptors are closed")
	require.True(t, status(t, n2).Ready, "a pod that is gone is no problem of the node's")
	requireReachable(t, n1.Pods[0].End(), n2.Pods[1].End())
	for _, family := range families {
		requireUnreachable(t, n1.Pods[0].End(), victim.Addr(family))
	}

	// Detached, and attached anew under the same name and addresses, in a new namespace.
	require.NoError(t, victim.Detach(testContext(t)))
	n2.Pods = n2.Pods[1:]
	require.NoError(t, victim.Recreate(testContext(t)))
	n2.Pods = append([]*lab.Pod{victim}, n2.Pods...)
	require.NoError(t, n2.WaitProgrammed(testContext(t)))
	requireReachable(t, n1.Pods[0].End(), victim.End())
}

func TestUplinkLosesItsCarrier(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1})
	carrierFollows(t, l)
	n1, n2 := l.Nodes[0], l.Nodes[1]
	f := openFlow(t, n1.Pods[0].End(), n2.Pods[0].End(), 4)
	for range 2 {
		require.NoError(t, lab.SetLink(l.Gateway(), n2.Name(), false))
		require.NoError(t, n2.WaitStatus(testContext(t), "aware that the uplink is down", func(s *controlv1.GetStatusResponse) bool {
			return !s.Uplink.Up && !s.Ready
		}))
		require.NoError(t, lab.SetLink(l.Gateway(), n2.Name(), true))
		require.NoError(t, n2.WaitProgrammed(testContext(t)))
		f.requireAlive(t, 15*time.Second)
	}
	requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
	requireReachable(t, n2.End(), n1.Pods[0].End())
}

func TestUplinkSetDownAndUp(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 2})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	require.NoError(t, lab.SetSysctl(n2.Netns(), "net/ipv6/conf/all/keep_addr_on_down", "1"))
	require.NoError(t, lab.SetLink(n2.Netns(), n2.Device(), false))
	require.NoError(t, n2.WaitStatus(testContext(t), "aware that the uplink is down", func(s *controlv1.GetStatusResponse) bool { return !s.Uplink.Up }))
	// Pods of one node need no uplink.
	requireReachable(t, n2.Pods[0].End(), n2.Pods[1].End())
	require.NoError(t, lab.SetLink(n2.Netns(), n2.Device(), true))
	require.NoError(t, n2.RestoreRoutes()) // the kernel forgot them; a network manager would put them back
	require.NoError(t, n2.WaitProgrammed(testContext(t)))
	requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
	requireReachable(t, n2.Pods[0].End(), n1.End())
}

func TestMemberChangesItsMAC(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 3, Pods: 1})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	f := openFlow(t, n1.Pods[0].End(), n2.Pods[0].End(), 6)
	mac := net.HardwareAddr{0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0x02}
	require.NoError(t, lab.SetLinkMAC(n2.Netns(), n2.Device(), mac))
	n2.MAC = mac.String()
	require.NoError(t, l.WriteStates())
	for _, n := range l.Nodes {
		require.NoError(t, n.Reload())
	}
	require.NoError(t, l.WaitProgrammed(testContext(t)))
	require.NoError(t, n2.WaitStatus(testContext(t), "at its new address", func(s *controlv1.GetStatusResponse) bool { return s.Uplink.Mac == mac.String() }))
	f.requireAlive(t, 15*time.Second)
	requireReachable(t, l.Nodes[2].Pods[0].End(), n2.Pods[0].End())
	requireProofs(t, l) // among them: frames on the wire carry the members' addresses
}

func TestSecondDaemonOnOneNodeIsRefused(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 2})
	n1 := l.Nodes[0]
	other := t.TempDir()
	for _, c := range []struct {
		name string
		env  []string
	}{
		{"same_state", nil},
		{"same_interface", []string{
			"OVERPLANE_STATE_DIR=" + other + "/state", "OVERPLANE_SOCKET=" + other + "/sock", "OVERPLANE_BPF_DIR=" + n1.BPFDir() + "-second"}},
		{"same_socket", []string{"OVERPLANE_STATE_DIR=" + other + "/state2"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			output, err := n1.Try(testContext(t), lab.StartOptions{Env: c.env}, 10*time.Second)
			require.Error(t, err)
			require.Contains(t, output, "another overplaned")
			require.NotContains(t, output, "panic")
		})
	}
	require.Empty(t, l.Broken(testContext(t)), "the first daemon is unimpressed")
	requireReachable(t, n1.Pods[0].End(), n1.Pods[1].End())
}

func TestForeignXDPProgramIsRefusedAndLeftInPlace(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 2, Uplink: "xdp"})
	n1 := l.Nodes[0]
	require.NoError(t, n1.Stop())
	require.NoError(t, os.RemoveAll(n1.BPFDir())) // detaches our own program

	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2 /* XDP_PASS */), asm.Return()},
	})
	require.NoError(t, err)
	defer prog.Close()
	var foreign link.Link
	attach := func() error {
		dev, err := net.InterfaceByName(n1.Device())
		if err != nil {
			return err
		}
		foreign, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: dev.Index})
		return err
	}
	// The kernel detaches the program after the last pin is gone, in its own time.
	require.Eventually(t, func() bool { return lab.InNetns(n1.Netns(), attach) == nil }, 5*time.Second, 50*time.Millisecond)
	defer foreign.Close()

	output, err := n1.Try(testContext(t), lab.StartOptions{}, 15*time.Second)
	require.Error(t, err, "a foreign program must be refused")
	require.Contains(t, output, "another XDP program")
	require.Contains(t, output, "foreign", "the error names the program")
	info, err := foreign.Info()
	require.NoError(t, err)
	require.NotZero(t, info.XDP().Ifindex, "the foreign program is still attached")

	require.NoError(t, foreign.Close())
	require.NoError(t, n1.Start(testContext(t)))
	require.NoError(t, n1.WaitProgrammed(testContext(t)))
	requireReachable(t, n1.Pods[0].End(), n1.Pods[1].End())
}

func TestMachineGrantsTooLittle(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 2, Uplink: "xdp"})
	n1 := l.Nodes[0]
	require.NoError(t, n1.Stop())
	setpriv := func(caps string) []string {
		return []string{tool(t, "setpriv"), "--bounding-set", caps, "--inh-caps", caps, "--"}
	}
	for _, c := range []struct {
		name string
		wrap []string
		says []string
	}{
		{"memlock_too_low",
			append([]string{tool(t, "prlimit"), "--memlock=65536:65536"}, setpriv("-ipc_lock,-sys_resource")...),
			[]string{"RLIMIT_MEMLOCK", "64 KiB"}},
		{"no_dev_net_tun",
			[]string{tool(t, "unshare"), "--mount", "--propagation", "private", "sh", "-c", `mount -t tmpfs none /dev/net && exec "$@"`, "sh"},
			[]string{"/dev/net/tun"}},
		{"no_CAP_NET_ADMIN", setpriv("-net_admin"), []string{"CAP_NET_ADMIN"}},
		{"no_CAP_BPF", setpriv("-bpf,-sys_admin"), []string{"CAP_BPF"}},
		{"all_at_once", setpriv("-bpf,-sys_admin,-net_admin"), []string{"CAP_BPF", "CAP_SYS_ADMIN", "CAP_NET_ADMIN"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			output, err := n1.Try(testContext(t), lab.StartOptions{Wrap: c.wrap}, 15*time.Second)
			require.Error(t, err, output)
			for _, s := range c.says {
				require.Contains(t, output, s)
			}
			require.NotContains(t, output, "panic")
			require.NotContains(t, err.Error(), "still ran", output)
		})
	}
	// A start that failed has broken nothing.
	require.NoError(t, n1.Start(testContext(t)))
	require.NoError(t, n1.WaitProgrammed(testContext(t)))
	requireReachable(t, n1.Pods[0].End(), n1.Pods[1].End())
}

func TestBadConfigurationNamesEveryVariable(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1})
	n1 := l.Nodes[0]
	require.NoError(t, n1.Stop())
	output, err := n1.Try(testContext(t), lab.StartOptions{Env: []string{
		"OVERPLANE_WORKERS=many", "OVERPLANE_UPLINK_MODE=vde", "OVERPLANE_MTU=100", "OVERPLANE_LOG_LEVEL=loud",
	}}, 10*time.Second)
	require.Error(t, err)
	for _, s := range []string{"OVERPLANE_WORKERS", "many", "OVERPLANE_UPLINK_MODE", "tun or plain", "OVERPLANE_MTU", "100", "OVERPLANE_LOG_LEVEL", "loud", "debug"} {
		require.Contains(t, output, s)
	}
}
