package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestSecondDaemonIsRefusedAndNamesTheFirst(t *testing.T) {
	cfg := testConfig(t)
	n := startNode(t, cfg, newFakePlatform())

	var running *AlreadyRunningError
	err := Run(t.Context(), cfg, Options{Platform: newFakePlatform()})
	require.ErrorAs(t, err, &running, "same state folder")
	require.Equal(t, os.Getpid(), running.PID)
	require.ErrorContains(t, err, "uses "+cfg.StateDir)

	other := testConfig(t)
	err = Run(t.Context(), other, Options{Platform: newFakePlatform()})
	require.ErrorAs(t, err, &running, "same network namespace")
	require.Equal(t, os.Getpid(), running.PID)
	require.ErrorContains(t, err, "serves this network namespace")

	require.NotNil(t, n.status(), "the first one lives on")
	require.NoError(t, n.stop())
	startNode(t, other, newFakePlatform())
}

func TestStaleSocketIsReplacedAndAnsweredOneIsNot(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	stale.SetUnlinkOnClose(false)
	require.NoError(t, stale.Close())
	require.FileExists(t, path)

	l, err := listenLocal(path, 0o640)
	require.NoError(t, err)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o640), info.Mode().Perm())
	c, err := net.Dial("unix", path)
	require.NoError(t, err)
	require.NoError(t, c.Close())

	_, err = listenLocal(path, 0o640)
	var running *AlreadyRunningError
	require.ErrorAs(t, err, &running)
	require.Equal(t, os.Getpid(), running.PID)
	require.NoError(t, l.Close())

	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = listenLocal(file, 0o640)
	require.ErrorContains(t, err, "is no socket")
	require.FileExists(t, file)
}

func TestSocketHasItsMode(t *testing.T) {
	n := startNode(t, testConfig(t, "OVERPLANE_SOCKET_MODE=0600"), newFakePlatform())
	info, err := os.Stat(n.cfg.Socket)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
}

// manager plays the service manager's part of sd_notify(3).
func manager(t *testing.T) (path string, next func() string) {
	path = filepath.Join(t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close() })
	return path, func() string {
		buf := make([]byte, 4096)
		require.NoError(t, c.SetReadDeadline(time.Now().Add(5*time.Second)))
		n, err := c.Read(buf)
		require.NoError(t, err)
		return string(buf[:n])
	}
}

func TestServiceManagerIsToldOfEveryTurn(t *testing.T) {
	path, next := manager(t)
	env := map[string]string{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "300000", "WATCHDOG_PID": strconv.Itoa(os.Getpid())}
	cfg := testConfig(t, "OVERPLANE_STATE_SOURCE=file")
	ctx, cancel := context.WithCancel(t.Context())
	reload, ended := make(chan os.Signal), make(chan error, 1)
	go func() {
		ended <- Run(ctx, cfg, Options{
			Platform: newFakePlatform(), Log: slog.New(slog.DiscardHandler), Getenv: func(k string) string { return env[k] }, Reload: reload,
		})
	}()
	require.Contains(t, next(), "READY=1\nSTATUS=forwarding on eth0 (xdp-copy)")
	require.Equal(t, "WATCHDOG=1", next())
	reload <- unix.SIGHUP
	until := func(want string) {
		for got := next(); ; got = next() {
			if len(got) >= len(want) && got[:len(want)] == want {
				return
			}
			require.Equal(t, "WATCHDOG=1", got)
		}
	}
	until("RELOADING=1\nMONOTONIC_USEC=")
	until("READY=1")
	cancel()
	until("STOPPING=1")
	require.NoError(t, <-ended)
}

func TestWatchdogOfAnotherProcessIsNotFed(t *testing.T) {
	env := map[string]string{"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}
	n := newNotifier(func(k string) string { return env[k] })
	require.Zero(t, n.watchdog)
	n.Ready("") // nobody listens: no harm
	require.Equal(t, notifier{}, newNotifier(func(string) string { return "" }))
}

func TestMissingCapabilitiesAreAllNamed(t *testing.T) {
	all := uint64(1)<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_BPF | 1<<unix.CAP_SYS_ADMIN
	require.Empty(t, checkCapabilities(all))
	require.Empty(t, checkCapabilities(all&^(1<<unix.CAP_BPF)), "CAP_SYS_ADMIN includes it")
	errs := checkCapabilities(all &^ (1<<unix.CAP_BPF | 1<<unix.CAP_SYS_ADMIN))
	require.Len(t, errs, 2)
	require.ErrorContains(t, errs[0], "missing capability CAP_BPF")
	require.Len(t, checkCapabilities(0), len(neededCapabilities))

	path := filepath.Join(t.TempDir(), "status")
	require.NoError(t, os.WriteFile(path, []byte("Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t0000008000003000\n"), 0o600))
	caps, err := effectiveCapabilities(path)
	require.NoError(t, err)
	require.Equal(t, uint64(1)<<unix.CAP_NET_ADMIN|1<<unix.CAP_NET_RAW|1<<unix.CAP_BPF, caps)
}

func TestMissingTunDeviceIsNamed(t *testing.T) {
	require.ErrorContains(t, checkTun("/nowhere/net/tun"), "no /nowhere/net/tun")
	require.NoError(t, checkTun("/dev/null"))
}

func TestPinsNeedABPFFileSystem(t *testing.T) {
	err := checkBPFFS(filepath.Join(t.TempDir(), "not", "there"))
	require.ErrorContains(t, err, "is not on a BPF file system")
	require.ErrorContains(t, err, "OVERPLANE_BPF_DIR")
}

func TestPanicOfACallIsItsErrorAlone(t *testing.T) {
	cfg := testConfig(t)
	a := newAgent(cfg, "test", slog.New(slog.DiscardHandler), newFakePlatform())
	ctx, cancel := context.WithCancel(t.Context())
	go a.loop(ctx)
	_, err := interceptor(a.log)(ctx, nil, &grpc.UnaryServerInfo{FullMethod: "/x/Y"}, func(ctx context.Context, _ any) (any, error) {
		return nil, a.do(ctx, func() { panic("boom") })
	})
	require.Equal(t, codes.Internal, status.Code(err))
	require.ErrorContains(t, err, "boom")
	ran := false
	require.NoError(t, a.do(ctx, func() { ran = true }), "the agent lives on")
	require.True(t, ran)
	cancel()
	<-a.stopped
	require.ErrorIs(t, a.do(context.Background(), func() {}), errStopped)
}

func TestOnlyTheLatestStateIsWritten(t *testing.T) {
	gate, wrote := make(chan struct{}), make(chan string, 10)
	s := newStateSaver("file", slog.New(slog.DiscardHandler), func(_ string, d *desired) error {
		<-gate
		wrote <- fmt.Sprint(len(d.pools))
		return nil
	})
	for i := range 5 {
		s.Save(&desired{pools: make([]pool, i)})
		time.Sleep(time.Millisecond)
	}
	close(gate)
	s.Close()
	close(wrote)
	var got []string
	for w := range wrote {
		got = append(got, w)
	}
	require.Equal(t, "4", got[len(got)-1])
	require.LessOrEqual(t, len(got), 2)
}
