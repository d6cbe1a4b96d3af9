package tap

import (
	"encoding/binary"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// frameOf makes a frame of a UDP packet with a payload of n bytes, from and to nobody in particular.
func frameOf(t testing.TB, pool *port.Pool, n int) port.Frame {
	t.Helper()
	f, ok := pool.Alloc()
	require.True(t, ok)
	f.Len = uint32(14 + 20 + 8 + n)
	b := pool.Bytes(&f)
	clear(b)
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0})
	binary.BigEndian.PutUint16(b[16:], uint16(20+8+n))
	b[22], b[23] = 64, unix.IPPROTO_UDP
	copy(b[26:], []byte{10, 99, 0, 2, 10, 99, 0, 1})
	binary.BigEndian.PutUint16(b[38:], uint16(8+n))
	return f
}

func TestKernelRejectsHostileMetadata(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 8, 1)
	a, _ := createIn(t, Config{Name: "tapa", Pools: []*port.Pool{pool}}, "10.99.0.1/24")
	q := a.Queue(0)
	for _, tc := range []struct {
		name    string
		offload port.Offload
		length  uint32 // 0: as made
		status  port.TxStatus
	}{
		{"plain", port.Offload{}, 0, port.TxOK},
		{"unfinished checksum", port.Offload{Flags: port.NeedsChecksum, ChecksumStart: 34, ChecksumOffset: 6}, 0, port.TxOK},
		{"checksum start behind the packet", port.Offload{Flags: port.NeedsChecksum, ChecksumStart: 9000, ChecksumOffset: 6}, 0, port.TxRejected},
		{"checksum offset behind the packet", port.Offload{Flags: port.NeedsChecksum, ChecksumStart: 34, ChecksumOffset: 60000}, 0, port.TxRejected},
		{"header longer than the packet", port.Offload{HeaderLen: 60000}, 0, port.TxRejected},
		{"unknown GSO type", port.Offload{GSO: 0x55, SegmentSize: 10}, 0, port.TxRejected},
		{"GSO without a segment size", port.Offload{Flags: port.NeedsChecksum, ChecksumStart: 34, ChecksumOffset: 6, GSO: port.GSOUDP}, 0, port.TxRejected},
		{"shorter than an Ethernet header", port.Offload{}, 13, port.TxRejected},
		{"empty", port.Offload{}, 0xffff, port.TxRejected},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bad, good := frameOf(t, pool, 100), frameOf(t, pool, 10)
			bad.Offload = tc.offload
			switch tc.length {
			case 0:
			case 0xffff:
				bad.Len = 0
			default:
				bad.Len = tc.length
			}
			frames := []port.Frame{bad, good}
			n, status := q.Transmit(frames)
			require.Equal(t, tc.status, status)
			if status == port.TxOK {
				require.Equal(t, 2, n)
			} else {
				require.Zero(t, n, "the refused frame stays the caller's")
				pool.Free(bad)
				n, status = q.Transmit(frames[1:])
				require.Equal(t, 1, n, "the one behind it is fine")
				require.Equal(t, port.TxOK, status)
			}
			requireNoLeak(t, pool)
		})
	}
}

func TestTransmitLimitsChains(t *testing.T) {
	needRoot(t)
	pool := newPool(t, port.MaxChain+1, 0)
	a, _ := createIn(t, Config{Name: "tapa", Pools: []*port.Pool{pool}}, "10.99.0.1/24")
	for _, n := range []int{1, 2, port.MaxChain, port.MaxChain + 1} {
		var frames []port.Frame
		for range n {
			f := frameOf(t, pool, 20)
			f.Flags = port.More
			frames = append(frames, f)
		}
		frames[n-1].Flags = 0
		binary.BigEndian.PutUint16(pool.Bytes(&frames[0])[16:], uint16(n*62-14))
		took, status := a.Queue(0).Transmit(frames)
		if n <= port.MaxChain {
			require.Equal(t, port.TxOK, status)
			require.Equal(t, n, took)
		} else {
			require.Equal(t, port.TxRejected, status)
			require.Zero(t, took)
			pool.FreeAll(frames)
		}
		requireNoLeak(t, pool)
	}
}

