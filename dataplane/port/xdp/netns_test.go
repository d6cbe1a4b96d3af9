package xdp

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

const netnsPrefix = "ovpxdp-"

// TestMain removes namespaces that a crashed run left: their names carry its process id.
func TestMain(m *testing.M) {
	stale, _ := filepath.Glob("/run/netns/" + netnsPrefix + "*")
	for _, path := range stale {
		name := filepath.Base(path)
		pid, _ := strconv.Atoi(strings.Split(name, "-")[1])
		if unix.Kill(pid, 0) != nil {
			_ = exec.Command("ip", "netns", "del", name).Run()
		}
	}
	os.Exit(m.Run())
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces and AF_XDP sockets")
	}
}

var netnsCount atomic.Int32

// newNetns makes a network namespace with lo up, and deletes it at the end of the test.
func newNetns(t testing.TB) string {
	t.Helper()
	needRoot(t)
	name := fmt.Sprintf("%s%d-%d", netnsPrefix, os.Getpid(), netnsCount.Add(1))
	run(t, "ip", "netns", "add", name)
	t.Cleanup(func() { run(t, "ip", "netns", "del", name) })
	run(t, "ip", "-n", name, "link", "set", "lo", "up")
	return name
}

// in runs f with the calling goroutine inside a namespace. Sockets and links made there stay there.
func in(t testing.TB, netns string, f func()) {
	t.Helper()
	runtime.LockOSThread()
	old, err := os.Open("/proc/thread-self/ns/net")
	require.NoError(t, err)
	defer old.Close()
	target, err := os.Open("/run/netns/" + netns)
	require.NoError(t, err)
	defer target.Close()
	require.NoError(t, unix.Setns(int(target.Fd()), unix.CLONE_NEWNET))
	defer func() {
		if unix.Setns(int(old.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread() // else the thread ends with its goroutine
		}
	}()
	f()
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
	return string(out)
}

// link is a veth pair between two namespaces: the uplink under test, and the other end.
type veth struct {
	near, far       string // namespaces; interfaces are up0 and far0
	nearMAC, farMAC [6]byte
	nearIndex       int
	farIndex        int
}

func newVeth(t testing.TB, queues, mtu int) *veth {
	t.Helper()
	v := &veth{near: newNetns(t), far: newNetns(t)}
	q := strconv.Itoa(queues)
	run(t, "ip", "-n", v.near, "link", "add", "up0", "numrxqueues", q, "numtxqueues", q, "type", "veth",
		"peer", "name", "far0", "numrxqueues", q, "numtxqueues", q, "netns", v.far)
	for _, end := range []struct{ netns, name string }{{v.near, "up0"}, {v.far, "far0"}} {
		run(t, "ip", "netns", "exec", end.netns, "sysctl", "-qw", "net.ipv6.conf."+end.name+".disable_ipv6=1")
		run(t, "ip", "-n", end.netns, "link", "set", end.name, "mtu", strconv.Itoa(mtu))
		run(t, "ip", "netns", "exec", end.netns, "ethtool", "-K", end.name, "tx", "off")
	}
	for _, end := range []struct{ netns, name string }{{v.near, "up0"}, {v.far, "far0"}} {
		run(t, "ip", "-n", end.netns, "link", "set", end.name, "up")
	}
	in(t, v.near, func() { v.nearMAC, v.nearIndex = mac(t, "up0") })
	in(t, v.far, func() { v.farMAC, v.farIndex = mac(t, "far0") })
	return v
}

func mac(t testing.TB, ifname string) ([6]byte, int) {
	iface, err := net.InterfaceByName(ifname)
	require.NoError(t, err)
	return [6]byte(iface.HardwareAddr), iface.Index
}

// bpffs mounts a bpffs of the test's own and returns its path.
func bpffs(t testing.TB) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	require.NoError(t, unix.Mount("bpf", dir, "bpf", 0, ""))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

func newPool(t testing.TB, chunks, chunkSize, large int) *port.Pool {
	t.Helper()
	cfg := port.PoolConfig{Chunks: chunks, ChunkSize: chunkSize, LargeBuffers: large}
	mem, err := NewMemory(cfg.Size())
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, mem.Close()) })
	pool, err := port.NewPool(mem.Bytes(), cfg)
	require.NoError(t, err)
	return pool
}

// rawSocket is an AF_PACKET socket on the far end: it speaks frames without any of the code under test.
type rawSocket struct{ fd int }

func newRawSocket(t testing.TB, netns, ifname string) *rawSocket {
	t.Helper()
	s := &rawSocket{}
	in(t, netns, func() {
		_, index := mac(t, ifname)
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		require.NoError(t, err)
		require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
		require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 64<<20))
		require.NoError(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
		require.NoError(t, unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: 0x0300, Ifindex: index})) // ETH_P_ALL
		s.fd = fd
	})
	t.Cleanup(func() { _ = unix.Close(s.fd) })
	return s
}

func (s *rawSocket) send(t testing.TB, frame []byte) {
	t.Helper()
	for {
		_, err := unix.Write(s.fd, frame)
		if err == unix.ENOBUFS || err == unix.EAGAIN {
			continue
		}
		require.NoError(t, err)
		return
	}
}

// receive returns the next frame, nil if none came within the milliseconds.
func (s *rawSocket) receive(t testing.TB, ms int) []byte {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, ms)
	if err == unix.EINTR || n == 0 {
		return nil
	}
	require.NoError(t, err)
	b := make([]byte, 1<<17)
	n, err = unix.Read(s.fd, b)
	if err == unix.ENETDOWN {
		return nil
	}
	require.NoError(t, err)
	return b[:n]
}
