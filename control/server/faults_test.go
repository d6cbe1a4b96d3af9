package server_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/control/server"
	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

// onePool is an IPv4 pool of so many blocks.
func onePool(bits int) ipam.Ranges {
	return ipam.Ranges{Pods: []ipam.PodRange{{CIDR: netip.MustParsePrefix(fmt.Sprintf("10.244.0.0/%d", bits)), BlockBits: 24}}}
}

// dial opens a stream without a client behind it.
func (c *cluster) dial(f pki.Files) controlv1.ControlService_SyncClient {
	s, err := c.tryDial(f)
	require.NoError(c.t, err)
	return s
}

func (c *cluster) tryDial(f pki.Files) (controlv1.ControlService_SyncClient, error) {
	tc, err := f.Client("127.0.0.1")
	require.NoError(c.t, err)
	conn, err := grpc.NewClient(c.node, grpc.WithTransportCredentials(credentials.NewTLS(tc)))
	require.NoError(c.t, err)
	c.t.Cleanup(func() { _ = conn.Close() })
	return controlv1.NewControlServiceClient(conn).Sync(c.t.Context())
}

func hello(node string, i int) *controlv1.SyncRequest {
	return &controlv1.SyncRequest{Message: &controlv1.SyncRequest_Hello{Hello: &controlv1.Hello{Node: node, Ipv4: fmt.Sprintf("10.240.0.%d", i)}}}
}

func (c *cluster) block(cidr string) *controlv1.Block {
	r, err := c.admin().ListBlocks(c.t.Context(), &controlv1.ListBlocksRequest{})
	require.NoError(c.t, err)
	for _, b := range r.GetBlocks() {
		if b.GetCidr() == cidr {
			return b
		}
	}
	return nil
}

func (c *cluster) release(node string, fenced bool) {
	a := c.admin()
	c.eventually(func() bool {
		_, err := a.ReleaseNode(c.t.Context(), &controlv1.ReleaseNodeRequest{Node: node, Fenced: fenced})
		return err == nil
	}, "the release is refused")
}

func TestSecondStreamOfANodeEndsTheFirst(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	f := c.issue(pki.Node, "n1", 0)
	first := c.dial(f)
	require.NoError(t, first.Send(hello("n1", 1)))
	_, err := first.Recv()
	require.NoError(t, err)
	second := c.dial(f)
	require.NoError(t, second.Send(hello("n1", 1)))
	_, err = second.Recv()
	require.NoError(t, err)
	for err == nil {
		_, err = first.Recv()
	}
	require.Equal(t, codes.Aborted, status.Code(err))
}

func TestDrainAndRelease(t *testing.T) {
	c := newCluster(t, dualStack(), nil)
	n1, n2 := c.join(1, nil), c.join(2, nil)
	c.converged(n1, n2)
	own := n2.own()
	a := c.admin()
	_, err := a.ReleaseNode(t.Context(), &controlv1.ReleaseNodeRequest{Node: "n2", Fenced: true})
	require.Equal(t, codes.FailedPrecondition, status.Code(err), "a node that is connected was fenced")

	// The owner's data plane cannot give the block up yet.
	n2.mu.Lock()
	n2.hook = func(s *controlv1.NodeState) error {
		if len(s.GetOwnBlocks()) == 0 {
			return syncclient.Failures{{Kind: "own_block", Key: own[0], Reason: "a pod uses it"}}
		}
		return nil
	}
	n2.mu.Unlock()
	c.release("n2", false)
	time.Sleep(300 * time.Millisecond)
	require.Equal(t, controlv1.BlockState_BLOCK_STATE_RELEASING, c.block(own[0]).GetState())
	require.Equal(t, []string{"n2"}, c.block(own[0]).GetWaitsFor())
	r, err := a.GetConvergence(t.Context(), &controlv1.GetConvergenceRequest{})
	require.NoError(t, err)
	require.Equal(t, "a pod uses it", r.GetNodes()[1].GetFailures()[0].GetReason())
	require.True(t, slices.ContainsFunc(n1.now().GetRoutes(), func(r *controlv1.Route) bool { return r.GetPrefix() == own[0] }), "its route went before its owner did")

	n2.mu.Lock()
	n2.hook = nil
	n2.mu.Unlock()
	n2.stop()
	n2 = c.join(2, nil)
	c.eventually(func() bool { return c.block(own[0]).GetState() == controlv1.BlockState_BLOCK_STATE_FREE }, "the block does not become free")
	c.eventually(func() bool { return len(n1.now().GetRoutes()) == 2 }, "the routes stay") // the services'
	n2.stop()
	c.eventually(func() bool {
		r, err := a.ListNodes(t.Context(), &controlv1.ListNodesRequest{})
		return err == nil && len(r.GetNodes()) == 1
	}, "the node stays a member")

	// It joins again when an operator says so, and gets the same blocks.
	n2 = c.join(2, nil)
	c.eventually(func() bool { return n2.client.Status().Problem != "" }, "it was let in")
	require.Contains(t, n2.client.Status().Problem, "overplane node drain n2 --undo")
	_, err = a.DrainNode(t.Context(), &controlv1.DrainNodeRequest{Node: "n2", Undo: true})
	require.NoError(t, err)
	c.converged(n1, n2)
	require.ElementsMatch(t, own, n2.own())
}

