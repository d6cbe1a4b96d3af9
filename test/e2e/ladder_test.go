package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// A host that refuses something gets the next rung, and is told why; pods and connections go from rung to rung.
func TestLadder(t *testing.T) {
	t.Parallel()
	inCell(t)
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1, Uplink: "auto"})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	f := openFlow(t, n1.Pods[0].End(), n2.Pods[0].End(), 4)
	withoutNetRaw := []string{tool(t, "setpriv"), "--bounding-set", "-net_raw", "--inh-caps", "-net_raw", "--"}
	for _, c := range []struct {
		name string
		wrap []string
		rung string
		why  map[string]string // rung and part of the reason
	}{
		{"everything granted", nil, "xdp-copy", map[string]string{"xdp-zerocopy": "zero-copy"}},
		{"no CAP_NET_RAW", withoutNetRaw, "tun", map[string]string{"xdp-zerocopy": "CAP_NET_RAW", "xdp-copy": "CAP_NET_RAW"}},
		{"no AF_XDP", denyWrap("af_xdp"), "tun", map[string]string{"xdp-copy": "AF_XDP"}},
		{"no BPF links", denyWrap("bpf_links"), "tun", map[string]string{"xdp-copy": "Linux 5.11"}}, // neither XDP's nor tcx: filters
		{"no virtio-net header", denyWrap("af_xdp", "vnet_hdr"), "plain", map[string]string{"xdp-copy": "AF_XDP", "tun": "virtio-net header"}},
		{"everything granted again", nil, "xdp-copy", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.NoError(t, n1.Stop())
			require.NoError(t, n1.StartWith(testContext(t), lab.StartOptions{Wrap: c.wrap}))
			require.NoError(t, n1.WaitProgrammed(testContext(t)))
			s := status(t, n1)
			require.Equal(t, c.rung, s.Uplink.Rung, "%v", s.Uplink.WhyNotMore)
			reasons := map[string]string{}
			for _, r := range s.Uplink.WhyNotMore {
				reasons[r.Rung] = r.Reason
			}
			for rung, part := range c.why {
				require.Contains(t, reasons[rung], part)
			}
			f.requireAlive(t, 15*time.Second)
			requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
			requireReachable(t, n2.End(), n1.Pods[0].End())
			requirePing(t, n1.End(), n2.End(), 4)
			_, err := lab.Transfer(testContext(t), n1.Pods[0].End(), n2.Pods[0].End(), 6, 4<<20)
			require.NoError(t, err)
			// Of the other rungs nothing is left.
			require.Equal(t, c.rung == "tun" || c.rung == "plain", strings.Contains(strings.Join(interfaces(t, n1.Netns()), " "), "ovp-up0"))
			require.Equal(t, strings.HasPrefix(c.rung, "xdp"), strings.Contains(Exec(t, n1.Netns(), "ip", "link", "show", "eth0"), "xdp"))
		})
	}
	require.NoError(t, n1.Stop())
	for _, c := range []struct {
		name string
		mode string
		wrap []string
		says []string
	}{
		{"tun without virtio-net header", "tun", denyWrap("vnet_hdr"), []string{"OVERPLANE_UPLINK_MODE=tun", "virtio-net header"}},
		{"xdp without AF_XDP", "xdp", denyWrap("af_xdp"), []string{"OVERPLANE_UPLINK_MODE=xdp", "AF_XDP"}},
		{"xdp without CAP_NET_RAW", "xdp-copy", withoutNetRaw, []string{"CAP_NET_RAW"}},
		{"zero-copy on a veth", "xdp-zerocopy", nil, []string{"OVERPLANE_UPLINK_MODE=xdp-zerocopy", "zero-copy"}},
		{"neither AF_XDP nor a TAP", "auto", denyWrap("af_xdp", "tun_attach"), []string{"xdp-copy: ", "AF_XDP", "tun: ", "plain: ", "CAP_NET_ADMIN"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			output, err := n1.Try(testContext(t), lab.StartOptions{Env: []string{"OVERPLANE_UPLINK_MODE=" + c.mode}, Wrap: c.wrap}, 15*time.Second)
			require.Error(t, err)
			require.NotContains(t, err.Error(), "still ran", output)
			for _, s := range c.says {
				require.Contains(t, output, s)
			}
			require.NotContains(t, output, "panic")
		})
	}
	t.Run("no tc", func(t *testing.T) {
		// No links, and somebody else's filter where ours would have to be.
		Exec(t, n1.Netns(), "tc", "qdisc", "replace", "dev", "eth0", "clsact")
		Exec(t, n1.Netns(), "tc", "filter", "add", "dev", "eth0", "ingress", "prio", "1", "protocol", "ip", "u32", "match", "u32", "0", "0", "flowid", "1:1")
		output, err := n1.Try(testContext(t), lab.StartOptions{Wrap: denyWrap("bpf_links")}, 15*time.Second)
		require.Error(t, err)
		require.NotContains(t, err.Error(), "still ran", output)
		for _, s := range []string{"xdp-copy: ", "tun: ", "plain: ", "Linux 6.6", "tc filter show dev eth0 ingress"} {
			require.Contains(t, output, s)
		}
		require.NotContains(t, interfaces(t, n1.Netns()), "ovp-up0", "nothing is left")
		Exec(t, n1.Netns(), "tc", "qdisc", "del", "dev", "eth0", "clsact")
	})
	require.NoError(t, n1.Start(testContext(t)))
	require.NoError(t, n1.WaitProgrammed(testContext(t)))
	requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
}

