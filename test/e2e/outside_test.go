package e2e

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// Connections to the outside outlive the daemon, on every rung and with workers that must hand packets over.
func TestTranslatedConnectionsSurviveRestartsAndCrashes(t *testing.T) {
	t.Parallel()
	all := []lab.Options{{Uplink: "xdp-copy"}, {Uplink: "xdp-copy", Workers: 2}, {Uplink: "tun"}, {Uplink: "plain"}}
	if os.Getenv(cellVariable) != "" {
		all = []lab.Options{{}}
	}
	for _, o := range all {
		name := o.Uplink
		if o.Workers > 1 {
			name += " two workers"
		}
		t.Run(name, func(t *testing.T) {
			o.Nodes, o.Pods = 2, 2
			l := newLab(t, o)
			n1 := l.Nodes[0]
			var flows []*flow
			for _, family := range families {
				for range 8 {
					flows = append(flows, openFlow(t, n1.Pods[0].End(), l.ExtEnd(), family))
				}
			}
			for _, f := range flows {
				require.NotEqual(t, f.client.LocalAddr().String(), f.server.RemoteAddr().String(), "translated")
			}
			for _, end := range []func() error{n1.Stop, n1.Kill} {
				require.NoError(t, end())
				require.NoError(t, start(t, n1))
				for _, f := range flows {
					f.requireAlive(t, 15*time.Second)
				}
			}
			_, err := lab.Transfer(testContext(t), n1.Pods[1].End(), l.ExtEnd(), 4, bulk(32<<20))
			require.NoError(t, err)
		})
	}
}

// A service of the node whose port lies in the translated range is reached as ever, once the daemon has seen its socket.
func TestTheNodesServicesKeepTheirPorts(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 1})
	n1 := l.Nodes[0]
	eachFamily(t, func(t *testing.T, family int) {
		at := netip.AddrPortFrom(n1.Addr(family), 12345)
		var listener *net.TCPListener
		require.NoError(t, lab.InNetns(n1.Netns(), func() (err error) {
			listener, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
			return err
		}))
		defer listener.Close()
		require.Eventually(t, func() bool {
			c, err := lab.DialTCP(testContext(t), l.ExtEnd(), at)
			if err == nil {
				c.Close()
			}
			return err == nil
		}, 10*time.Second, 50*time.Millisecond)
	})
	// The kernel itself chooses none of the range.
	require.Contains(t, Exec(t, n1.Netns(), "cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"), "10000-29999")
}
