package server

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

// defaultAllowance is how long an operator's permission for removals holds.
const defaultAllowance = 10 * time.Minute

// adminServer is AdminService.
type adminServer struct {
	controlv1.UnimplementedAdminServiceServer
	v *Server
}

// adminError is the status of an error of the allocator.
func adminError(err error) error {
	var unknown *ipam.UnknownNodeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &unknown):
		return status.Error(codes.NotFound, err.Error())
	case errors.Is(err, ipam.ErrNotLeader):
		return status.Error(codes.Unavailable, err.Error()+": ask the one that does")
	case errors.Is(err, ipam.ErrUnknownOutcome), errors.Is(err, ipam.ErrConflict):
		return status.Error(codes.Unavailable, err.Error())
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	}
	return status.Error(codes.InvalidArgument, err.Error())
}

func (a *adminServer) version(revision int64) *controlv1.Version {
	return &controlv1.Version{Incarnation: a.v.graph.version().GetIncarnation(), Revision: uint64(revision)}
}

// done waits until the table that nodes are told has the revision, so that who asks for convergence next sees it.
func (a *adminServer) done(ctx context.Context, revision int64, err error) (*controlv1.Version, error) {
	if err != nil {
		return nil, adminError(err)
	}
	if err := a.v.graph.wait(ctx, revision); err != nil {
		return nil, adminError(err)
	}
	return a.version(revision), nil
}

func (a *adminServer) read(ctx context.Context, f func(*ipam.Table)) error {
	if !a.v.Leading() {
		return adminError(ipam.ErrNotLeader)
	}
	return adminError(a.v.store.Read(ctx, 0, f))
}

// ListNodes implements AdminServiceServer.
func (a *adminServer) ListNodes(ctx context.Context, _ *controlv1.ListNodesRequest) (*controlv1.ListNodesResponse, error) {
	out := &controlv1.ListNodesResponse{}
	err := a.read(ctx, func(t *ipam.Table) {
		for _, n := range t.Nodes() {
			if n.Gone {
				continue
			}
			m, p := member(n), a.v.progress.get(n.Name)
			node := &controlv1.Node{
				Name: n.Name, Ipv4: m.GetIpv4(), Ipv6: m.GetIpv6(), Mac: n.MAC, DaemonVersion: n.DaemonVersion, Draining: n.Draining,
				Connected: p.stream != nil, JoinedAt: timestamppb.New(n.Joined),
			}
			if !p.since.IsZero() {
				node.Since = timestamppb.New(p.since)
			}
			for _, b := range t.Owned(n.Name) {
				if b.Held() {
					node.Blocks = append(node.Blocks, b.CIDR.String())
				}
			}
			out.Nodes = append(out.Nodes, node)
		}
	})
	return out, err
}

var blockStates = map[ipam.State]controlv1.BlockState{
	ipam.Free: controlv1.BlockState_BLOCK_STATE_FREE, ipam.Allocated: controlv1.BlockState_BLOCK_STATE_ALLOCATED,
	ipam.Releasing: controlv1.BlockState_BLOCK_STATE_RELEASING, ipam.Cooldown: controlv1.BlockState_BLOCK_STATE_COOLDOWN,
}

func (a *adminServer) block(b *ipam.Block, resting map[netip.Prefix]ipam.Resting) *controlv1.Block {
	out := &controlv1.Block{Cidr: b.CIDR.String(), Pool: b.Pool.String(), State: blockStates[b.State], Owner: b.Owner, Since: timestamppb.New(b.Since)}
	switch r, ok := resting[b.CIDR]; {
	case b.State == ipam.Releasing:
		out.WaitsFor = []string{b.Owner}
	case ok:
		out.Remaining, out.WaitsFor = durationpb.New(r.Remaining), r.WaitsFor
	}
	return out
}

func (a *adminServer) resting(ctx context.Context) (map[netip.Prefix]ipam.Resting, error) {
	list, err := a.v.alloc.Resting(ctx, a.v.progress.of(a.v.graph.version().GetIncarnation()))
	out := make(map[netip.Prefix]ipam.Resting, len(list))
	for _, r := range list {
		out[r.Block.CIDR] = r
	}
	return out, err
}

