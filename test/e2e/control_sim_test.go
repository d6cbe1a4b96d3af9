package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab/sim"
)

// newSim makes an authority for a controller process and simulated nodes.
func newSim(t *testing.T) *sim.Cluster {
	t.Helper()
	if binaries == "" {
		t.Skip("the programs under test are built for root only")
	}
	c, err := sim.NewCluster(t.TempDir(), binaries)
	require.NoError(t, err)
	return c
}

// newController makes a controller with these settings that is not started yet, and ends it with the test.
func newController(t *testing.T, c *sim.Cluster, name string, env ...string) *sim.Controller {
	t.Helper()
	v, err := c.NewController(name)
	require.NoError(t, err)
	v.Env = env
	t.Cleanup(func() {
		require.NoError(t, v.Kill())
		log, _ := os.ReadFile(v.LogPath())
		require.NotContains(t, string(log), "DATA RACE")
		if t.Failed() {
			t.Logf("log of controller %s:\n%s", name, v.LogTail())
		}
	})
	return v
}

// startNode starts a simulated node, and ends it with the test.
func startNode(t *testing.T, c *sim.Cluster, i int, addresses []string, o sim.NodeOptions) *sim.Node {
	t.Helper()
	n, err := c.StartNode(i, addresses, o)
	require.NoError(t, err)
	t.Cleanup(n.Stop)
	return n
}

// limit is a context for what should take seconds.
func limit(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(testContext(t), d)
	t.Cleanup(cancel)
	return ctx
}

func hasBlocks(s *controlv1.NodeState) bool { return len(s.GetOwnBlocks()) > 0 }

// requireJoined waits until nodes have blocks and routes to one another's.
func requireJoined(t *testing.T, nodes ...*sim.Node) {
	t.Helper()
	ctx := limit(t, 20*time.Second)
	for _, n := range nodes {
		require.NoError(t, n.Wait(ctx, hasBlocks))
	}
	for _, n := range nodes {
		require.NoError(t, n.Wait(ctx, func(s *controlv1.NodeState) bool {
			for _, other := range nodes {
				for _, b := range other.Blocks() {
					if other != n && !sim.HasRouteTo(s, b, other.Name) {
						return false
					}
				}
			}
			return true
		}))
	}
}

// requireOwned checks that the controller and the nodes agree on whose the blocks are, and that nobody else has any.
func requireOwned(t *testing.T, v *sim.Controller, nodes ...*sim.Node) {
	t.Helper()
	blocks, err := v.Blocks(limit(t, 10*time.Second))
	require.NoError(t, err)
	want, have := map[string]string{}, map[string]string{}
	for _, n := range nodes {
		for _, b := range n.Blocks() {
			require.Empty(t, want[b], "block %s is that of two nodes", b)
			want[b] = n.Name
		}
	}
	for _, b := range blocks {
		if s := b.GetState(); s == controlv1.BlockState_BLOCK_STATE_ALLOCATED || s == controlv1.BlockState_BLOCK_STATE_RELEASING {
			have[b.GetCidr()] = b.GetOwner()
		}
	}
	require.Equal(t, want, have)
}

// newEtcd starts the machine's etcd.
func newEtcd(t *testing.T) *sim.Etcd {
	t.Helper()
	e, err := sim.NewEtcd(t.TempDir())
	if errors.Is(err, sim.ErrNoEtcd) {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	require.NoError(t, err)
	t.Cleanup(e.Kill)
	require.NoError(t, e.Start(testContext(t)))
	return e
}

// eachStore runs a test on the embedded etcd and on the machine's own. The settings are what a controller is told of it.
func eachStore(t *testing.T, f func(t *testing.T, env []string)) {
	t.Run("embedded", func(t *testing.T) { f(t, nil) })
	t.Run("etcd-server", func(t *testing.T) { f(t, []string{"ETCD_ENDPOINTS=" + newEtcd(t).Endpoint}) })
}

// newMountHolder mounts a tmpfs of that size at a folder, in a mount namespace of a process that ends with the test, and returns the namespace's path.
func newMountHolder(t *testing.T, dir, size string) string {
	t.Helper()
	cmd := exec.Command(tool(t, "unshare"), "--mount", "--propagation", "private", "sh", "-c", `mount -t tmpfs -o size="$2" tmpfs "$1" && echo ready && exec cat`, "sh", dir, size)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait() // cat ends with its input
	})
	line := make([]byte, 6)
	_, err = io.ReadFull(out, line)
	require.NoError(t, err, "the tmpfs cannot be mounted")
	return fmt.Sprintf("/proc/%d/ns/mnt", cmd.Process.Pid)
}
