package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/tap"
)

// Namespaces of these tests are named ovpker-<process>-<n>. Those of processes that are no more are removed before the tests start.
const netnsPrefix = "ovpker-"

func TestMain(m *testing.M) {
	stale, _ := filepath.Glob("/run/netns/" + netnsPrefix + "*")
	for _, path := range stale {
		name := filepath.Base(path)
		pid := strings.Split(strings.TrimPrefix(name, netnsPrefix), "-")[0]
		if _, err := os.Stat("/proc/" + pid); err != nil {
			_ = exec.Command("ip", "netns", "del", name).Run()
		}
	}
	os.Exit(m.Run())
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and devices")
	}
	for _, program := range []string{"ip", "ping"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs the %s command", program)
		}
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("needs the TUN/TAP driver: %v", err)
	}
}

var netnsCount int

// newNetNS makes a namespace and returns its name.
func newNetNS(t testing.TB) string {
	t.Helper()
	netnsCount++
	name := fmt.Sprintf("%s%d-%d", netnsPrefix, os.Getpid(), netnsCount)
	ip(t, "netns", "add", name)
	t.Cleanup(func() { _ = exec.Command("ip", "netns", "del", name).Run() })
	ip(t, "-n", name, "link", "set", "lo", "up")
	return name
}

func pathOf(ns string) string { return "/run/netns/" + ns }

// in runs f in a namespace and requires that it succeeds. f must not end the test.
func in(t testing.TB, ns string, f func() error) {
	t.Helper()
	require.NoError(t, InNetNS(pathOf(ns), f))
}

func ip(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	require.NoErrorf(t, err, "ip %s: %s", strings.Join(args, " "), out)
	return string(out)
}

func ping(ns string, args ...string) (string, error) {
	args = append([]string{"netns", "exec", ns, "ping", "-c", "2", "-i", "0.05", "-W", "2"}, args...)
	out, err := exec.Command("ip", args...).CombinedOutput()
	return string(out), err
}

func requirePing(t testing.TB, ns string, args ...string) {
	t.Helper()
	out, err := ping(ns, args...)
	require.NoErrorf(t, err, "ping in %s %v: %s", ns, args, out)
}

func requireNoPing(t testing.TB, ns string, args ...string) {
	t.Helper()
	out, err := ping(ns, append([]string{"-W", "0.3"}, args...)...)
	require.Errorf(t, err, "ping in %s %v: %s", ns, args, out)
}

func sysctl(t testing.TB, ns, key, value string) {
	t.Helper()
	in(t, ns, func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) })
}

func newPool(t testing.TB) *port.Pool {
	t.Helper()
	cfg := port.PoolConfig{Chunks: 256, ChunkSize: 2048, LargeBuffers: 16}
	p, err := port.NewPool(make([]byte, cfg.Size()), cfg)
	require.NoError(t, err)
	return p
}

// router is the smallest data plane: it sends a packet on by its destination address, with the gateway's address as the Ethernet source. It answers no ARP
// and no neighbour discovery, so nothing works that needs them.
type router struct {
	pool *port.Pool
	mu   sync.Mutex
	legs map[string]leg
	stop chan struct{}
	done sync.WaitGroup
}

type leg struct {
	port  port.Port
	mac   []byte
	addrs []netip.Addr
}

func newRouter(t testing.TB) *router {
	r := &router{pool: newPool(t), legs: map[string]leg{}, stop: make(chan struct{})}
	r.done.Go(r.run)
	t.Cleanup(func() { close(r.stop); r.done.Wait() })
	return r
}

func (r *router) config() tap.Config { return tap.Config{Pools: []*port.Pool{r.pool}} }

func (r *router) set(name string, p port.Port, mac []byte, addrs ...netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.legs[name] = leg{p, mac, addrs}
}

// destroyLater ends the port with the test, after the router let go of it.
func (r *router) destroyLater(t testing.TB, name string, p *tap.Port) {
	t.Cleanup(func() {
		r.drop(name)
		_ = p.Destroy()
	})
}

func (r *router) drop(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.legs, name)
}

func (r *router) run() {
	frames := make([]port.Frame, port.MaxChain)
	for {
		select {
		case <-r.stop:
			return
		default:
		}
		var fds []unix.PollFd
		r.mu.Lock()
		for _, l := range r.legs {
			if fd := l.port.Queue(0).FD(); fd >= 0 {
				fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
			}
		}
		r.mu.Unlock()
		_, _ = unix.Poll(fds, 10)
		r.mu.Lock()
		for _, l := range r.legs {
			got := frames[:l.port.Queue(0).Receive(frames)]
			for len(got) > 0 {
				n := port.PacketFrames(got)
				r.forward(got[:n])
				got = got[n:]
			}
		}
		r.mu.Unlock()
	}
}

func (r *router) forward(p []port.Frame) {
	b := r.pool.Bytes(&p[0])
	var dst netip.Addr
	switch {
	case len(b) >= 34 && b[12] == 0x08 && b[13] == 0:
		dst = netip.AddrFrom4([4]byte(b[30:34]))
	case len(b) >= 54 && b[12] == 0x86 && b[13] == 0xdd:
		dst = netip.AddrFrom16([16]byte(b[38:54]))
	}
	for _, l := range r.legs {
		for _, a := range l.addrs {
			if a == dst {
				copy(b, l.mac)
				copy(b[6:], GatewayMAC)
				q := l.port.Queue(0)
				n, _ := q.Transmit(p)
				if f, ok := q.(port.Flusher); ok {
					f.Flush()
				}
				if n > 0 {
					return
				}
			}
		}
	}
	r.pool.FreeAll(p)
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func prefixes(s ...string) (ps []netip.Prefix) {
	for _, p := range s {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	return ps
}

// routeGet asks the kernel how it would send to dst.
func routeGet(dst string) error {
	_, err := netlink.RouteGet(net.ParseIP(dst))
	if errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) {
		return fmt.Errorf("unreachable: %w", err)
	}
	return err
}
