package server

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/ipam"
)

// Causes with which streams are ended.
var (
	errReplaced   = status.Error(codes.Aborted, "this node opened another stream")
	errNotLeading = status.Error(codes.Unavailable, "this controller does not lead: try the next address")
	errStopping   = status.Error(codes.Unavailable, "this controller is stopping")
	errExpired    = status.Error(codes.Unauthenticated, "the node's certificate expired: issue a new one")
)

// How long a stream may take for what, and waits before it tries again.
const (
	helloTimeout   = 10 * time.Second
	rejectionPause = 30 * time.Second // a node that rejected a table is sent the next one, or the same after this
	firstRetry     = 200 * time.Millisecond
)

// nodeServer is ControlService.
type nodeServer struct {
	controlv1.UnimplementedControlServiceServer
	v *Server
}

// stream is one node's stream.
type stream struct {
	v     *Server
	grpc  grpc.BidiStreamingServer[controlv1.SyncRequest, controlv1.SyncResponse]
	node  string
	facts ipam.Facts
	end   endFunc

	at    cursor
	nonce uint64
	acks  chan *controlv1.Ack // of level ACCEPTED and REJECTED
}

// Sync implements ControlServiceServer.
func (n *nodeServer) Sync(g grpc.BidiStreamingServer[controlv1.SyncRequest, controlv1.SyncResponse]) error {
	v := n.v
	if !v.Leading() {
		return errNotLeading
	}
	name, expires, err := nodeOf(g.Context())
	if err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(g.Context())
	defer end(nil)
	ctx, cancel := context.WithDeadlineCause(ctx, expires, errExpired)
	defer cancel()

	s := &stream{v: v, grpc: g, node: name, end: end, acks: make(chan *controlv1.Ack, 1)}
	hello, err := s.hello(ctx)
	if err != nil {
		return err
	}
	if err := s.sameHistory(ctx, hello.GetHave()); err != nil {
		return err
	}
	if err := s.register(ctx, hello); err != nil {
		return err
	}
	if hello.GetHave() != nil {
		s.at = cursor{hello.GetHave(), hello.GetDigest(), hello.GetEntryCount()}
	}
	v.progress.attach(s, hello.GetHave(), hello.GetProgrammed())
	v.metrics.streams.Add(1)
	defer func() {
		v.progress.detach(s)
		v.metrics.streams.Add(-1)
		v.tickNow() // nobody waits for it any more
	}()
	// The node learns from the headers that it was taken in; there may be nothing else to tell it for long.
	if err := g.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	v.log.Info("node connected", "node", name, "has", api.FormatVersion(hello.GetHave()), "version", hello.GetDaemonVersion())
	go s.receive(ctx)
	err = s.send(ctx)
	v.log.Info("node disconnected", "node", name, "cause", err)
	return err
}

// receive takes what the node says, until the stream ends.
func (s *stream) receive(ctx context.Context) {
	for {
		m, err := s.grpc.Recv()
		if err != nil {
			s.end(err)
			return
		}
		switch {
		case m.GetHello() != nil:
			// Its facts changed; what it has is known.
			if err := s.register(ctx, m.GetHello()); err != nil {
				s.end(err)
				return
			}
			s.v.progress.update(s, func(n *nodeProgress) { n.facts = s.facts })
		case m.GetAck().GetLevel() == controlv1.Ack_LEVEL_PROGRAMMED:
			s.programmed(m.GetAck())
		case m.GetAck() != nil:
			select {
			case s.acks <- m.GetAck():
			case <-ctx.Done():
				return
			}
		}
	}
}

// programmed takes over that the node's data plane forwards by a version.
func (s *stream) programmed(a *controlv1.Ack) {
	newest := s.v.graph.version()
	s.v.progress.update(s, func(n *nodeProgress) {
		if a.GetVersion().GetIncarnation() == n.programmed.GetIncarnation() && a.GetVersion().GetRevision() < n.programmed.GetRevision() {
			return // two acknowledgements that overtook one another
		}
		n.failures, n.more = a.GetFailures(), a.GetMoreFailures()
		if !slices.ContainsFunc(n.failures, func(f *controlv1.EntryFailure) bool { return f.GetKind() == "" }) {
			n.programmed = a.GetVersion() // else it forwards by what it had
		}
		if n.converged(newest) {
			if !n.behind.IsZero() {
				s.v.metrics.program.Observe(s.v.progress.now().Sub(n.behind).Seconds())
			}
			n.behind = time.Time{}
		}
	})
	if s.v.graph.releasing(s.node) {
		s.v.tickNow()
	}
}

