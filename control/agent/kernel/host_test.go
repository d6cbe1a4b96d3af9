package kernel

import (
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port/tap"
)

func itoa(n int) string { return strconv.Itoa(n) }

// newNode is a namespace with an uplink that has addresses and default routes, and nobody at its other end.
func newNode(t testing.TB) string {
	t.Helper()
	node := newNetNS(t)
	ip(t, "-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", "wire")
	ip(t, "-n", node, "link", "set", "wire", "up")
	ip(t, "-n", node, "link", "set", "eth0", "up")
	ip(t, "-n", node, "addr", "add", "10.240.0.11/24", "dev", "eth0")
	ip(t, "-n", node, "addr", "add", "fd00:240::11/64", "dev", "eth0", "nodad")
	ip(t, "-n", node, "route", "add", "default", "via", "10.240.0.1")
	ip(t, "-n", node, "route", "add", "default", "via", "fd00:240::1")
	return node
}

func hostPort() HostPort {
	return HostPort{
		MTU: 1500, PodCIDRs: prefixes("10.244.0.0/16", "fd12:3456:789a::/64"),
		HostIPv4: addr("10.240.0.11"), HostIPv6: addr("fd00:240::11"),
	}
}

func attachHost(t testing.TB, node string, r *router, h HostPort) *tap.Port {
	t.Helper()
	var p *tap.Port
	in(t, node, func() (err error) { p, err = AttachHostPort(h, r.config()); return err })
	r.destroyLater(t, "host", p)
	r.set("host", p, HostMAC, h.HostIPv4, h.HostIPv6)
	return p
}

func TestNodeAndPodsReachEachOther(t *testing.T) {
	needRoot(t)
	node, pod := newNode(t), newNetNS(t)
	sysctl(t, node, "net/ipv4/conf/all/rp_filter", "1") // strict, and it stays so
	sysctl(t, node, "net/ipv4/conf/default/rp_filter", "1")
	sysctl(t, node, "net/ipv4/ip_forward", "0")
	r := newRouter(t)
	p := attachHost(t, node, r, hostPort())
	attach(t, node, r, podDevice(pod, "10.244.0.2", "fd12:3456:789a::2"))
	both := func() {
		t.Helper()
		requirePing(t, node, "10.244.0.2")
		requirePing(t, node, "fd12:3456:789a::2")
		requirePing(t, pod, "10.240.0.11")
		requirePing(t, pod, "fd00:240::11")
		requirePing(t, pod, "-s", "5000", "fd00:240::11")
	}
	both()
	out := ip(t, "-n", node, "addr", "show", "ovp0")
	require.NotContains(t, out, "inet", "the host port has no address, link-local neither")
	require.Contains(t, ip(t, "-n", node, "route", "get", "10.244.9.9"), "src 10.240.0.11")
	require.Contains(t, ip(t, "-n", node, "route", "get", "fd12:3456:789a::9"), "src fd00:240::11")

	// Held by one daemon only.
	err := InNetNS(pathOf(node), func() error { _, err := AttachHostPort(hostPort(), r.config()); return err })
	require.ErrorIs(t, err, ErrBusy)

	// A restart, with another MTU.
	r.drop("host")
	require.NoError(t, p.Close())
	require.Contains(t, ip(t, "-n", node, "link"), "ovp0", "the device stays")
	h := hostPort()
	h.MTU = 4000
	p = attachHost(t, node, r, h)
	both()
	require.Contains(t, ip(t, "-n", node, "link", "show", "ovp0"), "mtu 4000")

	// The device goes: pods become unreachable, and nothing leaks to the default route.
	r.drop("host")
	require.NoError(t, p.Destroy())
	_, err = ping(node, "10.244.0.2")
	require.Error(t, err)
	for _, dst := range []string{"10.244.0.2", "fd12:3456:789a::2"} {
		err := InNetNS(pathOf(node), func() error { return routeGet(dst) })
		require.ErrorContains(t, err, "unreachable")
	}
}

