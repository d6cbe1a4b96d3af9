package server

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/ipam"
)

// nodeOf is the name in the client's certificate, and until when it holds.
func nodeOf(ctx context.Context) (string, time.Time, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return "", time.Time{}, status.Error(codes.Unauthenticated, "there is no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return "", time.Time{}, status.Error(codes.Unauthenticated, "a node needs a certificate")
	}
	c := info.State.PeerCertificates[0]
	if !pki.HasRole(c, pki.Node) {
		return "", time.Time{}, status.Errorf(codes.PermissionDenied, "the certificate of %q is no node's: its organization is %v, want %s", c.Subject.CommonName, c.Subject.Organization, pki.Node)
	}
	if err := api.ValidateNodeName(c.Subject.CommonName); err != nil {
		return "", time.Time{}, status.Errorf(codes.PermissionDenied, "the common name of the certificate is no node's name: %v", err)
	}
	return c.Subject.CommonName, c.NotAfter, nil
}

// hello waits for the first message, but not for ever.
func (s *stream) hello(ctx context.Context) (*controlv1.Hello, error) {
	type first struct {
		m   *controlv1.SyncRequest
		err error
	}
	got := make(chan first, 1)
	go func() {
		m, err := s.grpc.Recv()
		got <- first{m, err}
	}()
	t := time.NewTimer(helloTimeout)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-t.C:
		return nil, status.Error(codes.DeadlineExceeded, "the node did not say hello")
	case f := <-got:
		if f.err != nil {
			return nil, f.err
		}
		if f.m.GetHello() == nil {
			return nil, status.Error(codes.InvalidArgument, "the first message must be a hello")
		}
		return f.m.GetHello(), nil
	}
}

// wentBack is the status of a node that knows more of the store's history than the store does.
func wentBack(has *controlv1.Version, revision uint64) error {
	return status.Errorf(codes.FailedPrecondition, "the node has version %s, but the store is only at revision %d: it went back in its history, as after a copy of its files; "+
		"overplane-controller restore makes a new history", api.FormatVersion(has), revision)
}

// sameHistory refuses a node that has a version which the store never came to. What the store says of the node's blocks is not to be trusted then, so this comes
// before the node is registered, and stays so when the store's new history is as long as the one that was lost.
func (s *stream) sameHistory(ctx context.Context, have *controlv1.Version) error {
	now := s.v.graph.version()
	if have.GetIncarnation() != now.GetIncarnation() {
		return nil
	}
	if before := s.v.progress.lost(s.node, 0); before != 0 && before == have.GetRevision() {
		return wentBack(have, now.GetRevision())
	}
	if have.GetRevision() <= now.GetRevision() {
		return nil
	}
	// Another controller may have made it, and the table here be late.
	newest, err := s.v.store.Newest(ctx)
	if err != nil {
		return refusal(fmt.Errorf("%w: %w", ipam.ErrUnknownOutcome, err))
	}
	if int64(have.GetRevision()) <= newest {
		return nil
	}
	s.v.progress.lost(s.node, have.GetRevision())
	s.v.log.Error("a node has a version that the store never came to: the store went back in its history", "node", s.node, "has", api.FormatVersion(have), "revision", newest)
	return wentBack(have, uint64(newest))
}

// register makes the node a member, and waits until the table has it.
func (s *stream) register(ctx context.Context, h *controlv1.Hello) error {
	if h.GetNode() != s.node {
		s.v.metrics.registrations.WithLabelValues("refused").Inc()
		s.v.log.Warn("a node said that it is another", "certificate", s.node, "hello", h.GetNode())
		return status.Errorf(codes.PermissionDenied, "the certificate is node %q's, but the hello says %q", s.node, h.GetNode())
	}
	f, err := facts(h)
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	s.facts = f
	revision, err := s.v.alloc.Register(ctx, f)
	if err == nil {
		err = s.v.graph.wait(ctx, revision)
	}
	if err != nil {
		s.v.metrics.registrations.WithLabelValues("refused").Inc()
		s.v.log.Warn("a node could not join", "node", s.node, "error", err)
		return refusal(err)
	}
	s.v.metrics.registrations.WithLabelValues("joined").Inc()
	return nil
}

// facts are what a hello says of its node.
func facts(h *controlv1.Hello) (ipam.Facts, error) {
	f := ipam.Facts{Name: h.GetNode(), MAC: h.GetMac(), DaemonVersion: h.GetDaemonVersion()}
	// The rules for a member are those of the state that it becomes part of.
	err := api.Validate(&controlv1.NodeState{Node: h.GetNode(), Members: []*controlv1.Member{
		{Name: h.GetNode(), Ipv4: h.GetIpv4(), Ipv6: h.GetIpv6(), Mac: h.GetMac()},
	}})
	if err != nil {
		return f, err
	}
	f.IPv4, _ = netip.ParseAddr(h.GetIpv4()) // empty: none
	f.IPv6, _ = netip.ParseAddr(h.GetIpv6())
	return f, nil
}

// refusal is the status that says why a registration failed.
func refusal(err error) error {
	var exhausted *ipam.ExhaustedError
	var inUse *ipam.InUseError
	var released *ipam.ReleasedError
	code := codes.FailedPrecondition
	switch {
	case errors.As(err, &exhausted):
		code = codes.ResourceExhausted
	case errors.As(err, &inUse):
		code = codes.AlreadyExists
	case errors.As(err, &released):
	case errors.Is(err, ipam.ErrNotLeader), errors.Is(err, ipam.ErrUnknownOutcome), errors.Is(err, ipam.ErrConflict),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		code = codes.Unavailable
	}
	return status.Error(code, err.Error())
}