// A pod that gives its device a longer virtio-net header must not get at bytes of packets that were in the buffer before.
func TestForeignHeaderSizeLeaksNothing(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 1, 1)
	a, ns := createIn(t, Config{Name: "tapa", Pools: []*port.Pool{pool}, Persist: true}, "10.99.0.1/24")
	ip(t, "-n", ns, "neigh", "add", "10.99.0.2", "lladdr", "02:00:00:00:00:02", "dev", "tapa")
	frames := make([]port.Frame, port.MaxChain)
	c := dial(t, ns, "udp", "10.99.0.2:7")
	isOurs := func(p []port.Frame) bool { return p[0].Len == 100+42 }

	_, err := c.Write(make([]byte, 100))
	require.NoError(t, err)
	p := receiveOne(a.Queue(0), frames, isOurs, pool)
	require.NotNil(t, p)
	pool.FreeAll(p)

	// Something to find, should the kernel leave it there.
	f, _ := pool.Alloc()
	for i := range pool.Buffer(&f) {
		pool.Buffer(&f)[i] = 0xaa
	}
	pool.Free(f)
	for _, size := range []int{headerLen + 1, 60, 1500} {
		// The pod's end: a queue of its own, which is detached again so that all packets come to ours.
		in(t, ns, func() error {
			fd, err := openDevice()
			if err != nil {
				return err
			}
			defer func() { _ = unix.Close(fd) }()
			if err := attach(fd, "tapa", false); err != nil {
				return err
			}
			return unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, size)
		})
		before := a.Stats().BadHeader
		_, err = c.Write(make([]byte, 100))
		require.NoError(t, err)
		require.Eventually(t, func() bool {
			if a.Queue(0).Receive(frames) == 0 {
				return a.Stats().BadHeader > before
			}
			// Kernels that fill the longer header with zeros (6.14) are harmless by themselves.
			skipped := min(size-headerLen, int(frames[0].Len))
			require.Equal(t, make([]byte, skipped), pool.Bytes(&frames[0])[:skipped], "bytes of an earlier packet")
			pool.FreeAll(frames[:port.PacketFrames(frames)])
			return true
		}, 3*time.Second, time.Millisecond)
	}
	requireNoLeak(t, pool)
}

func TestLinkDownAndUp(t *testing.T) {
	w, nsA, nsB := pair(t, 1, false)
	transfer(t, nsA, nsB, "10.99.0.2", 1000)
	w.halt()
	ip(t, "-n", nsB, "link", "set", "tapb", "down")
	f := frameOf(t, w.pool, 10)
	n, status := w.b.Queue(0).Transmit([]port.Frame{f})
	require.Zero(t, n)
	require.Equal(t, port.TxDown, status)
	w.pool.Free(f)
	require.False(t, w.b.Dead(), "down is not dead")
	require.GreaterOrEqual(t, w.b.Queue(0).FD(), 0)
	w.start()
	ip(t, "-n", nsB, "link", "set", "tapb", "up")
	transfer(t, nsA, nsB, "10.99.0.2", 1000)
	w.halt()
	requireNoLeak(t, w.pool)
}

