package xdp

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// joined is an uplink with a device beside it. A veth stands for the TAP: what the device transmits arrives at its other end, in a namespace that stands for
// the worker, and what is sent there arrives at the device.
type joined struct {
	*veth
	worker string // namespace of the device's other end, user0
	device int    // index of dev0, beside up0
}

func newJoined(t testing.TB) *joined {
	t.Helper()
	j := &joined{veth: newVeth(t, 1, 1500), worker: newNetns(t)}
	run(t, "ip", "-n", j.near, "link", "add", "dev0", "type", "veth", "peer", "name", "user0", "netns", j.worker)
	for _, end := range []struct{ netns, name string }{{j.near, "dev0"}, {j.worker, "user0"}} {
		run(t, "ip", "netns", "exec", end.netns, "sysctl", "-qw", "net.ipv6.conf."+end.name+".disable_ipv6=1")
		run(t, "ip", "-n", end.netns, "link", "set", end.name, "arp", "off", "up")
	}
	in(t, j.near, func() { _, j.device = mac(t, "dev0") })
	return j
}

// open makes the steering with the test's pod CIDRs and the far end as member, not attached.
func (j *joined) open(t testing.TB, dir string) *Steering {
	t.Helper()
	s, err := OpenSteering(SteeringConfig{Interface: "up0", PinDir: dir, Workers: 2})
	require.NoError(t, err)
	require.NoError(t, s.SetPodCIDRs([]netip.Prefix{podCIDR4, podCIDR6}))
	require.NoError(t, s.SetMembers([][6]byte{j.farMAC}))
	return s
}

// tcxPrograms are the ids of an interface's ingress programs, in their order.
func tcxPrograms(t testing.TB, ifindex int) (ids []ebpf.ProgramID) {
	t.Helper()
	r, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: ebpf.AttachTCXIngress})
	require.NoError(t, err)
	for _, p := range r.Programs {
		ids = append(ids, p.ID)
	}
	return ids
}

func haveTCXOrSkip(t testing.TB) {
	needRoot(t)
	if err := haveTCX(); err != nil {
		t.Skip("needs tcx:", err)
	}
}

func TestTCDecisionAgainstModel(t *testing.T) {
	haveTCXOrSkip(t)
	j := newJoined(t)
	const next, shot, redirect = 0xffffffff, 2, 7
	action := map[string]uint32{"redirected": redirect, "asked": redirect, "passed": next, "passed_other_mac": next, "dropped_not_member": shot}
	in(t, j.near, func() {
		s := j.open(t, "")
		defer func() { require.NoError(t, s.Close()) }()
		require.NoError(t, s.SetHeartbeatLimit(0))
		coll, err := s.loadTC(TCConfig{Device: j.device})
		require.NoError(t, err)
		defer coll.Close()
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		for round := range 20 {
			m := randomModel(rng, j.nearMAC)
			m.routed = false
			require.NoError(t, s.SetGatewayMAC(m.gateway))
			require.NoError(t, s.SetOutside(m.outside))
			require.NoError(t, s.SetTranslation(m.translation))
			setFlows(t, s, m.flows)
			require.NoError(t, s.SetPodCIDRs(m.cidrs))
			var members [][6]byte
			for mac := range m.members {
				members = append(members, mac)
			}
			require.NoError(t, s.SetMembers(members))
			for range 300 {
				frame := m.randomFrame(rng)
				if len(frame) < 54 { // the kernel's test run refuses packets shorter than their IP header
					frame = append(frame, make([]byte, 54-len(frame))...)
				}
				verdict := m.decide(frame)
				got, err := coll.Programs[bpf.TCProgOverplaneTcIn].Run(&ebpf.RunOptions{Data: frame})
				require.NoError(t, err)
				require.Equal(t, action[verdict], got, "round %d, want %s: %+v\nframe %x", round, verdict, m, frame)
			}
		}
	})
}

