package xdp

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// addNodeAddresses numbers both ends: 10.240.0.1 near, 10.240.0.2 far.
func addNodeAddresses(t testing.TB, v *veth) {
	run(t, "ip", "-n", v.near, "addr", "add", "10.240.0.1/24", "dev", "up0")
	run(t, "ip", "-n", v.far, "addr", "add", "10.240.0.2/24", "dev", "far0")
}

func pings(v *veth, address string) bool {
	return exec.Command("ip", "netns", "exec", v.far, "ping", "-c", "1", "-W", "1", address).Run() == nil
}

// sendPods sends packets between pods to the near end, from an Ethernet address.
func sendPods(t testing.TB, v *veth, raw *rawSocket, from [6]byte, n int) {
	for i := range n {
		raw.send(t, ipFrame(from, v.nearMAC, remote4, pod4, 100, uint32(i)))
	}
}

// requireCounters waits until the counters rose by exactly want, others by nothing except passed ones.
func requireCounters(t testing.TB, s *Steering, before map[string]uint64, want map[string]uint64) {
	t.Helper()
	diff := map[string]uint64{}
	require.Eventually(t, func() bool {
		now, err := s.Counters()
		require.NoError(t, err)
		for _, name := range counterNames {
			if diff[name] = now[name] - before[name]; name[:6] != "passed" && diff[name] != want[name] {
				return false
			}
		}
		return true
	}, 2*time.Second, time.Millisecond, "want %v, have %v", want, diff)
}

// TestSocketGone closes the sockets under traffic: pods' packets are dropped and counted, the node's own go on.
func TestSocketGone(t *testing.T) {
	v := newVeth(t, 1, 1500)
	addNodeAddresses(t, v)
	s := openSteered(t, v, steeredConfig{})
	raw := newRawSocket(t, v.far, "far0")
	receiveAll(t, v, s, raw, 1500, 100)
	require.True(t, pings(v, "10.240.0.1"))

	require.NoError(t, s.Port.Close())
	before := s.counters(t)
	sendPods(t, v, raw, v.farMAC, 50)
	requireCounters(t, s.steering, before, map[string]uint64{"dropped_no_socket": 50})
	require.True(t, pings(v, "10.240.0.1"))
	// The stack would have answered: it has the address.
	run(t, "ip", "-n", v.near, "addr", "add", pod4.String()+"/32", "dev", "up0")
	run(t, "ip", "-n", v.far, "route", "add", pod4.String()+"/32", "via", "10.240.0.1")
	require.False(t, pings(v, pod4.String()))
}

// TestStaleHeartbeat stops a worker: only its queues' frames are dropped, and only until it beats again.
func TestStaleHeartbeat(t *testing.T) {
	v := newVeth(t, 1, 1500)
	addNodeAddresses(t, v)
	s := openSteered(t, v, steeredConfig{workers: 2})
	raw := newRawSocket(t, v.far, "far0")
	require.NoError(t, s.steering.SetHeartbeatLimit(200*time.Millisecond))
	time.Sleep(250 * time.Millisecond)
	Beat(s.steering.Heartbeat(1)) // not the owner of queue 0

	before := s.counters(t)
	sendPods(t, v, raw, v.farMAC, 20)
	requireCounters(t, s.steering, before, map[string]uint64{"dropped_stale": 20})
	require.True(t, pings(v, "10.240.0.1"))

	before = s.counters(t)
	Beat(s.steering.Heartbeat(0))
	sendPods(t, v, raw, v.farMAC, 20)
	requireCounters(t, s.steering, before, map[string]uint64{"redirected": 20})

	require.NoError(t, s.steering.SetHeartbeatLimit(0))
	time.Sleep(250 * time.Millisecond)
	before = s.counters(t)
	sendPods(t, v, raw, v.farMAC, 20)
	requireCounters(t, s.steering, before, map[string]uint64{"redirected": 20})
	require.Panics(t, func() { s.steering.Heartbeat(MaxWorkers) })
}