// The device goes, with its namespace or alone: descriptors made elsewhere find it dead, and nobody spins on them.
func TestDeviceDeleted(t *testing.T) {
	for _, tc := range []struct {
		name   string
		delete func(t *testing.T, ns string)
	}{
		{"with its namespace", func(t *testing.T, ns string) { ip(t, "netns", "del", ns) }},
		{"alone", func(t *testing.T, ns string) { ip(t, "-n", ns, "link", "del", "tapb") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			// No TCP here: a connection that is still closing keeps its namespace for minutes.
			w, _, nsB := pair(t, 2, true)
			var told atomic.Int32
			for _, q := range w.b.queues {
				q.onDead = sync.OnceFunc(func() { told.Add(1) })
			}
			// A worker's epoll set, that nobody takes the descriptor out of.
			epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
			require.NoError(t, err)
			defer func() { _ = unix.Close(epoll) }()
			fd := w.b.Queue(0).FD()
			require.NoError(t, unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN}))
			w.halt()
			tc.delete(t, nsB)
			events := make([]unix.EpollEvent, 1)

			frames := make([]port.Frame, port.MaxChain)
			for i := range w.b.NumQueues() {
				// The kernel deletes namespaces one after the other, when it has time.
				for end := time.Now().Add(30 * time.Second); !w.b.queues[i].Dead() && time.Now().Before(end); {
					_, _ = unix.EpollWait(epoll, events, 10)
					w.pool.FreeAll(frames[:w.b.Queue(i).Receive(frames)])
				}
				require.True(t, w.b.queues[i].Dead())
				require.ErrorIs(t, w.b.queues[i].Err(), unix.EBADFD)
			}
			require.True(t, w.b.Dead())
			require.Eventually(t, func() bool { return told.Load() == 2 }, 5*time.Second, time.Millisecond)
			require.Equal(t, fd, w.b.Queue(0).FD(), "the number stays ours")
			n, err := unix.EpollWait(epoll, events, 100)
			require.True(t, n <= 0 && (err == nil || err == unix.EINTR), "the set is silent: %d %v", n, err)

			f := frameOf(t, w.pool, 10)
			took, status := w.b.Queue(0).Transmit([]port.Frame{f})
			require.Zero(t, took)
			require.Equal(t, port.TxDown, status)
			w.pool.Free(f)
			require.Zero(t, w.b.Queue(0).Receive(frames))
			requireNoLeak(t, w.pool)
			require.NoError(t, w.b.Destroy(), "destroying a dead port is no error")
		})
	}
}

// What makes watching namespaces necessary: a descriptor opened inside keeps the deleted namespace's device alive.
func TestReopenedDeviceOutlivesNamespaceName(t *testing.T) {
	needRoot(t)
	pools := []*port.Pool{newPool(t, 4, 1)}
	a, ns := createIn(t, Config{Name: "tapa", Pools: pools, Persist: true}, "10.99.0.1/24")
	require.NoError(t, a.Close())
	in(t, ns, func() (err error) { a, err = Reopen(Config{Name: "tapa", Pools: pools}); return err })
	t.Cleanup(func() { _ = a.Destroy() })
	require.NoError(t, exec.Command("ip", "netns", "del", ns).Run())
	time.Sleep(200 * time.Millisecond)
	frames := make([]port.Frame, port.MaxChain)
	pools[0].FreeAll(frames[:a.Queue(0).Receive(frames)])
	require.False(t, a.Dead())
}

func TestNoAllocations(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 256, 16)
	pools := []*port.Pool{pool}
	a, ns := createIn(t, Config{Name: "tapa", Pools: pools}, "10.99.0.1/24")
	ip(t, "-n", ns, "neigh", "add", "10.99.0.2", "lladdr", "02:00:00:00:00:02", "dev", "tapa")
	c := dial(t, ns, "udp", "10.99.0.2:7")
	frames := make([]port.Frame, port.MaxChain)
	small, train := make([]byte, 100), make([]byte, 1400)
	received := 0
	q := a.Queue(0)
	require.Zero(t, testing.AllocsPerRun(200, func() {
		_, _ = c.Write(small)
		_, _ = c.Write(train)
		n := q.Receive(frames)
		received += n
		pool.FreeAll(frames[:n])
		f1, _ := pool.Alloc()
		f1.Len = 100
		large, _ := pool.AllocLarge()
		large.Len = 60
		f2, _ := pool.Alloc()
		f2.Flags, f2.Len = port.More, 60
		frames[0], frames[1], frames[2] = f1, f2, large
		k, _ := q.Transmit(frames[:3])
		pool.FreeAll(frames[k:3])
	}))
	require.Greater(t, received, 300)
	requireNoLeak(t, pool)
}