func TestNodeThatComesBackAfterItsBlockWentToCooldown(t *testing.T) {
	c := newCluster(t, onePool(23), func(cfg *server.Config) { cfg.IPAM.Cooldown = 2 * time.Second }) // two blocks
	n1, n2 := c.join(1, nil), c.join(2, nil)
	c.converged(n1, n2)
	own := n2.own()[0]
	n2.stop()
	c.release("n2", true)
	require.Equal(t, controlv1.BlockState_BLOCK_STATE_COOLDOWN, c.block(own).GetState())

	// Nobody else gets the block while it rests; who had it does.
	n3 := c.join(3, nil)
	c.eventually(func() bool { return n3.client.Status().Problem != "" }, "a resting block was given out")
	require.Contains(t, n3.client.Status().Problem, "overplane pools add CIDR --block 24")
	n2 = c.join(2, nil)
	c.converged(n1, n2)
	require.Equal(t, []string{own}, n2.own())

	// Once it is another's, it is not given back.
	n2.stop()
	c.release("n2", true)
	c.converged(n1, n3)
	require.Equal(t, []string{own}, n3.own())
	n2 = c.join(2, nil)
	c.eventually(func() bool { return n2.client.Status().Problem != "" }, "there was no block left")
	_, err := c.admin().AddPool(t.Context(), &controlv1.AddPoolRequest{Cidr: "10.245.0.0/16"})
	require.NoError(t, err)
	c.converged(n1, n2, n3)
	require.Equal(t, []string{"10.245.0.0/24"}, n2.own())
}

// A release that is taken back before the owner heard of it leaves the owner its block.
func TestReleaseIsTakenBack(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	n1, n2 := c.join(1, nil), c.join(2, nil)
	c.converged(n1, n2)
	own := n2.own()[0]
	n2.stop()
	c.release("n2", false)
	_, err := c.admin().DrainNode(t.Context(), &controlv1.DrainNodeRequest{Node: "n2", Undo: true})
	require.NoError(t, err)
	n2 = c.join(2, nil)
	c.converged(n1, n2)
	require.Equal(t, []string{own}, n2.own())
	require.Equal(t, controlv1.BlockState_BLOCK_STATE_ALLOCATED, c.block(own).GetState())
	// The same while it is connected, its data plane being slow.
	heard := make(chan struct{}, 10)
	n2.mu.Lock()
	n2.hook = func(s *controlv1.NodeState) error {
		if len(s.GetOwnBlocks()) == 0 {
			heard <- struct{}{}
			return syncclient.Failures{{Kind: "own_block", Key: own, Reason: "a pod uses it"}}
		}
		return nil
	}
	n2.mu.Unlock()
	c.release("n2", false)
	<-heard
	_, err = c.admin().DrainNode(t.Context(), &controlv1.DrainNodeRequest{Node: "n2", Undo: true})
	require.NoError(t, err)
	c.converged(n1, n2)
	require.Equal(t, []string{own}, n2.own())
}

func TestTwoNodesRaceForTheLastBlock(t *testing.T) {
	c := newCluster(t, onePool(24), nil)
	n1, n2 := c.join(1, nil), c.join(2, nil)
	c.eventually(func() bool {
		return len(n1.own())+len(n2.own()) == 1 && (n1.client.Status().Problem != "") != (n2.client.Status().Problem != "")
	}, "want one winner")
	r, err := c.admin().ListPools(t.Context(), &controlv1.ListPoolsRequest{})
	require.NoError(t, err)
	require.Contains(t, r.GetWarnings()[0], "all 1 blocks are in use")
}

