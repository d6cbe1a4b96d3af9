package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// service is the local API. Its methods run on gRPC's goroutines and send commands to the agent's.
type service struct {
	controlv1.UnimplementedLocalServiceServer
	a *Agent
}

// newServer makes the gRPC server of the local API.
func newServer(a *Agent) *grpc.Server {
	s := grpc.NewServer(
		grpc.MaxRecvMsgSize(api.MaxMessageBytes), grpc.MaxSendMsgSize(api.MaxMessageBytes),
		grpc.UnaryInterceptor(interceptor(a.log)),
	)
	controlv1.RegisterLocalServiceServer(s, &service{a: a})
	return s
}

// interceptor turns a panic into an error of that one call, and logs calls.
func interceptor(log *slog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (resp any, err error) {
		start := time.Now()
		defer func() {
			if p := recover(); p != nil {
				log.Error("a call of the local API panicked", "method", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
				resp, err = nil, status.Errorf(codes.Internal, "internal error: %v", p)
			}
			log.Debug("local API", "method", path.Base(info.FullMethod), "code", status.Code(err), "took", time.Since(start))
		}()
		return next(ctx, req)
	}
}

// do runs f on the agent's goroutine; its error has a gRPC code.
func (s *service) do(ctx context.Context, f func() error) error {
	var err error
	switch derr := s.a.do(ctx, func() { err = f() }); {
	case errors.Is(derr, errStopped):
		return status.Error(codes.Unavailable, derr.Error())
	case derr != nil:
		return status.FromContextError(derr).Err()
	}
	return err
}

func (s *service) AttachPod(ctx context.Context, r *controlv1.AttachPodRequest) (*controlv1.AttachPodResponse, error) {
	req, err := parsePodRequest(r)
	if err != nil {
		return nil, err
	}
	out := &controlv1.AttachPodResponse{}
	return out, s.do(ctx, func() error {
		out.Pod, err = s.a.attach(req)
		return err
	})
}

func (s *service) DetachPod(ctx context.Context, r *controlv1.DetachPodRequest) (*controlv1.DetachPodResponse, error) {
	if r.GetName() == "" {
		return nil, status.Error(codes.InvalidArgument, "name is empty")
	}
	out := &controlv1.DetachPodResponse{}
	return out, s.do(ctx, func() error {
		out.Existed = s.a.detach(r.GetName())
		if s.a.storeProblem != "" {
			return status.Error(codes.Unavailable, s.a.storeProblem)
		}
		return nil
	})
}

func (s *service) ListPods(ctx context.Context, _ *controlv1.ListPodsRequest) (*controlv1.ListPodsResponse, error) {
	out := &controlv1.ListPodsResponse{}
	return out, s.do(ctx, func() error {
		for _, p := range s.a.podsInOrder() {
			out.Pods = append(out.Pods, s.a.podMessage(p))
		}
		return nil
	})
}

// pushed refuses pushes to a daemon that has another source.
func (s *service) pushed() error {
	if src := s.a.cfg.StateSource; src != SourceAPI {
		return status.Errorf(codes.FailedPrecondition, "this node's desired state comes from source %q (%sSTATE_SOURCE); only %q takes pushes", src, EnvPrefix, SourceAPI)
	}
	return nil
}

func (s *service) ReplaceState(ctx context.Context, r *controlv1.ReplaceStateRequest) (*controlv1.ReplaceStateResponse, error) {
	if err := s.pushed(); err != nil {
		return nil, err
	}
	state := r.GetState()
	if state == nil {
		return nil, status.Error(codes.InvalidArgument, "state is missing")
	}
	api.Complete(state) // the message is ours: nobody else has it
	d, err := checkState(s.a.cfg.NodeName, state)
	if err != nil {
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	out := &controlv1.ReplaceStateResponse{Programmed: state.GetVersion()}
	return out, s.do(ctx, func() error {
		if have := s.a.stateVersion(); have.GetIncarnation() != "" && have.GetIncarnation() == state.GetVersion().GetIncarnation() &&
			have.GetRevision() > state.GetVersion().GetRevision() {
			return status.Errorf(codes.FailedPrecondition, "version %s is older than the node's %s: a store's revision never goes back",
				api.FormatVersion(state.GetVersion()), api.FormatVersion(have))
		}
		return s.program(d)
	})
}

func (s *service) PatchState(ctx context.Context, r *controlv1.PatchStateRequest) (*controlv1.PatchStateResponse, error) {
	if err := s.pushed(); err != nil {
		return nil, err
	}
	if r.GetPatch() == nil {
		return nil, status.Error(codes.InvalidArgument, "patch is missing")
	}
	out := &controlv1.PatchStateResponse{}
	return out, s.do(ctx, func() error {
		next, err := api.Apply(s.a.rawState(), r.GetPatch())
		var base *api.BaseMismatchError
		if errors.As(err, &base) {
			return status.Error(codes.Aborted, err.Error())
		}
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		d, err := checkState(s.a.cfg.NodeName, next)
		if err != nil {
			return status.Error(codes.InvalidArgument, err.Error())
		}
		out.Programmed = next.GetVersion()
		return s.program(d)
	})
}

// program puts a pushed state in force.
func (s *service) program(d *desired) error {
	if !s.a.setState(d) {
		return status.Error(codes.DeadlineExceeded, "the state is in force, but a worker has not taken it over; see the status")
	}
	return nil
}

func (s *service) GetState(ctx context.Context, _ *controlv1.GetStateRequest) (*controlv1.GetStateResponse, error) {
	out := &controlv1.GetStateResponse{}
	return out, s.do(ctx, func() error {
		out.State = s.a.rawState()
		return nil
	})
}

func (s *service) GetStatus(ctx context.Context, _ *controlv1.GetStatusRequest) (*controlv1.GetStatusResponse, error) {
	out := &controlv1.GetStatusResponse{}
	if err := s.do(ctx, func() error {
		s.a.fillStatus(out)
		return nil
	}); err != nil {
		return nil, err
	}
	short, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	stats, err := s.a.dp.Stats(short)
	if err != nil {
		out.Problems = append(out.Problems, fmt.Sprintf("a worker does not answer: %v", err))
		out.Ready = false
		return out, nil
	}
	out.Workers = workerMessages(stats)
	return out, nil
}

func (s *service) ListRoutes(ctx context.Context, _ *controlv1.ListRoutesRequest) (*controlv1.ListRoutesResponse, error) {
	out := &controlv1.ListRoutesResponse{}
	var snapshot routesView
	if err := s.do(ctx, func() error {
		snapshot = s.a.routesView()
		return nil
	}); err != nil {
		return nil, err
	}
	out.Programmed, out.Routes = snapshot.version, snapshot.messages()
	return out, nil
}

func (s *service) GetCounters(ctx context.Context, _ *controlv1.GetCountersRequest) (*controlv1.GetCountersResponse, error) {
	stats, err := s.a.dp.Stats(ctx)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return counterMessage(stats), nil
}

func (s *service) GetDrops(ctx context.Context, _ *controlv1.GetDropsRequest) (*controlv1.GetDropsResponse, error) {
	stats, err := s.a.dp.Stats(ctx)
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return &controlv1.GetDropsResponse{Drops: dropMessages(stats)}, nil
}

// rawState is the state in force, never nil. Nobody may change it.
func (a *Agent) rawState() *controlv1.NodeState {
	if a.state == nil {
		return &controlv1.NodeState{Node: a.cfg.NodeName}
	}
	return a.state.raw
}

func (a *Agent) stateVersion() *controlv1.Version { return a.rawState().GetVersion() }

// podMessage describes a pod.
func (a *Agent) podMessage(p *pod) *controlv1.Pod {
	m := &controlv1.Pod{
		Name: p.rec.Name, Netns: p.rec.NetNS, Interface: p.rec.Interface, Mac: p.rec.MAC,
		GatewayMac: formatMAC(GatewayMAC), Mtu: uint32(p.dev.MTU), Kind: p.rec.kind(),
		State: controlv1.PodState_POD_STATE_READY, AttachedAt: timestamppb.New(p.rec.AttachedAt),
	}
	text := func(addr, gateway netip.Addr) (string, string) {
		if !addr.IsValid() {
			return "", ""
		}
		return addr.String(), gateway.String()
	}
	m.Ipv4, m.GatewayIpv4 = text(p.rec.IPv4, Gateway4)
	m.Ipv6, m.GatewayIpv6 = text(p.rec.IPv6, Gateway6)
	if p.port == nil {
		m.State, m.Reason = controlv1.PodState_POD_STATE_FAILED, p.reason
	}
	return m
}

func cloneVersion(v *controlv1.Version) *controlv1.Version {
	if v == nil {
		return nil
	}
	return proto.CloneOf(v)
}
