package agent

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/control/server"
	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/ipam"
)

// testController is a controller on a store in memory, over real TCP and TLS.
type testController struct {
	t       *testing.T
	dir     string // of the authority
	mem     *store.Memory
	address string // where nodes dial
	admin   controlv1.AdminServiceClient
	kill    func()
}

func newTestController(t *testing.T) *testController {
	t.Helper()
	c := &testController{t: t, dir: t.TempDir(), mem: store.NewMemory()}
	require.NoError(t, pki.Init(c.dir, "test", time.Now()))
	for _, r := range []pki.Request{
		{Role: pki.Controller, Name: "controller", Hosts: []string{"127.0.0.1"}}, {Role: pki.Admin, Name: "admin"}, {Role: pki.Node, Name: "n1"}, {Role: pki.Node, Name: "n2"},
	} {
		require.NoError(t, pki.Issue(c.dir, r, c.files(r.Name).Cert, c.files(r.Name).Key, false, time.Now()))
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c.address = l.Addr().String()
	require.NoError(t, l.Close())
	c.start()
	return c
}

func (c *testController) files(name string) *pki.Files {
	return &pki.Files{CA: filepath.Join(c.dir, pki.CACert), Cert: filepath.Join(c.dir, name+".crt"), Key: filepath.Join(c.dir, name+".key")}
}

// start starts the controller on what is in the store.
func (c *testController) start() {
	st, err := c.mem.Open(context.Background())
	require.NoError(c.t, err)
	v := server.New(st, server.Config{
		Grace: time.Millisecond, IPAM: ipam.Config{Cooldown: 100 * time.Millisecond, Deadline: 5 * time.Second},
		Ranges: ipam.Ranges{Families: []ipam.Family{ipam.IPv4, ipam.IPv6}, Pods: []ipam.PodRange{
			{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockBits: 24}, {CIDR: netip.MustParsePrefix("fd12:3456:789a::/64"), BlockBits: 80},
		}},
	})
	forNodes, err := c.files("controller").Server(pki.Node)
	require.NoError(c.t, err)
	forAdmins, err := c.files("controller").Server(pki.Admin)
	require.NoError(c.t, err)
	h := server.NewHealth(v)
	nodes, admin := v.NodeServer(forNodes, h), v.AdminServer(forAdmins, h)
	ln, err := net.Listen("tcp", c.address)
	require.NoError(c.t, err)
	la, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(c.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = v.Run(ctx) })
	wg.Go(func() { _ = nodes.Serve(ln) })
	wg.Go(func() { _ = admin.Serve(la) })
	c.kill = sync.OnceFunc(func() {
		cancel()
		nodes.Stop()
		admin.Stop()
		wg.Wait()
		_ = st.Close()
	})
	c.t.Cleanup(c.kill)
	tc, err := c.files("admin").Client("127.0.0.1")
	require.NoError(c.t, err)
	conn, err := grpc.NewClient(la.Addr().String(), grpc.WithTransportCredentials(credentials.NewTLS(tc)))
	require.NoError(c.t, err)
	c.t.Cleanup(func() { _ = conn.Close() })
	c.admin = controlv1.NewAdminServiceClient(conn)
	require.Eventually(c.t, v.Leading, 10*time.Second, 5*time.Millisecond)
}

// config is node n1's.
func (c *testController) config(settings ...string) Config {
	f := c.files("n1")
	return testConfig(c.t, append([]string{
		"OVERPLANE_STATE_SOURCE=controller", "OVERPLANE_SYNC_ADDRESSES=" + c.address, "OVERPLANE_TLS_CA=" + f.CA, "OVERPLANE_TLS_CERT=" + f.Cert, "OVERPLANE_TLS_KEY=" + f.Key,
	}, settings...)...)
}

// other joins node n2, which has no data plane.
func (c *testController) other() {
	client, err := syncclient.New(syncclient.Config{
		Node: "n2", Addresses: []string{c.address}, TLS: *c.files("n2"), MinBackoff: 20 * time.Millisecond,
		Facts: func() (syncclient.Facts, error) {
			return syncclient.Facts{IPv4: "10.240.0.12", IPv6: "fd00:240::12", MAC: "02:00:00:00:00:02"}, nil
		},
	})
	require.NoError(c.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = client.Run(ctx, func(context.Context, *controlv1.NodeState) error { return nil })
	}()
	c.t.Cleanup(func() { cancel(); <-done })
}