// The device that stands for the uplink is deleted: it is made again.
func TestUplinkDeviceDeleted(t *testing.T) {
	t.Parallel()
	inCell(t)
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1, Uplink: "tun"})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	before := device(t, n1.Netns(), "ovp-up0").Index
	Exec(t, n1.Netns(), "ip", "link", "del", "ovp-up0")
	require.Eventually(t, func() bool {
		return strings.Contains(strings.Join(interfaces(t, n1.Netns()), " "), "ovp-up0") && device(t, n1.Netns(), "ovp-up0").Index != before
	}, 10*time.Second, 20*time.Millisecond)
	require.NoError(t, n1.WaitProgrammed(testContext(t)))
	requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
}

// The uplink comes back as something else, under the same name and address: the ladder is climbed anew.
func TestUplinkComesBackAsAnotherKind(t *testing.T) {
	t.Parallel()
	inCell(t)
	for _, c := range []struct {
		kind string
		add  []string // the new eth0 over under0
		on   string   // the same at the other node, if it must be
	}{
		{"bridge", nil, ""},
		{"bond", []string{"mode", "active-backup"}, ""},
		{"macvlan", []string{"mode", "passthru"}, ""},
		{"vlan", []string{"id", "7"}, "both"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			l := newLab(t, lab.Options{Nodes: 2, Pods: 1, Uplink: "auto"})
			n1, n2 := l.Nodes[0], l.Nodes[1]
			if out, err := tryExec(t, n1.Netns(), "ip", "link", "add", "probe0", "type", c.kind); strings.Contains(out, "Unknown device type") {
				t.Skipf("the kernel has no %s: %v", c.kind, err)
			}
			_, _ = tryExec(t, n1.Netns(), "ip", "link", "del", "probe0")
			require.Equal(t, "xdp-copy", status(t, n1).Uplink.Rung)
			change := func(n *lab.Node) {
				Exec(t, n.Netns(), "ip", "link", "del", "eth0")
				require.NoError(t, n.WaitStatus(testContext(t), "aware that the uplink is gone", func(s *controlv1.GetStatusResponse) bool { return !s.Ready }))
				Exec(t, l.Gateway(), "ip", "link", "add", n.Name(), "type", "veth", "peer", "name", "under0", "netns", n.Netns())
				Exec(t, l.Gateway(), "ethtool", "-K", n.Name(), "tx", "off")
				Exec(t, l.Gateway(), "ip", "link", "set", n.Name(), "master", "br0", "up")
				Exec(t, n.Netns(), "ethtool", "-K", "under0", "tx", "off")
				switch c.kind {
				case "bridge", "bond":
					Exec(t, n.Netns(), append([]string{"ip", "link", "add", "new0", "address", n.MAC, "type", c.kind}, c.add...)...)
					Exec(t, n.Netns(), "ip", "link", "set", "under0", "master", "new0")
				default:
					Exec(t, n.Netns(), "ip", "link", "set", "under0", "address", n.MAC)
					Exec(t, n.Netns(), append([]string{"ip", "link", "add", "link", "under0", "name", "new0", "type", c.kind}, c.add...)...)
				}
				// In this order: with under0 a VLAN interface on it comes up, and before Linux 6.2 what is up keeps its name.
				Exec(t, n.Netns(), "ip", "link", "set", "new0", "name", "eth0")
				Exec(t, n.Netns(), "ip", "link", "set", "under0", "up")
				for _, family := range families {
					Exec(t, n.Netns(), "ip", "addr", "add", n.Addr(family).String()+map[int]string{4: "/24", 6: "/64"}[family], "dev", "eth0")
				}
				Exec(t, n.Netns(), "ip", "link", "set", "eth0", "address", n.MAC, "up")
				require.NoError(t, n.WaitStatus(testContext(t), "ready again", func(s *controlv1.GetStatusResponse) bool { return s.Ready && s.Uplink.Up }))
			}
			change(n1)
			if c.on != "" {
				change(n2)
			}
			s := status(t, n1)
			require.Equal(t, "tun", s.Uplink.Rung)
			require.Len(t, s.Uplink.WhyNotMore, 2)
			t.Log(s.Uplink.WhyNotMore[1].Reason)
			requireReachable(t, n1.Pods[0].End(), n2.Pods[0].End())
			requireReachable(t, n2.Pods[0].End(), n1.Pods[0].End())
			requirePing(t, n1.End(), n2.End(), 4)
		})
	}
}
