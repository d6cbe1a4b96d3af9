package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/mem"
	"github.com/overplane/overplane/snat"
)

// fakePort is a port in memory that knows whether it was closed.
type fakePort struct {
	*mem.Port
	machine *fakePlatform
}

func (p *fakePort) Close() error {
	p.machine.mu.Lock()
	defer p.machine.mu.Unlock()
	p.machine.open--
	return nil
}

// fakePlatform is a machine in memory. It survives the daemon, as kernels do.
type fakePlatform struct {
	socketsErr, connectionsErr error // of listing the node's sockets
	mu                         sync.Mutex
	facts                      Facts
	watchers                   map[chan Facts]bool
	gone                       func(string)

	open      int // ports
	devices   map[string]PodDevice
	netns     map[string]string // path -> identity
	host      HostDevice
	plans     []SteeringPlan
	steering  int // open
	attach    error
	uplinkErr error
	createErr error
	reopenErr error
	opened    int // times the uplink was opened
}

func newFakePlatform() *fakePlatform {
	return &fakePlatform{
		facts: Facts{
			Name: "eth0", Index: 7, MAC: packet.MAC{2, 0, 0, 0, 0, 1}, MTU: 1500, Up: true, Queues: 2,
			Addresses: []netip.Prefix{netip.MustParsePrefix("10.240.0.11/24"), netip.MustParsePrefix("fd00:240::11/64")},
			Gateway4:  netip.MustParseAddr("10.240.0.1"), GatewayMAC4: packet.MAC{2, 0, 0, 0, 0, 0xfe},
			Gateway6: netip.MustParseAddr("fd00:240::1"), GatewayMAC6: packet.MAC{2, 0, 0, 0, 0, 0xfe},
		},
		watchers: make(map[chan Facts]bool), devices: make(map[string]PodDevice), netns: make(map[string]string),
	}
}

func (f *fakePlatform) Preflight(uint64) error { return nil }

func (f *fakePlatform) Uplink() (Facts, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.facts.Gone {
		return Facts{}, errors.New("no such interface")
	}
	return f.facts, nil
}

func (f *fakePlatform) WatchUplink(ctx context.Context, _ string, changed func(Facts)) error {
	c := make(chan Facts, 16)
	f.mu.Lock()
	f.watchers[c] = true
	now := f.facts
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		delete(f.watchers, c)
		f.mu.Unlock()
	}()
	changed(now)
	for {
		select {
		case <-ctx.Done():
			return nil
		case facts := <-c:
			changed(facts)
		}
	}
}

// set changes the uplink's facts and tells the watchers.
func (f *fakePlatform) set(change func(*Facts)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.facts)
	for c := range f.watchers {
		c <- f.facts
	}
}

func (f *fakePlatform) Pools(n int) ([]*port.Pool, func(), error) {
	var pools []*port.Pool
	for range n {
		cfg := port.PoolConfig{Chunks: 256, ChunkSize: 2048, LargeBuffers: 4}
		p, err := port.NewPool(make([]byte, cfg.Size()), cfg)
		if err != nil {
			return nil, nil, err
		}
		pools = append(pools, p)
	}
	return pools, func() {}, nil
}

func (f *fakePlatform) HostPorts() (tcp, udp []uint16, err error) {
	return []uint16{22, 10250}, []uint16{53}, f.socketsErr
}

func (f *fakePlatform) HostConnections() ([]uint16, error) {
	if f.connectionsErr != nil {
		return nil, f.connectionsErr
	}
	return []uint16{22, 10251}, nil
}

func (f *fakePlatform) ReservePorts(first, last uint16) error { return nil }

type fakeSteering struct {
	f     *fakePlatform
	beats []uint64
}

func (f *fakePlatform) AttachSteering(_ string, workers int) (Steering, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.attach != nil {
		return nil, f.attach
	}
	f.steering++
	return &fakeSteering{f: f, beats: make([]uint64, workers)}, nil
}

func (s *fakeSteering) Apply(p SteeringPlan) error {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.plans = append(s.f.plans, p)
	return nil
}
func (s *fakeSteering) AttachHost(string) error               { return nil }
func (s *fakeSteering) Flows([]snat.FlowEvent) error          { return nil }
func (s *fakeSteering) KnownFlows() ([]snat.FlowEvent, error) { return nil, nil }
func (s *fakeSteering) Counters() (map[string]uint64, error) {
	return map[string]uint64{"ours": 1}, nil
}
func (s *fakeSteering) Heartbeat(i int) *uint64 { return &s.beats[i] }
func (s *fakeSteering) Close() error {
	s.f.mu.Lock()
	defer s.f.mu.Unlock()
	s.f.steering--
	return nil
}

