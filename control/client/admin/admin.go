// Package admin speaks to the controller's AdminService: what the operator's cluster commands are made of.
//
//	Default, Flags ─> Dial ─> Client (every method of AdminService) ─> errors for people
package admin

import (
	"context"
	"fmt"
	"net"
	"os"
	"path"
	"time"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/pki"
)

// Config is how the controller is reached.
type Config struct {
	Address    string // host:port of its admin listener
	ServerName string // the name that its certificate must have; empty: the host of Address
	Files      pki.Files
}

// Variables of the environment, and what holds without them.
const (
	AddressEnv     = "OVERPLANE_CONTROLLER"
	CAEnv          = "OVERPLANE_ADMIN_CA"
	CertEnv        = "OVERPLANE_ADMIN_CERT"
	KeyEnv         = "OVERPLANE_ADMIN_KEY"
	DefaultAddress = "127.0.0.1:7444"
	defaultDir     = "/etc/overplane/pki/"
)

// callTimeout bounds a call whose context has no deadline.
const callTimeout = 30 * time.Second

// Default is the environment's configuration.
func Default() *Config {
	get := func(name, otherwise string) string {
		if v := os.Getenv(name); v != "" {
			return v
		}
		return otherwise
	}
	return &Config{
		Address: get(AddressEnv, DefaultAddress),
		Files:   pki.Files{CA: get(CAEnv, defaultDir+"ca.crt"), Cert: get(CertEnv, defaultDir+"admin.crt"), Key: get(KeyEnv, defaultDir+"admin.key")},
	}
}

// Flags adds flags that change the configuration.
func (c *Config) Flags(f *pflag.FlagSet) {
	f.StringVar(&c.Address, "controller", c.Address, "the controller's admin address (environment: "+AddressEnv+")")
	f.StringVar(&c.ServerName, "controller-name", c.ServerName, "the name in the controller's certificate, if it is not the address's host")
	f.StringVar(&c.Files.CA, "ca", c.Files.CA, "the authority's certificates (environment: "+CAEnv+")")
	f.StringVar(&c.Files.Cert, "cert", c.Files.Cert, "the administrator's certificate (environment: "+CertEnv+")")
	f.StringVar(&c.Files.Key, "key", c.Files.Key, "its key (environment: "+KeyEnv+")")
}

// Client is a connection to a controller. It may be used by any number of goroutines.
type Client struct {
	controlv1.AdminServiceClient
	conn    *grpc.ClientConn
	address string
}

// Dial makes a client. The connection is made by the first call; its errors are of type *Error.
func Dial(cfg *Config) (*Client, error) {
	host, _, err := net.SplitHostPort(cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("controller %q: want host:port", cfg.Address)
	}
	if cfg.ServerName != "" {
		host = cfg.ServerName
	}
	tls, err := cfg.Files.Client(host)
	if err != nil {
		return nil, fmt.Errorf("%w (overplane-controller pki issue admin makes a certificate; --ca, --cert and --key name the files)", err)
	}
	c := &Client{address: cfg.Address}
	c.conn, err = grpc.NewClient("passthrough:///"+cfg.Address, grpc.WithTransportCredentials(credentials.NewTLS(tls)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes)), grpc.WithUnaryInterceptor(c.call))
	if err != nil {
		return nil, err
	}
	c.AdminServiceClient = controlv1.NewAdminServiceClient(c.conn)
	return c, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Error is a call that failed. Its text is for people; status.FromError finds its gRPC status.
type Error struct {
	Method string
	Status *status.Status
	text   string
}

// Error implements error.
func (e *Error) Error() string { return e.text }

// GRPCStatus is what package status looks for.
func (e *Error) GRPCStatus() *status.Status { return e.Status }

func (c *Client) call(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, callTimeout)
		defer cancel()
	}
	err := invoke(ctx, method, req, reply, cc, opts...)
	if err == nil {
		return nil
	}
	st := status.Convert(err)
	e := &Error{Method: path.Base(method), Status: st, text: st.Message()}
	switch st.Code() {
	case codes.Unavailable:
		e.text = fmt.Sprintf("controller %s: %s", c.address, st.Message())
	case codes.DeadlineExceeded:
		e.text = fmt.Sprintf("controller %s did not finish %s in time: %s", c.address, e.Method, st.Message())
	case codes.Unimplemented:
		e.text = fmt.Sprintf("controller %s does not know %s: it is older than this command", c.address, e.Method)
	}
	return e
}