// TestNotMember is about who may send pods' packets, and about frames that are another cluster's.
func TestNotMember(t *testing.T) {
	v := newVeth(t, 1, 1500)
	s := openSteered(t, v, steeredConfig{})
	raw := newRawSocket(t, v.far, "far0")
	stranger := [6]byte{2, 0, 0, 0, 0, 9}

	before := s.counters(t)
	sendPods(t, v, raw, stranger, 10)
	raw.send(t, ipFrame(stranger, v.nearMAC, other4, pod4, 100, 0))
	raw.send(t, ipFrame(stranger, v.nearMAC, pod6, other6, 100, 0))
	requireCounters(t, s.steering, before, map[string]uint64{"dropped_not_member": 12})

	before = s.counters(t)
	raw.send(t, ipFrame(stranger, [6]byte{2, 0, 0, 0, 0, 7}, remote4, pod4, 100, 0))
	raw.send(t, ipFrame(v.farMAC, [6]byte{2, 0, 0, 0, 0, 7}, remote4, pod4, 100, 0))
	raw.send(t, ipFrame(v.farMAC, v.nearMAC, other4, other4, 100, 0))
	require.Eventually(t, func() bool {
		c := s.counters(t)
		return c["passed_other_mac"]-before["passed_other_mac"] == 2 && c["passed"]-before["passed"] == 1
	}, 2*time.Second, time.Millisecond)
	requireCounters(t, s.steering, before, nil)

	before = s.counters(t)
	require.NoError(t, s.steering.SetMembers([][6]byte{stranger, v.farMAC, stranger}))
	sendPods(t, v, raw, stranger, 10)
	requireCounters(t, s.steering, before, map[string]uint64{"redirected": 10})

	before = s.counters(t)
	require.NoError(t, s.steering.SetMembers([][6]byte{v.farMAC}))
	sendPods(t, v, raw, stranger, 10)
	sendPods(t, v, raw, v.farMAC, 10)
	requireCounters(t, s.steering, before, map[string]uint64{"redirected": 10, "dropped_not_member": 10})
	require.ErrorContains(t, s.steering.SetMembers(make([][6]byte, MaxMembers+1)), "at most 16384")

	before = s.counters(t)
	require.NoError(t, s.steering.SetUplinkMAC(stranger))
	sendPods(t, v, raw, v.farMAC, 10)
	time.Sleep(50 * time.Millisecond)
	requireCounters(t, s.steering, before, nil)
}

// TestForeignProgram attaches somebody else's program first, as a link and by netlink.
func TestForeignProgram(t *testing.T) {
	v := newVeth(t, 1, 1500)
	dir := filepath.Join(bpffs(t), "up0")
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "someone_elses", Type: ebpf.XDP, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	require.NoError(t, err)
	defer prog.Close()
	info, err := prog.Info()
	require.NoError(t, err)
	id, _ := info.ID()

	refused := func(t *testing.T) {
		defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a finalizer could hide a leak
		before := bpfDescriptors(t)
		defer func() { require.Equal(t, before, bpfDescriptors(t), "descriptors leak") }()
		in(t, v.near, func() {
			for _, generic := range []bool{false, true} {
				_, err := AttachSteering(SteeringConfig{Interface: "up0", Workers: 1, PinDir: dir, Generic: generic})
				require.ErrorIs(t, err, ErrForeignProgram)
				var foreign *ForeignProgramError
				require.True(t, errors.As(err, &foreign))
				require.Equal(t, ForeignProgramError{Interface: "up0", ID: uint32(id), Name: "someone_elses"}, *foreign)
			}
			attached, err := attachedProgram(v.nearIndex)
			require.NoError(t, err)
			require.Equal(t, uint32(id), attached, "left in place")
		})
		pins, err := os.ReadDir(dir)
		require.NoError(t, err)
		require.Empty(t, pins)
	}
	t.Run("link", func(t *testing.T) {
		in(t, v.near, func() {
			l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: v.nearIndex})
			require.NoError(t, err)
			defer l.Close()
			refused(t)
		})
	})
	t.Run("netlink", func(t *testing.T) {
		if _, err := exec.LookPath("bpftool"); err != nil {
			t.Skip("needs bpftool to attach by netlink")
		}
		path := filepath.Join(bpffs(t), "prog")
		require.NoError(t, prog.Pin(path))
		run(t, "nsenter", "--net=/run/netns/"+v.near, "bpftool", "net", "attach", "xdp", "pinned", path, "dev", "up0")
		refused(t)
		run(t, "nsenter", "--net=/run/netns/"+v.near, "bpftool", "net", "detach", "xdp", "dev", "up0")
		in(t, v.near, func() {
			s, err := AttachSteering(SteeringConfig{Interface: "up0", Workers: 1})
			require.NoError(t, err, "now it is free")
			require.NoError(t, s.Close())
			attached, err := attachedProgram(v.nearIndex)
			require.NoError(t, err)
			require.Zero(t, attached, "not pinned: closing detaches")
		})
	})
}

