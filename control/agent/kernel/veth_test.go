package kernel

import (
	"io"
	"net"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/xdp"
)

func vethDevice(ns, host, ipv4, ipv6 string) PodDevice {
	d := podDevice(ns, ipv4, ipv6)
	d.Host = host
	return d
}

// vethConfig gives the pod's port a queue for each of n workers, all of which are the router.
func vethConfig(r *router, n int) xdp.VethConfig {
	c := xdp.VethConfig{RingSize: 64}
	for range n {
		c.Pools = append(c.Pools, r.pool)
	}
	return c
}

// useVeth has the router forward for the pod until the test ends.
func useVeth(t testing.TB, r *router, dev PodDevice, p *xdp.VethPort) {
	t.Cleanup(func() { r.drop(dev.NetNS); _ = p.Close() })
	r.set(dev.NetNS, p, PodMAC(dev.IPv4, dev.IPv6), dev.IPv4, dev.IPv6)
}

func attachVeth(t testing.TB, node string, r *router, dev PodDevice, queues int) *xdp.VethPort {
	t.Helper()
	var p *xdp.VethPort
	in(t, node, func() (err error) { p, err = AttachVeth(dev, vethConfig(r, queues)); return err })
	useVeth(t, r, dev, p)
	return p
}

func reopenVeth(t testing.TB, node string, r *router, dev PodDevice, queues int) *xdp.VethPort {
	t.Helper()
	var p *xdp.VethPort
	in(t, node, func() (err error) { p, err = ReopenVeth(dev, vethConfig(r, queues)); return err })
	useVeth(t, r, dev, p)
	return p
}

func TestPodsOfBothKindsReachEachOther(t *testing.T) {
	needRoot(t)
	node, a, b, c := newNetNS(t), newNetNS(t), newNetNS(t), newNetNS(t)
	sysctl(t, a, "net/ipv6/conf/default/disable_ipv6", "1")
	r := newRouter(t)
	p := attachVeth(t, node, r, vethDevice(a, "host-a", "10.244.0.2", "fd12::2"), 1)
	attachVeth(t, node, r, vethDevice(b, "host-b", "10.244.0.3", "fd12::3"), 1)
	attach(t, node, r, podDevice(c, "10.244.0.4", "fd12::4"))
	require.Equal(t, "host-a", p.Name())
	for _, from := range []string{a, b, c} {
		for _, dst := range []string{"10.244.0.2", "fd12::2", "10.244.0.3", "fd12::3", "10.244.0.4", "fd12::4"} {
			requirePing(t, from, dst)
			requirePing(t, from, "-s", "5000", dst)
		}
	}

	out := ip(t, "-n", a, "-d", "addr", "show", "eth0")
	require.Contains(t, out, "10.244.0.2/32")
	require.Contains(t, out, "fd12::2/128")
	require.Contains(t, out, "02:50:0a:f4:00:02")
	require.NotContains(t, out, "tentative")
	require.Contains(t, ip(t, "-n", a, "route"), "default via 169.254.1.1 dev eth0 src 10.244.0.2")
	require.Contains(t, ip(t, "-n", a, "-6", "route"), "default via fe80::1 dev eth0 src fd12::2")
	// The node's own stack takes no part.
	host := ip(t, "-n", node, "-d", "addr", "show", "host-a")
	require.NotContains(t, host, "inet")
	require.Contains(t, host, "xdp")
	require.Contains(t, host, "state UP")
}

