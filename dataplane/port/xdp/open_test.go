package xdp

import (
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestQueues sends on each queue of the far end, which arrives on the same queue here, and stops one of two workers.
func TestQueues(t *testing.T) {
	v := newVeth(t, 2, 1500)
	s := openSteered(t, v, steeredConfig{workers: 2})
	far := &steered{pools: newPools(newPool(t, 1024, 2048, 0), newPool(t, 1024, 2048, 0))}
	in(t, v.far, func() {
		var err error
		far.Port, err = Open(Config{Interface: "far0", Pools: far.pools, RingSize: 256, Mode: Copy})
		require.NoError(t, err)
	})
	defer far.Close()
	require.NoError(t, far.WhyNotMore(), "what was asked for was granted")

	send := func(n int) {
		for i := range n {
			far.transmit(t, i%2, ipFrame(v.farMAC, v.nearMAC, remote4, pod4, 100, uint32(i)))
		}
		far.queues[0].Flush()
		far.queues[1].Flush()
	}
	send(100)
	var per [2]int
	require.True(t, s.poll(func(p []byte, q int) bool {
		require.Equal(t, int(seqOf(p)%2), q)
		per[q]++
		return per[0]+per[1] == 100
	}, 2000), "%v", per)
	require.Equal(t, [2]int{50, 50}, per)

	require.NoError(t, s.steering.SetHeartbeatLimit(100*time.Millisecond))
	time.Sleep(150 * time.Millisecond)
	before := s.counters(t)
	Beat(s.steering.Heartbeat(1))
	send(100)
	requireCounters(t, s.steering, before, map[string]uint64{"redirected": 50, "dropped_stale": 50})
	far.requireNoLeak(t)
	s.poll(func([]byte, int) bool { return false }, 10)
	s.requireNoLeak(t)
}

// TestRingFull receives nothing for a while: the kernel counts, and what was lost is memory of nobody.
func TestRingFull(t *testing.T) {
	v := newVeth(t, 1, 1500)
	s := openSteered(t, v, steeredConfig{ring: 64, chunks: 256})
	raw := newRawSocket(t, v.far, "far0")
	sendPods(t, v, raw, v.farMAC, 200)
	require.Eventually(t, func() bool { return s.counters(t)["redirected"] == 200 }, time.Second, time.Millisecond)
	n := 0
	s.poll(func([]byte, int) bool { n++; return false }, 20)
	require.Equal(t, 64, n)
	st, err := s.queues[0].Stats()
	require.NoError(t, err)
	require.Equal(t, Stats{RxDropped: 136, FillRingEmpty: 136}, st)
	receiveAll(t, v, s, raw, 1500, 64)
	s.requireNoLeak(t)
}

// TestOpenBusy opens an interface that is open, and again as soon as it is not.
func TestOpenBusy(t *testing.T) {
	v := newVeth(t, 1, 1500)
	pool := newPool(t, 1024, 2048, 0)
	in(t, v.near, func() {
		fds := openSockets(t)
		cfg := Config{Interface: "up0", Pools: newPools(pool), RingSize: 256, Mode: Copy}
		p, err := Open(cfg)
		require.NoError(t, err)
		_, err = Open(cfg)
		require.ErrorIs(t, err, unix.EBUSY)
		require.ErrorContains(t, err, "another AF_XDP socket holds the queue")
		go func() {
			time.Sleep(300 * time.Millisecond)
			_ = p.Close()
		}()
		p2, err := Open(cfg)
		require.NoError(t, err, "waits for the release")
		require.NoError(t, p2.Close())
		for range 10 {
			p, err := Open(cfg)
			require.NoError(t, err)
			require.NoError(t, p.Close())
		}
		cfg.Mode = ZeroCopy
		_, err = Open(cfg)
		require.ErrorIs(t, err, unix.EOPNOTSUPP)
		require.Equal(t, fds, openSockets(t), "descriptors leak")
	})
}

// openSockets counts the process's AF_XDP sockets and mappings of rings.
func openSockets(t *testing.T) (n [2]int) {
	entries, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		require.NoError(t, err)
		if domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err == nil && domain == unix.AF_XDP {
			n[0]++
		}
	}
	maps, err := os.ReadFile("/proc/self/maps")
	require.NoError(t, err)
	n[1] = strings.Count(string(maps), "socket:")
	return n
}

func TestOpenConfigErrors(t *testing.T) {
	small, large := newPool(t, 16, 2048, 0), newPool(t, 16, 4096, 0)
	ok := Config{Interface: "lo", Pools: newPools(small), RingSize: 64, MTU: 1500}
	for _, c := range []struct {
		name   string
		edit   func(*Config)
		rx, tx int
		want   []string
	}{
		{"fine", func(*Config) {}, 1, 1, nil},
		{"ring", func(c *Config) { c.RingSize = 100 }, 1, 1, []string{"rings of 100 entries"}},
		{"several", func(c *Config) { c.RingSize, c.MTU, c.Pools = 1<<20, 20, nil }, 1, 1, []string{"rings of 1048576", "MTU 20", "no frame memory"}},
		{"mode", func(c *Config) { c.Mode = 9 }, 1, 1, []string{"mode 9"}},
		{"budget", func(c *Config) { c.TxBudget = 128 }, 1, 1, []string{"transmit budget 128"}},
		{"fewer transmit queues", func(*Config) {}, 4, 1, []string{"4 receive but 1 transmit queues"}},
		{"queues", func(*Config) {}, 300, 300, []string{"300 receive queues"}},
		{"pools", func(c *Config) { c.Pools = newPools(small, large) }, 1, 1, []string{"pool 1 has chunks of 4096 bytes, pool 0 of 2048"}},
		{"steering", func(c *Config) { c.Steering = &Steering{ifname: "x"} }, 1, 1, []string{"attached to x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := ok
			c.edit(&cfg)
			err := cfg.check(c.rx, c.tx)
			if c.want == nil {
				require.NoError(t, err)
			}
			for _, w := range c.want {
				require.ErrorContains(t, err, w)
			}
		})
	}
}