// ListBlocks implements AdminServiceServer.
func (a *adminServer) ListBlocks(ctx context.Context, _ *controlv1.ListBlocksRequest) (*controlv1.ListBlocksResponse, error) {
	resting, err := a.resting(ctx)
	if err != nil {
		return nil, adminError(err)
	}
	out := &controlv1.ListBlocksResponse{}
	err = a.read(ctx, func(t *ipam.Table) {
		for _, b := range t.Blocks() {
			out.Blocks = append(out.Blocks, a.block(b, resting))
		}
	})
	return out, err
}

// ListPools implements AdminServiceServer.
func (a *adminServer) ListPools(ctx context.Context, _ *controlv1.ListPoolsRequest) (*controlv1.ListPoolsResponse, error) {
	out := &controlv1.ListPoolsResponse{}
	err := a.read(ctx, func(t *ipam.Table) {
		for _, u := range t.Usage() {
			out.Pools = append(out.Pools, &controlv1.PoolUsage{
				Cidr: u.Pool.CIDR.String(), BlockPrefixLength: uint32(u.Pool.BlockBits), Nodes: uint32(u.Total),
				Allocated: uint32(u.Allocated), Releasing: uint32(u.Releasing), Cooldown: uint32(u.Cooldown), Free: uint32(u.Free()),
			})
		}
		out.Warnings = t.Warnings()
		r := t.Ranges()
		if warnings, _ := r.Validate(); len(t.Pools()) > 0 {
			out.Warnings = append(out.Warnings, warnings...)
		}
	})
	return out, err
}

// AddPool implements AdminServiceServer.
func (a *adminServer) AddPool(ctx context.Context, r *controlv1.AddPoolRequest) (*controlv1.AddPoolResponse, error) {
	cidr, err := netip.ParsePrefix(r.GetCidr())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "pool %q: want a prefix, e.g. 10.245.0.0/16", r.GetCidr())
	}
	bits := int(r.GetBlockPrefixLength())
	if bits == 0 {
		bits = ipam.DefaultBlockBits(ipam.FamilyOf(cidr))
	}
	revision, warnings, err := a.v.alloc.AddPool(ctx, ipam.PodRange{CIDR: cidr, BlockBits: bits})
	v, err := a.done(ctx, revision, err)
	if err != nil {
		return nil, err
	}
	a.v.log.Info("a pool was added", "pool", cidr, "block_bits", bits)
	// Nodes that lacked a block of its family get one.
	go func() {
		for _, f := range a.v.progress.connected() {
			if _, err := a.v.alloc.Register(context.Background(), f); err != nil {
				a.v.log.Warn("a node could not be given a block of the new pool", "node", f.Name, "error", err)
			}
		}
	}()
	return &controlv1.AddPoolResponse{Version: v, Warnings: warnings}, nil
}

// ListStaticRoutes implements AdminServiceServer.
func (a *adminServer) ListStaticRoutes(ctx context.Context, _ *controlv1.ListStaticRoutesRequest) (*controlv1.ListStaticRoutesResponse, error) {
	out := &controlv1.ListStaticRoutesResponse{}
	err := a.read(ctx, func(t *ipam.Table) {
		for _, r := range t.Routes() {
			out.Routes = append(out.Routes, staticRoute(r))
		}
	})
	return out, err
}

// SetStaticRoute implements AdminServiceServer.
func (a *adminServer) SetStaticRoute(ctx context.Context, r *controlv1.SetStaticRouteRequest) (*controlv1.SetStaticRouteResponse, error) {
	p, err := netip.ParsePrefix(r.GetRoute().GetPrefix())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "route %q: want a prefix, e.g. 10.9.0.0/16", r.GetRoute().GetPrefix())
	}
	if r.GetRoute().GetTarget() == nil {
		return nil, status.Errorf(codes.InvalidArgument, "route %s has no target: want a node, the host or unreachable", p)
	}
	revision, err := a.v.alloc.SetRoute(ctx, ipam.StaticRoute{Prefix: p, Node: r.GetRoute().GetNode(), Host: r.GetRoute().GetHost()})
	v, err := a.done(ctx, revision, err)
	return &controlv1.SetStaticRouteResponse{Version: v}, err
}

// RemoveStaticRoute implements AdminServiceServer.
func (a *adminServer) RemoveStaticRoute(ctx context.Context, r *controlv1.RemoveStaticRouteRequest) (*controlv1.RemoveStaticRouteResponse, error) {
	p, err := netip.ParsePrefix(r.GetPrefix())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "route %q: want a prefix, e.g. 10.9.0.0/16", r.GetPrefix())
	}
	a.v.graph.expect(p)
	existed, revision, err := a.v.alloc.RemoveRoute(ctx, p)
	v, err := a.done(ctx, revision, err)
	return &controlv1.RemoveStaticRouteResponse{Existed: existed, Version: v}, err
}