// bpfDescriptors counts the process's descriptors of programs, maps and links.
func bpfDescriptors(t *testing.T) (n int) {
	fds, err := filepath.Glob("/proc/self/fd/*")
	require.NoError(t, err)
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasPrefix(target, "anon_inode:bpf") {
			n++
		}
	}
	return n
}

// TestAdoption loses the process: what is pinned drops what is ours until the next process takes over, with tables and counters.
func TestAdoption(t *testing.T) {
	v := newVeth(t, 1, 1500)
	addNodeAddresses(t, v)
	run(t, "ip", "-n", v.near, "addr", "add", pod4.String()+"/32", "dev", "up0")
	run(t, "ip", "-n", v.far, "route", "add", pod4.String()+"/32", "via", "10.240.0.1")
	raw := newRawSocket(t, v.far, "far0")
	dir := filepath.Join(bpffs(t), "overplane", "up0")

	s := openSteered(t, v, steeredConfig{pinDir: dir})
	require.False(t, s.steering.Adopted())
	require.True(t, s.steering.Multibuffer())
	receiveAll(t, v, s, raw, 1500, 100)
	var id uint32
	in(t, v.near, func() { id, _ = attachedProgram(v.nearIndex) })
	require.NotZero(t, id)

	// All descriptors close, as when the process is killed.
	require.NoError(t, s.Port.Close())
	require.NoError(t, s.steering.Close())
	require.ErrorIs(t, s.steering.SetMembers(nil), os.ErrClosed)
	require.ErrorIs(t, s.steering.SetUplinkMAC([6]byte{2}), os.ErrClosed)
	_, err := s.steering.Counters()
	require.ErrorIs(t, err, os.ErrClosed)
	require.False(t, pings(v, pod4.String()), "dropped")
	require.True(t, pings(v, "10.240.0.1"), "passed")

	// A table that does not fit and a pin of another version are replaced.
	members := filepath.Join(dir, bpf.SteerMapMembers+layoutVersion)
	require.FileExists(t, members)
	old, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	require.NoError(t, err)
	defer old.Close()
	require.NoError(t, os.Remove(filepath.Join(dir, bpf.SteerMapXsks+layoutVersion)))
	require.NoError(t, old.Pin(filepath.Join(dir, bpf.SteerMapXsks+layoutVersion)))
	clone, err := old.Clone()
	require.NoError(t, err)
	defer clone.Close()
	require.NoError(t, clone.Pin(filepath.Join(dir, "members-v0")))

	var a *Steering
	var p *Port
	pool := newPool(t, 4096, 2048, 0)
	in(t, v.near, func() {
		a, err = AttachSteering(SteeringConfig{Interface: "up0", PinDir: dir, Workers: 1, HeartbeatLimit: time.Hour})
		require.NoError(t, err)
		require.True(t, a.Adopted())
		p, err = Open(Config{Interface: "up0", Pools: newPools(pool), Steering: a})
		require.NoError(t, err)
	})
	defer func() { require.NoError(t, p.Close()); require.NoError(t, a.Close()) }()
	require.NoFileExists(t, filepath.Join(dir, "members-v0"))
	var now uint32
	in(t, v.near, func() { now, _ = attachedProgram(v.nearIndex) })
	require.NotEqual(t, id, now, "the program is the new process's")

	// Tables and counters were kept.
	Beat(a.Heartbeat(0))
	next := &steered{Port: p, steering: a, pools: newPools(pool)}
	require.Equal(t, uint64(100), next.counters(t)["redirected"])
	next.poll(func([]byte, int) bool { return false }, 1)
	receiveAll(t, v, next, raw, 1500, 100)

	require.NoError(t, Uninstall(dir))
	require.NoError(t, Uninstall(dir), "twice")
	require.NoDirExists(t, dir)
	in(t, v.near, func() { now, _ = attachedProgram(v.nearIndex) })
	require.Zero(t, now, "detached although a process still holds it")
	require.True(t, pings(v, pod4.String()), "the stack's again")
}