func TestClientsThatStopReadingHoldNobodyUp(t *testing.T) {
	c := newCluster(t, onePool(16), func(cfg *server.Config) { cfg.AckTimeout = 2 * time.Second })
	n1 := c.join(1, nil)
	var stuck []controlv1.ControlService_SyncClient
	for i := range 50 {
		s := c.dial(c.issue(pki.Node, fmt.Sprintf("stuck%d", i), 0))
		require.NoError(t, s.Send(hello(fmt.Sprintf("stuck%d", i), 100+i)))
		stuck = append(stuck, s)
	}
	start := time.Now()
	n2 := c.join(2, nil)
	c.eventually(func() bool {
		return slices.ContainsFunc(n1.now().GetRoutes(), func(r *controlv1.Route) bool { return r.GetNode() == "n2" })
	}, "n1 waits for others")
	c.eventually(func() bool { return len(n2.own()) == 1 }, "n2 waits for others")
	t.Logf("n2's route reached n1 after %v", time.Since(start))
	for _, s := range stuck {
		var err error
		for err == nil {
			_, err = s.Recv()
		}
		require.Equal(t, codes.Aborted, status.Code(err), "%v", err)
	}
}

func TestControllerThatRestartsChangesNothing(t *testing.T) {
	dirs := map[int]string{1: t.TempDir(), 2: t.TempDir()}
	c := newCluster(t, dualStack(), nil)
	join := func(i int) *node { return c.join(i, func(cfg *syncclient.Config) { cfg.Dir = dirs[i] }) }
	n1, n2 := join(1), join(2)
	c.converged(n1, n2)
	before, before2 := n1.now(), n2.now()
	c.kill()
	c.eventually(func() bool { return !n1.client.Status().Connected }, "the stream stands")
	require.Equal(t, before.GetDigest(), n1.now().GetDigest())

	// A daemon that starts meanwhile comes up from disk.
	n2.stop()
	n2 = join(2)
	c.eventually(func() bool { return n2.now() != nil }, "nothing comes from disk")
	require.Equal(t, before2.GetDigest(), n2.now().GetDigest())
	n1.mu.Lock()
	n1.hook = func(s *controlv1.NodeState) error {
		if s.GetDigest() != before.GetDigest() {
			t.Errorf("the table changed: digest %x, was %x", s.GetDigest(), before.GetDigest())
		}
		return nil
	}
	n1.mu.Unlock()
	c.start()
	c.converged(n1, n2)
	require.Equal(t, before.GetVersion().GetIncarnation(), n1.now().GetVersion().GetIncarnation())
	require.GreaterOrEqual(t, n1.now().GetVersion().GetRevision(), before.GetVersion().GetRevision())
}

func TestEmptyStoreRemovesNothing(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	var nodes []*node
	for i := range 12 {
		nodes = append(nodes, c.join(i, nil))
	}
	c.converged(nodes...)
	before := nodes[0].now()
	// Another store in its place, as after a disk was lost.
	c.kill()
	c.mem = store.NewMemory()
	c.start()
	c.eventually(func() bool {
		r, err := c.admin().GetConvergence(t.Context(), &controlv1.GetConvergenceRequest{})
		return err == nil && len(r.GetNodes()) == 12 && r.GetConnected() == 12
	}, "the nodes do not come back")
	// They register with the empty store one by one, so some tables lack little enough to be taken; none ever lost more than the guard lets go.
	require.GreaterOrEqual(t, len(before.GetRoutes()), 11)
	c.eventually(func() bool {
		for _, n := range nodes {
			if n.now().GetVersion().GetIncarnation() == before.GetVersion().GetIncarnation() {
				return false
			}
		}
		return true
	}, "the nodes do not take the new store over once it has what they have")
}

