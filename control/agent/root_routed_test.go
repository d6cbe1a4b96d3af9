package agent

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/control/api"
)

// Two nodes on links of their own, and a router between that carries routes for the pod CIDRs:
//
//	n1 10.240.1.11 ── 10.240.1.1 [ovpagt-gw] 10.240.2.1 ── 10.240.2.11 n2
func TestRealDaemonsOnARoutedUnderlay(t *testing.T) {
	m := newMachine(t)
	gw := testPrefix + "gw"
	m.ip("netns", "add", gw)
	m.ip("-n", m.ns(1), "link", "del", "eth0") // the direct link
	m.in(gw, "sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
	for i := 1; i <= 2; i++ {
		dev := fmt.Sprintf("eth%d", i)
		m.ip("-n", m.ns(i), "link", "add", "eth0", "address", fmt.Sprintf("02:00:00:00:00:0%d", i), "type", "veth", "peer", "name", dev, "netns", gw)
		m.ip("-n", gw, "addr", "add", fmt.Sprintf("10.240.%d.1/24", i), "dev", dev)
		m.ip("-n", gw, "addr", "add", fmt.Sprintf("fd00:240:%d::1/64", i), "dev", dev, "nodad")
		m.ip("-n", gw, "link", "set", dev, "up")
		m.in(gw, "ethtool", "-K", dev, "tx", "off")
		m.ip("-n", m.ns(i), "addr", "add", fmt.Sprintf("10.240.%d.11/24", i), "dev", "eth0")
		m.ip("-n", m.ns(i), "addr", "add", fmt.Sprintf("fd00:240:%d::11/64", i), "dev", "eth0", "nodad")
		m.ip("-n", m.ns(i), "link", "set", "eth0", "up")
		m.in(m.ns(i), "ethtool", "-K", "eth0", "tx", "off")
		m.ip("-n", m.ns(i), "route", "add", "default", "via", fmt.Sprintf("10.240.%d.1", i))
		m.ip("-n", m.ns(i), "-6", "route", "add", "default", "via", fmt.Sprintf("fd00:240:%d::1", i))
		m.ip("-n", gw, "route", "add", fmt.Sprintf("10.244.%d.0/24", i), "via", fmt.Sprintf("10.240.%d.11", i))
		m.ip("-n", gw, "-6", "route", "add", fmt.Sprintf("fd12:3456:789a:0:%d::/80", i), "via", fmt.Sprintf("fd00:240:%d::11", i))
		m.ip("netns", "add", m.podNS(i, 1))
	}
	for i := 1; i <= 2; i++ {
		s := m.state(i)
		for j, member := range s.GetMembers() {
			member.Ipv4, member.Ipv6, member.Mac = fmt.Sprintf("10.240.%d.11", j+1), fmt.Sprintf("fd00:240:%d::11", j+1), ""
		}
		api.Seal(s)
		require.NoError(t, os.RemoveAll(m.stateFile(i)))
		require.NoError(t, api.WriteFile(m.stateFile(i), s))
	}

	direct := m.start(1)
	require.False(t, direct.status().GetReady())
	require.Contains(t, strings.Join(direct.status().GetProblems(), "\n"), "needs OVERPLANE_UNDERLAY=routed")
	require.NoError(t, direct.end(unix.SIGTERM))

	var d [3]*daemon
	for i := 1; i <= 2; i++ {
		d[i] = m.start(i, "OVERPLANE_UNDERLAY=routed")
		d[i].attach(1)
	}
	for i := 1; i <= 2; i++ {
		d[i].eventually("gateways resolved", ready)
	}
	for _, to := range []string{"10.244.2.2", "fd12:3456:789a:0:2::2", "10.240.1.11", "fd00:240:1::11"} {
		m.reaches(m.podNS(1, 1), to)
	}
	m.reaches(m.ns(1), "10.244.1.2")
	// Behind a gateway nothing tells a node from a stranger, so that only pods are let in from there: neither the gateway itself nor another node.
	require.Error(t, m.ping(gw, "10.244.1.2"))
	require.Error(t, m.ping(m.ns(2), "10.244.1.2"))

	// The gateway is replaced.
	m.ip("-n", gw, "link", "set", "eth1", "address", "02:00:00:00:00:aa")
	m.in(m.ns(1), "ip", "neigh", "flush", "all")
	d[1].eventually("the gateway's new address", func(s *statusResponse) bool {
		return s.GetUplink().GetGatewayMacIpv4() == "02:00:00:00:00:aa" && s.GetUplink().GetGatewayMacIpv6() == "02:00:00:00:00:aa" && s.GetReady()
	})
	m.reaches(m.podNS(1, 1), "10.244.2.2")
	m.reaches(m.podNS(1, 1), "fd12:3456:789a:0:2::2")
}
