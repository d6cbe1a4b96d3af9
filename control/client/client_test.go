package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

type daemon struct {
	controlv1.UnimplementedLocalServiceServer
	err   error
	block bool
}

func (d *daemon) GetStatus(ctx context.Context, _ *controlv1.GetStatusRequest) (*controlv1.GetStatusResponse, error) {
	if d.block {
		<-ctx.Done()
		return nil, status.FromContextError(ctx.Err()).Err()
	}
	return &controlv1.GetStatusResponse{Node: "n1", Problems: []string{strings.Repeat("x", 5<<20)}}, d.err
}

// serve starts a daemon; stop ends it and leaves its socket there, as a killed one does.
func serve(t *testing.T, d *daemon) (socket string, stop func()) {
	socket = filepath.Join(t.TempDir(), "overplaned.sock")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	s := grpc.NewServer(grpc.MaxSendMsgSize(64 << 20))
	controlv1.RegisterLocalServiceServer(s, d)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	stopped := false
	stop = func() {
		if !stopped {
			stopped = true
			s.Stop()
			if err := <-done; !errors.Is(err, grpc.ErrServerStopped) { // stopped before it began
				require.NoError(t, err)
			}
		}
	}
	t.Cleanup(stop)
	return socket, stop
}

func TestCallsReachTheDaemon(t *testing.T) {
	socket, _ := serve(t, &daemon{})
	c, err := Dial(socket)
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close()) }()
	r, err := c.GetStatus(t.Context(), &controlv1.GetStatusRequest{}) // more than gRPC's default of 4 MiB
	require.NoError(t, err)
	require.Equal(t, "n1", r.Node)
}

func TestDialSaysWhatIsWrongWithTheSocket(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "none.sock")
	_, err := Dial(missing)
	require.EqualError(t, err, "socket "+missing+" does not exist, so overplaned is not running, or listens elsewhere: "+
		"start it (systemctl start overplaned), or name another socket with --socket or OVERPLANE_SOCKET")

	dead, stop := serve(t, &daemon{})
	stop()
	_, err = Dial(dead)
	require.EqualError(t, err, "socket "+dead+" exists, but nobody listens on it: overplaned is not running: "+
		"start it (systemctl start overplaned), or name another socket with --socket or OVERPLANE_SOCKET")

	file := filepath.Join(dir, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err = Dial(file)
	require.EqualError(t, err, file+" is no socket: name overplaned's with --socket or OVERPLANE_SOCKET")

	_, err = Dial("")
	require.EqualError(t, err, "the socket's name is empty: name it with --socket or OVERPLANE_SOCKET")

	long := filepath.Join(dir, strings.Repeat("x", 120))
	_, err = Dial(long)
	require.ErrorContains(t, err, "a unix socket's may have at most 107")

	// Another user's socket: root may open everything, so the kernel's refusal is given.
	require.EqualError(t, explainDial("/run/x", &net.OpError{Op: "dial", Err: os.ErrPermission}),
		"socket /run/x: permission denied: run this as root, or as a member of the socket's group")
}

func TestDialNoticesWhatIsNoDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "other.sock")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = conn.Write([]byte("220 mail.example ESMTP\r\n"))
			_ = conn.Close()
		}
	}()
	_, err = Dial(socket)
	require.EqualError(t, err, "socket "+socket+": what listens there is not overplaned")
}

// A stopped daemon's kernel still takes connections.
func TestDialDoesNotWaitForAHangingDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "hangs.sock")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	defer func() { _ = l.Close() }()
	start := time.Now()
	_, err = Dial(socket)
	require.EqualError(t, err, "socket "+socket+": overplaned takes no connections: it hangs or is stopped; see its log (journalctl -u overplaned)")
	require.Less(t, time.Since(start), 6*dialTimeout)
}

func TestCallsSayWhyTheyFailed(t *testing.T) {
	d := &daemon{}
	socket, stop := serve(t, d)
	c, err := Dial(socket)
	require.NoError(t, err)
	defer func() { require.NoError(t, c.Close()) }()
	call := func(ctx context.Context) error {
		_, err := c.GetStatus(ctx, &controlv1.GetStatusRequest{})
		var e *Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, "GetStatus", e.Method)
		return err
	}

	d.err = status.Error(codes.InvalidArgument, "address 10.9.9.9 is in none of this node's blocks")
	err = call(t.Context())
	require.EqualError(t, err, "address 10.9.9.9 is in none of this node's blocks") // the daemon's words, nothing around them
	require.Equal(t, codes.InvalidArgument, status.Code(err))

	d.err = status.Error(codes.Internal, "oops")
	require.EqualError(t, call(t.Context()), "GetStatus: oops")

	d.err = status.Error(codes.Unimplemented, "unknown method")
	require.EqualError(t, call(t.Context()), "overplaned on "+socket+" does not know GetStatus: it is older than this command")

	d.block = true
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorContains(t, call(ctx), "overplaned on "+socket+" did not finish GetStatus in time")

	stop()
	require.ErrorContains(t, call(t.Context()), "overplaned on "+socket+" went away during GetStatus")
}

func TestSocketIsTheEnvironmentsOrTheDefault(t *testing.T) {
	t.Setenv(SocketEnv, "")
	require.Equal(t, DefaultSocket, Socket())
	t.Setenv(SocketEnv, "/run/x.sock")
	require.Equal(t, "/run/x.sock", Socket())
}