// TestInterfaceRecreated finds the pin of an attachment whose interface was deleted, and that of another interface.
func TestInterfaceRecreated(t *testing.T) {
	v := newVeth(t, 1, 1500)
	dir := filepath.Join(bpffs(t), "up0")
	attach := func(ifname string) (*Steering, error) {
		return AttachSteering(SteeringConfig{Interface: ifname, PinDir: dir, Workers: 1})
	}
	in(t, v.near, func() {
		s, err := attach("up0")
		require.NoError(t, err)
		require.NoError(t, s.SetPodCIDRs([]netip.Prefix{podCIDR4}))
		require.NoError(t, s.Close())
		run(t, "ip", "-n", v.near, "link", "add", "up1", "type", "veth", "peer", "name", "far1", "netns", v.far)
		_, err = attach("up1")
		require.ErrorContains(t, err, "belongs to another interface")

		run(t, "ip", "-n", v.near, "link", "del", "up0")
		s, err = attach("up1")
		require.NoError(t, err)
		require.False(t, s.Adopted())
		require.Equal(t, uint32(1), s.cfg.Prefixes4, "the tables live on")
		require.NoError(t, s.Close())
		run(t, "ip", "-n", v.near, "link", "del", "up1")
		require.NoError(t, Uninstall(dir), "nothing is attached any more, the pins go")
		require.NoDirExists(t, dir)
	})
}

func TestSteeringConfigErrors(t *testing.T) {
	v := newVeth(t, 1, 1500)
	dir := filepath.Join(t.TempDir(), "x")
	in(t, v.near, func() {
		for _, c := range []struct {
			name string
			cfg  SteeringConfig
			err  string
		}{
			{"no bpffs", SteeringConfig{Interface: "up0", Workers: 1, PinDir: dir}, "mount -t bpf bpf /sys/fs/bpf"},
			{"no workers", SteeringConfig{Interface: "up0"}, "0 workers: want 1 to 64"},
			{"no interface", SteeringConfig{Interface: "nope", Workers: 1}, `interface "nope"`},
			{"no Ethernet", SteeringConfig{Interface: "lo", Workers: 1}, "no Ethernet address"},
		} {
			t.Run(c.name, func(t *testing.T) {
				// The subtest's goroutine is on another thread.
				in(t, v.near, func() {
					_, err := AttachSteering(c.cfg)
					require.ErrorContains(t, err, c.err)
				})
			})
		}
	})
	require.NoDirExists(t, dir)
}

// TestGenericMode attaches to the generic hook: a bridge, which has no native XDP.
func TestGenericMode(t *testing.T) {
	netns := newNetns(t)
	run(t, "ip", "-n", netns, "link", "add", "d0", "type", "bridge")
	run(t, "ip", "-n", netns, "link", "set", "d0", "up")
	in(t, netns, func() {
		_, err := AttachSteering(SteeringConfig{Interface: "d0", Workers: 1})
		require.ErrorContains(t, err, "no native XDP")
		s, err := AttachSteering(SteeringConfig{Interface: "d0", Workers: 1, Generic: true})
		require.NoError(t, err)
		require.NoError(t, s.Close())
	})
}

// TestBeatClock compares what a heartbeat holds with the kernel's clock, and counts its allocations.
func TestBeatClock(t *testing.T) {
	var beat uint64
	time.Sleep(10 * time.Millisecond)
	var before, after unix.Timespec
	require.NoError(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &before))
	Beat(&beat)
	require.NoError(t, unix.ClockGettime(unix.CLOCK_MONOTONIC, &after))
	const slack = 5e6 // between the two readings at start
	require.Greater(t, float64(beat), float64(before.Nano())-slack)
	require.Less(t, float64(beat), float64(after.Nano())+slack)
	require.Zero(t, testing.AllocsPerRun(100, func() { Beat(&beat) }))
}

func BenchmarkBeat(b *testing.B) {
	var beat uint64
	for b.Loop() {
		Beat(&beat)
	}
}
