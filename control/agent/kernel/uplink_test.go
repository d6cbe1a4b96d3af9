package kernel

import (
	"context"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink/nl"
)

// underlay is a node with an uplink eth0, and a gateway at its other end.
func underlay(t testing.TB) (node, gw string) {
	t.Helper()
	node, gw = newNetNS(t), newNetNS(t)
	ip(t, "-n", node, "link", "add", "eth0", "address", "02:00:00:00:00:11", "numrxqueues", "4", "numtxqueues", "4", "type", "veth",
		"peer", "name", "eth0", "address", "02:00:00:00:00:01", "netns", gw)
	for ns, last := range map[string]string{node: "11", gw: "1"} {
		ip(t, "-n", ns, "link", "set", "eth0", "up")
		ip(t, "-n", ns, "addr", "add", "10.240.0."+last+"/24", "dev", "eth0")
		ip(t, "-n", ns, "addr", "add", "fd00:240::"+last+"/64", "dev", "eth0", "nodad")
	}
	ip(t, "-n", node, "route", "add", "default", "via", "10.240.0.1")
	ip(t, "-n", node, "route", "add", "default", "via", "fd00:240::1")
	return node, gw
}

func readIn(t testing.TB, ns, name string) (u Uplink) {
	t.Helper()
	in(t, ns, func() (err error) { u, err = ReadUplink(name); return err })
	return u
}

func TestReadUplink(t *testing.T) {
	needRoot(t)
	node, _ := underlay(t)
	requirePing(t, node, "10.240.0.1")
	requirePing(t, node, "fd00:240::1")
	u := readIn(t, node, "")
	require.NotZero(t, u.Index)
	u.Index = 0
	gwMAC := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	v4, v6 := netip.MustParsePrefix("10.240.0.11/24"), netip.MustParsePrefix("fd00:240::11/64")
	require.Equal(t, Uplink{
		Name: "eth0", Kind: KindVeth, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 0x11}, MTU: 1500, Up: true,
		IPv4: v4, IPv6: v6, Addresses: []netip.Prefix{v4, v6},
		Gateway4: addr("10.240.0.1"), Gateway6: addr("fd00:240::1"), GatewayMAC4: gwMAC, GatewayMAC6: gwMAC,
		RxQueues: 4, TxQueues: 4,
	}, u)
	named := readIn(t, node, "eth0")
	named.Index = 0
	require.True(t, named.Equal(u))

	_, err := func() (u Uplink, err error) {
		err = InNetNS(pathOf(node), func() error { u, err = ReadUplink("eth7"); return err })
		return u, err
	}()
	require.ErrorIs(t, err, ErrNoLink)
	require.ErrorContains(t, err, "eth7")
}

// Which of several addresses, routes and interfaces.
func TestReadUplinkChooses(t *testing.T) {
	needRoot(t)
	node, _ := underlay(t)
	ip(t, "-n", node, "addr", "add", "10.240.0.50/24", "dev", "eth0")                                 // secondary: same subnet
	ip(t, "-n", node, "addr", "add", "fd00:240::50/64", "dev", "eth0", "nodad", "preferred_lft", "0") // deprecated; IPv6 lists it first
	ip(t, "-n", node, "link", "add", "net1", "type", "veth", "peer", "name", "net1p")
	ip(t, "-n", node, "link", "set", "net1p", "up")
	ip(t, "-n", node, "link", "set", "net1", "up")
	ip(t, "-n", node, "addr", "add", "192.0.2.1/24", "dev", "net1")
	ip(t, "-n", node, "route", "add", "default", "via", "192.0.2.254", "metric", "5000")
	u := readIn(t, node, "")
	require.Equal(t, "eth0", u.Name)
	require.Equal(t, "10.240.0.11/24", u.IPv4.String())
	require.Equal(t, "fd00:240::11/64", u.IPv6.String())
	require.Len(t, u.Addresses, 4)
	u = readIn(t, node, "net1")
	require.Equal(t, "192.0.2.254", u.Gateway4.String())
	require.False(t, u.Gateway6.IsValid())
	require.False(t, u.IPv6.IsValid())

	// Only IPv6 has a default route; then nobody.
	ip(t, "-n", node, "route", "flush", "default")
	ip(t, "-n", node, "-4", "route", "flush", "root", "0/0")
	require.Equal(t, "eth0", readIn(t, node, "").Name)
	ip(t, "-n", node, "-6", "route", "del", "default")
	err := InNetNS(pathOf(node), func() error { _, err := ReadUplink(""); return err })
	require.ErrorIs(t, err, ErrNoLink)
	require.ErrorContains(t, err, "default route")

	// VLANs say so.
	if out, err := exec.Command("ip", "-n", node, "link", "add", "link", "eth0", "name", "eth0.5", "type", "vlan", "id", "5").CombinedOutput(); err == nil {
		require.Equal(t, KindVLAN, readIn(t, node, "eth0.5").Kind)
	} else {
		t.Logf("no VLAN devices here: %s", out)
	}
}