func (c *testController) node(name string) *controlv1.NodeConvergence {
	r, err := c.admin.GetConvergence(c.t.Context(), &controlv1.GetConvergenceRequest{})
	require.NoError(c.t, err)
	for _, n := range r.GetNodes() {
		if n.GetNode() == name {
			return n
		}
	}
	return nil
}

// blockState is the state of a block, unspecified if it was never used.
func (c *testController) blockState(cidr string) controlv1.BlockState {
	r, err := c.admin.ListBlocks(c.t.Context(), &controlv1.ListBlocksRequest{})
	require.NoError(c.t, err)
	for _, b := range r.GetBlocks() {
		if b.GetCidr() == cidr {
			return b.GetState()
		}
	}
	return controlv1.BlockState_BLOCK_STATE_UNSPECIFIED
}

func (n *node) joined() {
	n.t.Helper()
	n.eventually("the node joins", func() bool { return len(n.status().GetOwnBlocks()) == 2 })
}

func TestNodeJoinsAndReachesOthers(t *testing.T) {
	c := newTestController(t)
	n := startNode(t, c.config(), newFakePlatform())
	n.joined()
	s := n.status()
	require.True(t, s.GetReady(), "%v", s.GetProblems())
	require.Equal(t, "controller", s.GetStateSource())
	require.True(t, s.GetController().GetConnected())
	require.Equal(t, c.address, s.GetController().GetAddress())
	require.Empty(t, s.GetWarnings())
	require.Equal(t, []string{"10.244.0.0/24", "fd12:3456:789a::/80"}, s.GetOwnBlocks())

	c.other()
	n.eventually("the route to the other node", func() bool { return n.routes()["10.244.1.0/24"].GetMac() == "02:00:00:00:00:02" })
	n.eventually("the acknowledgement", func() bool {
		r, err := c.admin.GetConvergence(t.Context(), &controlv1.GetConvergenceRequest{})
		return err == nil && r.GetConverged() == 2
	})
	_, err := n.client.ReplaceState(t.Context(), &controlv1.ReplaceStateRequest{State: threeNodes()})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "a node has one source")
}

func TestNodeForwardsOnWithoutItsController(t *testing.T) {
	c := newTestController(t)
	c.other()
	cfg, machine := c.config(), newFakePlatform()
	n := startNode(t, cfg, machine)
	n.joined()
	n.eventually("the route to the other node", func() bool { return n.routes()["10.244.0.0/24"] != nil || n.routes()["10.244.1.0/24"] != nil })
	before := n.routes()

	c.kill()
	n.eventually("it says so", func() bool { return !n.status().GetController().GetConnected() })
	s := n.status()
	require.True(t, s.GetReady(), "a node that forwards is ready: %v", s.GetProblems())
	require.Len(t, s.GetWarnings(), 1)
	require.Contains(t, s.GetWarnings()[0], "no controller for ")
	require.Equal(t, before, n.routes())

	// A daemon that starts meanwhile takes the table from disk before it says that it is ready.
	require.NoError(t, n.stop())
	n = startNode(t, cfg, machine)
	require.Equal(t, before, n.routes())
	require.True(t, n.status().GetReady(), "%v", n.status().GetProblems())

	c.start()
	n.eventually("it connects again", func() bool { s := n.status(); return s.GetController().GetConnected() && len(s.GetWarnings()) == 0 })
	n.eventually("it has converged", func() bool {
		m := c.node("n1")
		return m.GetConnected() && m.GetProgrammed() != nil && m.GetBehind() == nil
	})
}

func TestNodeWithoutTableAndController(t *testing.T) {
	c := newTestController(t)
	c.kill()
	n := startNode(t, c.config(), newFakePlatform())
	require.False(t, n.status().GetReady())
	n.eventually("it says why", func() bool { return n.hasProblem("there is no desired state yet: controller " + c.address) })
	require.Empty(t, n.status().GetWarnings())
	c.start()
	n.joined()
	n.eventually("it is ready", func() bool { return n.status().GetReady() })
}

