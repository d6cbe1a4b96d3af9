package tap

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// pair is two namespaces with a device each and a wire between them.
func pair(t testing.TB, queues int, persist bool) (w *wire, nsA, nsB string) {
	needRoot(t)
	pool := newPool(t, 256, 32)
	pools := []*port.Pool{pool}
	a, nsA := createIn(t, Config{Name: "tapa", Pools: pools, Queues: queues, Persist: persist}, "10.99.0.1/24", "fd99::1/64")
	b, nsB := createIn(t, Config{Name: "tapb", Pools: pools, Queues: queues, Persist: persist}, "10.99.0.2/24", "fd99::2/64")
	return newWire(t, pool, a, b), nsA, nsB
}

func TestPing(t *testing.T) {
	w, nsA, _ := pair(t, 1, false)
	if _, err := exec.LookPath("ping"); err != nil {
		t.Skip("needs ping")
	}
	for _, dst := range []string{"10.99.0.2", "fd99::2"} {
		// 4,000 bytes: fragments; the MTU keeps them short of a chunk.
		for _, size := range []string{"56", "4000"} {
			out, err := exec.Command("ip", "netns", "exec", nsA, "ping", "-c", "3", "-i", "0.05", "-W", "2", "-s", size, dst).CombinedOutput()
			require.NoErrorf(t, err, "%s", out)
		}
	}
	w.halt()
	requireNoLeak(t, w.pool)
	require.Zero(t, w.a.Stats())
}

// transfer sends size bytes over TCP and requires that the same arrive.
func transfer(t testing.TB, from, to, address string, size int) {
	t.Helper()
	l := listen(t, to, "tcp", net.JoinHostPort(address, "0"))
	sum := make(chan []byte, 1)
	go func() {
		h := sha256.New()
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(h, c)
			_ = c.Close()
		}
		sum <- h.Sum(nil)
	}()
	c := dial(t, from, "tcp", l.Addr().String())
	data := make([]byte, size)
	src := rand.NewChaCha8([32]byte{1})
	_, _ = src.Read(data)
	want := sha256.Sum256(data)
	require.NoError(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err := c.Write(data)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	select {
	case got := <-sum:
		require.Equal(t, want[:], got)
		require.NoError(t, l.Close()) // an open socket keeps its namespace alive
	case <-time.After(20 * time.Second):
		t.Fatal("transfer did not end")
	}
}

func TestTCPTrainsCrossWhole(t *testing.T) {
	w, nsA, nsB := pair(t, 1, false)
	for _, dst := range []struct {
		address string
		gso     uint8
	}{{"10.99.0.2", port.GSOTCP4}, {"fd99::2", port.GSOTCP6}} {
		get(w, func() int { w.longest = 0; return 0 })
		transfer(t, nsA, nsB, dst.address, 64<<20)
		require.Greater(t, get(w, func() int { return w.longest }), 30_000, "a train of more than 30 KB in one piece")
		require.Positive(t, get(w, func() int { return w.trains[dst.gso] }))
	}
	require.Zero(t, get(w, func() int { return w.rejected }))
	w.halt()
	requireNoLeak(t, w.pool)
	require.Zero(t, w.a.Stats())
	require.Zero(t, w.b.Stats())
}

func TestUDP(t *testing.T) {
	w, nsA, nsB := pair(t, 1, false)
	for _, dst := range []string{"10.99.0.2", "fd99::2"} {
		var l net.PacketConn
		in(t, nsB, func() (err error) { l, err = net.ListenPacket("udp", net.JoinHostPort(dst, "0")); return err })
		t.Cleanup(func() { _ = l.Close() })
		c := dial(t, nsA, "udp", l.LocalAddr().String())
		buf := make([]byte, 65536)
		for _, size := range []int{0, 1, 18, 1200, 1472 - 20, 9000, 60000} {
			msg := bytes.Repeat([]byte{byte(size)}, size)
			_, err := c.Write(msg)
			require.NoError(t, err)
			require.NoError(t, l.SetReadDeadline(time.Now().Add(3*time.Second)))
			n, _, err := l.ReadFrom(buf)
			require.NoErrorf(t, err, "%d bytes to %s", size, dst)
			require.Equal(t, msg, buf[:n:n][:n])
		}
		// A UDP train, if the kernel lets pods make them.
		if w.a.Caps().USO {
			rc, err := c.(*net.UDPConn).SyscallConn()
			require.NoError(t, err)
			require.NoError(t, rc.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, 1000)
			}))
			require.NoError(t, err)
			_, err = c.Write(make([]byte, 20_500))
			require.NoError(t, err)
			total := 0
			for total < 20_500 {
				require.NoError(t, l.SetReadDeadline(time.Now().Add(3*time.Second)))
				n, _, err := l.ReadFrom(buf)
				require.NoError(t, err)
				require.LessOrEqual(t, n, 1000)
				total += n
			}
			require.Positive(t, get(w, func() int { return w.trains[port.GSOUDP] }))
		}
	}
	w.halt()
	requireNoLeak(t, w.pool)
}

