package e2e

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

// udpFrame builds an Ethernet frame with a UDP datagram in it, checksums right.
func udpFrame(t *testing.T, srcMAC, dstMAC net.HardwareAddr, src, dst netip.AddrPort, payload []byte) []byte {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: srcMAC, DstMAC: dstMAC, EthernetType: layers.EthernetTypeIPv4}
	udp := &layers.UDP{SrcPort: layers.UDPPort(src.Port()), DstPort: layers.UDPPort(dst.Port())}
	var ip gopacket.SerializableLayer
	if src.Addr().Is4() {
		v4 := &layers.IPv4{Version: 4, TTL: 64, Protocol: layers.IPProtocolUDP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice()}
		require.NoError(t, udp.SetNetworkLayerForChecksum(v4))
		ip = v4
	} else {
		eth.EthernetType = layers.EthernetTypeIPv6
		v6 := &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolUDP, SrcIP: src.Addr().AsSlice(), DstIP: dst.Addr().AsSlice()}
		require.NoError(t, udp.SetNetworkLayerForChecksum(v6))
		ip = v6
	}
	buf := gopacket.NewSerializeBuffer()
	require.NoError(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, eth, ip, udp, gopacket.Payload(payload)))
	return buf.Bytes()
}

// sendFrame puts a frame on a device of a namespace as it is.
func sendFrame(t *testing.T, netns, device string, frame []byte) {
	t.Helper()
	require.NoError(t, lab.InNetns(netns, func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		// Past the queueing discipline and the uplink's egress program, which would have the frame for one of the kernel's services.
		if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1); err != nil {
			return err
		}
		var proto [2]byte
		copy(proto[:], frame[12:14])
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: dev.Index, Protocol: binary.NativeEndian.Uint16(proto[:])})
	}))
}

// device reads a device of a namespace.
func device(t *testing.T, netns, name string) (dev *net.Interface) {
	t.Helper()
	require.NoError(t, lab.InNetns(netns, func() (err error) {
		dev, err = net.InterfaceByName(name)
		return err
	}))
	return dev
}

// receiver is a UDP socket of an end that notes whether anything has come.
type receiver struct {
	conn *net.UDPConn
	addr netip.AddrPort
}

func newReceiver(t *testing.T, e lab.End, family int) *receiver {
	t.Helper()
	c, err := lab.ListenUDP(e, family)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return &receiver{c, c.LocalAddr().(*net.UDPAddr).AddrPort()}
}

// got waits for a datagram.
func (r *receiver) got(t *testing.T, limit time.Duration) bool {
	t.Helper()
	require.NoError(t, r.conn.SetReadDeadline(time.Now().Add(limit)))
	_, err := r.conn.Read(make([]byte, 2048))
	return err == nil
}

func TestPodsCannotSpoof(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 2})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	pod := n1.Pods[0]
	dev := device(t, pod.Netns(), "eth0")
	gateway, err := net.ParseMAC(gatewayMACOf(t, n1))
	require.NoError(t, err)
	eachFamily(t, func(t *testing.T, family int) {
		rx := newReceiver(t, n2.Pods[0].End(), family)
		send := func(src netip.Addr) {
			sendFrame(t, pod.Netns(), "eth0", udpFrame(t, dev.HardwareAddr, gateway, netip.AddrPortFrom(src, 4000), rx.addr, []byte("whoever")))
		}
		send(pod.Addr(family))
		require.True(t, rx.got(t, 5*time.Second), "the frame with the pod's own address arrives: the others do not for their source alone")

		unassigned := pod.Addr(family)
		for range 100 {
			unassigned = unassigned.Next()
		}
		spoofed := []netip.Addr{
			n1.Pods[1].Addr(family), // a neighbour on the node
			n2.Pods[1].Addr(family), // a pod elsewhere
			n1.Addr(family),         // the node
			l.ExtEnd().Addr(family), // the world
			unassigned,              // nobody
		}
		before := dropsOf(t, n1, pod.Name(), "source_not_pods")
		for _, src := range spoofed {
			send(src)
		}
		require.Eventually(t, func() bool {
			return dropsOf(t, n1, pod.Name(), "source_not_pods") == before+uint64(len(spoofed))
		}, 5*time.Second, 20*time.Millisecond, "each is counted at the pod")
		require.False(t, rx.got(t, 200*time.Millisecond), "a spoofed datagram arrived")
	})
}