func TestBlockOfPodsIsNotGivenUp(t *testing.T) {
	c := newTestController(t)
	machine := newFakePlatform()
	n := startNode(t, c.config(), machine)
	n.joined()
	_, err := n.attach("a", machine.addNetNS("a"), "10.244.0.2", "fd12:3456:789a::2")
	require.NoError(t, err)

	_, err = c.admin.ReleaseNode(t.Context(), &controlv1.ReleaseNodeRequest{Node: "n1"})
	require.NoError(t, err)
	n.eventually("the failures are told", func() bool { return len(c.node("n1").GetFailures()) == 2 })
	f := c.node("n1").GetFailures()[0]
	require.Equal(t, []string{"own_block", "10.244.0.0/24", "pods have addresses of it: a"}, []string{f.GetKind(), f.GetKey(), f.GetReason()})
	require.True(t, n.hasProblem("pod a: "), "%v", n.status().GetProblems())
	time.Sleep(1500 * time.Millisecond) // the controller looks every second
	require.Equal(t, controlv1.BlockState_BLOCK_STATE_RELEASING, c.blockState("10.244.0.0/24"))
	_, err = n.attach("b", machine.addNetNS("b"), "10.244.0.3", "fd12:3456:789a::3")
	require.Equal(t, codes.InvalidArgument, status.Code(err), "the block takes no more pods")

	_, err = n.client.DetachPod(t.Context(), &controlv1.DetachPodRequest{Name: "a"})
	require.NoError(t, err)
	n.eventually("the last pod gone, the block is given up", func() bool {
		s := c.blockState("10.244.0.0/24")
		return s == controlv1.BlockState_BLOCK_STATE_COOLDOWN || s == controlv1.BlockState_BLOCK_STATE_FREE
	})
}

func TestNewFactsAreTold(t *testing.T) {
	c := newTestController(t)
	machine := newFakePlatform()
	n := startNode(t, c.config(), machine)
	n.joined()
	mac := func() string {
		r, err := c.admin.ListNodes(t.Context(), &controlv1.ListNodesRequest{})
		require.NoError(t, err)
		return r.GetNodes()[0].GetMac()
	}
	require.Equal(t, "02:00:00:00:00:01", mac())
	machine.set(func(f *Facts) { f.MAC = packet.MAC{2, 0, 0, 0, 0, 9} })
	n.eventually("the controller knows", func() bool { return mac() == "02:00:00:00:00:09" })
	n.eventually("the node's own state says so", func() bool { return n.status().GetReady() })
}

func TestWhatCannotBeProgrammedIsAcknowledgedAsSuch(t *testing.T) {
	c := newTestController(t)
	machine := newFakePlatform()
	n := startNode(t, c.config(), machine)
	n.joined()
	c.other()
	n.eventually("both have converged", func() bool {
		r, err := c.admin.GetConvergence(t.Context(), &controlv1.GetConvergenceRequest{})
		return err == nil && r.GetConverged() == 2
	})
	addresses := machine.facts.Addresses
	machine.set(func(f *Facts) {
		f.Addresses = []netip.Prefix{netip.MustParsePrefix("10.240.0.11/32"), netip.MustParsePrefix("fd00:240::11/128")}
	})
	n.eventually("the other node is on another link now", func() bool {
		f := c.node("n1").GetFailures()
		return len(f) == 1 && f[0].GetKind() == "member" && f[0].GetKey() == "n2"
	})
	machine.set(func(f *Facts) { f.Addresses = addresses })
	n.eventually("and back", func() bool { return len(c.node("n1").GetFailures()) == 0 })
}

func TestFactsOfANode(t *testing.T) {
	a := newAgent(Config{NodeName: "n1", Underlay: UnderlayDirect}, "test", nil, nil)
	_, err := a.syncFacts()
	require.ErrorIs(t, err, errNoFacts)
	a.facts = newFakePlatform().facts
	f, err := a.syncFacts()
	require.NoError(t, err)
	require.Equal(t, syncclient.Facts{IPv4: "10.240.0.11", IPv6: "fd00:240::11", MAC: "02:00:00:00:00:01"}, f)
	a.cfg.Underlay = UnderlayRouted
	f, err = a.syncFacts()
	require.NoError(t, err)
	require.Empty(t, f.MAC, "on a routed underlay frames go to the gateway")
	a.facts.Gone = true
	_, err = a.syncFacts()
	require.ErrorIs(t, err, errNoFacts)
}

