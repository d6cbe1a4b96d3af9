package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/tap"
	"github.com/overplane/overplane/dataplane/port/xdp"
)

func tc(t *testing.T, ns string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("tc"); err != nil {
		t.Skip("needs the tc command")
	}
	out, err := exec.Command("tc", append([]string{"-n", ns}, args...)...).CombinedOutput()
	require.NoErrorf(t, err, "tc %s: %s", strings.Join(args, " "), out)
	return string(out)
}

// TestClassifierInPlaceOfTCX joins an uplink and its device by filters, as before Linux 6.6, beside a filter of somebody else.
func TestClassifierInPlaceOfTCX(t *testing.T) {
	needRoot(t)
	near, far := newNetNS(t), newNetNS(t)
	ip(t, "-n", near, "link", "add", "up0", "type", "veth", "peer", "name", "far0", "netns", far)
	ip(t, "-n", near, "link", "set", "up0", "up")
	ip(t, "-n", far, "link", "set", "far0", "up")
	ip(t, "-n", near, "addr", "add", "10.240.0.1/24", "dev", "up0")
	ip(t, "-n", far, "addr", "add", "10.240.0.2/24", "dev", "far0")
	tc(t, near, "qdisc", "add", "dev", "up0", "clsact")
	tc(t, near, "filter", "add", "dev", "up0", "ingress", "prio", "10", "protocol", "ip", "u32", "match", "u32", "0", "0", "flowid", "1:1")
	filters := func(dev string) string { return tc(t, near, "filter", "show", "dev", dev, "ingress") }

	pool := newPool(t)
	farMAC := interfaceMAC(t, far, "far0")
	var (
		p     *tap.Port
		index int
		s     *xdp.Steering
	)
	in(t, near, func() (err error) {
		p, index, err = AttachUplinkDevice(1500, tap.Config{Pools: []*port.Pool{pool}})
		if err != nil {
			return err
		}
		if s, err = xdp.OpenSteering(xdp.SteeringConfig{Interface: "up0", Workers: 1}); err != nil {
			return err
		}
		for range 2 { // the second time in place
			if err := s.AttachTC(xdp.TCConfig{Device: index, Classifier: Classifier{}, NoTCX: true}); err != nil {
				return err
			}
		}
		if err := s.SetPodCIDRs([]netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}); err != nil {
			return err
		}
		return s.SetMembers([][6]byte{[6]byte(farMAC)})
	})
	require.Equal(t, 1, strings.Count(filters("up0"), "handle 0x4f56 overplane_tc_in"), "%s", filters("up0"))
	require.Equal(t, 1, strings.Count(filters(UplinkDeviceName), "handle 0x4f56 overplane_tc_out"))
	xdp.Beat(s.Heartbeat(0))

	// In: a packet for a pod comes out of the device.
	ip(t, "-n", far, "route", "add", "10.244.0.0/16", "via", "10.240.0.1")
	requirePing(t, far, "10.240.0.1")
	go func() { _, _ = ping(far, "10.244.1.2") }()
	frames := make([]port.Frame, port.MaxChain)
	got := 0
	require.Eventually(t, func() bool { got = p.Queue(0).Receive(frames); return got > 0 }, 2*time.Second, time.Millisecond)
	frame := pool.Bytes(&frames[0])
	require.Equal(t, []byte{10, 244, 1, 2}, frame[30:34])

	// Out: what a worker writes leaves by the uplink: the request, sent back as it is but for the addresses, arrives.
	copy(frame[26:], []byte{10, 244, 1, 2, 10, 240, 0, 2})
	copy(frame, farMAC)
	before := received(t, far, "far0")
	n, status := p.Queue(0).Transmit(frames[:got])
	require.Equal(t, port.TxOK, status)
	require.Equal(t, got, n)
	require.Eventually(t, func() bool { return received(t, far, "far0") > before }, 2*time.Second, time.Millisecond)

	// What is away is away, and the stranger's filter stays.
	in(t, near, func() error {
		require.NoError(t, s.Close())
		return Classifier{}.DetachAll(xdp.TCPrograms()...)
	})
	require.NotContains(t, filters("up0"), "overplane")
	require.Contains(t, filters("up0"), "pref 10 u32")

	// A stranger in our place is left there.
	tc(t, near, "filter", "add", "dev", "up0", "ingress", "prio", "1", "protocol", "ip", "u32", "match", "u32", "0", "0", "flowid", "1:1")
	in(t, near, func() error {
		s, err := xdp.OpenSteering(xdp.SteeringConfig{Interface: "up0", Workers: 1})
		if err != nil {
			return err
		}
		defer s.Close()
		err = s.AttachTC(xdp.TCConfig{Device: index, Classifier: Classifier{}, NoTCX: true})
		require.ErrorContains(t, err, "tc filter show dev up0 ingress")
		return nil
	})
	require.Contains(t, filters("up0"), "pref 1 u32")
	require.NotContains(t, filters("up0"), "overplane")
	require.NotContains(t, filters(UplinkDeviceName), "overplane", "the half that was attached is away again")
	in(t, near, func() error { return p.Close() })
	in(t, near, RemoveUplinkDevice)
	in(t, near, RemoveUplinkDevice)
}

func interfaceMAC(t *testing.T, ns, name string) (hw net.HardwareAddr) {
	t.Helper()
	in(t, ns, func() error {
		i, err := net.InterfaceByName(name)
		if err == nil {
			hw = i.HardwareAddr
		}
		return err
	})
	return hw
}

// received is how many packets an interface got.
func received(t *testing.T, ns, dev string) (n int) {
	t.Helper()
	out := ip(t, "netns", "exec", ns, "cat", "/sys/class/net/"+dev+"/statistics/rx_packets")
	_, err := fmt.Sscan(out, &n)
	require.NoError(t, err)
	return n
}

// TestUplinkDevice makes the device, loses its daemon, finds it again with other queues and without header, and removes it.
func TestUplinkDevice(t *testing.T) {
	needRoot(t)
	ns := newNetNS(t)
	pool := newPool(t)
	first := 0
	for _, c := range []struct {
		queues int
		plain  bool
	}{{1, false}, {2, false}, {2, true}, {1, false}} {
		in(t, ns, func() error {
			p, index, err := AttachUplinkDevice(1400, tap.Config{Pools: []*port.Pool{pool}, Queues: c.queues, Plain: c.plain})
			if err != nil {
				return err
			}
			if first == 0 {
				first = index
			}
			require.Equal(t, first, index, "the same device")
			require.Equal(t, !c.plain, p.Caps().TSO4)
			_, _, err = AttachUplinkDevice(1400, tap.Config{Pools: []*port.Pool{pool}})
			require.ErrorIs(t, err, ErrBusy)
			return p.Close()
		})
		text := ip(t, "-n", ns, "addr", "show", UplinkDeviceName)
		require.Contains(t, text, "mtu 1400")
		require.Contains(t, text, "NOARP")
		require.NotContains(t, text, "inet", "no address of either family")
	}
	in(t, ns, RemoveUplinkDevice)

	ip(t, "-n", ns, "link", "add", UplinkDeviceName, "type", "veth")
	require.NoError(t, InNetNS(pathOf(ns), func() error {
		_, _, err := AttachUplinkDevice(1400, tap.Config{Pools: []*port.Pool{pool}})
		require.ErrorIs(t, err, ErrLinkExists)
		require.ErrorIs(t, RemoveUplinkDevice(), ErrLinkExists)
		return nil
	}))
}
