package kernel

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port/tap"
)

func podDevice(ns, ipv4, ipv6 string) PodDevice {
	d := PodDevice{NetNS: pathOf(ns), Name: "eth0", MTU: 1500}
	if ipv4 != "" {
		d.IPv4 = addr(ipv4)
	}
	if ipv6 != "" {
		d.IPv6 = addr(ipv6)
	}
	return d
}

// attach attaches a pod to a node's router.
func attach(t testing.TB, node string, r *router, dev PodDevice) *tap.Port {
	t.Helper()
	var p *tap.Port
	in(t, node, func() (err error) { p, err = AttachTAP(dev, r.config()); return err })
	r.destroyLater(t, dev.NetNS, p)
	r.set(dev.NetNS, p, PodMAC(dev.IPv4, dev.IPv6), dev.IPv4, dev.IPv6)
	return p
}

func TestPodsReachEachOther(t *testing.T) {
	needRoot(t)
	node, a, b := newNetNS(t), newNetNS(t), newNetNS(t)
	// As container runtimes leave it.
	sysctl(t, a, "net/ipv6/conf/default/disable_ipv6", "1")
	r := newRouter(t)
	p := attach(t, node, r, podDevice(a, "10.244.0.2", "fd12::2"))
	attach(t, node, r, podDevice(b, "10.244.0.3", "fd12::3"))
	require.Equal(t, "eth0", p.Name())
	for _, dst := range []string{"10.244.0.3", "fd12::3"} {
		requirePing(t, a, dst)
		requirePing(t, a, "-s", "5000", dst)
	}
	requirePing(t, b, "10.244.0.2")
	requirePing(t, b, "fd12::2")

	out := ip(t, "-n", a, "-d", "addr", "show", "eth0")
	require.Contains(t, out, "10.244.0.2/32")
	require.Contains(t, out, "fd12::2/128")
	require.Contains(t, out, "02:50:0a:f4:00:02")
	require.Contains(t, out, "mtu 1500")
	require.NotContains(t, out, "tentative")
	routes := ip(t, "-n", a, "route")
	require.Contains(t, routes, "default via 169.254.1.1 dev eth0 src 10.244.0.2")
	require.Contains(t, routes, "169.254.1.1 dev eth0 scope link")
	require.Contains(t, ip(t, "-n", a, "-6", "route"), "default via fe80::1 dev eth0 src fd12::2")
	neighbours := ip(t, "-n", a, "neigh")
	require.Contains(t, neighbours, "169.254.1.1 dev eth0 lladdr 02:4f:56:50:47:57 PERMANENT")
	require.Contains(t, neighbours, "fe80::1 dev eth0 lladdr 02:4f:56:50:47:57 ")
	require.NotContains(t, ip(t, "-n", node, "link"), "ovpt", "the temporary device is not left in the node")
}

func TestPodOfOneFamily(t *testing.T) {
	needRoot(t)
	node, a, b, c, d := newNetNS(t), newNetNS(t), newNetNS(t), newNetNS(t), newNetNS(t)
	r := newRouter(t)
	attach(t, node, r, podDevice(a, "10.244.0.2", ""))
	attach(t, node, r, podDevice(b, "10.244.0.3", ""))
	attach(t, node, r, podDevice(c, "", "fd12::4"))
	attach(t, node, r, podDevice(d, "", "fd12::5"))
	requirePing(t, a, "10.244.0.3")
	requirePing(t, c, "fd12::5")
	require.Empty(t, ip(t, "-n", a, "-6", "route", "show", "default"))
	require.Empty(t, ip(t, "-n", c, "-4", "route"))
}

func TestAttachFailsWhole(t *testing.T) {
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
		{"default route exists", func(ns string) {
			ip(t, "-n", ns, "link", "add", "net1", "type", "veth", "peer", "name", "other")
			ip(t, "-n", ns, "link", "set", "net1", "up")
			ip(t, "-n", ns, "route", "add", "default", "dev", "net1")
		}, nil, ErrForeignRoute, "0.0.0.0/0 dev net1"},
		{"no namespace", nil, func(d *PodDevice) { d.NetNS = "/run/netns/ovpker-none" }, ErrNoNetNS, "ovpker-none"},
		{"a file that is no namespace", nil, func(d *PodDevice) { d.NetNS = "/etc/hostname" }, ErrNoNetNS, "/etc/hostname"},
		{"a namespace of another kind", nil, func(d *PodDevice) { d.NetNS = "/proc/self/ns/uts" }, ErrNoNetNS, "another kind"},
		{"no address", nil, func(d *PodDevice) { d.IPv4, d.IPv6 = netip.Addr{}, netip.Addr{} }, nil, "no address"},
		{"families swapped", nil, func(d *PodDevice) { d.IPv4, d.IPv6 = d.IPv6, d.IPv4 }, nil, "wrong family"},
		{"MTU too small for IPv6", nil, func(d *PodDevice) { d.MTU = 1279 }, nil, "1280"},
		{"MTU too large", nil, func(d *PodDevice) { d.MTU = 70000 }, nil, "65521"},
		{"invalid interface name", nil, func(d *PodDevice) { d.Name = "a-name-that-is-too-long" }, nil, ""},
		{"multicast Ethernet address", nil, func(d *PodDevice) { d.MAC = net.HardwareAddr{1, 0, 0, 0, 0, 1} }, nil, "01:00:00:00:00:01"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pod := newNetNS(t)
			if tc.prepare != nil {
				tc.prepare(pod)
			}
			dev := podDevice(pod, "10.244.0.2", "fd12::2")
			if tc.change != nil {
				tc.change(&dev)
			}
			nodeBefore, podBefore := links(node), links(pod)
			err := InNetNS(pathOf(node), func() error { _, err := AttachTAP(dev, r.config()); return err })
			require.Error(t, err)
			require.ErrorContains(t, err, tc.text)
			if tc.target != nil {
				require.ErrorIs(t, err, tc.target)
			}
			require.Equal(t, nodeBefore, links(node))
			require.Equal(t, podBefore, links(pod))
		})
	}
}