func TestSameEntriesUnderANewVersionBuildNothing(t *testing.T) {
	c := newTestController(t)
	n := startNode(t, c.config(), newFakePlatform())
	n.joined()
	generation := func() uint64 { return n.status().GetWorkers()[0].GetSnapshot() }
	before := generation()
	r := &controlv1.Route{Prefix: "192.168.9.0/24", Target: &controlv1.Route_Unreachable{Unreachable: true}}
	_, err := c.admin.SetStaticRoute(t.Context(), &controlv1.SetStaticRouteRequest{Route: r})
	require.NoError(t, err)
	n.eventually("a route builds", func() bool { return generation() > before })

	// The controller starts again: same entries, and not less of a version.
	before = generation()
	version := n.status().GetProgrammed()
	c.kill()
	n.eventually("away", func() bool { return !n.status().GetController().GetConnected() })
	c.start()
	n.eventually("back", func() bool { return n.status().GetController().GetConnected() })
	n.eventually("converged", func() bool { m := c.node("n1"); return m.GetProgrammed() != nil && m.GetBehind() == nil })
	require.Equal(t, before, generation())
	require.Equal(t, version.GetIncarnation(), n.status().GetProgrammed().GetIncarnation())
	require.True(t, n.status().GetReady())
}

func TestControllerSettings(t *testing.T) {
	_, _, err := Load([]string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_STATE_SOURCE=controller", "OVERPLANE_TLS_CA=ca.crt", "OVERPLANE_TLS_KEY=relative", "OVERPLANE_SYNC_REMOVAL_PERCENT=0"})
	for _, want := range []string{
		`OVERPLANE_SYNC_ADDRESSES="": a node with the state source controller needs one`, `OVERPLANE_TLS_CA="ca.crt": allowed: an absolute path`, `OVERPLANE_TLS_KEY="relative"`,
		`OVERPLANE_SYNC_REMOVAL_PERCENT="0"`,
	} {
		require.ErrorContains(t, err, want)
	}
	for _, addresses := range []string{"here", "10.0.0.5:7443,:7443", "10.0.0.5:70000", "10.0.0.5:"} {
		_, _, err = Load([]string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_STATE_SOURCE=controller", "OVERPLANE_SYNC_ADDRESSES=" + addresses})
		require.ErrorContains(t, err, "is not host:port", addresses)
		require.ErrorContains(t, err, `OVERPLANE_SYNC_ADDRESSES="`+addresses+`"`)
	}
	_, _, err = Load([]string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_TLS_CA=ca.crt"})
	require.NoError(t, err, "they matter to the source controller only")

	cfg, warnings, err := Load([]string{
		"OVERPLANE_NODE_NAME=n1", "OVERPLANE_STATE_SOURCE=controller", "OVERPLANE_SYNC_ADDRESSES=10.0.0.5:7443,[fd00::5]:7443",
		"OVERPLANE_CONTROLLER=10.0.0.5:7444", "OVERPLANE_CONTROLLER_LISTEN=:7443", "OVERPLANE_ADMIN_CA=/ca.crt", "OVERPLANE_BIN=/x", "OVERPLANE_SYNC_ADDRESS=typo",
	})
	require.NoError(t, err)
	require.Equal(t, []string{"10.0.0.5:7443", "[fd00::5]:7443"}, cfg.SyncAddresses)
	require.Len(t, warnings, 1, "other programs' variables are none of the daemon's")
	require.Contains(t, warnings[0], "OVERPLANE_SYNC_ADDRESS has no effect; the nearest known one is OVERPLANE_SYNC_ADDRESSES")
	var environ []string
	for _, v := range cfg.Variables() {
		environ = append(environ, v.Name+"="+v.Value)
	}
	again, _, err := Load(environ)
	require.NoError(t, err)
	require.Equal(t, cfg, again, "what is printed reads back")
}

// A publish would panic: the agent has no data plane.
func TestTableWithTheSameDigestIsOnlyRelabelled(t *testing.T) {
	a := newAgent(Config{NodeName: "n1"}, "test", slog.New(slog.DiscardHandler), nil)
	a.sync = &controller{}
	var err error
	a.state, err = checkState("n1", threeNodes())
	require.NoError(t, err)
	a.programmed = a.state
	next := threeNodes()
	next.Version.Revision++
	d, err := checkState("n1", next)
	require.NoError(t, err)
	require.NoError(t, a.takeTable(d))
	require.EqualValues(t, 6, a.programmed.raw.GetVersion().GetRevision())
	other := threeNodes()
	other.Routes = other.GetRoutes()[1:]
	api.Seal(other)
	d, err = checkState("n1", other)
	require.NoError(t, err)
	require.Panics(t, func() { _ = a.takeTable(d) })
}
