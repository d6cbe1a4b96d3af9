package server_test

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/control/server"
	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

// cluster is a controller on a store in memory, over real TCP and TLS, with simulated nodes.
type cluster struct {
	t    *testing.T
	dir  string // of the authority
	mem  *store.Memory
	cfg  server.Config
	node string // address that nodes dial

	mu      sync.Mutex
	stop    func()
	server  *server.Server
	store   *store.Store
	adminAt string
}

// dualStack are the ranges that most tests use.
func dualStack() ipam.Ranges {
	return ipam.Ranges{
		Families: []ipam.Family{ipam.IPv4, ipam.IPv6},
		Pods:     []ipam.PodRange{{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockBits: 24}, {CIDR: netip.MustParsePrefix("fd12:3456:789a::/64"), BlockBits: 80}},
		Services: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("fd12:3456:789a:1::/108")},
	}
}

func newCluster(t *testing.T, ranges ipam.Ranges, change func(*server.Config)) *cluster {
	c := &cluster{t: t, dir: t.TempDir(), mem: store.NewMemory()}
	require.NoError(t, pki.Init(c.dir, "test", time.Now()))
	c.issue(pki.Controller, "controller", 0)
	c.issue(pki.Admin, "admin", 0)
	c.cfg = server.Config{Ranges: ranges, Grace: time.Millisecond, IPAM: ipam.Config{Cooldown: 300 * time.Millisecond, Deadline: 5 * time.Second}, AckTimeout: 5 * time.Second}
	if testing.Verbose() && os.Getenv("TEST_LOG") != "" {
		c.cfg.Log = slog.Default()
	}
	if change != nil {
		change(&c.cfg)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c.node = l.Addr().String()
	require.NoError(t, l.Close())
	c.start()
	t.Cleanup(func() { c.kill() })
	return c
}

// issue makes a certificate in the cluster's directory.
func (c *cluster) issue(role pki.Role, name string, validity time.Duration) pki.Files {
	f := pki.Files{CA: filepath.Join(c.dir, pki.CACert), Cert: filepath.Join(c.dir, name+".crt"), Key: filepath.Join(c.dir, name+".key")}
	r := pki.Request{Role: role, Name: name, Validity: validity}
	if role == pki.Controller {
		r.Hosts = []string{"127.0.0.1", "localhost"}
	}
	require.NoError(c.t, pki.Issue(c.dir, r, f.Cert, f.Key, true, time.Now()))
	return f
}

func (c *cluster) files(name string) pki.Files {
	return pki.Files{CA: filepath.Join(c.dir, pki.CACert), Cert: filepath.Join(c.dir, name+".crt"), Key: filepath.Join(c.dir, name+".key")}
}

// start starts a controller on what is in the store.
func (c *cluster) start() {
	st, err := c.mem.Open(context.Background())
	require.NoError(c.t, err)
	v := server.New(st, c.cfg)
	h := server.NewHealth(v)
	tc, err := c.files("controller").Server(pki.Node)
	require.NoError(c.t, err)
	ta, err := c.files("controller").Server(pki.Admin)
	require.NoError(c.t, err)
	nodes, admin := v.NodeServer(tc, h), v.AdminServer(ta, h)
	var ln net.Listener
	require.Eventually(c.t, func() bool { ln, err = net.Listen("tcp", c.node); return err == nil }, 5*time.Second, 10*time.Millisecond)
	la, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(c.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = v.Run(ctx) })
	wg.Go(func() { _ = nodes.Serve(ln) })
	wg.Go(func() { _ = admin.Serve(la) })
	require.Eventually(c.t, v.Leading, 10*time.Second, 5*time.Millisecond)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server, c.store, c.adminAt = v, st, la.Addr().String()
	c.stop = func() {
		cancel()
		nodes.Stop()
		admin.Stop()
		wg.Wait()
		_ = st.Close()
	}
}

// kill ends the controller without ceremony; the store keeps what it has.
func (c *cluster) kill() {
	c.mu.Lock()
	stop := c.stop
	c.stop = nil
	c.mu.Unlock()
	if stop != nil {
		stop()
	}
}

func (c *cluster) admin() controlv1.AdminServiceClient {
	tc, err := c.files("admin").Client("127.0.0.1")
	require.NoError(c.t, err)
	conn, err := grpc.NewClient(c.adminAt, grpc.WithTransportCredentials(credentials.NewTLS(tc)), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	require.NoError(c.t, err)
	c.t.Cleanup(func() { _ = conn.Close() })
	return controlv1.NewAdminServiceClient(conn)
}

// node is a simulated node: the real client with a data plane that keeps what it is told.
type node struct {
	name   string
	client *syncclient.Client
	stop   func()

	mu    sync.Mutex
	state *controlv1.NodeState
	calls int
	hook  func(*controlv1.NodeState) error // what the data plane has to say
}

func (n *node) apply(_ context.Context, s *controlv1.NodeState) error {
	if err := api.Validate(s); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls++
	if n.hook != nil {
		if err := n.hook(s); err != nil {
			return err
		}
	}
	n.state = s
	return nil
}

func (n *node) now() *controlv1.NodeState {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state
}

func (n *node) own() (out []string) {
	for _, b := range n.now().GetOwnBlocks() {
		out = append(out, b.GetCidr())
	}
	return out
}

// join starts node number i, named n<i>.
func (c *cluster) join(i int, change func(*syncclient.Config)) *node {
	name := fmt.Sprintf("n%d", i)
	if _, err := os.Stat(filepath.Join(c.dir, name+".crt")); err != nil {
		c.issue(pki.Node, name, 0)
	}
	cfg := syncclient.Config{
		Node: name, Addresses: []string{c.node}, TLS: c.files(name), MinBackoff: 20 * time.Millisecond, MaxBackoff: 200 * time.Millisecond,
		Facts: func() (syncclient.Facts, error) {
			return syncclient.Facts{
				IPv4: fmt.Sprintf("10.240.%d.%d", i/250, i%250+1), IPv6: fmt.Sprintf("fd00:240::%x", i+1), MAC: fmt.Sprintf("02:00:00:00:%02x:%02x", i/256, i%256),
			}, nil
		},
	}
	if testing.Verbose() && os.Getenv("TEST_LOG") != "" {
		cfg.Log = slog.Default().With("node", name)
	}
	if change != nil {
		change(&cfg)
	}
	cl, err := syncclient.New(cfg)
	require.NoError(c.t, err)
	n := &node{name: name, client: cl}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = cl.Run(ctx, n.apply)
	}()
	var once sync.Once
	n.stop = func() { once.Do(func() { cancel(); <-done }) }
	c.t.Cleanup(n.stop)
	return n
}

// eventually waits for the cluster to be as f asks.
func (c *cluster) eventually(f func() bool, msg string) {
	c.t.Helper()
	require.Eventually(c.t, f, 20*time.Second, 10*time.Millisecond, msg)
}

// converged waits until every one of the nodes forwards to all the others.
func (c *cluster) converged(nodes ...*node) {
	c.t.Helper()
	a := c.admin()
	c.eventually(func() bool {
		r, err := a.GetConvergence(c.t.Context(), &controlv1.GetConvergenceRequest{})
		if err != nil || int(r.GetConverged()) < len(nodes) {
			return false
		}
		for _, n := range nodes {
			if n.client.Status().Programmed.GetRevision() < r.GetIssued().GetRevision() {
				return false
			}
		}
		return true
	}, "the nodes do not converge")
}