// A daemon goes and comes back while the pod talks; what the pod lost of its configuration is put right.
func TestReopenKeepsConnectionsAndRepairs(t *testing.T) {
	needRoot(t)
	node, a, b := newNetNS(t), newNetNS(t), newNetNS(t)
	r := newRouter(t)
	devA, devB := podDevice(a, "10.244.0.2", "fd12::2"), podDevice(b, "10.244.0.3", "fd12::3")
	pa, pb := attach(t, node, r, devA), attach(t, node, r, devB)

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

	// Two processes may not have it at once.
	_, err := ReopenTAP(devA, r.config())
	require.ErrorIs(t, err, ErrBusy)

	r.drop(devA.NetNS)
	r.drop(devB.NetNS)
	require.NoError(t, pa.Close())
	require.NoError(t, pb.Close())
	require.True(t, PodAlive(devA, ""))
	ip(t, "-n", a, "route", "del", "default")
	ip(t, "-n", a, "neigh", "del", "169.254.1.1", "dev", "eth0")
	ip(t, "-n", a, "addr", "del", "10.244.0.2/32", "dev", "eth0")
	ip(t, "-n", b, "link", "set", "eth0", "mtu", "1400")
	devA.MTU, devB.MTU = 4000, 4000
	for _, x := range []struct {
		dev PodDevice
		p   **tap.Port
	}{{devA, &pa}, {devB, &pb}} {
		p, err := ReopenTAP(x.dev, r.config())
		require.NoError(t, err)
		r.destroyLater(t, x.dev.NetNS, p)
		*x.p = p
		r.set(x.dev.NetNS, p, PodMAC(x.dev.IPv4, x.dev.IPv6), x.dev.IPv4, x.dev.IPv6)
	}
	echo()
	requirePing(t, a, "10.244.0.3")
	requirePing(t, a, "-M", "do", "-s", "3900", "10.244.0.3")
	requirePing(t, b, "fd12::2")

	// Again: everything is right already.
	before := ip(t, "-n", a, "route") + ip(t, "-n", a, "-6", "route") + ip(t, "-n", a, "addr")
	r.drop(devA.NetNS)
	require.NoError(t, pa.Close())
	pa, err = ReopenTAP(devA, r.config())
	require.NoError(t, err)
	r.destroyLater(t, devA.NetNS, pa)
	require.Equal(t, strings.Fields(before), strings.Fields(ip(t, "-n", a, "route")+ip(t, "-n", a, "-6", "route")+ip(t, "-n", a, "addr")))
}