// gatewayMACOf is the Ethernet address that a node's pods know as their gateway's.
func gatewayMACOf(t *testing.T, n *lab.Node) string {
	t.Helper()
	pods, err := n.AttachedPods(testContext(t))
	require.NoError(t, err)
	require.NotEmpty(t, pods)
	return pods[0].GatewayMac
}

func TestOutsideCannotReachPods(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1})
	n1 := l.Nodes[0]
	pod, ext := n1.Pods[0], l.ExtEnd()
	eachFamily(t, func(t *testing.T, family int) {
		// A fabric that knows where the pods are, and a host that uses it.
		block := netip.PrefixFrom(pod.Addr(family), map[int]int{4: 24, 6: 80}[family]).Masked()
		require.NoError(t, lab.AddRoute(l.Gateway(), block, "br0", n1.Addr(family)))
		gw := map[int]string{4: "198.51.100.1", 6: "2001:db8:100::1"}[family]
		require.NoError(t, lab.AddRoute(l.Ext(), block, "eth0", netip.MustParseAddr(gw)))

		rx := newReceiver(t, pod.End(), family)
		tx, err := lab.ListenUDP(ext, family)
		require.NoError(t, err)
		defer tx.Close()
		before := status(t, n1).Uplink.Steering
		const attempts = 5
		for range attempts {
			_, err = tx.WriteToUDPAddrPort([]byte("from outside"), rx.addr)
			require.NoError(t, err)
		}
		require.False(t, rx.got(t, 500*time.Millisecond), "a datagram from outside arrived")
		after := status(t, n1).Uplink.Steering
		require.GreaterOrEqual(t, after["dropped_not_member"], before["dropped_not_member"]+attempts,
			"they came as far as the uplink and were dropped there: %v", after)
		// The node itself stays reachable for the same host.
		requirePing(t, ext, n1.End(), family)
	})
}

func TestTwoClustersWithOnePodCIDRShareAnUnderlay(t *testing.T) {
	t.Parallel()
	a := newLab(t, lab.Options{Name: "ovpta", Nodes: 2, Pods: 1})
	b := newLab(t, lab.Options{Name: "ovptb", Nodes: 2, Pods: 1, Underlay: "ovpta"})
	require.ErrorContains(t, lab.Down("ovpta"), "ovptb", "an underlay in use is not taken down")
	require.Equal(t, "n3", b.Nodes[0].Name())
	a1, a2, b1, b2 := a.Nodes[0].Pods[0], a.Nodes[1].Pods[0], b.Nodes[0].Pods[0], b.Nodes[1].Pods[0]
	eachFamily(t, func(t *testing.T, family int) {
		require.Equal(t, a1.Addr(family), b1.Addr(family), "the two clusters number their pods alike")
		require.Equal(t, a2.Addr(family), b2.Addr(family))

		// What a's pod sends reaches a's pod and not b's with the same address and port.
		inA := newReceiver(t, a2.End(), family)
		var inB *net.UDPConn
		require.NoError(t, lab.InNetns(b2.Netns(), func() (err error) {
			inB, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(inA.addr))
			return err
		}))
		defer inB.Close()
		rxB := &receiver{inB, inA.addr}
		tx, err := lab.ListenUDP(a1.End(), family)
		require.NoError(t, err)
		defer tx.Close()
		_, err = tx.WriteToUDPAddrPort([]byte("for a"), inA.addr)
		require.NoError(t, err)
		require.True(t, inA.got(t, 5*time.Second))
		require.False(t, rxB.got(t, 200*time.Millisecond), "cluster b heard cluster a")

		// A node of a that addresses a node of b on purpose is not heard.
		macA, err := net.ParseMAC(a.Nodes[0].MAC)
		require.NoError(t, err)
		macB, err := net.ParseMAC(b.Nodes[1].MAC)
		require.NoError(t, err)
		before := status(t, b.Nodes[1]).Uplink.Steering["dropped_not_member"]
		frame := udpFrame(t, macA, macB, netip.AddrPortFrom(a1.Addr(family), 4000), inA.addr, bytes.Repeat([]byte("x"), 64))
		sendFrame(t, a.Nodes[0].Netns(), a.Nodes[0].Device(), frame)
		require.False(t, rxB.got(t, 200*time.Millisecond), "cluster b let a frame of cluster a in")
		require.Greater(t, status(t, b.Nodes[1]).Uplink.Steering["dropped_not_member"], before)
	})
	requireReachable(t, a1.End(), a2.End())
	requireReachable(t, b2.End(), b1.End())
}