func TestAttachVethFailsWhole(t *testing.T) {
	needRoot(t)
	node := newNetNS(t)
	r := newRouter(t)
	links := func(ns string) string { return ip(t, "-n", ns, "-br", "link") }
	for _, tc := range []struct {
		name    string
		prepare func(ns string)
		change  func(*PodDevice)
		target  error
		text    string
	}{
		{"interface exists", func(ns string) { ip(t, "-n", ns, "link", "add", "eth0", "type", "veth", "peer", "name", "other") }, nil, ErrLinkExists, "eth0"},
		{"host's end exists", func(string) {
			ip(t, "-n", node, "link", "add", "host-x", "type", "bridge")
			t.Cleanup(func() { ip(t, "-n", node, "link", "del", "host-x") })
		}, func(d *PodDevice) { d.Host = "host-x" }, ErrLinkExists, "host-x"},
		{"default route exists", func(ns string) {
			ip(t, "-n", ns, "link", "add", "net1", "type", "veth", "peer", "name", "other")
			ip(t, "-n", ns, "link", "set", "net1", "up")
			ip(t, "-n", ns, "route", "add", "default", "dev", "net1")
		}, nil, ErrForeignRoute, "0.0.0.0/0 dev net1"},
		{"no namespace", nil, func(d *PodDevice) { d.NetNS = "/run/netns/ovpker-none" }, ErrNoNetNS, "ovpker-none"},
		{"no host's end", nil, func(d *PodDevice) { d.Host = "" }, nil, "host's end"},
		{"no address", nil, func(d *PodDevice) { d.IPv4, d.IPv6 = addr("::").Unmap(), addr("::") }, nil, ""},
		{"invalid host's end", nil, func(d *PodDevice) { d.Host = "a-name-that-is-too-long" }, nil, ""},
		{"no rings of that size", nil, func(d *PodDevice) { d.MTU = 1500 }, nil, "rings of 100"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := newNetNS(t)
			if tc.prepare != nil {
				tc.prepare(pod)
			}
			dev := vethDevice(pod, "host-a", "10.244.0.2", "fd12::2")
			if tc.change != nil {
				tc.change(&dev)
			}
			cfg := vethConfig(r, 1)
			if strings.Contains(tc.text, "rings") {
				cfg.RingSize = 100
			}
			nodeBefore, podBefore := links(node), links(pod)
			err := InNetNS(pathOf(node), func() error { _, err := AttachVeth(dev, cfg); return err })
			require.ErrorContains(t, err, tc.text)
			if tc.target != nil {
				require.ErrorIs(t, err, tc.target)
			}
			require.Equal(t, nodeBefore, links(node))
			require.Equal(t, podBefore, links(pod))
		})
	}
}

// A daemon goes and comes back with another number of workers while the pod talks; what the pod lost of its configuration is put right.
func TestReopenVethKeepsConnectionsAndRepairs(t *testing.T) {
	needRoot(t)
	node, a, b := newNetNS(t), newNetNS(t), newNetNS(t)
	r := newRouter(t)
	devA, devB := vethDevice(a, "host-a", "10.244.0.2", "fd12::2"), vethDevice(b, "host-b", "10.244.0.3", "fd12::3")
	ports := map[string]*xdp.VethPort{}
	ports[devA.NetNS], ports[devB.NetNS] = attachVeth(t, node, r, devA, 1), attachVeth(t, node, r, devB, 1)

	var l net.Listener
	in(t, b, func() (err error) { l, err = net.Listen("tcp", "[fd12::3]:0"); return err })
	defer func() { _ = l.Close() }()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.Copy(c, c)
		}
	}()
	var c net.Conn
	in(t, a, func() (err error) { c, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second); return err })
	defer func() { _ = c.Close() }()
	echo := func() {
		require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		_, err := io.WriteString(c, "hello")
		require.NoError(t, err)
		_, err = io.ReadFull(c, make([]byte, 5))
		require.NoError(t, err)
	}
	echo()
	channels := func(ns, name string) string {
		out, err := exec.Command("ip", "netns", "exec", ns, "ethtool", "-l", name).CombinedOutput()
		if err != nil {
			t.Skipf("needs ethtool: %s", out)
		}
		_, now, _ := strings.Cut(string(out), "Current")
		return strings.Join(strings.Fields(now), " ")
	}
	for _, step := range []struct{ queues, mtu int }{{2, 3000}, {2, 1500}, {1, 1500}, {1, 9000}} {
		for _, dev := range []PodDevice{devA, devB} {
			r.drop(dev.NetNS)
			require.NoError(t, ports[dev.NetNS].Close())
		}
		in(t, node, func() error {
			require.True(t, PodAlive(devA, ""))
			return nil
		})
		ip(t, "-n", a, "route", "del", "default")
		ip(t, "-n", a, "neigh", "del", "169.254.1.1", "dev", "eth0")
		ip(t, "-n", a, "addr", "del", "10.244.0.2/32", "dev", "eth0")
		ip(t, "-n", node, "link", "set", "host-b", "down")
		for _, dev := range []PodDevice{devA, devB} {
			dev.MTU = step.mtu
			p := reopenVeth(t, node, r, dev, step.queues)
			require.Equal(t, step.queues, p.NumQueues())
			ports[dev.NetNS] = p
			for ns, name := range map[string]string{node: dev.Host, strings.TrimPrefix(dev.NetNS, "/run/netns/"): "eth0"} {
				require.Contains(t, channels(ns, name), "RX: "+itoa(step.queues)+" TX: "+itoa(step.queues))
			}
		}
		if step.queues == 1 { // the test's router drives no more
			echo()
			requirePing(t, a, "10.244.0.3")
			requirePing(t, a, "-M", "do", "-s", itoa(step.mtu-28), "10.244.0.3")
		}
	}
}