// send keeps the node up to date until the stream ends, and returns why it does.
func (s *stream) send(ctx context.Context) error {
	rejected := 0
	for {
		s.v.graph.mu.Lock()
		moved := s.v.graph.moved
		s.v.graph.mu.Unlock()
		allowed, allowance := s.v.allowed.get(s.v.progress.now())
		g, behind := s.v.graph.next(s.node, s.at)
		if behind {
			return wentBack(s.at.version, s.v.graph.version().GetRevision())
		}
		if g == nil {
			newest := s.v.graph.version()
			s.v.progress.update(s, func(n *nodeProgress) {
				if n.converged(newest) {
					n.behind = time.Time{}
				}
			})
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-moved:
			}
			continue
		}
		s.v.progress.update(s, func(n *nodeProgress) {
			if n.behind.IsZero() {
				n.behind = s.v.progress.now()
			}
		})
		ack, err := s.exchange(ctx, g, allowed)
		if err != nil {
			return err
		}
		if ack.GetLevel() == controlv1.Ack_LEVEL_ACCEPTED {
			rejected = 0
			s.at = g.next
			s.v.progress.update(s, func(n *nodeProgress) { n.accepted, n.problem = g.next.version, "" })
			continue
		}
		if err := s.rejected(ctx, ack, rejected, moved, allowance); err != nil {
			return err
		}
		rejected++
	}
}

// rejected deals with a node that does not take what it was sent.
func (s *stream) rejected(ctx context.Context, a *controlv1.Ack, before int, moved, allowance <-chan struct{}) error {
	s.v.metrics.rejections.WithLabelValues(a.GetRejection().String()).Inc()
	s.v.log.Warn("a node does not take what it was sent", "node", s.node, "version", api.FormatVersion(a.GetVersion()), "reason", a.GetReason())
	s.v.progress.update(s, func(n *nodeProgress) { n.problem = a.GetReason() })
	pause := rejectionPause
	switch a.GetRejection() {
	case controlv1.Rejection_REJECTION_DIGEST:
		s.at = cursor{} // a snapshot mends it
		pause = min(firstRetry<<min(before, 10)*time.Duration(min(before, 1)), rejectionPause)
		moved = nil
	case controlv1.Rejection_REJECTION_REGRESSION:
		return status.Errorf(codes.FailedPrecondition, "node %s has a newer version than %s: %s", s.node, api.FormatVersion(a.GetVersion()), a.GetReason())
	}
	t := time.NewTimer(pause)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-moved:
	case <-allowance:
	case <-t.C:
	}
	return nil
}

// exchange sends a group and waits for the answer to it.
func (s *stream) exchange(ctx context.Context, g *group, allowed uint32) (*controlv1.Ack, error) {
	release := func() {}
	if g.last.GetSnapshot() {
		s.v.metrics.snapshots.Inc()
		select {
		case s.v.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		t := time.AfterFunc(maxSlotTime, func() { <-s.v.slots })
		release = func() {
			if t.Stop() {
				<-s.v.slots
			}
		}
	}
	defer release()
	removals := g.removed
	if g.last.GetSnapshot() && s.at.version != nil {
		removals = s.v.tombstones(ctx, s.at.version)
	}
	g.last.IntendedRemovals = max(removals, allowed)

	nonce := s.nonce + uint64(len(g.chunks))
	sent := make(chan error, 1)
	// In a goroutine of its own: it blocks for as long as the node does not read, and ends with the stream.
	go func(nonce uint64) {
		var err error
		for i, c := range g.chunks {
			own := &controlv1.SyncResponse{Version: g.last.GetVersion(), Snapshot: g.last.GetSnapshot()}
			if i+1 == len(g.chunks) {
				own = g.last
			}
			nonce++
			own.Nonce = nonce
			if err = s.grpc.SendMsg(&encoded{c, own}); err != nil {
				break
			}
			s.v.metrics.batches.Inc()
		}
		sent <- err
	}(s.nonce)
	s.nonce = nonce

	t := time.NewTimer(s.v.cfg.AckTimeout)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-t.C:
			s.v.metrics.slow.Inc()
			return nil, status.Errorf(codes.Aborted, "the node did not accept version %s within %v", api.FormatVersion(g.next.version), s.v.cfg.AckTimeout)
		case err := <-sent:
			if err != nil {
				return nil, fmt.Errorf("sending to node %s: %w", s.node, err)
			}
			sent = nil
		case a := <-s.acks:
			if a.GetNonce() == nonce {
				return a, nil
			}
		}
	}
}

// tombstones is how many removals since a version the records account for: blocks and nodes that they remember as no longer being there.
func (v *Server) tombstones(ctx context.Context, since *controlv1.Version) (n uint32) {
	_ = v.store.Read(ctx, 0, func(t *ipam.Table) {
		if t.Incarnation != since.GetIncarnation() {
			return
		}
		for _, b := range t.Blocks() {
			if b.State != ipam.Allocated && b.Revision > int64(since.GetRevision()) {
				n++
			}
		}
		for _, node := range t.Nodes() {
			if node.Gone && node.Revision > int64(since.GetRevision()) {
				n++
			}
		}
	})
	return n
}