func TestTCJoinsUplinkAndDevice(t *testing.T) {
	haveTCXOrSkip(t)
	j := newJoined(t)
	addNodeAddresses(t, j.veth)
	far, user := newRawSocket(t, j.far, "far0"), newRawSocket(t, j.worker, "user0")
	in(t, j.near, func() {
		s := j.open(t, "")
		defer func() { require.NoError(t, s.Close()) }()
		require.NoError(t, s.AttachTC(TCConfig{Device: j.device}))
		require.False(t, s.Adopted())
		Beat(s.Heartbeat(0))

		counters := func() map[string]uint64 {
			c, err := s.Counters()
			require.NoError(t, err)
			return c
		}
		ours := ipFrame(j.farMAC, j.nearMAC, remote4, pod4, 1514, 1)
		before := counters()
		far.send(t, ours)
		require.Equal(t, ours, user.receive(t, 1000), "the Ethernet header and all else is kept")
		ours6 := ipFrame(j.farMAC, j.nearMAC, remote6, pod6, 90, 2)
		far.send(t, ours6)
		require.Equal(t, ours6, user.receive(t, 1000))
		requireCounters(t, s, before, map[string]uint64{"redirected": 2})

		t.Run("out", func(t *testing.T) {
			frame := ipFrame(j.nearMAC, j.farMAC, pod4, remote4, 1514, 3)
			user.send(t, frame)
			require.Equal(t, frame, far.receive(t, 1000))
		})
		t.Run("the kernel has its own", func(t *testing.T) {
			require.True(t, pings(j.veth, "10.240.0.1"))
			require.Nil(t, user.receive(t, 50))
		})
		t.Run("a tag is somebody else's", func(t *testing.T) {
			before := counters()
			tagged := append(append(append([]byte{}, ours[:12]...), 0x81, 0, 0, 7), ours[12:1000]...)
			far.send(t, tagged)
			require.Nil(t, user.receive(t, 100))
			requireCounters(t, s, before, nil)
		})
		t.Run("not a member", func(t *testing.T) {
			before := counters()
			far.send(t, ipFrame([6]byte{2, 0, 0, 0, 0, 9}, j.nearMAC, remote4, pod4, 100, 4))
			requireCounters(t, s, before, map[string]uint64{"dropped_not_member": 1})
			require.Nil(t, user.receive(t, 50))
		})
		t.Run("stale when all workers are", func(t *testing.T) {
			require.NoError(t, s.SetHeartbeatLimit(200*time.Millisecond))
			time.Sleep(250 * time.Millisecond)
			before := counters()
			far.send(t, ours)
			requireCounters(t, s, before, map[string]uint64{"dropped_stale": 1})
			Beat(s.Heartbeat(1)) // the other one
			before = counters()
			far.send(t, ours)
			require.Equal(t, ours, user.receive(t, 1000))
			requireCounters(t, s, before, map[string]uint64{"redirected": 1})
			require.True(t, pings(j.veth, "10.240.0.1"))
		})
	})
	in(t, j.near, func() {
		require.Empty(t, tcxPrograms(t, j.nearIndex), "not pinned: closing detaches")
		require.Empty(t, tcxPrograms(t, j.device))
	})
}

