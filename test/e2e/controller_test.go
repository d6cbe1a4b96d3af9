package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// requireBlocks waits until all blocks of a node are in one of the states.
func requireBlocks(t *testing.T, l *lab.Lab, node string, states ...controlv1.BlockState) {
	t.Helper()
	require.Eventually(t, func() bool {
		blocks, err := l.Blocks(testContext(t), node)
		for _, b := range blocks {
			in := false
			for _, s := range states {
				in = in || b.GetState() == s
			}
			if !in {
				return false
			}
		}
		return err == nil && len(blocks) == len(families)
	}, 10*time.Second, 50*time.Millisecond, "blocks of %s", node)
}

// underTraffic does something while pods of the nodes that are there talk, a hundred datagrams a second in each flow; none may be lost.
func underTraffic(t *testing.T, l *lab.Lab, do func(), nodes ...*lab.Node) {
	t.Helper()
	traffic, err := l.StartTraffic(nodes...)
	require.NoError(t, err)
	do()
	sent, err := traffic.Stop()
	require.NoError(t, err)
	require.NotZero(t, sent)
	t.Logf("0 of %d datagrams lost", sent)
}

// snapshots are the generations of what a daemon's workers forward by.
func snapshots(t *testing.T, n *lab.Node) (out []uint64) {
	t.Helper()
	for _, w := range status(t, n).GetWorkers() {
		out = append(out, w.GetSnapshot())
	}
	return out
}

// hasRoute reports whether a node forwards by a prefix.
func hasRoute(t *testing.T, n *lab.Node, prefix string) (has bool) {
	t.Helper()
	require.NoError(t, n.Call(testContext(t), func(ctx context.Context, c controlv1.LocalServiceClient) error {
		r, err := c.ListRoutes(ctx, &controlv1.ListRoutesRequest{})
		has = slices.ContainsFunc(r.GetRoutes(), func(r *controlv1.ProgrammedRoute) bool { return r.GetPrefix() == prefix })
		return err
	}))
	return has
}

func requireRoute(t *testing.T, n *lab.Node, prefix string) {
	t.Helper()
	require.Eventually(t, func() bool { return hasRoute(t, n, prefix) }, 20*time.Second, 20*time.Millisecond, "%s does not hear of %s", n.Name(), prefix)
}

