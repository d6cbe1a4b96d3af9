package agent

import (
	"context"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane"
)

// stuckForwarder is a data plane one of whose workers may hang.
type stuckForwarder struct {
	Forwarder
	stuck atomic.Bool
}

func (f *stuckForwarder) Stats(ctx context.Context) ([]dataplane.WorkerStats, error) {
	if f.stuck.Load() {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, nil
}

// A daemon whose worker, or whose own goroutine, is stuck must stop telling the service manager that it lives, so that it is killed and started again.
func TestWhoIsStuckDoesNotFeedTheWatchdog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	require.NoError(t, err)
	defer l.Close()
	fed := func(within time.Duration) bool {
		require.NoError(t, l.SetReadDeadline(time.Now().Add(within)))
		n, err := l.Read(make([]byte, 100))
		return err == nil && n > 0
	}
	drain := func() {
		for fed(50 * time.Millisecond) {
		}
	}

	f := &stuckForwarder{}
	a := newAgent(testConfig(t), "test", slog.New(slog.DiscardHandler), newFakePlatform())
	a.dp = f
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go a.loop(ctx)
	go func() {
		defer close(ended)
		a.feedWatchdog(ctx, notifier{addr: &net.UnixAddr{Name: path, Net: "unixgram"}, watchdog: 300 * time.Millisecond})
	}()
	defer func() { cancel(); <-ended }()
	require.True(t, fed(2*time.Second))

	f.stuck.Store(true) // a worker
	time.Sleep(200 * time.Millisecond)
	drain()
	require.False(t, fed(500*time.Millisecond), "fed although a worker hangs")
	f.stuck.Store(false)
	require.True(t, fed(2*time.Second))

	block := make(chan struct{}) // the agent's goroutine
	go func() { _ = a.do(ctx, func() { <-block }) }()
	time.Sleep(200 * time.Millisecond)
	drain()
	require.False(t, fed(500*time.Millisecond), "fed although the agent hangs")
	close(block)
	require.True(t, fed(2*time.Second))
}