func TestRemovalsNeedTheControllersWord(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	n1 := c.join(1, nil)
	c.converged(n1)
	a := c.admin()
	for i := range 40 {
		_, err := a.SetStaticRoute(t.Context(), &controlv1.SetStaticRouteRequest{Route: &controlv1.Route{
			Prefix: fmt.Sprintf("10.9.%d.0/24", i), Target: &controlv1.Route_Unreachable{Unreachable: true},
		}})
		require.NoError(t, err)
	}
	c.converged(n1)
	routes := func() int { return len(n1.now().GetRoutes()) }
	require.Equal(t, 40, routes())

	// Somebody deletes the records behind the controller's back.
	var tx ipam.Tx
	for i := range 30 {
		tx.Delete = append(tx.Delete, fmt.Sprintf("routes/10.9.%d.0_24", i))
	}
	_, err := c.store.Commit(t.Context(), tx)
	require.NoError(t, err)
	c.eventually(func() bool { return n1.client.Status().Refused != "" }, "the removal was taken")
	require.Equal(t, 40, routes())
	r, err := a.GetConvergence(t.Context(), &controlv1.GetConvergenceRequest{})
	require.NoError(t, err)
	require.Contains(t, r.GetNodes()[0].GetProblem(), "--allow-removals 30")
	_, err = a.AllowRemovals(t.Context(), &controlv1.AllowRemovalsRequest{Count: 30})
	require.NoError(t, err)
	c.eventually(func() bool { return routes() == 10 }, "the operator's word is not heard")

	// What an operator removes through the controller is meant.
	_, err = a.AllowRemovals(t.Context(), &controlv1.AllowRemovalsRequest{})
	require.NoError(t, err)
	c.kill()
	c.start()
	n1.stop()
	a = c.admin()
	for i := 30; i < 40; i++ {
		_, err = a.RemoveStaticRoute(t.Context(), &controlv1.RemoveStaticRouteRequest{Prefix: fmt.Sprintf("10.9.%d.0/24", i)})
		require.NoError(t, err)
	}
}

func TestNodeWithAnothersAddress(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	n1 := c.join(1, nil)
	c.converged(n1)
	thief := c.join(2, func(cfg *syncclient.Config) {
		cfg.Facts = func() (syncclient.Facts, error) {
			return syncclient.Facts{IPv4: "10.240.0.2", MAC: "02:00:00:00:00:09"}, nil
		}
	})
	c.eventually(func() bool { return thief.client.Status().Problem != "" }, "it was let in")
	require.Contains(t, thief.client.Status().Problem, "overplane node release n1 --fenced")
	inside := c.join(3, func(cfg *syncclient.Config) {
		cfg.Facts = func() (syncclient.Facts, error) { return syncclient.Facts{IPv4: "10.244.3.1"}, nil }
	})
	c.eventually(func() bool { return inside.client.Status().Problem != "" }, "it was let in")
	require.Contains(t, inside.client.Status().Problem, "10.244.3.1, which is inside pod range 10.244.0.0/16")
}

func TestNodesFactsChange(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	n1 := c.join(1, nil)
	mac, changed := make(chan string, 2), make(chan struct{})
	mac <- "02:00:00:00:00:aa"
	n2 := c.join(2, func(cfg *syncclient.Config) {
		cfg.FactsChanged = changed
		cfg.Facts = func() (syncclient.Facts, error) { return syncclient.Facts{IPv4: "10.240.0.9", MAC: <-mac}, nil }
	})
	c.converged(n1, n2)
	mac <- "02:00:00:00:00:bb"
	changed <- struct{}{}
	c.eventually(func() bool {
		return slices.ContainsFunc(n1.now().GetMembers(), func(m *controlv1.Member) bool { return m.GetMac() == "02:00:00:00:00:bb" })
	}, "the new MAC does not arrive")
}

func TestLeadIsLost(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	n1 := c.join(1, nil)
	c.converged(n1)
	c.mem.Depose()
	c.eventually(c.server.Leading, "nobody leads")
	n2 := c.join(2, nil)
	c.converged(n1, n2)
}

func TestTwoHundredNodes(t *testing.T) {
	const nodes = 200
	c := newCluster(t, dualStack(), nil)
	var all []*node
	start := time.Now()
	for i := range nodes {
		all = append(all, c.join(i, nil))
	}
	c.converged(all...)
	t.Logf("%d nodes joined and converged in %v", nodes, time.Since(start))
	owners := make(map[string]string)
	for _, n := range all {
		require.Len(t, n.own(), 2)
		for _, b := range n.own() {
			require.Empty(t, owners[b])
			owners[b] = n.name
		}
	}
	for _, n := range all {
		require.Len(t, n.now().GetRoutes(), 2*(nodes-1)+2)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	start = time.Now()
	_, err := c.admin().SetStaticRoute(ctx, &controlv1.SetStaticRouteRequest{Route: &controlv1.Route{Prefix: "10.9.0.0/24", Target: &controlv1.Route_Node{Node: "n7"}}})
	require.NoError(t, err)
	c.converged(all...)
	t.Logf("one change is programmed by %d nodes after %v", nodes, time.Since(start))
	// The target has no route to itself.
	require.Len(t, all[7].now().GetRoutes(), 2*(nodes-1)+2)
	require.Len(t, all[8].now().GetRoutes(), 2*(nodes-1)+3)
}
