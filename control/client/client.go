// Package client speaks to a node's daemon over its unix socket: what the operator's command and other local tools are made of.
//
//	Dial ─> Client (every method of LocalService) ─> errors for people
//
// A socket that cannot be used says at once what is wrong with it and what to do; a call that the daemon refuses says why, in the daemon's
// words. The tables and JSON that people read are made by package view.
package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// DefaultSocket is where the daemon listens unless it is told otherwise.
const DefaultSocket = "/run/overplane/overplaned.sock"

// SocketEnv is the environment variable that names another socket.
const SocketEnv = "OVERPLANE_SOCKET"

const (
	// dialTimeout bounds the wait for a connection: a daemon that is well answers at once.
	dialTimeout = 5 * time.Second
	// callTimeout bounds a call whose context has no deadline. The longest is ReplaceState, which waits for every worker.
	callTimeout = 60 * time.Second
	// maxSocketPath is the longest path of a unix socket (sun_path in unix(7), less the final zero).
	maxSocketPath = 107
)

// Socket is the socket to use: the environment's, else the default.
func Socket() string {
	if s := os.Getenv(SocketEnv); s != "" {
		return s
	}
	return DefaultSocket
}

// Client is a connection to the daemon. It may be used by any number of goroutines.
type Client struct {
	controlv1.LocalServiceClient
	conn   *grpc.ClientConn
	socket string
}

// Dial connects to the daemon that listens on socket. The connection stands when it returns, so its errors are about the socket: they
// name it and say what to do. Errors of the calls are of type *Error.
func Dial(socket string) (*Client, error) {
	c := &Client{socket: socket}
	var refused atomic.Pointer[error] // why the kernel gave no connection
	var err error
	c.conn, err = grpc.NewClient("passthrough:///overplaned",
		grpc.WithTransportCredentials(insecure.NewCredentials()), // access is a matter of the socket's permissions
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "unix", socket)
			if err != nil {
				refused.Store(&err)
			}
			return conn, err
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes), grpc.MaxCallSendMsgSize(api.MaxMessageBytes)),
		grpc.WithUnaryInterceptor(c.call),
	)
	if err != nil {
		return nil, err
	}
	if err := c.connect(&refused); err != nil {
		return nil, errors.Join(err, c.conn.Close())
	}
	c.LocalServiceClient = controlv1.NewLocalServiceClient(c.conn)
	return c, nil
}

// connect waits until the daemon has answered with its HTTP/2 settings. A stopped process takes connections (the kernel does), but does not answer.
func (c *Client) connect(refused *atomic.Pointer[error]) error {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	c.conn.Connect()
	for {
		switch s := c.conn.GetState(); {
		case s == connectivity.Ready:
			return nil
		case s == connectivity.TransientFailure && refused.Load() != nil:
			return explainDial(c.socket, *refused.Load())
		case s == connectivity.TransientFailure:
			return fmt.Errorf("socket %s: what listens there is not overplaned", c.socket)
		case !c.conn.WaitForStateChange(ctx, s):
			return explainDial(c.socket, os.ErrDeadlineExceeded)
		}
	}
}

// Close ends the connection and every call that is under way.
func (c *Client) Close() error { return c.conn.Close() }

// explainDial says what is wrong with a socket, and what to do.
func explainDial(socket string, err error) error {
	const hint = "start it (systemctl start overplaned), or name another socket with --socket or " + SocketEnv
	info, statErr := os.Stat(socket)
	switch {
	case socket == "":
		return fmt.Errorf("the socket's name is empty: name it with --socket or %s", SocketEnv)
	case len(socket) > maxSocketPath:
		return fmt.Errorf("socket %s: the path has %d bytes: a unix socket's may have at most %d", socket, len(socket), maxSocketPath)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("socket %s: permission denied: run this as root, or as a member of the socket's group", socket)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("socket %s does not exist, so overplaned is not running, or listens elsewhere: %s", socket, hint)
	case statErr == nil && info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("%s is no socket: name overplaned's with --socket or %s", socket, SocketEnv)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("socket %s exists, but nobody listens on it: overplaned is not running: %s", socket, hint)
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("socket %s: overplaned takes no connections: it hangs or is stopped; see its log (journalctl -u overplaned)", socket)
	}
	return fmt.Errorf("socket %s: %w", socket, err)
}

// Error is a call that failed. Its text is for people; errors.As finds it, status.FromError its gRPC status.
type Error struct {
	Method string // e.g. "AttachPod"
	Status *status.Status
	text   string
}

// Error implements error.
func (e *Error) Error() string { return e.text }

// GRPCStatus is what package status looks for.
func (e *Error) GRPCStatus() *status.Status { return e.Status }

// call gives a call a deadline if it has none, and its error words.
func (c *Client) call(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	err := invoker(ctx, method, req, reply, cc, opts...)
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	e := &Error{Method: path.Base(method), Status: st, text: st.Message()}
	switch st.Code() {
	case codes.Unavailable:
		e.text = fmt.Sprintf("overplaned on %s went away during %s: %s", c.socket, e.Method, st.Message())
	case codes.DeadlineExceeded:
		e.text = fmt.Sprintf("overplaned on %s did not finish %s in time: %s", c.socket, e.Method, st.Message())
	case codes.Unimplemented:
		e.text = fmt.Sprintf("overplaned on %s does not know %s: it is older than this command", c.socket, e.Method)
	case codes.ResourceExhausted:
		e.text = fmt.Sprintf("%s: %s (the most is %d bytes a message)", e.Method, st.Message(), api.MaxMessageBytes)
	case codes.Internal, codes.Unknown:
		e.text = fmt.Sprintf("%s: %s", e.Method, st.Message())
	}
	return e
}
