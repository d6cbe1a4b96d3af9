package e2e

import (
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// framesTo collects what comes to the underlay for an address.
func framesTo(t *testing.T, l *lab.Lab, dst netip.Addr) *lab.Capture {
	t.Helper()
	c, err := lab.StartCapture(l.Gateway(), func(f []byte) bool {
		ip, ok := lab.ParseOuterIP(f)
		return ok && ip.Dst == dst
	})
	require.NoError(t, err)
	return c
}

// Pod addresses that nobody has must not leave by the default route: neither from pods nor from the node, and neither with the daemon
// nor without it.
func TestUnusedPodSpaceIsNotLeaked(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1})
	n1 := l.Nodes[0]
	eachFamily(t, func(t *testing.T, family int) {
		for _, unused := range map[int][]string{
			4: {"10.244.99.5", "10.244.1.77"},
			6: {"fd12:3456:789a:0:99::5", "fd12:3456:789a:0:1::77"},
		}[family] {
			dst := netip.MustParseAddr(unused)
			capture := framesTo(t, l, dst)
			p, err := lab.NewPinger(n1.Pods[0].Netns(), dst)
			require.NoError(t, err)
			defer p.Close()
			_, _, err = p.Once(56, 2*time.Second)
			var icmpErr *lab.ICMPError
			require.ErrorAs(t, err, &icmpErr, "%v", dst)
			require.Equal(t, n1.Addr(family), icmpErr.From)
			requireUnreachable(t, n1.End(), dst)
			require.Empty(t, capture.Stop(), "%v was seen on the underlay", dst)
		}
	})
	require.NoError(t, n1.Stop())
	eachFamily(t, func(t *testing.T, family int) {
		dst := netip.MustParseAddr(map[int]string{4: "10.244.99.5", 6: "fd12:3456:789a:0:99::5"}[family])
		capture := framesTo(t, l, dst)
		requireUnreachable(t, n1.End(), dst)
		require.Empty(t, capture.Stop(), "%v was seen on the underlay", dst)
	})
}

// What is for the world outside leaves with the node's address; with translation switched off ("external SNAT") with the pod's own.
func TestPodsAndTheWorldOutside(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1})
	n1 := l.Nodes[0]
	pod, ext := n1.Pods[0], l.ExtEnd()
	require.NoError(t, n1.WaitStatus(testContext(t), "aware of its gateways", func(s *controlv1.GetStatusResponse) bool {
		return s.Uplink.GatewayMacIpv4 != "" && s.Uplink.GatewayMacIpv6 != "" // until then the outside is unreachable
	}))
	eachFamily(t, func(t *testing.T, family int) {
		capture := framesTo(t, l, ext.Addr(family))
		requirePing(t, pod.End(), ext, family)
		frames := capture.Stop()
		require.NotEmpty(t, frames)
		ip, _ := lab.ParseOuterIP(frames[0].Bytes)
		require.Equal(t, n1.Addr(family), ip.Src)
		require.Equal(t, n1.MAC, ip.SrcMAC.String())
	})

	l.Revision++
	for _, n := range l.Nodes {
		s := l.State(n)
		s.Snat.Disabled = true
		require.NoError(t, l.WriteState(n, s))
		require.NoError(t, n.Reload())
	}
	require.NoError(t, l.WaitProgrammed(testContext(t)))
	eachFamily(t, func(t *testing.T, family int) {
		capture := framesTo(t, l, ext.Addr(family))
		requireUnreachable(t, pod.End(), ext.Addr(family)) // outside has no way back
		frames := capture.Stop()
		require.NotEmpty(t, frames)
		ip, _ := lab.ParseOuterIP(frames[0].Bytes)
		require.Equal(t, pod.Addr(family), ip.Src)
		require.Equal(t, n1.MAC, ip.SrcMAC.String())
	})
}
