package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
	"github.com/overplane/overplane/test/lab/sim"
)

// The disk under the embedded etcd is full: a small tmpfs in a mount namespace of the controller's own. Nodes forward on by what they have; with room again, what
// was given out is there, and nodes join.
func TestControllersDiskIsFull(t *testing.T) {
	t.Parallel()
	if err := lab.CheckRoot(); err != nil {
		t.Skip(err)
	}
	c := newSim(t)
	v := newController(t, c, "a")
	ctx := limit(t, time.Minute)
	// The file system outlives the controller: it is mounted in the namespace of a process that holds it.
	holder := newMountHolder(t, v.StateDir(), "100m")
	v.Wrap = []string{"nsenter", "--mount=" + holder}
	require.NoError(t, v.Start(ctx))
	var ledger sim.Ledger
	n1 := startNode(t, c, 1, []string{v.Address}, sim.NodeOptions{Ledger: &ledger})
	n2 := startNode(t, c, 2, []string{v.Address}, sim.NodeOptions{Ledger: &ledger})
	requireJoined(t, n1, n2)
	before := n1.State()

	inside := filepath.Join(strings.TrimSuffix(holder, "/ns/mnt"), "root", v.StateDir())
	filler := filepath.Join(inside, "filler")
	fill(t, filler)
	// Whatever the controller makes of it, sooner or later: it may serve what it has, refuse, or end, which a service manager would answer by starting it again.
	n3 := startNode(t, c, 3, []string{v.Address}, sim.NodeOptions{Ledger: &ledger})
	refused := time.Now()
	for i := 0; time.Since(refused) < 4*time.Second; i++ {
		if !v.Running() {
			require.NoError(t, v.Launch())
		}
		// Writes of all kinds: many, since the log has room that it took before.
		_ = v.Call(func(a controlv1.AdminServiceClient) error {
			_, err := a.SetStaticRoute(ctx, &controlv1.SetStaticRouteRequest{Route: &controlv1.Route{
				Prefix: fmt.Sprintf("10.%d.%d.0/24", 100+i/250, i%250), Target: &controlv1.Route_Unreachable{Unreachable: true},
			}})
			return err
		})
	}
	for _, n := range []*sim.Node{n1, n2} {
		require.Equal(t, before.GetOwnBlocks()[0].GetCidr(), n1.Blocks()[0])
		require.NotEmpty(t, n.Blocks())
	}
	require.True(t, sim.HasRouteTo(n1.State(), n2.Blocks()[0], "n2"), "n1 forgot n2")

	require.NoError(t, os.Remove(filler))
	// It may still be about to end of the last write that failed.
	for {
		if !v.Running() {
			require.NoError(t, v.Launch())
		}
		err := v.WaitLeads(ctx)
		if err == nil {
			break
		}
		require.False(t, v.Running(), "%v", err)
		require.NoError(t, ctx.Err())
	}
	requireJoined(t, n1, n2, n3)
	requireOwned(t, v, n1, n2, n3)
	require.Equal(t, before.GetVersion().GetIncarnation(), n1.State().GetVersion().GetIncarnation(), "it is another store")
	require.Empty(t, ledger.Wrong())
}

// fill writes to a file until nothing more fits.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			require.ErrorIs(t, err, unix.ENOSPC)
			size /= 2
		}
	}
}

