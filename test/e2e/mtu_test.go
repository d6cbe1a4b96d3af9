package e2e

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// once sends one echo request of a size, again if it gets lost.
func once(t *testing.T, p *lab.Pinger, size int) error {
	t.Helper()
	var err error
	for range 3 {
		_, _, err = p.Once(size, 2*time.Second)
		if !errors.Is(err, lab.ErrNoReply) {
			break
		}
	}
	return err
}

func TestPathMTU(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1, MTU: 1500})
	n1 := l.Nodes[0]
	from, to := n1.Pods[0].End(), l.Nodes[1].Pods[0].End()
	require.Equal(t, 1500, device(t, from.Netns, "eth0").MTU, "pods get the uplink's MTU in full")

	eachFamily(t, func(t *testing.T, family int) {
		headers := map[int]int{4: 20 + 8, 6: 40 + 8}[family]
		p, err := lab.NewPinger(from.Netns, to.Addr(family))
		require.NoError(t, err)
		defer p.Close()
		require.NoError(t, p.SetDF(true))
		require.NoError(t, once(t, p, 1500-headers), "a packet of exactly the MTU")
		// Fragmented by the sender, forwarded as fragments, reassembled by the receiver.
		require.NoError(t, p.SetDF(false))
		require.NoError(t, once(t, p, 8000))
	})

	if l.Options.PodPort == "veth" {
		t.Skip("a veth drops by itself what is larger than the MTU of its other end: no such packet comes to the daemon")
	}
	// A pod that believes in a larger MTU than the underlay's.
	require.NoError(t, lab.SetLinkMTU(from.Netns, "eth0", 3400))
	eachFamily(t, func(t *testing.T, family int) {
		p, err := lab.NewPinger(from.Netns, to.Addr(family))
		require.NoError(t, err)
		defer p.Close()
		require.NoError(t, p.SetDF(true))
		err = once(t, p, 3000)
		var icmpErr *lab.ICMPError
		require.ErrorAs(t, err, &icmpErr)
		require.True(t, icmpErr.TooBig(), "%v", icmpErr)
		require.Equal(t, 1500, icmpErr.MTU)
		require.Equal(t, n1.Addr(family), icmpErr.From)
		require.Positive(t, dropsOf(t, n1, "", "too_big"))
	})
	t.Run("IPv4_without_DF_is_fragmented", func(t *testing.T) {
		p, err := lab.NewPinger(from.Netns, to.IPv4)
		require.NoError(t, err)
		defer p.Close()
		require.NoError(t, p.SetDF(false))
		require.NoError(t, once(t, p, 3000))
	})
	t.Run("TCP_finds_the_path_MTU", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			_, err := lab.Transfer(testContext(t), from, to, family, 8<<20)
			require.NoError(t, err)
		})
	})
}

func TestMTUFollowsTheUplink(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1, MTU: 1500})
	n1 := l.Nodes[0]
	pod := n1.Pods[0]
	require.NoError(t, lab.SetLinkMTU(n1.Netns(), n1.Device(), 1400))
	require.Eventually(t, func() bool { return device(t, pod.Netns(), "eth0").MTU == 1400 }, 10*time.Second, 50*time.Millisecond)
	requireReachable(t, pod.End(), l.Nodes[1].Pods[0].End())
	require.NoError(t, lab.SetLinkMTU(n1.Netns(), n1.Device(), 1500))
	require.Eventually(t, func() bool { return device(t, pod.Netns(), "eth0").MTU == 1500 }, 10*time.Second, 50*time.Millisecond)
}