func TestSyncHostRoutes(t *testing.T) {
	needRoot(t)
	node := newNode(t)
	r := newRouter(t)
	h := hostPort()
	attachHost(t, node, r, h)
	routes := func() string {
		return ip(t, "-n", node, "-4", "route", "show", "proto", itoa(RouteProtocol)) + ip(t, "-n", node, "-6", "route", "show", "proto", itoa(RouteProtocol))
	}
	sync := func() { t.Helper(); in(t, node, func() error { return SyncHostRoutes(h) }) }
	first := routes()
	require.Equal(t, 4, strings.Count(first, "\n"), first)
	require.Contains(t, first, "10.244.0.0/16 via 169.254.1.1 dev ovp0 src 10.240.0.11 metric 100 onlink")
	require.Contains(t, first, "unreachable 10.244.0.0/16 metric 4096")
	require.Contains(t, first, "fd12:3456:789a::/64 via fe80::1 dev ovp0 src fd00:240::11 metric 100")
	require.Contains(t, first, "unreachable fd12:3456:789a::/64 dev lo metric 4096")
	sync()
	require.Equal(t, first, routes(), "idempotent")

	// One deleted by hand comes back.
	ip(t, "-n", node, "route", "del", "10.244.0.0/16", "metric", "100")
	sync()
	require.ElementsMatch(t, strings.Split(first, "\n"), strings.Split(routes(), "\n"))

	// Grown, then another set.
	h.PodCIDRs = prefixes("10.244.0.0/16", "10.200.0.0/16", "fd12:3456:789a::/64")
	sync()
	require.Equal(t, 6, strings.Count(routes(), "\n"))
	h.PodCIDRs = prefixes("10.200.0.0/16")
	sync()
	require.Equal(t, 2, strings.Count(routes(), "\n"), routes())
	require.NotContains(t, routes(), "10.244.")

	// The node's address changes.
	ip(t, "-n", node, "addr", "add", "10.240.0.12/24", "dev", "eth0")
	h.HostIPv4 = addr("10.240.0.12")
	sync()
	require.Contains(t, routes(), "src 10.240.0.12")
	h.HostIPv4 = addr("10.240.0.99")
	require.ErrorContains(t, InNetNS(pathOf(node), func() error { return SyncHostRoutes(h) }), "10.240.0.99")

	in(t, node, func() error { return RemoveHostPort("") })
	require.Empty(t, routes())
	require.NotContains(t, ip(t, "-n", node, "link"), "ovp0")
	in(t, node, func() error { return RemoveHostPort("") })

	// Without the device the unreachable routes are there nevertheless.
	h = hostPort()
	require.ErrorIs(t, InNetNS(pathOf(node), func() error { return SyncHostRoutes(h) }), ErrNoLink)
	require.Equal(t, 2, strings.Count(routes(), "unreachable"))
}

func TestForeignRoutes(t *testing.T) {
	needRoot(t)
	node := newNode(t)
	r := newRouter(t)
	for _, tc := range []struct {
		route   []string
		foreign bool
	}{
		{[]string{"10.244.0.0/16", "via", "10.240.0.1"}, true},
		{[]string{"10.244.7.0/24", "via", "10.240.0.1"}, true},
		{[]string{"fd12:3456:789a:0:1::/80", "via", "fd00:240::1"}, true},
		{[]string{"unreachable", "10.244.3.0/24"}, true},
		{[]string{"10.0.0.0/8", "via", "10.240.0.1"}, false},
		{[]string{"10.245.0.0/16", "via", "10.240.0.1"}, false},
	} {
		t.Run(strings.Join(tc.route, " "), func(t *testing.T) {
			ip(t, append([]string{"-n", node, "route", "add"}, tc.route...)...)
			defer ip(t, append([]string{"-n", node, "route", "del"}, tc.route...)...)
			err := InNetNS(pathOf(node), func() error {
				p, err := AttachHostPort(hostPort(), r.config())
				if err == nil {
					_ = p.Destroy()
					err = RemoveHostPort("")
				}
				return err
			})
			if !tc.foreign {
				require.NoError(t, err)
				return
			}
			require.ErrorIs(t, err, ErrForeignRoute)
			prefix := tc.route[0]
			if prefix == "unreachable" {
				prefix = tc.route[1]
			}
			require.ErrorContains(t, err, prefix)
			require.NotContains(t, ip(t, "-n", node, "link"), "ovp0", "nothing was made")
			require.Empty(t, ip(t, "-n", node, "route", "show", "proto", itoa(RouteProtocol)))
		})
	}
}

func TestHostPortErrors(t *testing.T) {
	needRoot(t)
	node := newNode(t)
	r := newRouter(t)
	for _, tc := range []struct {
		name   string
		change func(*HostPort)
		text   string
	}{
		{"somebody else's interface", func(h *HostPort) { h.Name = "eth0" }, "eth0 is a veth"},
		{"MTU", func(h *HostPort) { h.MTU = 1279 }, "1280"},
		{"host bits", func(h *HostPort) { h.PodCIDRs = prefixes("10.244.0.1/16") }, "10.244.0.1/16"},
		{"everything", func(h *HostPort) { h.PodCIDRs = prefixes("0.0.0.0/0") }, "0.0.0.0/0"},
		{"a source that the node has not got", func(h *HostPort) { h.HostIPv6 = addr("fd00:240::99") }, "fd00:240::99"},
		{"families swapped", func(h *HostPort) { h.HostIPv4, h.HostIPv6 = h.HostIPv6, h.HostIPv4 }, "wrong family"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := hostPort()
			tc.change(&h)
			err := InNetNS(pathOf(node), func() error { _, err := AttachHostPort(h, r.config()); return err })
			require.ErrorContains(t, err, tc.text)
			require.NotContains(t, ip(t, "-n", node, "link"), "ovp0")
		})
	}
	require.ErrorIs(t, InNetNS(pathOf(node), func() error { return SetHostPort(hostPort()) }), ErrNoLink)
}