func TestNodesOfAController(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Name: "ovptctl", Nodes: 3, Pods: 1, State: lab.StateController})
	n1, n2, n3 := l.Nodes[0], l.Nodes[1], l.Nodes[2]
	t.Run("they_forward_by_what_it_says", func(t *testing.T) {
		for i, n := range l.Nodes {
			s := status(t, n)
			require.True(t, s.GetReady(), "%v", s.GetProblems())
			require.Equal(t, l.Controller.Address, s.GetController().GetAddress())
			require.Equal(t, 2, len(s.GetOwnBlocks()))
			require.Equal(t, []string{"10.244.0.2", "10.244.1.2", "10.244.2.2"}[i], n.Pods[0].IPv4().String())
		}
		requireReachable(t, n1.Pods[0].End(), n3.Pods[0].End())
		r := l.Report(testContext(t))
		require.Equal(t, l.ControllerPid(), r.Controller.PID)
		require.Equal(t, "10.240.0.1:7443", r.Controller.Address)
	})

	for _, p := range lab.ControlProofs() {
		t.Run(strings.ReplaceAll(p.Name, " ", "_"), func(t *testing.T) {
			detail, err := p.Check(testContext(t), l, 4)
			require.NoError(t, err)
			t.Log(detail)
		})
	}

	t.Run("a_daemon_starts_while_it_is_away", func(t *testing.T) {
		outage := 2 * time.Second
		if full() {
			outage = time.Minute
		}
		generations := map[string][]uint64{n1.Name(): snapshots(t, n1), n3.Name(): snapshots(t, n3)}
		before := status(t, n2).GetProgrammed()
		time.Sleep(1200 * time.Millisecond) // a daemon writes its table once a second at most
		// The flows of the daemon that starts anew begin with it; all others go on from before to after.
		underTraffic(t, l, func() {
			require.NoError(t, l.KillController())
			end := time.Now().Add(outage)
			require.NoError(t, n2.Kill())
			require.NoError(t, n2.Start(testContext(t)))
			s := status(t, n2)
			require.True(t, s.GetReady(), "%v", s.GetProblems())
			require.False(t, s.GetController().GetConnected())
			require.NotEmpty(t, s.GetWarnings())
			require.True(t, api.EqualVersions(before, s.GetProgrammed()), "it forwards by the table on disk")
			requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
			generations[n2.Name()] = snapshots(t, n2)
			underTraffic(t, l, func() {
				time.Sleep(time.Until(end))
				require.NoError(t, l.StartController(testContext(t)))
				require.NoError(t, l.WaitProgrammed(testContext(t)))
			})
		}, n1, n3)
		for _, n := range l.Nodes {
			require.Equal(t, generations[n.Name()], snapshots(t, n), "%s changed what it forwards by, though nothing changed", n.Name())
		}
	})

	t.Run("a_node_is_cut_off_from_it", func(t *testing.T) {
		// The router's part of the underlay is lost to n3: the controller is there, the other nodes are not.
		rules := "table inet cut { chain out { type filter hook output priority 0; tcp dport 7443-7445 drop; }; chain in { type filter hook input priority 0; tcp sport 7443-7445 drop; }; }"
		underTraffic(t, l, func() {
			Exec(t, n3.Netns(), "nft", rules)
			const news = "10.9.0.0/24"
			require.NoError(t, l.AdminCall(testContext(t), func(ctx context.Context, c controlv1.AdminServiceClient) error {
				_, err := c.SetStaticRoute(ctx, &controlv1.SetStaticRouteRequest{Route: &controlv1.Route{Prefix: news, Target: &controlv1.Route_Unreachable{Unreachable: true}}})
				return err
			}))
			requireRoute(t, n1, news)
			requireRoute(t, n2, news)
			require.False(t, hasRoute(t, n3, news), "n3 heard of it though it is cut off")
			Exec(t, n3.Netns(), "nft", "delete table inet cut")
			requireRoute(t, n3, news) // what TCP lost it sends again, a little later each time
			require.NoError(t, l.WaitProgrammed(testContext(t)))
		})
	})

	t.Run("another_nodes_certificate_is_refused", func(t *testing.T) {
		require.NoError(t, n1.Stop())
		stolen := filepath.Join(n2.Dir(), "pki", "node")
		require.NoError(t, n1.StartWith(testContext(t), lab.StartOptions{Env: []string{"OVERPLANE_TLS_CERT=" + stolen + ".crt", "OVERPLANE_TLS_KEY=" + stolen + ".key"}}))
		require.NoError(t, n1.WaitStatus(testContext(t), "refused", func(s *controlv1.GetStatusResponse) bool {
			return len(s.GetWarnings()) > 0 && strings.Contains(s.GetWarnings()[0], `the certificate is node "n2"'s`)
		}))
		requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
		require.NoError(t, n1.Stop())
		require.NoError(t, n1.Start(testContext(t)))
		require.NoError(t, l.WaitProgrammed(testContext(t)))
	})

	t.Run("the_operators_commands_find_it", func(t *testing.T) {
		for args, want := range map[string]string{"converge": "3 of 3 nodes connected, 3 converged", "nodes": "10.244.1.0/24", "blocks": "allocated"} {
			out, err := exec.Command(filepath.Join(binaries, "overplane"), "lab", "--name", l.Name, "exec", "gw", "--", filepath.Join(binaries, "overplane"), args).CombinedOutput()
			require.NoError(t, err, string(out))
			require.Contains(t, string(out), want)
		}
	})

	t.Run("a_dead_node_is_fenced_and_comes_back", func(t *testing.T) {
		n4, err := l.AddNode(testContext(t))
		require.NoError(t, err)
		require.NoError(t, n4.Kill())
		require.NoError(t, l.Drain(testContext(t), n4.Name()))
		requireBlocks(t, l, "n4", controlv1.BlockState_BLOCK_STATE_COOLDOWN, controlv1.BlockState_BLOCK_STATE_FREE)
		again, err := l.AddNode(testContext(t))
		require.NoError(t, err)
		require.Equal(t, "n4", again.Name())
		require.Equal(t, n4.BlockIPv4, again.BlockIPv4, "the same identity gets its block back")
		requireReachable(t, n1.Pods[0].End(), again.Pods[0].End())
		require.NoError(t, l.Drain(testContext(t), "n4"))
	})

	t.Run("the_traffic_counts_what_is_lost", func(t *testing.T) {
		traffic, err := l.StartTraffic()
		require.NoError(t, err)
		require.NoError(t, n3.Kill())
		require.NoError(t, n3.Start(testContext(t)))
		time.Sleep(200 * time.Millisecond)
		_, err = traffic.Stop()
		require.ErrorContains(t, err, "n1-p1 to n3-p1, IPv4: ")
		require.NotContains(t, err.Error(), "n1-p1 to n2-p1")
		require.NoError(t, l.WaitProgrammed(testContext(t)))
	})

	// The last one: n3 is not whole afterwards.
	t.Run("a_block_that_pods_live_in_is_not_given_up", func(t *testing.T) {
		require.NoError(t, l.AdminCall(testContext(t), func(ctx context.Context, c controlv1.AdminServiceClient) error {
			_, err := c.ReleaseNode(ctx, &controlv1.ReleaseNodeRequest{Node: "n3"})
			return err
		}))
		require.NoError(t, n3.WaitStatus(testContext(t), "without blocks", func(s *controlv1.GetStatusResponse) bool { return len(s.GetOwnBlocks()) == 0 }))
		time.Sleep(1500 * time.Millisecond) // the controller looks every second
		requireBlocks(t, l, "n3", controlv1.BlockState_BLOCK_STATE_RELEASING)
		require.NoError(t, n3.Pods[0].Detach(testContext(t)))
		requireBlocks(t, l, "n3", controlv1.BlockState_BLOCK_STATE_COOLDOWN, controlv1.BlockState_BLOCK_STATE_FREE)
	})
}

