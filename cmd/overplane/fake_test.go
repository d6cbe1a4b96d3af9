package main

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// clock is when the tests happen.
var clock = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// fakeDaemon answers like a node's daemon, from fields that tests set before they ask.
type fakeDaemon struct {
	controlv1.UnimplementedLocalServiceServer
	status   *controlv1.GetStatusResponse
	routes   *controlv1.ListRoutesResponse
	counters *controlv1.GetCountersResponse

	mu    sync.Mutex // calls may overlap
	state *controlv1.NodeState
	pods  []*controlv1.Pod
	drops [][]*controlv1.DropCount // one answer a call, the last one for ever
	err   error                    // given instead of any answer
}

func newFakeDaemon() *fakeDaemon {
	version := &controlv1.Version{Incarnation: "2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11", Revision: 7}
	return &fakeDaemon{
		status: &controlv1.GetStatusResponse{
			Node: "n1", DaemonVersion: "v0.1.0", StartedAt: timestamppb.New(clock.Add(-(26*time.Hour + 3*time.Minute))), Ready: true,
			StateSource: "api", Desired: version, Programmed: version, EntryCount: 13, PodCount: 2, RouteCount: 9, MemberCount: 3,
			Pools:     []string{"10.244.0.0/16 in blocks of /24", "fd12:3456:789a::/64 in blocks of /80"},
			OwnBlocks: []string{"10.244.1.0/24", "fd12:3456:789a:0:1::/80"},
			Uplink: &controlv1.Uplink{
				Interface: "eth0", Mac: "02:00:0a:f0:00:0b", Mtu: 1500, Up: true, Queues: 4, Rung: "xdp-copy",
				WhyNotMore: []*controlv1.RungRefusal{{Rung: "xdp-zerocopy", Reason: "driver veth has no zero-copy receive"}},
				Ipv4:       "10.240.0.11", Ipv6: "fd00:240::11", GatewayIpv4: "10.240.0.1", GatewayMacIpv4: "02:00:0a:f0:00:01", GatewayIpv6: "fd00:240::1",
				Underlay: "direct", Steering: map[string]uint64{"redirected": 18446744073709551615, "passed": 12, "dropped_stale": 0},
			},
			HostPort: &controlv1.HostPort{Interface: "ovp0", Mac: "02:4f:56:50:48:00", Mtu: 1500},
			Workers: []*controlv1.Worker{
				{Index: 0, Cpu: 2, UplinkQueues: []uint32{0, 2}, Polls: 123456789, BusyPolls: 4567, Parks: 89, Packets: 98765,
					FramesTotal: 16384, FramesFree: 14336, LargeTotal: 64, LargeFree: 64, Snapshot: 5},
				{Index: 1, Cpu: 3, UplinkQueues: []uint32{1, 3}, Polls: 7, Packets: 3, FramesTotal: 16384, FramesFree: 99, LargeTotal: 64, LargeFree: 3, Snapshot: 5},
			},
		},
		pods: []*controlv1.Pod{
			{Name: "web", Netns: "/run/netns/web", Interface: "eth0", Ipv4: "10.244.1.2", Ipv6: "fd12:3456:789a:0:1::2", Mac: "0a:58:0a:f4:01:02",
				GatewayIpv4: "169.254.1.1", GatewayIpv6: "fe80::1", GatewayMac: "02:4f:56:50:47:57", Mtu: 1500, Kind: "tap",
				State: controlv1.PodState_POD_STATE_READY, AttachedAt: timestamppb.New(clock.Add(-90 * time.Second))},
			{Name: "default/batch-0", Netns: "/proc/123/ns/net", Interface: "eth0", Ipv4: "10.244.1.3", Mac: "0a:58:0a:f4:01:03", Mtu: 1500, Kind: "tap",
				State: controlv1.PodState_POD_STATE_FAILED, Reason: "its network namespace is gone; detach it", AttachedAt: timestamppb.New(clock.Add(-50 * time.Hour))},
		},
		routes: &controlv1.ListRoutesResponse{Programmed: version, Routes: []*controlv1.ProgrammedRoute{
			{Prefix: "10.244.0.0/16", Kind: "unreachable"},
			{Prefix: "fd12:3456:789a::/64", Kind: "unreachable"},
			{Prefix: "0.0.0.0/0", Kind: "outside", Mac: "02:00:0a:f0:00:01", Mtu: 1500},
			{Prefix: "10.0.0.0/16", Kind: "host", Mac: "02:4f:56:50:48:00", Mtu: 1500},
			{Prefix: "10.240.0.12/32", Kind: "member", Target: "n2", Mac: "02:00:0a:f0:00:0c", Mtu: 1500},
			{Prefix: "10.244.1.2/32", Kind: "pod", Target: "web", Mac: "0a:58:0a:f4:01:02", Mtu: 1500},
			{Prefix: "10.244.2.0/24", Kind: "node", Target: "n2", Mac: "02:00:0a:f0:00:0c", Mtu: 1500},
			{Prefix: "fd12:3456:789a:0:2::/80", Kind: "node", Target: "n2", Mtu: 1500},
		}},
		counters: &controlv1.GetCountersResponse{
			Ports: []*controlv1.PortCounters{
				{Port: "eth0", Kind: "uplink", Worker: 0, In: &controlv1.Traffic{Frames: 10, Packets: 10, Bytes: 640}, Out: &controlv1.Traffic{Frames: 5, Packets: 5, Bytes: 320}, DroppedIn: 3},
				{Port: "web", Kind: "pod", Worker: 0, In: &controlv1.Traffic{Frames: 2, Packets: 90, Bytes: 131072}, Out: &controlv1.Traffic{}, DroppedOut: 1},
				{Port: "eth0", Kind: "uplink", Worker: 1, In: &controlv1.Traffic{Frames: 1, Packets: 1, Bytes: 64}, Out: &controlv1.Traffic{Frames: 18446744073709551000, Packets: 2, Bytes: 3}},
			},
			Answered: map[string]uint64{"arp": 2, "nd": 1, "echo": 0}, IcmpErrors: map[string]uint64{"time_exceeded": 4, "packet_too_big": 0},
		},
		drops: [][]*controlv1.DropCount{{
			dropped("eth0", "uplink", "in", "ip_bad_checksum", 2, 0),
			dropped("web", "pod", "in", "source_not_pods", 40, 0),
			dropped("web", "pod", "in", "source_not_pods", 2, 1),
			dropped("web", "pod", "out", "port_full", 1, 1),
		}},
		state: &controlv1.NodeState{
			Node: "n1", Version: version,
			Pools:     []*controlv1.Pool{{Cidr: "10.244.0.0/16", BlockPrefixLength: 24}},
			OwnBlocks: []*controlv1.OwnBlock{{Cidr: "10.244.1.0/24"}},
			Members:   []*controlv1.Member{{Name: "n1", Ipv4: "10.240.0.11"}, {Name: "n2", Ipv4: "10.240.0.12", Mac: "02:00:0a:f0:00:0c"}},
			Routes:    []*controlv1.Route{{Prefix: "10.244.2.0/24", Target: &controlv1.Route_Node{Node: "n2"}}},
		},
	}
}

