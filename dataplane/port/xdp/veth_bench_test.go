package xdp

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/test/livegen"
)

// openWhole opens the pair with the whole pool as the UMEM, as an uplink's queues are: the alternative that was measured.
func (p *podPair) openWhole(t testing.TB, pool *port.Pool, ring, budget int) *Port {
	t.Helper()
	var out *Port
	in(t, p.node, func() {
		var err error
		out, err = Open(Config{Interface: p.host, Pools: newPools(pool), RingSize: ring, TxBudget: budget, Mode: Copy})
		require.NoError(t, err)
		for i, q := range out.queues {
			q.fillTarget = uint32(ring)
			require.NoError(t, p.program.addSocket(i, q.fd))
		}
	})
	t.Cleanup(func() { require.NoError(t, out.Close()) })
	return out
}

// dropAll drops what arrives in the pod before its stack sees it, the same for whoever sent it.
func (p *podPair) dropAll(t testing.TB) {
	t.Helper()
	run(t, "ip", "netns", "exec", p.netns, "nft", "add table netdev sink; add chain netdev sink in { type filter hook ingress device eth0 priority 0; policy drop; }")
}

func (p *podPair) received(t testing.TB) (packets uint64) {
	t.Helper()
	in(t, p.netns, func() {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		require.NoError(t, err)
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); f[0] == "eth0:" {
				packets, err = strconv.ParseUint(f[2], 10, 64)
				require.NoError(t, err)
			}
		}
	})
	return packets
}

// BenchmarkVethForward moves frames from one pod to another through one worker's queues: no parsing, no lookup. The generator and the softirq work of the
// receiving end have core 0, the worker and the softirq work of the sending end core 1. Mpps counts what arrived at the second pod's device.
//
//	generator -> eth0 === host's end -> worker -> host's end === eth0 -> dropped at ingress
func BenchmarkVethForward(b *testing.B) {
	for _, c := range []struct {
		memory      string
		frame, ring int
	}{
		{"own", 64, 256}, {"own", 64, 512}, {"own", 64, 2048}, {"own", 64, 8192},
		{"whole", 64, 512}, {"whole", 64, 2048}, {"whole", 64, 8192},
		{"own", 1514, 512}, {"own", 1514, 2048}, {"own", 1514, 8192},
		{"whole", 1514, 512}, {"whole", 1514, 2048}, {"whole", 1514, 8192},
	} {
		b.Run(fmt.Sprintf("memory=%s/frame=%d/ring=%d", c.memory, c.frame, c.ring), func(b *testing.B) {
			benchmarkVeth(b, c.memory == "whole", c.frame, c.ring)
		})
	}
}

func benchmarkVeth(b *testing.B, whole bool, size, ring int) {
	node := newNetns(b)
	from, to := newPodPair(b, node, "veth0", 1, 1500), newPodPair(b, node, "veth1", 1, 1500)
	to.dropAll(b)
	pool := newPool(b, 32768, 4096, 0)
	const budget = 64
	var rx, tx interface {
		port.Queue
		port.Flusher
	}
	if whole {
		rx, tx = from.openWhole(b, pool, ring, budget).queues[0], to.openWhole(b, pool, ring, budget).queues[0]
	} else {
		cfg := VethConfig{Pools: newPools(pool), RingSize: ring, TxBudget: budget}
		rx, tx = from.open(b, cfg).queues[0], to.open(b, cfg).queues[0]
	}
	frame := make([]byte, size)
	copy(frame, ipFrame(from.mac, to.mac, remote4, pod4, 64, 0))

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var set unix.CPUSet
	set.Set(1)
	require.NoError(b, unix.SchedSetaffinity(0, &set))
	defer func() { set.Set(0); _ = unix.SchedSetaffinity(0, &set) }()

	frames := make([]port.Frame, 128)
	forward := func(packets int) {
		for done := 0; done < packets; {
			n := rx.Receive(frames)
			if n == 0 { // as a worker does that is idle
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(rx.FD()), Events: unix.POLLIN}}, 10)
			}
			taken, _ := tx.Transmit(frames[:n])
			pool.FreeAll(frames[taken:n])
			tx.Flush()
			done += taken
		}
	}
	g, err := livegen.Start("/run/netns/"+from.netns, "eth0", frame, 0)
	require.NoError(b, err)
	defer func() { require.NoError(b, g.Stop()) }()
	forward(10000)
	b.ResetTimer()
	start, cpu, before := time.Now(), threadTime(), to.received(b)
	forward(b.N)
	b.ReportMetric(float64(to.received(b)-before)/time.Since(start).Seconds()/1e6, "Mpps")
	b.ReportMetric(float64(threadTime()-cpu)/float64(b.N), "cpu-ns/op")
	b.StopTimer()
}