// DrainNode implements AdminServiceServer.
func (a *adminServer) DrainNode(ctx context.Context, r *controlv1.DrainNodeRequest) (*controlv1.DrainNodeResponse, error) {
	revision, err := a.v.alloc.Drain(ctx, r.GetNode(), r.GetUndo())
	v, err := a.done(ctx, revision, err)
	if err == nil && r.GetUndo() {
		if p := a.v.progress.get(r.GetNode()); p.stream != nil {
			_, err = a.v.alloc.Register(ctx, p.facts)
			err = adminError(err)
		}
	}
	return &controlv1.DrainNodeResponse{Version: v}, err
}

// ReleaseNode implements AdminServiceServer.
func (a *adminServer) ReleaseNode(ctx context.Context, r *controlv1.ReleaseNodeRequest) (*controlv1.ReleaseNodeResponse, error) {
	if p := a.v.progress.get(r.GetNode()); r.GetFenced() && p.stream != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "node %s is connected: if it lives, release it without --fenced; if it died just now, that takes up to a minute to be seen", r.GetNode())
	}
	revision, err := a.v.alloc.Release(ctx, r.GetNode(), r.GetFenced())
	v, err := a.done(ctx, revision, err)
	if err != nil {
		return nil, err
	}
	a.v.log.Info("a node's blocks are released", "node", r.GetNode(), "fenced", r.GetFenced())
	out := &controlv1.ReleaseNodeResponse{Version: v}
	resting, err := a.resting(ctx)
	if err != nil {
		return nil, adminError(err)
	}
	err = a.read(ctx, func(t *ipam.Table) {
		for _, b := range t.Owned(r.GetNode()) {
			out.Blocks = append(out.Blocks, a.block(b, resting))
		}
	})
	return out, err
}

// GetConvergence implements AdminServiceServer.
func (a *adminServer) GetConvergence(ctx context.Context, _ *controlv1.GetConvergenceRequest) (*controlv1.GetConvergenceResponse, error) {
	out := &controlv1.GetConvergenceResponse{Issued: a.v.graph.version()}
	err := a.read(ctx, func(t *ipam.Table) {
		for _, n := range t.Nodes() {
			if n.Gone {
				continue
			}
			p := a.v.progress.get(n.Name)
			c := &controlv1.NodeConvergence{Node: n.Name, Connected: p.stream != nil, Accepted: p.accepted, Programmed: p.programmed, Problem: p.problem, Failures: p.failures}
			if p.more > 0 {
				c.Failures = append(c.Failures[:len(c.Failures):len(c.Failures)], &controlv1.EntryFailure{Reason: fmt.Sprintf("and %d more", p.more)})
			}
			if c.Connected {
				out.Connected++
			}
			if p.converged(out.GetIssued()) {
				out.Converged++
			} else if !p.behind.IsZero() {
				c.Behind = timestamppb.New(p.behind)
			}
			out.Nodes = append(out.Nodes, c)
		}
	})
	return out, err
}

// AllowRemovals implements AdminServiceServer.
func (a *adminServer) AllowRemovals(_ context.Context, r *controlv1.AllowRemovalsRequest) (*controlv1.AllowRemovalsResponse, error) {
	d := defaultAllowance
	if r.GetForTime() != nil {
		d = r.GetForTime().AsDuration()
	}
	a.v.allowed.set(r.GetCount(), a.v.progress.now().Add(d))
	a.v.log.Warn("an operator allows nodes to remove entries", "count", r.GetCount(), "for", d)
	return &controlv1.AllowRemovalsResponse{}, nil
}

// Backup implements AdminServiceServer.
func (a *adminServer) Backup(ctx context.Context, _ *controlv1.BackupRequest) (*controlv1.BackupResponse, error) {
	content, revision, err := store.Backup(ctx, a.v.store)
	if err != nil {
		return nil, adminError(err)
	}
	return &controlv1.BackupResponse{Content: content, Version: &controlv1.Version{Incarnation: a.v.graph.version().GetIncarnation(), Revision: uint64(revision)}}, nil
}