// The files of the embedded etcd are put back to what they were, as from a copy of the disk: a store that says that what nodes were told never was. They do not
// take it, and forward on.
func TestControllersFilesArePutBack(t *testing.T) {
	t.Parallel()
	c := newSim(t)
	v := newController(t, c, "a")
	ctx := limit(t, time.Minute)
	require.NoError(t, v.Start(ctx))
	var ledger sim.Ledger
	join := func(i int) *sim.Node {
		return startNode(t, c, i, []string{v.Address}, sim.NodeOptions{Ledger: &ledger})
	}
	nodes := []*sim.Node{join(1), join(2)}
	requireJoined(t, nodes...)
	require.NoError(t, v.Stop())
	old := filepath.Join(t.TempDir(), "old")
	require.NoError(t, os.CopyFS(old, os.DirFS(v.StateDir())))
	require.NoError(t, v.Start(ctx))
	for i := 3; i < 20; i++ {
		nodes = append(nodes, join(i))
	}
	requireJoined(t, nodes...)
	require.NoError(t, v.Kill())
	before := map[string]uint64{}
	for _, n := range nodes {
		before[n.Name] = n.State().GetDigest()
	}

	require.NoError(t, os.RemoveAll(v.StateDir()))
	require.NoError(t, os.CopyFS(v.StateDir(), os.DirFS(old)))
	require.NoError(t, v.Start(ctx))
	require.Eventually(t, func() bool {
		for _, n := range nodes {
			if !strings.Contains(n.Client.Status().Problem, "it went back in its history") {
				return false
			}
		}
		return true
	}, 20*time.Second, 20*time.Millisecond, "nobody says what is wrong")
	for _, n := range nodes {
		require.Equal(t, before[n.Name], n.State().GetDigest(), "%s took it", n.Name)
	}
	require.Empty(t, ledger.Wrong())
}

// A controller that leads is cut off from etcd: another one leads, the nodes go there, and the first one gives nothing out. Then it is back.
func TestControllerIsCutOffFromEtcd(t *testing.T) {
	t.Parallel()
	c, etcd := newSim(t), newEtcd(t)
	ctx := limit(t, time.Minute)
	wire, err := sim.NewProxy(strings.TrimPrefix(etcd.Endpoint, "http://"))
	require.NoError(t, err)
	defer wire.Close()
	a := newController(t, c, "a", "ETCD_ENDPOINTS=http://"+wire.Addr())
	b := newController(t, c, "b", "ETCD_ENDPOINTS="+etcd.Endpoint)
	require.NoError(t, a.Start(ctx))
	require.NoError(t, b.Launch())
	require.NoError(t, b.WaitServes(ctx))
	var ledger sim.Ledger
	addresses := []string{a.Address, b.Address}
	join := func(i int) *sim.Node { return startNode(t, c, i, addresses, sim.NodeOptions{Ledger: &ledger}) }
	n1, n2 := join(1), join(2)
	requireJoined(t, n1, n2)
	require.False(t, b.Leads())

	wire.Cut()
	n3, n4 := join(3), join(4)
	require.NoError(t, b.WaitLeads(ctx))
	requireJoined(t, n1, n2, n3, n4)
	require.Eventually(t, func() bool { return !a.Leads() }, 10*time.Second, 20*time.Millisecond, "two lead")
	requireOwned(t, b, n1, n2, n3, n4)
	wire.Heal()

	require.NoError(t, b.Stop())
	require.NoError(t, a.WaitLeads(ctx))
	n5 := join(5)
	requireJoined(t, n1, n2, n3, n4, n5)
	requireOwned(t, a, n1, n2, n3, n4, n5)
	require.Empty(t, ledger.Wrong())
}

// An etcd of its own dies and comes back. The controller and the nodes wait for it.
func TestEtcdIsAway(t *testing.T) {
	t.Parallel()
	c, etcd := newSim(t), newEtcd(t)
	ctx := limit(t, time.Minute)
	v := newController(t, c, "a", "ETCD_ENDPOINTS="+etcd.Endpoint)
	require.NoError(t, v.Start(ctx))
	var ledger sim.Ledger
	join := func(i int) *sim.Node {
		return startNode(t, c, i, []string{v.Address}, sim.NodeOptions{Ledger: &ledger})
	}
	n1, n2 := join(1), join(2)
	requireJoined(t, n1, n2)
	before := n1.State().GetDigest()
	etcd.Kill()
	n3 := join(3)
	time.Sleep(2 * time.Second)
	require.Equal(t, before, n1.State().GetDigest())
	require.Empty(t, n3.Blocks())
	require.True(t, v.Running())
	require.NoError(t, etcd.Start(ctx))
	requireJoined(t, n1, n2, n3)
	requireOwned(t, v, n1, n2, n3)
	require.Empty(t, ledger.Wrong())
}
