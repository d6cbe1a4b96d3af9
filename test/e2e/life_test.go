package e2e

import (
	"errors"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// A daemon that is away must not take the node's own traffic with it, and one that comes back must find its pods.
func TestDaemonAwayAndBack(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		workers int
		away    func(*lab.Node) error
		back    func(*testing.T, *lab.Node) error
	}{
		{"killed", 1, (*lab.Node).Kill, start},
		{"killed_2_workers", 2, (*lab.Node).Kill, start},
		{"stopped", 1, (*lab.Node).Stop, start},
		{"hung", 1, func(n *lab.Node) error { return n.Signal(unix.SIGSTOP) }, func(_ *testing.T, n *lab.Node) error { return n.Signal(unix.SIGCONT) }},
		{"hung_2_workers", 2, func(n *lab.Node) error { return n.Signal(unix.SIGSTOP) }, func(_ *testing.T, n *lab.Node) error { return n.Signal(unix.SIGCONT) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t, lab.Options{Nodes: 2, Pods: 2, Workers: c.workers})
			n1, n2 := l.Nodes[0], l.Nodes[1]
			var nodeFlows, podFlows []*flow
			for _, family := range families {
				nodeFlows = append(nodeFlows, openFlow(t, n1.End(), n2.End(), family), openFlow(t, n2.End(), l.ExtEnd(), family))
				podFlows = append(podFlows,
					openFlow(t, n1.Pods[0].End(), n2.Pods[0].End(), family), // remote
					openFlow(t, n2.Pods[0].End(), n2.Pods[1].End(), family)) // local
			}
			podDevice := deviceIndex(t, n2.Pods[0].Netns())

			require.NoError(t, c.away(n2))
			time.Sleep(3 * time.Second) // longer than the heartbeat's limit
			for _, f := range nodeFlows {
				f.requireAlive(t, 5*time.Second)
			}
			require.Equal(t, podDevice, deviceIndex(t, n2.Pods[0].Netns()), "the pod keeps its device")
			for _, family := range families {
				requireUnreachable(t, n1.Pods[0].End(), n2.Pods[0].Addr(family))
			}

			require.NoError(t, c.back(t, n2))
			require.NoError(t, n2.WaitProgrammed(testContext(t)))
			for _, f := range podFlows {
				// The retransmission timer has doubled a few times by now.
				f.requireAlive(t, 15*time.Second)
			}
			for _, f := range nodeFlows {
				f.requireAlive(t, 5*time.Second)
			}
			require.Equal(t, podDevice, deviceIndex(t, n2.Pods[0].Netns()), "the pod keeps its device")
			requireReachable(t, n1.Pods[1].End(), n2.Pods[1].End())
			requireReachable(t, n2.End(), n2.Pods[0].End())
		})
	}
}

// Bytes on their way when both daemons crash, one after the other, arrive.
func TestTransferSurvivesCrashes(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1})
	eachFamily(t, func(t *testing.T, family int) {
		done := make(chan error, 1)
		go func() {
			_, err := lab.Transfer(testContext(t), l.Nodes[0].Pods[0].End(), l.Nodes[1].Pods[0].End(), family, bulk(256<<20))
			done <- err
		}()
		for _, n := range l.Nodes {
			time.Sleep(200 * time.Millisecond)
			require.Empty(t, done, "the transfer ended before the crash")
			require.NoError(t, n.Kill())
			require.NoError(t, n.Start(testContext(t)))
		}
		require.NoError(t, <-done)
	})
}

func start(t *testing.T, n *lab.Node) error { return n.Start(testContext(t)) }

// deviceIndex is the interface index of eth0 in a namespace: another device has another one.
func deviceIndex(t *testing.T, netns string) int {
	t.Helper()
	var index int
	require.NoError(t, lab.InNetns(netns, func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			index = i.Index
		}
		return err
	}))
	return index
}

func TestReloadFollowsTheStateFile(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 3, Pods: 1})
	n1, n3 := l.Nodes[0], l.Nodes[2]
	pod1, pod3 := n1.Pods[0].End(), n3.Pods[0].End()
	requireReachable(t, pod1, pod3)

	// n1 forgets n3's blocks: unused pool space is unreachable, by ICMP, and never leaves by the default route.
	l.Revision++
	state := l.State(n1)
	kept := state.Routes[:0]
	for _, r := range state.Routes {
		if r.GetNode() != n3.Name() {
			kept = append(kept, r)
		}
	}
	state.Routes = kept
	require.NoError(t, l.WriteState(n1, state))
	require.NoError(t, n1.Reload())
	require.NoError(t, n1.WaitProgrammed(testContext(t)))
	eachFamily(t, func(t *testing.T, family int) {
		p, err := lab.NewPinger(pod1.Netns, pod3.Addr(family))
		require.NoError(t, err)
		defer p.Close()
		_, _, err = p.Once(56, 2*time.Second)
		var icmpErr *lab.ICMPError
		require.ErrorAs(t, err, &icmpErr)
		require.Equal(t, map[int]uint8{4: 3, 6: 1}[family], icmpErr.Type, "destination unreachable")
		require.Equal(t, n1.Addr(family), icmpErr.From)
	})
	require.Positive(t, dropsOf(t, n1, n1.Pods[0].Name(), "unreachable"))

	require.NoError(t, l.WriteStates())
	require.NoError(t, n1.Reload())
	require.NoError(t, l.WaitProgrammed(testContext(t)))
	requireReachable(t, pod1, pod3)

	t.Run("bad_state_is_refused_and_the_old_one_kept", func(t *testing.T) {
		bad := l.State(n1)
		bad.Version.Revision++
		bad.Node = "somebody-else"
		require.NoError(t, l.WriteState(n1, bad))
		require.NoError(t, n1.Reload())
		require.NoError(t, n1.WaitStatus(testContext(t), "complaining", func(s *controlv1.GetStatusResponse) bool { return len(s.Problems) > 0 }))
		requireReachable(t, pod1, pod3)
	})
}

func TestNodesComeAndGo(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1})
	n1 := l.Nodes[0]
	n3, err := l.AddNode(testContext(t))
	require.NoError(t, err)
	require.Equal(t, "n3", n3.Name())
	requireReachable(t, n1.Pods[0].End(), n3.Pods[0].End())
	gone := n3.Pods[0].End()
	require.NoError(t, l.Drain(testContext(t), "n3"))
	for _, family := range families {
		requireUnreachable(t, n1.Pods[0].End(), gone.Addr(family))
	}
	requireReachable(t, n1.Pods[0].End(), l.Nodes[1].Pods[0].End())
	require.Empty(t, l.Broken(testContext(t)))
	_, err = lab.Load(l.Name)
	require.False(t, errors.Is(err, lab.ErrNoLab))
}