// without runs f on a thread that lacks the capabilities, and that ends with it.
func without(t *testing.T, netns string, f func(), capabilities ...int) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked
		in(t, netns, func() {
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			var data [2]unix.CapUserData
			if err := unix.Capget(&hdr, &data[0]); err != nil {
				t.Error(err)
				return
			}
			for _, c := range capabilities {
				data[c/32].Effective &^= 1 << (c % 32)
			}
			if err := unix.Capset(&hdr, &data[0]); err != nil {
				t.Error(err)
				return
			}
			f()
		})
	}()
	<-done
}

// TestMissingCapabilities checks that each refusal names what is missing.
func TestMissingCapabilities(t *testing.T) {
	v := newVeth(t, 1, 1500)
	dir := bpffs(t)
	pool := newPool(t, 1024, 2048, 0)
	var errs []error
	attach := func() {
		_, err := AttachSteering(SteeringConfig{Interface: "up0", Workers: 1, PinDir: dir + "/up0"})
		errs = append(errs, err)
	}
	without(t, v.near, func() {
		_, err := Open(Config{Interface: "up0", Pools: newPools(pool), RingSize: 256})
		errs = append(errs, err)
	}, unix.CAP_NET_RAW)
	without(t, v.near, attach, unix.CAP_BPF, unix.CAP_SYS_ADMIN)
	without(t, v.near, attach, unix.CAP_NET_ADMIN, unix.CAP_SYS_ADMIN)
	require.Len(t, errs, 3)
	for i, want := range []string{"CAP_NET_RAW", "CAP_BPF", "CAP_NET_ADMIN"} {
		var missing *CapabilityError
		require.ErrorAs(t, errs[i], &missing)
		require.Contains(t, missing.Capability, want)
	}
}

// TestMemlockTooLow checks that the refusal names the limit and what to set.
func TestMemlockTooLow(t *testing.T) {
	v := newVeth(t, 1, 1500)
	pool := newPool(t, 1024, 2048, 0)
	var old unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old))
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 64 << 10, Max: old.Max}))
	defer func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old)) }()
	var err error
	without(t, v.near, func() {
		_, err = Open(Config{Interface: "up0", Pools: newPools(pool), RingSize: 256})
	}, unix.CAP_IPC_LOCK)
	var low *MemlockError
	require.ErrorAs(t, err, &low)
	require.Equal(t, uint64(2<<20), low.Want)
	require.Equal(t, uint64(64<<10), low.Limit)
	require.ErrorContains(t, err, "RLIMIT_MEMLOCK is 64 KiB")
	require.ErrorContains(t, err, "LimitMEMLOCK=infinity")
}

func TestProbe(t *testing.T) {
	v := newVeth(t, 2, 1500)
	var r *ProbeReport
	in(t, v.near, func() {
		var err error
		r, err = Probe("up0")
		require.NoError(t, err)
	})
	require.Equal(t, "veth", r.Driver)
	require.Equal(t, 2, r.RXQueues)
	require.Equal(t, 2, r.TXQueues)
	require.NoError(t, r.Err())
	for _, c := range r.Capabilities {
		t.Logf("%-40s Linux %-5s required=%-5v %v", c.Name, c.Kernel, c.Required, c.Err)
		if c.Name == "AF_XDP zero-copy" {
			require.ErrorIs(t, c.Err, unix.EOPNOTSUPP, "veth has none")
		}
	}
}

// TestRouted attaches for a routed underlay.
func TestRouted(t *testing.T) {
	v := newVeth(t, 1, 1500)
	in(t, v.near, func() {
		s, err := AttachSteering(SteeringConfig{Interface: "up0", Workers: 1, Routed: true})
		require.NoError(t, err)
		defer func() { require.NoError(t, s.Close()) }()
		require.NoError(t, s.SetPodCIDRs([]netip.Prefix{podCIDR4}))
		require.NoError(t, s.SetMembers([][6]byte{v.farMAC}))
		raw := newRawSocket(t, v.far, "far0")
		sendPods(t, v, raw, v.farMAC, 5)
		requireCounters(t, s, map[string]uint64{}, map[string]uint64{"dropped_not_member": 5})
		require.NoError(t, s.SetGatewayMAC(v.farMAC))
		before, err := s.Counters()
		require.NoError(t, err)
		sendPods(t, v, raw, v.farMAC, 5)
		raw.send(t, ipFrame(v.farMAC, v.nearMAC, other4, pod4, 100, 0))
		requireCounters(t, s, before, map[string]uint64{"dropped_no_socket": 5, "dropped_not_member": 1})
	})
}