func TestUSOGrantedFromKernel62(t *testing.T) {
	needRoot(t)
	p, _ := createIn(t, Config{Name: "tapa", Pools: []*port.Pool{newPool(t, 4, 1)}})
	var u unix.Utsname
	require.NoError(t, unix.Uname(&u))
	release := unix.ByteSliceToString(u.Release[:])
	var major, minor int
	_, err := fmt.Sscanf(release, "%d.%d", &major, &minor)
	require.NoError(t, err)
	require.Equal(t, major > 6 || major == 6 && minor >= 2, p.Caps().USO, release)
}

func TestJumboPlainPacketIsAChain(t *testing.T) {
	w, nsA, nsB := pair(t, 1, false)
	ip(t, "-n", nsA, "link", "set", "tapa", "mtu", "9000")
	ip(t, "-n", nsB, "link", "set", "tapb", "mtu", "9000")
	var pc net.PacketConn
	in(t, nsB, func() (err error) { pc, err = net.ListenPacket("udp", "10.99.0.2:0"); return err })
	t.Cleanup(func() { _ = pc.Close() })
	c := dial(t, nsA, "udp", pc.LocalAddr().String())
	msg := make([]byte, 8900)
	rnd := rand.NewChaCha8([32]byte{2})
	_, _ = rnd.Read(msg)
	_, err := c.Write(msg)
	require.NoError(t, err)
	buf := make([]byte, 65536)
	require.NoError(t, pc.SetReadDeadline(time.Now().Add(3*time.Second)))
	n, _, err := pc.ReadFrom(buf)
	require.NoError(t, err)
	require.Equal(t, msg, buf[:n])
	require.Equal(t, 8900+8+20+14, get(w, func() int { return w.longest }))
	w.halt()
	requireNoLeak(t, w.pool)
}

// Without large buffers small packets pass and long ones are dropped and counted, to the byte.
func TestTruncatedFramesAreDroppedAndCounted(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 8, 0)
	a, ns := createIn(t, Config{Name: "tapa", Pools: []*port.Pool{pool}}, "10.99.0.1/24")
	ip(t, "-n", ns, "link", "set", "tapa", "mtu", "9000")
	ip(t, "-n", ns, "neigh", "add", "10.99.0.2", "lladdr", "02:00:00:00:00:02", "dev", "tapa")
	c := dial(t, ns, "udp", "10.99.0.2:7")
	frames := make([]port.Frame, port.MaxChain)
	udp := func(p []port.Frame) bool {
		b := pool.Bytes(&p[0])
		return len(b) > 23 && b[12] == 8 && b[13] == 0 && b[23] == unix.IPPROTO_UDP
	}
	// A chunk has room for the least always, and for more than the most never: frames start 64 to Headroom bytes into it.
	const headers = 14 + 20 + 8
	const least, most = 2048 - port.Headroom - headers, 2048 - 64 - headers
	for _, tc := range []struct {
		size      int
		truncated uint64
	}{{100, 0}, {least, 0}, {most + 1, 1}, {5000, 2}} {
		_, err := c.Write(make([]byte, tc.size))
		require.NoError(t, err)
		_, err = c.Write(make([]byte, 60))
		require.NoError(t, err)
		if before := tc.truncated; before == 0 {
			p := receiveOne(a.Queue(0), frames, func(p []port.Frame) bool { return udp(p) && p[0].Len != 60+42 }, pool)
			require.NotNil(t, p, "%d bytes", tc.size)
			require.EqualValues(t, tc.size+42, p[0].Len)
			pool.FreeAll(p)
		} else {
			p := receiveOne(a.Queue(0), frames, func(p []port.Frame) bool { return udp(p) && p[0].Len == 60+42 }, pool)
			require.NotNil(t, p, "the small packet behind it")
			pool.FreeAll(p)
		}
		require.Equal(t, tc.truncated, a.Stats().Truncated, "%d bytes", tc.size)
	}
	requireNoLeak(t, pool)
}