func (f *fakePlatform) newPort(name string, pools []*port.Pool) port.Port {
	f.open++
	return &fakePort{machine: f, Port: mem.New(mem.Config{Name: name, Pools: pools, Caps: port.Caps{MaxFrame: 9014, Polled: true}})}
}

func (f *fakePlatform) OpenUplink(facts Facts, _ Steering, pools []*port.Pool) (UplinkGrant, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.uplinkErr != nil {
		return UplinkGrant{}, f.uplinkErr
	}
	f.opened++
	return UplinkGrant{
		Port: f.newPort(facts.Name, pools), Rung: ModeXDPCopy, Refused: []Refusal{{Rung: ModeXDPZeroCopy, Reason: "the driver cannot"}},
	}, nil
}

func (f *fakePlatform) OpenHost(d HostDevice, pools []*port.Pool) (port.Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.host = d
	return f.newPort(d.Name, pools), nil
}

func (f *fakePlatform) SetHost(d HostDevice) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.host = d
	return nil
}

func (f *fakePlatform) CreatePod(d PodDevice, pools []*port.Pool) (port.Port, string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.createErr != nil {
		return nil, "", f.createErr
	}
	id, ok := f.netns[d.NetNS]
	if !ok {
		return nil, "", fmt.Errorf("%w: %s", ErrPodGone, d.NetNS)
	}
	f.devices[d.NetNS+" "+d.Interface] = d
	return f.newPort(d.Interface, pools), id, nil
}

func (f *fakePlatform) alive(d PodDevice) bool {
	id, ok := f.netns[d.NetNS]
	_, dev := f.devices[d.NetNS+" "+d.Interface]
	return ok && dev && (d.NetNSID == "" || d.NetNSID == id)
}

func (f *fakePlatform) ReopenPod(d PodDevice, pools []*port.Pool) (port.Port, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reopenErr != nil {
		return nil, f.reopenErr
	}
	if !f.alive(d) {
		return nil, ErrPodGone
	}
	return f.newPort(d.Interface, pools), nil
}

func (f *fakePlatform) RemovePod(d PodDevice) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d.NetNSID == "" || f.netns[d.NetNS] == d.NetNSID {
		delete(f.devices, d.NetNS+" "+d.Interface)
	}
	return nil
}

func (f *fakePlatform) SetPodMTU(d PodDevice) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.devices[d.NetNS+" "+d.Interface] = d
	return nil
}

func (f *fakePlatform) PodAlive(d PodDevice) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.alive(d)
}

func (f *fakePlatform) WatchPods(_ context.Context, gone func(string)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gone = gone
}

func (f *fakePlatform) Uninstall() error { return nil }

// addNetNS makes a namespace and returns its path.
func (f *fakePlatform) addNetNS(name string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	path := "/run/netns/" + name
	f.netns[path] = fmt.Sprintf("id-%s-%d", name, len(f.netns))
	return path
}

// deleteNetNS deletes a namespace with its devices.
func (f *fakePlatform) deleteNetNS(path string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.netns, path)
	for k, d := range f.devices {
		if d.NetNS == path {
			delete(f.devices, k)
		}
	}
}

// node is a daemon under test.
type node struct {
	t      *testing.T
	cfg    Config
	plat   *fakePlatform
	reload chan os.Signal
	client controlv1.LocalServiceClient
	stop   func() error
}

// testConfig is a configuration in a folder of its own. Socket paths are short: t.TempDir may be too long for one.
func testConfig(t *testing.T, settings ...string) Config {
	t.Helper()
	dir, err := os.MkdirTemp("", "ovp")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	environ := []string{
		"OVERPLANE_NODE_NAME=n1", "OVERPLANE_CPUS=none", "OVERPLANE_STATE_SOURCE=api",
		"OVERPLANE_STATE_DIR=" + filepath.Join(dir, "state"), "OVERPLANE_SOCKET=" + filepath.Join(dir, "sock"),
		"OVERPLANE_STATE_FILE=" + filepath.Join(dir, "state.json"), "OVERPLANE_WORKERS=2",
		"OVERPLANE_METRICS_LISTEN=none",
	}
	cfg, _, err := Load(append(environ, settings...))
	require.NoError(t, err)
	return cfg
}