func dropped(port, kind, direction, reason string, packets uint64, worker uint32) *controlv1.DropCount {
	return &controlv1.DropCount{Port: port, Kind: kind, Direction: direction, Reason: reason, Description: "what " + reason + " means", Packets: packets, Worker: worker}
}

// serve makes the daemon answer on a socket, until the test ends.
func (d *fakeDaemon) serve(t *testing.T) (socket string) {
	socket = filepath.Join(t.TempDir(), "overplaned.sock")
	l, err := net.Listen("unix", socket)
	require.NoError(t, err)
	api.Seal(d.state)
	s := grpc.NewServer()
	controlv1.RegisterLocalServiceServer(s, d)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return socket
}

func (d *fakeDaemon) GetStatus(context.Context, *controlv1.GetStatusRequest) (*controlv1.GetStatusResponse, error) {
	return d.status, d.err
}

func (d *fakeDaemon) ListRoutes(context.Context, *controlv1.ListRoutesRequest) (*controlv1.ListRoutesResponse, error) {
	return d.routes, d.err
}

func (d *fakeDaemon) GetCounters(context.Context, *controlv1.GetCountersRequest) (*controlv1.GetCountersResponse, error) {
	return d.counters, d.err
}

func (d *fakeDaemon) ListPods(context.Context, *controlv1.ListPodsRequest) (*controlv1.ListPodsResponse, error) {
	return &controlv1.ListPodsResponse{Pods: d.pods}, d.err
}

func (d *fakeDaemon) GetDrops(context.Context, *controlv1.GetDropsRequest) (*controlv1.GetDropsResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &controlv1.GetDropsResponse{Drops: d.drops[0]}
	if len(d.drops) > 1 {
		d.drops = d.drops[1:]
	}
	return r, d.err
}

func (d *fakeDaemon) AttachPod(_ context.Context, r *controlv1.AttachPodRequest) (*controlv1.AttachPodResponse, error) {
	if r.GetName() == "web" {
		return nil, status.Error(codes.AlreadyExists, `pod web is attached with other values: ipv4 is 10.244.1.2`)
	}
	return &controlv1.AttachPodResponse{Pod: &controlv1.Pod{
		Name: r.GetName(), Netns: r.GetNetns(), Interface: r.GetInterface(), Ipv4: r.GetIpv4(), Ipv6: r.GetIpv6(), Mac: "0a:58:0a:f4:01:0a",
		GatewayIpv4: "169.254.1.1", GatewayIpv6: "fe80::1", GatewayMac: "02:4f:56:50:47:57", Mtu: 1500, Kind: "tap",
		State: controlv1.PodState_POD_STATE_READY, AttachedAt: timestamppb.New(clock),
	}}, d.err
}

func (d *fakeDaemon) DetachPod(_ context.Context, r *controlv1.DetachPodRequest) (*controlv1.DetachPodResponse, error) {
	return &controlv1.DetachPodResponse{Existed: r.GetName() == "web"}, d.err
}

func (d *fakeDaemon) GetState(context.Context, *controlv1.GetStateRequest) (*controlv1.GetStateResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.state == nil {
		return &controlv1.GetStateResponse{}, d.err
	}
	return &controlv1.GetStateResponse{State: proto.CloneOf(d.state)}, d.err
}

func (d *fakeDaemon) ReplaceState(_ context.Context, r *controlv1.ReplaceStateRequest) (*controlv1.ReplaceStateResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := api.Validate(r.GetState()); err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	d.state = r.GetState()
	return &controlv1.ReplaceStateResponse{Programmed: d.state.GetVersion()}, d.err
}

func (d *fakeDaemon) PatchState(_ context.Context, r *controlv1.PatchStateRequest) (*controlv1.PatchStateResponse, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, err := api.Apply(d.state, r.GetPatch())
	if err != nil {
		return nil, status.Error(codes.Aborted, err.Error())
	}
	d.state = s
	return &controlv1.PatchStateResponse{Programmed: s.GetVersion()}, d.err
}