// Nothing in a frame says that its checksum is unfinished, so the pod's stack must not leave it so.
func TestVethPodFinishesItsChecksums(t *testing.T) {
	needRoot(t)
	node, pod := newNetNS(t), newNetNS(t)
	r := newRouter(t)
	dev := vethDevice(pod, "host-a", "10.244.0.2", "fd12::2")
	p := attachVeth(t, node, r, dev, 1)
	features := func() string {
		out, err := exec.Command("ip", "netns", "exec", pod, "ethtool", "-k", "eth0").CombinedOutput()
		if err != nil {
			t.Skipf("needs ethtool: %s", out)
		}
		return string(out)
	}
	require.Contains(t, features(), "tx-checksumming: off")
	require.Contains(t, features(), "tx-checksum-sctp: off")
	require.NoError(t, exec.Command("ip", "netns", "exec", pod, "ethtool", "-K", "eth0", "tx", "on").Run())
	r.drop(dev.NetNS)
	require.NoError(t, p.Close())
	reopenVeth(t, node, r, dev, 1)
	require.Contains(t, features(), "tx-checksumming: off", "put right when it is opened again")
}

func TestVethPairThatIsNotOurs(t *testing.T) {
	needRoot(t)
	node, pod := newNetNS(t), newNetNS(t)
	r := newRouter(t)
	dev := vethDevice(pod, "host-a", "10.244.0.2", "")
	reopen := func(d PodDevice) error {
		return InNetNS(pathOf(node), func() error { _, err := ReopenVeth(d, vethConfig(r, 1)); return err })
	}
	alive := func(d PodDevice) (alive bool) {
		in(t, node, func() error { alive = PodAlive(d, ""); return nil })
		return alive
	}
	require.ErrorIs(t, reopen(dev), ErrNoLink)
	require.False(t, alive(dev))
	ip(t, "-n", node, "link", "add", "host-a", "type", "veth", "peer", "name", "elsewhere")
	require.ErrorIs(t, reopen(dev), ErrNoLink)
	ip(t, "-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
	require.ErrorIs(t, reopen(dev), ErrLinkExists)
	require.ErrorContains(t, reopen(dev), "not the other end")
	require.False(t, alive(dev))
	dev.NetNS = "/run/netns/ovpker-none"
	require.ErrorIs(t, reopen(dev), ErrNoNetNS)

	ip(t, "-n", node, "link", "add", "host-b", "type", "bridge")
	in(t, node, func() error {
		require.ErrorIs(t, RemoveVeth("host-b"), ErrLinkExists, "somebody else's interface stays")
		return nil
	})
}

func TestRemoveVeth(t *testing.T) {
	needRoot(t)
	node, pod := newNetNS(t), newNetNS(t)
	dev := vethDevice(pod, "host-a", "10.244.0.2", "fd12::2")
	r := newRouter(t)
	p := attachVeth(t, node, r, dev, 1)
	remove := func() { in(t, node, func() error { return RemoveVeth(dev.Host) }) }
	remove()
	require.NotContains(t, ip(t, "-n", pod, "link"), "eth0")
	require.NotContains(t, ip(t, "-n", node, "link"), "host-a")
	require.True(t, p.Dead())
	r.drop(dev.NetNS)
	require.NoError(t, p.Close())
	remove() // twice
	attachVeth(t, node, r, dev, 1)

	// A namespace that is deleted takes the pair along; sockets do not hold it.
	require.NoError(t, exec.Command("ip", "netns", "del", pod).Run())
	require.Eventually(t, func() bool { return !strings.Contains(ip(t, "-n", node, "link"), "host-a") }, 5*time.Second, 10*time.Millisecond)
	remove()
}

func TestSetVethMTU(t *testing.T) {
	needRoot(t)
	node, a, b := newNetNS(t), newNetNS(t), newNetNS(t)
	r := newRouter(t)
	devA, devB := vethDevice(a, "host-a", "10.244.0.2", "fd12::2"), vethDevice(b, "host-b", "10.244.0.3", "fd12::3")
	attachVeth(t, node, r, devA, 1)
	attachVeth(t, node, r, devB, 1)
	for _, mtu := range []int{1400, 1280, 1500} {
		devA.MTU, devB.MTU = mtu, mtu
		in(t, node, func() error {
			require.NoError(t, SetPodMTU(devA))
			return SetPodMTU(devB)
		})
		requirePing(t, a, "-M", "do", "-s", itoa(mtu-28), "10.244.0.3")
		requireNoPing(t, a, "-M", "do", "-s", itoa(mtu-27), "10.244.0.3")
		requirePing(t, a, "-M", "do", "-s", itoa(mtu-48), "fd12::3")
	}
}

var _ port.Port = (*xdp.VethPort)(nil)

func TestVethReceivesOnTheseCPUs(t *testing.T) {
	needRoot(t)
	node, pod := newNetNS(t), newNetNS(t)
	r := newRouter(t)
	dev := vethDevice(pod, "host-a", "10.244.0.2", "fd12::2")
	attachVeth(t, node, r, dev, 2)
	for _, c := range []struct {
		cpus []int
		want uint64
	}{{[]int{1}, 2}, {[]int{0, 1}, 3}, {nil, 0}} {
		if runtime.NumCPU() < 2 {
			t.Skip("needs two processors")
		}
		require.NoError(t, SetReceiveCPUs(dev, c.cpus))
		for _, q := range []string{"rx-0", "rx-1"} {
			out, err := exec.Command("ip", "netns", "exec", pod, "cat", "/sys/class/net/eth0/queues/"+q+"/rps_cpus").CombinedOutput()
			require.NoError(t, err, "%s", out)
			mask, err := strconv.ParseUint(strings.TrimSpace(string(out)), 16, 64)
			require.NoError(t, err)
			require.Equal(t, c.want, mask)
		}
	}
	dev.Name = "none"
	require.ErrorContains(t, SetReceiveCPUs(dev, nil), "none")
}

func TestCPUMask(t *testing.T) {
	for want, cpus := range map[string][]int{
		"0": nil, "00000001": {0}, "00000006": {1, 2}, "80000000": {31}, "00000001,00000000": {32}, "00000002,00000000,80000001": {65, 0, 31},
	} {
		require.Equal(t, want, cpuMask(cpus))
	}
}