// With an empty pool packets wait in the device, and nothing is lost when there are frames again.
func TestEmptyPoolLeavesPacketsInTheDevice(t *testing.T) {
	needRoot(t)
	pool := newPool(t, 1, 1)
	a, ns := createIn(t, Config{Name: "tapa", Pools: []*port.Pool{pool}}, "10.99.0.1/24")
	ip(t, "-n", ns, "neigh", "add", "10.99.0.2", "lladdr", "02:00:00:00:00:02", "dev", "tapa")
	frames := make([]port.Frame, port.MaxChain)
	require.Eventually(t, func() bool {
		n := a.Queue(0).Receive(frames)
		pool.FreeAll(frames[:n])
		return n == 0
	}, 5*time.Second, 50*time.Millisecond)
	f, ok := pool.Alloc()
	require.True(t, ok)
	before := a.Stats().Starved
	c := dial(t, ns, "udp", "10.99.0.2:7")
	_, err := c.Write(make([]byte, 321))
	require.NoError(t, err)
	require.Zero(t, a.Queue(0).Receive(frames))
	require.Equal(t, before+1, a.Stats().Starved)
	pool.Free(f)
	p := receiveOne(a.Queue(0), frames, func(p []port.Frame) bool { return p[0].Len == 321+42 }, pool)
	require.NotNil(t, p)
	pool.FreeAll(p)
	requireNoLeak(t, pool)
}

func TestReceiveNeverCutsChains(t *testing.T) {
	w, nsA, nsB := pair(t, 1, false)
	w.halt()
	// One slot is no room for a packet that may be a chain of two.
	require.Zero(t, w.a.Queue(0).Receive(make([]port.Frame, 1)))
	require.Zero(t, w.a.Queue(0).Receive(nil))
	w.start()
	transfer(t, nsA, nsB, "10.99.0.2", 1<<20)
	w.halt()
	requireNoLeak(t, w.pool)
}

func TestMultiQueueSpreadsFlows(t *testing.T) {
	w, nsA, nsB := pair(t, 4, false)
	require.Equal(t, 4, w.a.NumQueues())
	for range 16 {
		transfer(t, nsA, nsB, "10.99.0.2", 64<<10)
	}
	require.Greater(t, get(w, func() int { return len(w.queues) }), 1, "one queue took all flows")
	w.halt()
	requireNoLeak(t, w.pool)
}

// The daemon restarts: descriptors close, another number of queues re-opens the device, and an established connection goes on.
func TestReopenKeepsConnections(t *testing.T) {
	w, nsA, nsB := pair(t, 2, true)
	l := listen(t, nsB, "tcp", "10.99.0.2:0")
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, _ = io.Copy(c, c)
		}
	}()
	c := dial(t, nsA, "tcp", l.Addr().String())
	echo := func(s string) {
		require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		_, err := io.WriteString(c, s)
		require.NoError(t, err)
		buf := make([]byte, len(s))
		_, err = io.ReadFull(c, buf)
		require.NoError(t, err)
		require.Equal(t, s, string(buf))
	}
	echo("before")
	for _, queues := range []int{1, 3} {
		w.halt()
		require.NoError(t, w.a.Close())
		require.NoError(t, w.b.Close())
		reopen := func(ns, name string) (p *Port) {
			in(t, ns, func() (err error) {
				p, err = Reopen(Config{Name: name, Pools: []*port.Pool{w.pool}, Queues: queues})
				return err
			})
			t.Cleanup(func() { _ = p.Destroy() })
			return p
		}
		w.a, w.b = reopen(nsA, "tapa"), reopen(nsB, "tapb")
		require.Equal(t, queues, w.a.NumQueues())
		w.start()
		echo("after")
	}
	w.halt()
	requireNoLeak(t, w.pool)
}

func TestCloseAndDestroy(t *testing.T) {
	needRoot(t)
	ns := newNetNS(t)
	exists := func(name string) bool {
		return inErr(ns, func() error { _, err := ifindex(name); return err }) == nil
	}
	for _, tc := range []struct {
		persist, destroy, remains bool
	}{{false, false, false}, {true, false, true}, {true, true, false}, {false, true, false}} {
		var p *Port
		in(t, ns, func() (err error) {
			p, err = Create(Config{Name: "tapc", Pools: []*port.Pool{newPool(t, 1, 0)}, Persist: tc.persist, Queues: 2})
			return err
		})
		require.True(t, exists("tapc"))
		if tc.destroy {
			require.NoError(t, p.Destroy())
		} else {
			require.NoError(t, p.Close())
			require.NoError(t, p.Close(), "closing twice is harmless")
		}
		require.Equal(t, tc.remains, exists("tapc"), "%+v", tc)
		if tc.remains {
			ip(t, "-n", ns, "link", "del", "tapc")
		}
	}
}