// TestTCBesideOthers has a stranger on the uplink before and one after ours: they see what is not ours, and stay.
func TestTCBesideOthers(t *testing.T) {
	haveTCXOrSkip(t)
	j := newJoined(t)
	addNodeAddresses(t, j.veth)
	far, user := newRawSocket(t, j.far, "far0"), newRawSocket(t, j.worker, "user0")
	stranger, err := ebpf.NewProgram(&ebpf.ProgramSpec{ // drops everything
		Name: "stranger", Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	require.NoError(t, err)
	defer stranger.Close()
	in(t, j.near, func() {
		l, err := link.AttachTCX(link.TCXOptions{Interface: j.nearIndex, Program: stranger, Attach: ebpf.AttachTCXIngress})
		require.NoError(t, err)
		defer l.Close()
		require.False(t, pings(j.veth, "10.240.0.1"))

		s := j.open(t, "")
		require.NoError(t, s.AttachTC(TCConfig{Device: j.device}))
		Beat(s.Heartbeat(0))
		require.Len(t, tcxPrograms(t, j.nearIndex), 2)
		far.send(t, ipFrame(j.farMAC, j.nearMAC, remote4, pod4, 100, 1))
		require.NotNil(t, user.receive(t, 1000), "ours comes first")
		require.False(t, pings(j.veth, "10.240.0.1"), "the stranger still decides about the rest")
		require.NoError(t, s.DetachTC())
		require.NoError(t, s.DetachTC(), "twice")
		require.Len(t, tcxPrograms(t, j.nearIndex), 1, "the stranger stays")
		require.NoError(t, s.Close())
	})
}

// TestTCAdoption loses the process under pinned tc programs: what is ours is dropped until the next process takes over, in place.
func TestTCAdoption(t *testing.T) {
	haveTCXOrSkip(t)
	j := newJoined(t)
	addNodeAddresses(t, j.veth)
	run(t, "ip", "-n", j.near, "addr", "add", pod4.String()+"/32", "dev", "up0")
	run(t, "ip", "-n", j.far, "route", "add", pod4.String()+"/32", "via", "10.240.0.1")
	far, user := newRawSocket(t, j.far, "far0"), newRawSocket(t, j.worker, "user0")
	dir := filepath.Join(bpffs(t), "up0")
	ours := ipFrame(j.farMAC, j.nearMAC, remote4, pod4, 100, 1)
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a finalizer could hide a leak
	descriptors := bpfDescriptors(t)
	in(t, j.near, func() {
		s := j.open(t, dir)
		require.NoError(t, s.AttachTC(TCConfig{Device: j.device}))
		Beat(s.Heartbeat(0))
		far.send(t, ours)
		require.NotNil(t, user.receive(t, 1000))
		require.NoError(t, s.Close())
		require.Equal(t, descriptors, bpfDescriptors(t), "descriptors leak")

		old := tcxPrograms(t, j.nearIndex)
		require.Len(t, old, 1)
		far.send(t, ours)
		require.Nil(t, user.receive(t, 100), "nobody beats: dropped at once")
		require.False(t, pings(j.veth, pod4.String()), "dropped")
		require.True(t, pings(j.veth, "10.240.0.1"), "passed")

		s, err := OpenSteering(SteeringConfig{Interface: "up0", PinDir: dir, Workers: 1})
		require.NoError(t, err)
		require.NoError(t, s.AttachTC(TCConfig{Device: j.device}))
		require.True(t, s.Adopted())
		require.Len(t, tcxPrograms(t, j.nearIndex), 1)
		require.NotEqual(t, old, tcxPrograms(t, j.nearIndex), "the program is the new process's")
		before, err := s.Counters()
		require.NoError(t, err)
		require.Equal(t, uint64(1), before["redirected"], "tables and counters were kept")
		Beat(s.Heartbeat(0))
		far.send(t, ours)
		require.NotNil(t, user.receive(t, 1000))

		// The device is made anew, as after an uninstalled and re-installed driver.
		require.NoError(t, s.Close())
		run(t, "ip", "-n", j.near, "link", "del", "dev0")
		run(t, "ip", "-n", j.near, "link", "add", "dev0", "type", "veth", "peer", "name", "user0", "netns", j.worker)
		_, j.device = mac(t, "dev0")
		s, err = OpenSteering(SteeringConfig{Interface: "up0", PinDir: dir, Workers: 1})
		require.NoError(t, err)
		require.NoError(t, s.AttachTC(TCConfig{Device: j.device}))
		require.Len(t, tcxPrograms(t, j.device), 1)
		require.NoError(t, s.Close())

		require.NoError(t, Uninstall(dir))
		require.NoError(t, Uninstall(dir), "twice")
		require.NoDirExists(t, dir)
		require.Empty(t, tcxPrograms(t, j.nearIndex))
		require.Empty(t, tcxPrograms(t, j.device))
		require.True(t, pings(j.veth, pod4.String()), "the stack's again")
	})
}

// TestHookChanges goes from XDP to tc and back over the same pinned tables: one hook at a time, and nothing of the other is left.
func TestHookChanges(t *testing.T) {
	haveTCXOrSkip(t)
	j := newJoined(t)
	dir := filepath.Join(bpffs(t), "up0")
	pins := func() (names []string) {
		entries, err := os.ReadDir(dir)
		require.NoError(t, err)
		for _, e := range entries {
			switch e.Name() {
			case linkPin, tcInPin, tcOutPin:
				names = append(names, e.Name())
			}
		}
		return names
	}
	in(t, j.near, func() {
		for range 2 {
			s := j.open(t, dir)
			require.NoError(t, s.AttachXDP())
			require.NoError(t, s.AttachXDP(), "twice")
			require.Equal(t, []string{linkPin}, pins())
			require.Empty(t, tcxPrograms(t, j.nearIndex))
			require.NoError(t, s.Close())

			s = j.open(t, dir)
			require.NoError(t, s.AttachTC(TCConfig{Device: j.device}))
			require.Equal(t, []string{tcInPin, tcOutPin}, pins())
			attached, err := attachedProgram(j.nearIndex)
			require.NoError(t, err)
			require.Zero(t, attached)
			require.NoError(t, s.Close())
		}
		// One process that was refused a socket goes on to tc.
		s := j.open(t, dir)
		require.NoError(t, s.AttachXDP())
		require.NoError(t, s.DetachXDP())
		require.NoError(t, s.AttachTC(TCConfig{Device: j.device}))
		require.Equal(t, []string{tcInPin, tcOutPin}, pins())
		require.NoError(t, s.Close())
		require.NoError(t, Uninstall(dir))
	})
}

// TestTCRefused has neither tcx nor a classifier, and then a classifier that fails: nothing stays attached.
func TestTCRefused(t *testing.T) {
	haveTCXOrSkip(t)
	j := newJoined(t)
	dir := filepath.Join(bpffs(t), "up0")
	in(t, j.near, func() {
		s := j.open(t, dir)
		require.ErrorContains(t, s.AttachTC(TCConfig{Device: j.device, NoTCX: true}), "neither tcx nor a classifier")
		broken := &brokenClassifier{}
		require.ErrorIs(t, s.AttachTC(TCConfig{Device: j.device, NoTCX: true, Classifier: broken}), os.ErrInvalid)
		require.Equal(t, []string{bpf.TCProgOverplaneTcOut, bpf.TCProgOverplaneTcIn}, broken.attached)
		require.Equal(t, map[int]bool{j.device: true, j.nearIndex: true}, broken.detached)
		require.ErrorContains(t, s.AttachTC(TCConfig{Device: 1 << 20}), "tcx links (Linux 6.6)")
		require.Empty(t, tcxPrograms(t, j.nearIndex))
		require.NoError(t, s.Close())
		require.NoError(t, Uninstall(dir))
	})
}

// brokenClassifier fails at the second program.
type brokenClassifier struct {
	attached []string
	detached map[int]bool
}

func (b *brokenClassifier) Attach(_, _ int, name string, _ bool) error {
	b.attached = append(b.attached, name)
	if len(b.attached) == 2 {
		return os.ErrInvalid
	}
	return nil
}

func (b *brokenClassifier) Detach(ifindex int, _ ...string) error {
	if b.detached == nil {
		b.detached = map[int]bool{}
	}
	b.detached[ifindex] = true
	return nil
}

func TestCapabilitiesOfThisKernel(t *testing.T) {
	needRoot(t)
	for _, c := range Capabilities() {
		require.NotEmpty(t, c.Kernel, "%s", c.Name)
		if c.Required {
			require.NoError(t, c.Err, "%s (Linux %s)", c.Name, c.Kernel)
		}
	}
}