func TestTwoControllersShareAnUnderlay(t *testing.T) {
	t.Parallel()
	a := newLab(t, lab.Options{Name: "ovptcta", Nodes: 2, Pods: 1, State: lab.StateController})
	b := newLab(t, lab.Options{Name: "ovptctb", Nodes: 2, Pods: 1, State: lab.StateController, Underlay: "ovptcta"})
	require.NotEqual(t, a.Controller.Address, b.Controller.Address)
	for i := range a.Nodes {
		require.Equal(t, a.Nodes[i].Pods[0].IPv4(), b.Nodes[i].Pods[0].IPv4(), "the two clusters number their pods alike")
	}
	for _, l := range []*lab.Lab{a, b} {
		requireReachable(t, l.Nodes[0].Pods[0].End(), l.Nodes[1].Pods[0].End())
		r, err := l.Convergence(testContext(t))
		require.NoError(t, err)
		require.EqualValues(t, 2, r.GetConverged())
		require.Len(t, r.GetNodes(), 2, "neither has heard of the other's nodes")
	}

	// Both at once, with the same addresses: each pod receives exactly what its own cluster's sent to it. Both clusters' flows have ports of their own, so a
	// datagram that strayed would find no socket.
	type counters struct{ datagrams, noPort uint64 }
	read := func(l *lab.Lab) (c counters) {
		for _, n := range l.Nodes {
			in, no := udpCounters(t, n.Pods[0].Netns())
			c.datagrams, c.noPort = c.datagrams+in, c.noPort+no
		}
		return c
	}
	before := []counters{read(a), read(b)}
	both := []*lab.Traffic{nil, nil}
	for i, l := range []*lab.Lab{a, b} {
		var err error
		both[i], err = l.StartTraffic()
		require.NoError(t, err)
	}
	n5, err := b.AddNode(testContext(t)) // also while one of them changes
	require.NoError(t, err)
	require.NoError(t, b.Drain(testContext(t), n5.Name()))
	for i, l := range []*lab.Lab{a, b} {
		sent, err := both[i].Stop()
		require.NoError(t, err, "lab %s", l.Name)
		after := read(l)
		require.Equal(t, sent, after.datagrams-before[i].datagrams, "pods of lab %s received other datagrams than were sent to them", l.Name)
		require.Equal(t, before[i].noPort, after.noPort, "pods of lab %s received datagrams that nobody sent them", l.Name)
		t.Logf("lab %s: %d datagrams, each where it belongs", l.Name, sent)
	}
}

// udpCounters are how many datagrams a namespace's sockets took, and how many came for ports that nobody listens on, IPv4 and IPv6.
func udpCounters(t *testing.T, netns string) (datagrams, noPort uint64) {
	t.Helper()
	require.NoError(t, lab.InNetns(netns, func() error {
		v4, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		v6, err := os.ReadFile("/proc/thread-self/net/snmp6")
		if err != nil {
			return err
		}
		var lines [][]string
		for line := range strings.Lines(string(v4) + string(v6)) {
			lines = append(lines, strings.Fields(line))
		}
		number := func(s string) uint64 {
			n, err := strconv.ParseUint(s, 10, 64)
			require.NoError(t, err)
			return n
		}
		for i, l := range lines {
			switch {
			case l[0] == "Udp:" && l[1] == "InDatagrams":
				datagrams += number(lines[i+1][1])
				noPort += number(lines[i+1][2])
			case l[0] == "Udp6InDatagrams":
				datagrams += number(l[1])
			case l[0] == "Udp6NoPorts":
				noPort += number(l[1])
			}
		}
		return nil
	}))
	return datagrams, noPort
}