// watch runs WatchUplink in a namespace and returns what it reports.
func watch(t testing.TB, ns, name string) <-chan Uplink {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	reports := make(chan Uplink, 100)
	done := make(chan error, 1)
	go func() {
		done <- InNetNS(pathOf(ns), func() error { return WatchUplink(ctx, name, func(u Uplink) { reports <- u }) })
	}()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
	return reports
}

// await waits for a report that satisfies f.
func await(t testing.TB, reports <-chan Uplink, what string, f func(Uplink) bool) Uplink {
	t.Helper()
	var last Uplink
	timeout := time.After(15 * time.Second)
	for {
		select {
		case last = <-reports:
			if f(last) {
				return last
			}
		case <-timeout:
			t.Fatalf("not reported: %s; last was %+v", what, last)
		}
	}
}

func TestWatchUplink(t *testing.T) {
	needRoot(t)
	node, gw := underlay(t)
	reports := watch(t, node, "eth0")
	// Nobody ever talked to the gateway: the watch has it resolved.
	u := await(t, reports, "resolved gateways", func(u Uplink) bool { return u.GatewayMAC4 != nil && u.GatewayMAC6 != nil })
	require.Equal(t, "02:00:00:00:00:01", u.GatewayMAC4.String())
	require.True(t, u.Up)

	ip(t, "-n", node, "link", "set", "eth0", "mtu", "9000")
	await(t, reports, "MTU", func(u Uplink) bool { return u.MTU == 9000 })

	ip(t, "-n", node, "link", "set", "eth0", "down")
	await(t, reports, "down", func(u Uplink) bool { return !u.Up })
	ip(t, "-n", node, "link", "set", "eth0", "up")
	await(t, reports, "up", func(u Uplink) bool { return u.Up })
	ip(t, "-n", node, "route", "replace", "default", "via", "10.240.0.1")
	ip(t, "-n", node, "addr", "replace", "fd00:240::11/64", "dev", "eth0", "nodad")
	ip(t, "-n", node, "route", "replace", "default", "via", "fd00:240::1")
	await(t, reports, "gateways again", func(u Uplink) bool { return u.GatewayMAC4 != nil && u.GatewayMAC6 != nil })

	// Carrier: the other end goes down.
	ip(t, "-n", gw, "link", "set", "eth0", "down")
	await(t, reports, "no carrier", func(u Uplink) bool { return !u.Up })
	ip(t, "-n", gw, "link", "set", "eth0", "up")
	ip(t, "-n", gw, "addr", "replace", "fd00:240::1/64", "dev", "eth0", "nodad")
	await(t, reports, "carrier", func(u Uplink) bool { return u.Up && u.GatewayMAC4 != nil })

	ip(t, "-n", node, "addr", "add", "10.241.0.11/24", "dev", "eth0")
	await(t, reports, "another address", func(u Uplink) bool { return len(u.Addresses) == 3 && u.IPv4.String() == "10.240.0.11/24" })
	ip(t, "-n", node, "addr", "del", "10.241.0.11/24", "dev", "eth0")
	await(t, reports, "address gone", func(u Uplink) bool { return len(u.Addresses) == 2 })

	// Another gateway takes over the address, and says so as routers do.
	ip(t, "-n", gw, "link", "set", "eth0", "address", "02:00:00:00:00:99")
	ip(t, "-n", gw, "neigh", "flush", "all")
	requirePing(t, gw, "10.240.0.11")
	requirePing(t, gw, "fd00:240::11")
	await(t, reports, "gateway's new address", func(u Uplink) bool { return u.GatewayMAC4.String() == "02:00:00:00:00:99" })

	// Another next hop.
	ip(t, "-n", gw, "addr", "add", "10.240.0.2/24", "dev", "eth0")
	ip(t, "-n", node, "route", "replace", "default", "via", "10.240.0.2")
	await(t, reports, "another gateway", func(u Uplink) bool { return u.Gateway4 == addr("10.240.0.2") && u.GatewayMAC4 != nil })
	ip(t, "-n", node, "route", "del", "default")
	await(t, reports, "no gateway", func(u Uplink) bool { return !u.Gateway4.IsValid() })

	// Gone, and back under the same name.
	ip(t, "-n", node, "link", "del", "eth0")
	await(t, reports, "gone", func(u Uplink) bool { return u.Gone && u.Name == "eth0" })
	ip(t, "-n", node, "link", "add", "eth0", "type", "veth", "peer", "name", "wire")
	await(t, reports, "back", func(u Uplink) bool { return !u.Gone && u.Index != 0 })
}

