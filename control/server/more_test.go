package server_test

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/control/server"
)

func TestNodesFindTheControllerThatLeads(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	// A second controller on the same store waits for the lead.
	st, err := c.mem.Open(t.Context())
	require.NoError(t, err)
	defer st.Close()
	v := server.New(st, c.cfg)
	tc, err := c.files("controller").Server(pki.Node)
	require.NoError(t, err)
	s := v.NodeServer(tc, server.NewHealth(v))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	go func() { _ = s.Serve(l) }()
	defer s.Stop()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- v.Run(ctx) }()
	defer func() { cancel(); <-done }()

	both := func(cfg *syncclient.Config) { cfg.Addresses = []string{l.Addr().String(), c.node} }
	n1, n2 := c.join(1, both), c.join(2, both)
	c.converged(n1, n2)
	before := n1.now()
	require.False(t, v.Leading())
	c.kill()
	c.eventually(v.Leading, "nobody leads")
	c.eventually(func() bool { return n1.client.Status().Address == l.Addr().String() }, "the node does not find the other controller")
	require.Equal(t, before.GetDigest(), n1.now().GetDigest())
	n3 := c.join(3, both)
	c.eventually(func() bool { return len(n3.own()) == 1 && len(n1.now().GetRoutes()) == 2 }, "the second controller does not do its work")
}

func TestPartitionedOwnerKeepsItsBlockUntilItAnswers(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	n1, n2 := c.join(1, nil), c.join(2, nil)
	c.converged(n1, n2)
	own := n2.own()[0]
	n2.stop() // as seen from here
	c.release("n2", false)
	time.Sleep(time.Second) // longer than the cooldown
	require.Equal(t, controlv1.BlockState_BLOCK_STATE_RELEASING, c.block(own).GetState())
	require.Len(t, n1.now().GetRoutes(), 1, "its route went, though it may live")
	n2 = c.join(2, nil)
	c.eventually(func() bool { return c.block(own).GetState() == controlv1.BlockState_BLOCK_STATE_FREE }, "the owner answered, and nothing follows")
	require.Empty(t, n2.own())
}

// A node that knows nothing of what was added to the protocol since its first version.
func TestClientOfTheFirstVersion(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	s := c.dial(c.issue(pki.Node, "n1", 0))
	require.NoError(t, s.Send(hello("n1", 1)))
	for {
		b, err := s.Recv()
		require.NoError(t, err)
		if !b.GetLast() {
			continue
		}
		for _, level := range []controlv1.Ack_Level{controlv1.Ack_LEVEL_ACCEPTED, controlv1.Ack_LEVEL_PROGRAMMED} {
			ack := &controlv1.Ack{Level: level, Nonce: b.GetNonce(), Version: b.GetVersion()}
			require.NoError(t, s.Send(&controlv1.SyncRequest{Message: &controlv1.SyncRequest_Ack{Ack: ack}}))
		}
		break
	}
	a := c.admin()
	c.eventually(func() bool {
		r, err := a.GetConvergence(t.Context(), &controlv1.GetConvergenceRequest{})
		return err == nil && r.GetConverged() == 1
	}, "it does not converge")
}
