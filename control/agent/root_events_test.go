package agent

import (
	"bytes"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/control/agent/kernel"
	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func TestRealDaemonFollowsTheKernel(t *testing.T) {
	m, d1, d2 := pair(t)
	p1, to4, to6 := m.podNS(1, 1), "10.244.2.2", "fd12:3456:789a:0:2::2"
	m.reaches(p1, to4)

	t.Run("uplink down and up", func(t *testing.T) {
		m.ip("-n", m.ns(1), "link", "set", "eth0", "down")
		d1.eventually("down is a problem", func(s *controlv1.GetStatusResponse) bool {
			return !s.GetUplink().GetUp() && strings.Contains(strings.Join(s.GetProblems(), "\n"), "uplink eth0 is down")
		})
		require.Error(t, m.ping(p1, to4))
		drops, err := d1.client.GetDrops(t.Context(), &controlv1.GetDropsRequest{})
		require.NoError(t, err)
		down := uint64(0)
		for _, d := range drops.GetDrops() {
			if d.GetReason() == "port_down" {
				down += d.GetPackets()
			}
		}
		require.NotZero(t, down, "packets for a port that is down die of port_down: %v", drops)
		m.uplinkUp(1)
		d1.eventually("up", ready)
		m.reaches(p1, to4)
		m.reaches(p1, to6)
	})

	t.Run("MTU", func(t *testing.T) {
		for _, want := range []int{1400, 3000} {
			m.ip("-n", m.ns(1), "link", "set", "eth0", "mtu", strconv.Itoa(want))
			m.ip("-n", m.ns(2), "link", "set", "eth0", "mtu", strconv.Itoa(want))
			for _, d := range []*daemon{d1, d2} {
				d.eventually("MTU", func(s *controlv1.GetStatusResponse) bool {
					return s.GetReady() && s.GetUplink().GetMtu() == uint32(want) && s.GetHostPort().GetMtu() == uint32(want)
				})
			}
			require.Eventually(t, func() bool { return m.linkMTU(p1, "eth0") == want && m.linkMTU(m.ns(1), "ovp0") == want }, 5*time.Second, 20*time.Millisecond)
			m.reaches(p1, to4)
			m.in(p1, "ping", "-c", "1", "-W", "2", "-M", "do", "-s", strconv.Itoa(want-28), to4)
		}
	})

	t.Run("a member's Ethernet address changes", func(t *testing.T) {
		m.ip("-n", m.ns(2), "link", "set", "eth0", "address", "02:00:00:00:00:22")
		for i := 1; i <= 2; i++ {
			s := m.state(i)
			s.Version.Revision++
			s.Members[1].Mac = "02:00:00:00:00:22"
			api.Seal(s)
			require.NoError(t, api.WriteFile(m.stateFile(i), s))
		}
		for _, d := range []*daemon{d1, d2} {
			d.eventually("programmed", func(s *controlv1.GetStatusResponse) bool { return s.GetReady() && s.GetProgrammed().GetRevision() == 2 })
		}
		d2.eventually("own address", func(s *controlv1.GetStatusResponse) bool { return s.GetUplink().GetMac() == "02:00:00:00:00:22" })
		m.reaches(p1, to4)
		m.reaches(p1, to6)
	})

	t.Run("a pod's namespace is deleted", func(t *testing.T) {
		m.ip("netns", "add", m.podNS(1, 2))
		d1.attach(2)
		m.reaches(m.podNS(1, 2), to4)
		m.ip("netns", "del", m.podNS(1, 2))
		d1.eventually("pod removed", func(s *controlv1.GetStatusResponse) bool { return s.GetPodCount() == 1 && s.GetReady() })
		require.Contains(t, d1.log.String(), "pod removed")
		m.ip("netns", "add", m.podNS(1, 2))
		d1.attach(2)
		m.reaches(m.podNS(1, 2), to4)
	})

	t.Run("a pod deletes its device", func(t *testing.T) {
		m.ip("-n", m.podNS(1, 2), "link", "del", "eth0")
		d1.eventually("pod removed", func(s *controlv1.GetStatusResponse) bool { return s.GetPodCount() == 1 && s.GetReady() })
		m.reaches(p1, to4)
	})

	t.Run("the uplink is replaced", func(t *testing.T) {
		m.ip("-n", m.ns(1), "link", "del", "eth0")
		d1.eventually("gone", func(s *controlv1.GetStatusResponse) bool { return !s.GetReady() })
		m.ip("-n", m.ns(1), "link", "add", "eth0", "address", "02:00:00:00:00:01", "numrxqueues", "2", "numtxqueues", "2",
			"type", "veth", "peer", "name", "eth0", "address", "02:00:00:00:00:22", "numrxqueues", "2", "numtxqueues", "2", "netns", m.ns(2))
		m.uplinkUp(1)
		m.uplinkUp(2)
		d1.eventually("ready again", ready)
		d2.eventually("ready again", ready)
		m.reaches(p1, to4)
		m.reaches(p1, to6)
	})

	t.Run("the host port is deleted", func(t *testing.T) {
		require.NoError(t, m.ping(m.ns(1), "10.244.1.2"))
		m.ip("-n", m.ns(1), "link", "del", "ovp0")
		d1.eventually("made again", func(s *controlv1.GetStatusResponse) bool {
			return s.GetReady() && m.command(m.ns(1), "ip", "link", "show", "ovp0").Run() == nil
		})
		m.reaches(m.ns(1), "10.244.1.2")
		m.reaches(m.ns(1), to4)
		m.reaches(p1, to6)
	})

	t.Run("the daemon hangs", func(t *testing.T) {
		require.NoError(t, d1.cmd.Process.Signal(unix.SIGSTOP))
		time.Sleep(2500 * time.Millisecond) // beyond the heartbeats' limit
		require.NoError(t, m.ping(m.ns(1), "10.240.0.12"), "the node's own traffic goes on")
		require.Error(t, m.ping(m.podNS(2, 1), "10.244.1.2"))
		require.NoError(t, d1.cmd.Process.Signal(unix.SIGCONT))
		m.reaches(m.podNS(2, 1), "10.244.1.2")
	})
}

func (m *machine) linkMTU(ns, dev string) (mtu int) {
	m.t.Helper()
	require.NoError(m.t, kernel.InNetNS(netnsPath(ns), func() error {
		i, err := net.InterfaceByName(dev)
		if err == nil {
			mtu = i.MTU
		}
		return err
	}))
	return mtu
}

func TestRealDaemonRefusesToStart(t *testing.T) {
	m := newMachine(t)
	fails := func(t *testing.T, cmd *exec.Cmd, text string) {
		t.Helper()
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		require.NoError(t, cmd.Start())
		stop := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() }) // it started after all
		err := cmd.Wait()
		stop.Stop()
		require.Error(t, err)
		require.Contains(t, out.String(), text)
		require.NotContains(t, m.in(m.ns(1), "ip", "link"), "ovp0", "nothing was made")
	}

	t.Run("foreign XDP program", func(t *testing.T) {
		var l link.Link
		require.NoError(t, kernel.InNetNS(netnsPath(m.ns(1)), func() error {
			prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
				Name: "stranger", Type: ebpf.XDP, License: "Dual BSD/GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
			})
			if err != nil {
				return err
			}
			defer prog.Close()
			i, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			l, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: i.Index})
			return err
		}))
		fails(t, m.daemonCommand(1), "another XDP program is attached to eth0")
		require.Contains(t, m.in(m.ns(1), "ip", "link", "show", "eth0"), "xdp", "it was left in place")
		require.NoError(t, l.Close())
	})

	t.Run("missing capability", func(t *testing.T) {
		// CAP_SYS_ADMIN includes CAP_BPF: the latter is missed only without both.
		for _, c := range []string{"net_admin", "net_raw", "sys_admin", "sys_admin,-bpf"} {
			cmd := m.daemonCommand(1, "OVERPLANE_UPLINK_MODE=xdp") // other rungs do without CAP_NET_RAW
			cmd.Args = append(cmd.Args[:2:2], "setpriv", "--bounding-set", "-"+c, "--inh-caps", "-"+c, "--", m.bin)
			missing := strings.Split(c, ",-")
			fails(t, cmd, "missing capability CAP_"+strings.ToUpper(missing[len(missing)-1]))
		}
	})

	t.Run("memlock", func(t *testing.T) {
		cmd := m.daemonCommand(1)
		drop := "-ipc_lock,-sys_resource"
		cmd.Args = append(cmd.Args[:2:2], "prlimit", "--memlock=65536:65536", "setpriv", "--bounding-set", drop, "--inh-caps", drop, "--", m.bin)
		fails(t, cmd, "RLIMIT_MEMLOCK")
	})

	t.Run("no bpffs", func(t *testing.T) {
		fails(t, m.daemonCommand(1, "OVERPLANE_BPF_DIR="+m.dir+"/pins"), "is not on a BPF file system")
	})

	t.Run("no TUN device", func(t *testing.T) {
		cmd := m.daemonCommand(1)
		script := "mount -t tmpfs none /dev/net && exec \"$0\""
		cmd.Args = append(cmd.Args[:2:2], "unshare", "-m", "sh", "-c", script, m.bin)
		fails(t, cmd, "no /dev/net/tun")
	})

	t.Run("no such uplink", func(t *testing.T) {
		fails(t, m.daemonCommand(1, "OVERPLANE_UPLINK=eth7"), "OVERPLANE_UPLINK")
		fails(t, m.daemonCommand(1, "OVERPLANE_UPLINK="), "OVERPLANE_UPLINK")
	})

	t.Run("forced rung", func(t *testing.T) {
		fails(t, m.daemonCommand(1, "OVERPLANE_UPLINK_MODE=xdp-zerocopy"), "OVERPLANE_UPLINK_MODE=xdp-zerocopy")
	})
}
