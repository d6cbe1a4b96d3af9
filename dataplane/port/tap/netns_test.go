package tap

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// Namespaces of these tests are named ovptap-<process>-<n>. Those of processes that are no more are removed before the tests start.
const netnsPrefix = "ovptap-"

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

// needRoot skips without what the tests cannot do without, and says what.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces and TAP devices")
	}
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs the ip command (iproute2)")
	}
	if _, err := os.Stat(devicePath); err != nil {
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

func ip(t testing.TB, args ...string) {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	require.NoErrorf(t, err, "ip %s: %s", strings.Join(args, " "), out)
}

// in runs f on a thread in the namespace. f must not end the test.
func in(t testing.TB, netns string, f func() error) {
	t.Helper()
	require.NoError(t, inErr(netns, f))
}

func inErr(netns string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so nobody else inherits the namespace.
		runtime.LockOSThread()
		fd, err := unix.Open("/run/netns/"+netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			done <- err
			return
		}
		err = unix.Setns(fd, unix.CLONE_NEWNET)
		_ = unix.Close(fd)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// listen and dial make sockets that belong to a namespace, whatever thread uses them later.
func listen(t testing.TB, netns, network, address string) net.Listener {
	t.Helper()
	var l net.Listener
	in(t, netns, func() (err error) { l, err = net.Listen(network, address); return err })
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t testing.TB, netns, network, address string) net.Conn {
	t.Helper()
	var c net.Conn
	in(t, netns, func() (err error) {
		// The dialer would try addresses on goroutines of its own, in the wrong namespace, only if there were several.
		c, err = net.DialTimeout(network, address, 5*time.Second)
		return err
	})
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// newPool is one worker's frame memory.
func newPool(t testing.TB, chunks, large int) *port.Pool {
	t.Helper()
	cfg := port.PoolConfig{Chunks: chunks, ChunkSize: 2048, LargeBuffers: large}
	p, err := port.NewPool(make([]byte, cfg.Size()), cfg)
	require.NoError(t, err)
	return p
}

// requireNoLeak says that every frame is back.
func requireNoLeak(t testing.TB, p *port.Pool) {
	t.Helper()
	chunks, large := p.Available()
	require.Equal(t, p.Config().Chunks, chunks, "chunks leaked or freed twice")
	require.Equal(t, p.Config().LargeBuffers, large, "large buffers leaked or freed twice")
}

// createIn makes a device in this process's namespace and moves it, up and with addresses, into a new one, as a pod's is.
func createIn(t testing.TB, cfg Config, addrs ...string) (*Port, string) {
	t.Helper()
	host, pod := newNetNS(t), newNetNS(t)
	var p *Port
	in(t, host, func() (err error) { p, err = Create(cfg); return err })
	t.Cleanup(func() { _ = p.Destroy() })
	ip(t, "-n", host, "link", "set", cfg.Name, "netns", pod)
	setUp(t, pod, cfg.Name, addrs...)
	return p, pod
}

func setUp(t testing.TB, netns, name string, addrs ...string) {
	t.Helper()
	require.NoError(t, inErr(netns, func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0)
	}))
	ip(t, "-n", netns, "link", "set", name, "up")
	for _, a := range addrs {
		args := []string{"-n", netns, "addr", "add", a, "dev", name}
		if strings.Contains(a, ":") {
			args = append(args, "nodad")
		}
		ip(t, args...)
	}
}
