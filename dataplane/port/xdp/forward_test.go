package xdp

import (
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// threadTime is the processor time of the calling thread, in user space and in the kernel.
func threadTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkForward moves 64-byte frames from one veth to another through one worker's queues: no parsing, no lookup. A generator of
// the same kind shares the machine. Mpps counts what was forwarded, ns/op and the
// forwarding thread's cpu-ns/op are per forwarded packet; the thread sleeps when nothing is there.
//
//	generator (AF_XDP) -> far0 === up0 -> worker -> out0 === sink0
func BenchmarkForward(b *testing.B) {
	for _, ring := range []int{4096, 16384} {
		b.Run(fmt.Sprintf("ports=veth/frame=64/ring=%d", ring), func(b *testing.B) { benchmarkForward(b, ring) })
	}
}

func benchmarkForward(b *testing.B, ring int) {
	v := newVeth(b, 1, 1500)
	run(b, "ip", "-n", v.near, "link", "add", "out0", "type", "veth", "peer", "name", "sink0", "netns", v.far)
	run(b, "ip", "-n", v.near, "link", "set", "out0", "up")
	run(b, "ip", "-n", v.far, "link", "set", "sink0", "up")
	pool, generatorPool := newPool(b, 4*ring, 2048, 0), newPool(b, 8192, 2048, 0)
	var up, out, generator *Port
	var s *Steering
	in(b, v.near, func() {
		var err error
		s, err = AttachSteering(SteeringConfig{Interface: "up0", Workers: 1, HeartbeatLimit: -1})
		require.NoError(b, err)
		require.NoError(b, s.SetPodCIDRs([]netip.Prefix{podCIDR4}))
		require.NoError(b, s.SetMembers([][6]byte{v.farMAC}))
		up, err = Open(Config{Interface: "up0", Pools: newPools(pool), RingSize: ring, TxBudget: 128, Steering: s})
		require.NoError(b, err)
		out, err = Open(Config{Interface: "out0", Pools: newPools(pool), RingSize: ring, TxBudget: 128})
		require.NoError(b, err)
	})
	in(b, v.far, func() {
		var err error
		generator, err = Open(Config{Interface: "far0", Pools: newPools(generatorPool), RingSize: 4096, TxBudget: 128})
		require.NoError(b, err)
	})
	defer func() { _, _, _, _ = up.Close(), out.Close(), generator.Close(), s.Close() }()

	var stop atomic.Bool
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		frame := ipFrame(v.farMAC, v.nearMAC, remote4, pod4, 64, 0)
		q := generator.queues[0]
		for !stop.Load() {
			for range 128 {
				f, ok := generatorPool.Alloc()
				if !ok {
					break
				}
				f.Len = uint32(copy(generatorPool.Buffer(&f), frame))
				if n, _ := q.Transmit([]port.Frame{f}); n == 0 {
					generatorPool.Free(f)
				}
			}
			q.Flush()
			q.reclaim()
		}
	}()

	rx, tx := up.queues[0], out.queues[0]
	frames := make([]port.Frame, 256)
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
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	forward(10000)
	b.ResetTimer()
	start, cpu := time.Now(), threadTime()
	forward(b.N)
	b.ReportMetric(float64(b.N)/time.Since(start).Seconds()/1e6, "Mpps")
	b.ReportMetric(float64(threadTime()-cpu)/float64(b.N), "cpu-ns/op")
	b.StopTimer()
	stop.Store(true)
	<-stopped
	st, err := rx.Stats()
	require.NoError(b, err)
	require.Zero(b, st.TxInvalid)
}