// A gateway that changed its address silently and answers no more to the old one is found once its entry has failed.
func TestWatchUplinkFindsSilentlyChangedGateway(t *testing.T) {
	needRoot(t)
	node, gw := underlay(t)
	for _, c := range []string{"base_reachable_time_ms=1000", "delay_first_probe_time=1", "retrans_time_ms=100", "gc_stale_time=1"} {
		key, value, _ := strings.Cut(c, "=")
		sysctl(t, node, "net/ipv4/neigh/eth0/"+key, value)
	}
	reports := watch(t, node, "eth0")
	await(t, reports, "resolved gateway", func(u Uplink) bool { return u.GatewayMAC4.String() == "02:00:00:00:00:01" })
	ip(t, "-n", gw, "link", "set", "eth0", "arp", "off")
	ip(t, "-n", gw, "link", "set", "eth0", "address", "02:00:00:00:00:77")
	// Asking is what a packet of the node's own would do, long before the next confirmation.
	require.Eventually(t, func() bool {
		in(t, node, func() error { return provoke(readIn(t, node, "eth0").Index, addr("10.240.0.1")) })
		out := ip(t, "-n", node, "neigh", "show", "10.240.0.1")
		return strings.Contains(out, "FAILED") || strings.Contains(out, "INCOMPLETE")
	}, 15*time.Second, 200*time.Millisecond)
	ip(t, "-n", gw, "link", "set", "eth0", "arp", "on")
	u := await(t, reports, "gateway's new address", func(u Uplink) bool {
		require.NotNil(t, u.GatewayMAC4, "the old address holds until the new one is known")
		return u.GatewayMAC4.String() == "02:00:00:00:00:77"
	})
	require.True(t, u.Up)
}

// Events are lost in a flood, and the subscription breaks: neither loses a change.
func TestWatchUplinkSurvivesLostEvents(t *testing.T) {
	needRoot(t)
	node, _ := underlay(t)
	ctx, cancel := context.WithCancel(context.Background())
	reports, done := make(chan Uplink, 100), make(chan error, 1)
	sockets := make(chan *nl.NetlinkSocket, 100)
	w := &uplinkWatch{name: "eth0", buffer: 1, dirty: make(chan struct{}, 1)}
	w.changed = func(u Uplink) {
		reports <- u
		sockets <- w.socket
	}
	go func() { done <- InNetNS(pathOf(node), func() error { return w.run(ctx) }) }()
	defer func() { cancel(); require.NoError(t, <-done) }()
	await(t, reports, "the beginning", func(u Uplink) bool { return u.GatewayMAC4 != nil })

	var script strings.Builder
	for i := range 5000 {
		script.WriteString("route add 10.250." + itoa(i/250) + "." + itoa(i%250) + "/32 via 10.240.0.1\n")
	}
	for mtu := 1400; w.overruns.Load() == 0; mtu++ {
		require.Less(t, mtu, 1410, "the flood did not overrun the smallest buffer")
		cmd := exec.Command("ip", "-n", node, "-batch", "-")
		cmd.Stdin = strings.NewReader(script.String() + strings.ReplaceAll(script.String(), "add", "del") + "link set eth0 mtu " + itoa(mtu) + "\n")
		out, err := cmd.CombinedOutput()
		require.NoErrorf(t, err, "%s", out)
		await(t, reports, "MTU", func(u Uplink) bool { return u.MTU == mtu })
	}

	var s *nl.NetlinkSocket
	for len(sockets) > 0 {
		s = <-sockets
	}
	s.Close()
	require.Eventually(t, func() bool { return !w.broken.Load() }, 5*time.Second, time.Millisecond)
	for _, mtu := range []int{1300, 1301} {
		ip(t, "-n", node, "link", "set", "eth0", "mtu", itoa(mtu))
		await(t, reports, "MTU", func(u Uplink) bool { return u.MTU == mtu })
	}
}

// A gateway that does not answer is asked for ever more rarely.
func TestResolverBacksOff(t *testing.T) {
	u := Uplink{Index: 1 << 30, Up: true} // no such interface: asking fails without consequence
	r := &resolver{}
	gateway := addr("192.0.2.1")
	require.Equal(t, reread, r.hold(u, gateway, &u.GatewayMAC4))
	want := resolveFirst * 2
	for range 8 {
		next := r.turn(u, gateway, 0)
		require.Equal(t, min(want, reread), next)
		asked := r.asked
		require.LessOrEqual(t, r.turn(u, gateway, 0), next)
		require.Equal(t, asked, r.asked, "asked twice at once")
		r.asked = r.asked.Add(-next)
		want *= 2
	}
	// Resolved: the next loss is answered at once.
	require.Equal(t, reread, r.turn(u, gateway, 0x02 /* reachable */))
	r.asked = time.Now().Add(-2 * resolveFirst)
	asked := r.asked
	r.turn(u, gateway, 0x20 /* failed */)
	require.NotEqual(t, asked, r.asked)
	// A permanent entry is never touched: asking would end its permanence.
	r = &resolver{}
	require.Equal(t, reread, r.turn(u, gateway, 0x80))
	require.Zero(t, r.asked)
}