// startNode runs a daemon until the test ends or n.stop is called.
func startNode(t *testing.T, cfg Config, plat *fakePlatform) *node {
	t.Helper()
	n := &node{t: t, cfg: cfg, plat: plat, reload: make(chan os.Signal)}
	ctx, cancel := context.WithCancel(context.Background())
	ready, ended := make(chan struct{}), make(chan error, 1)
	var once sync.Once
	go func() {
		ended <- Run(ctx, cfg, Options{
			Version: "test", Platform: plat, Reload: n.reload, Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
			Getenv: func(string) string { return "" }, Ready: func() { once.Do(func() { close(ready) }) },
		})
	}()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatalf("the daemon did not start: %v", err)
	case <-time.After(10 * time.Second):
		t.Fatal("the daemon did not start in time")
	}
	var result error
	n.stop = sync.OnceValue(func() error {
		cancel()
		select {
		case result = <-ended:
		case <-time.After(10 * time.Second):
			result = errors.New("the daemon did not stop")
		}
		return result
	})
	t.Cleanup(func() { require.NoError(t, n.stop()) })
	conn, err := grpc.NewClient("unix:"+cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	n.client = controlv1.NewLocalServiceClient(conn)
	return n
}

func (n *node) push(s *controlv1.NodeState) {
	n.t.Helper()
	_, err := n.client.ReplaceState(n.t.Context(), &controlv1.ReplaceStateRequest{State: s})
	require.NoError(n.t, err)
}

func (n *node) status() *controlv1.GetStatusResponse {
	n.t.Helper()
	s, err := n.client.GetStatus(n.t.Context(), &controlv1.GetStatusRequest{})
	require.NoError(n.t, err)
	return s
}

func (n *node) routes() map[string]*controlv1.ProgrammedRoute {
	n.t.Helper()
	r, err := n.client.ListRoutes(n.t.Context(), &controlv1.ListRoutesRequest{})
	require.NoError(n.t, err)
	out := make(map[string]*controlv1.ProgrammedRoute)
	for _, p := range r.GetRoutes() {
		out[p.GetPrefix()] = p
	}
	return out
}

func (n *node) pods() []string {
	n.t.Helper()
	r, err := n.client.ListPods(n.t.Context(), &controlv1.ListPodsRequest{})
	require.NoError(n.t, err)
	var out []string
	for _, p := range r.GetPods() {
		out = append(out, p.GetName())
	}
	return out
}

func (n *node) attach(name, netns, a4, a6 string) (*controlv1.Pod, error) {
	r, err := n.client.AttachPod(n.t.Context(), &controlv1.AttachPodRequest{Name: name, Netns: netns, Ipv4: a4, Ipv6: a6})
	return r.GetPod(), err
}

// eventually waits for a condition that other goroutines bring about.
func (n *node) eventually(what string, f func() bool) {
	n.t.Helper()
	require.Eventually(n.t, f, 5*time.Second, 5*time.Millisecond, what)
}

// hasProblem reports whether the status names a problem with the text.
func (n *node) hasProblem(text string) bool {
	return slices.ContainsFunc(n.status().GetProblems(), func(p string) bool { return contains(p, text) })
}

// threeNodes is the desired state of n1 in a cluster of three.
func threeNodes() *controlv1.NodeState {
	s := &controlv1.NodeState{
		Node: "n1", Version: &controlv1.Version{Incarnation: "store", Revision: 5},
		Pools:     []*controlv1.Pool{{Cidr: "10.244.0.0/16", BlockPrefixLength: 24}, {Cidr: "fd12:3456:789a::/64", BlockPrefixLength: 80}},
		OwnBlocks: []*controlv1.OwnBlock{{Cidr: "10.244.1.0/24"}, {Cidr: "fd12:3456:789a:0:1::/80"}},
	}
	for i := 1; i <= 3; i++ {
		s.Members = append(s.Members, &controlv1.Member{
			Name: fmt.Sprintf("n%d", i), Ipv4: fmt.Sprintf("10.240.0.1%d", i), Ipv6: fmt.Sprintf("fd00:240::1%d", i), Mac: fmt.Sprintf("02:00:00:00:00:0%d", i),
		})
		if i == 1 {
			continue
		}
		to := &controlv1.Route_Node{Node: fmt.Sprintf("n%d", i)}
		s.Routes = append(s.Routes,
			&controlv1.Route{Prefix: fmt.Sprintf("10.244.%d.0/24", i), Target: to},
			&controlv1.Route{Prefix: fmt.Sprintf("fd12:3456:789a:0:%d::/80", i), Target: to})
	}
	s.Routes = append(s.Routes, &controlv1.Route{Prefix: "10.96.0.0/12", Target: &controlv1.Route_Host{Host: true}})
	api.Seal(s)
	return s
}