func TestReopenWhatIsGone(t *testing.T) {
	needRoot(t)
	pod := newNetNS(t)
	dev := podDevice(pod, "10.244.0.2", "")
	r := newRouter(t)
	_, err := ReopenTAP(dev, r.config())
	require.ErrorIs(t, err, ErrNoLink)
	require.False(t, PodAlive(dev, ""))
	ip(t, "-n", pod, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
	_, err = ReopenTAP(dev, r.config())
	require.ErrorIs(t, err, ErrLinkExists)
	require.ErrorIs(t, RemoveTAP(dev), ErrLinkExists, "somebody else's interface stays")
	dev.NetNS = "/run/netns/ovpker-none"
	_, err = ReopenTAP(dev, r.config())
	require.ErrorIs(t, err, ErrNoNetNS)
	require.NoError(t, RemoveTAP(dev))
}

func TestRemoveTAP(t *testing.T) {
	needRoot(t)
	node, pod := newNetNS(t), newNetNS(t)
	dev := podDevice(pod, "10.244.0.2", "fd12::2")
	r := newRouter(t)
	p := attach(t, node, r, dev)
	r.drop(dev.NetNS)
	require.NoError(t, p.Close())
	require.NoError(t, RemoveTAP(dev))
	require.NotContains(t, ip(t, "-n", pod, "link"), "eth0")
	require.NoError(t, RemoveTAP(dev), "twice")
	attach(t, node, r, dev) // and again
}

func TestSetPodMTU(t *testing.T) {
	needRoot(t)
	node, a, b := newNetNS(t), newNetNS(t), newNetNS(t)
	r := newRouter(t)
	devA, devB := podDevice(a, "10.244.0.2", "fd12::2"), podDevice(b, "10.244.0.3", "fd12::3")
	attach(t, node, r, devA)
	attach(t, node, r, devB)
	for _, mtu := range []int{9000, 1280} {
		devA.MTU, devB.MTU = mtu, mtu
		require.NoError(t, SetPodMTU(devA))
		require.NoError(t, SetPodMTU(devB))
		requirePing(t, a, "-M", "do", "-s", itoa(mtu-28), "10.244.0.3")
		requireNoPing(t, a, "-M", "do", "-s", itoa(mtu-27), "10.244.0.3")
		requirePing(t, a, "-M", "do", "-s", itoa(mtu-48), "fd12::3")
		requireNoPing(t, a, "-M", "do", "-s", itoa(mtu-47), "fd12::3")
	}
	devA.MTU = 100
	require.ErrorContains(t, SetPodMTU(devA), "1280")
}

func TestNamespaceWatch(t *testing.T) {
	needRoot(t)
	node, a, b, c := newNetNS(t), newNetNS(t), newNetNS(t), newNetNS(t)
	gone := make(chan GoneNetNS, 10)
	w := WatchNetNS(100*time.Millisecond, func(g GoneNetNS) { gone <- g })
	defer w.Close()
	identify := func(ns string) Identity {
		id, err := Identify(pathOf(ns))
		require.NoError(t, err)
		require.NotZero(t, id.Inode)
		return id
	}
	require.NotEqual(t, identify(a), identify(b))
	require.Equal(t, identify(a), identify(a))
	require.NotZero(t, identify(a).Cookie)

	// A re-opened TAP, which keeps the namespace alive, is the case that only the watch finds.
	r := newRouter(t)
	dev := podDevice(a, "10.244.0.2", "")
	p := attach(t, node, r, dev)
	r.drop(dev.NetNS)
	require.NoError(t, p.Close())
	p, err := ReopenTAP(dev, r.config())
	require.NoError(t, err)
	defer func() { _ = p.Close() }()
	idA := identify(a)
	require.True(t, PodAlive(dev, idA.String()))

	w.Add("a", pathOf(a), idA)
	w.Add("b", pathOf(b), identify(b))
	w.Add("c", pathOf(c), identify(c))
	expect := func(key, ns string) {
		t.Helper()
		select {
		case g := <-gone:
			require.Equal(t, GoneNetNS{Key: key, Path: pathOf(ns)}, g)
		case <-time.After(5 * time.Second):
			t.Fatalf("%s: not told", key)
		}
	}
	silent := func() {
		t.Helper()
		select {
		case g := <-gone:
			t.Fatalf("told of %v", g)
		case <-time.After(350 * time.Millisecond):
		}
	}
	silent()
	require.NoError(t, exec.Command("ip", "netns", "del", a).Run())
	expect("a", a)
	require.False(t, PodAlive(dev, idA.String()))
	require.False(t, p.Dead(), "the device itself does not tell")

	// Another namespace under the same name.
	id := identify(b)
	require.NoError(t, exec.Command("sh", "-c", "ip netns del "+b+" && ip netns add "+b).Run())
	require.NotEqual(t, id, identify(b), "the inode's number may be the same, the cookie is not")
	expect("b", b)

	w.Remove("c")
	require.NoError(t, exec.Command("ip", "netns", "del", c).Run())
	silent()

	// What is gone when it is added is told at once.
	w.Add("late", pathOf(c), identify(b))
	expect("late", c)

	// A process's namespace, which has no directory to watch.
	cmd := exec.Command("ip", "netns", "exec", b, "sleep", "60")
	require.NoError(t, cmd.Start())
	path := "/proc/" + itoa(cmd.Process.Pid) + "/ns/net"
	require.Eventually(t, func() bool {
		id, err := Identify(path)
		return err == nil && id == identify(b)
	}, 3*time.Second, 10*time.Millisecond)
	w.Add("process", path, identify(b))
	silent()
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	select {
	case g := <-gone:
		require.Equal(t, "process", g.Key)
	case <-time.After(5 * time.Second):
		t.Fatal("not told")
	}
}

func TestInNetNS(t *testing.T) {
	needRoot(t)
	ns := newNetNS(t)
	sentinel := errors.New("sentinel")
	require.ErrorIs(t, InNetNS(pathOf(ns), func() error { return sentinel }), sentinel)
	require.ErrorIs(t, InNetNS("/run/netns/ovpker-none", func() error { return nil }), ErrNoNetNS)
	want, err := Identify(pathOf(ns))
	require.NoError(t, err)
	own, err := Identify("/proc/thread-self/ns/net")
	require.NoError(t, err)
	for range 20 {
		in(t, ns, func() error {
			got, err := Identify("/proc/thread-self/ns/net")
			if err == nil && got != want {
				err = errors.New("in the wrong namespace")
			}
			return err
		})
		got, err := Identify("/proc/thread-self/ns/net")
		require.NoError(t, err)
		require.Equal(t, own, got, "the caller's thread was moved")
	}
}
