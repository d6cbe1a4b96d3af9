package e2e

import (
	"context"
	"encoding/binary"
	"errors"
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

// wire is a device that frames are put on as they are.
type wire struct {
	fd       int
	index    int
	src, dst net.HardwareAddr // of the device, and of the router that it sends to
}

// podWire is a pod's own device, towards its node.
func podWire(t *testing.T, p *lab.Pod) *wire {
	t.Helper()
	router, err := net.ParseMAC(gatewayMACOf(t, p.Node()))
	require.NoError(t, err)
	return openWire(t, p.Netns(), router)
}

// extWire is the device of the host outside, towards the underlay's router.
func extWire(t *testing.T, l *lab.Lab) *wire {
	t.Helper()
	return openWire(t, l.Ext(), device(t, l.Gateway(), "ext").HardwareAddr)
}

func openWire(t *testing.T, netns string, router net.HardwareAddr) *wire {
	t.Helper()
	w := &wire{dst: router}
	require.NoError(t, lab.InNetns(netns, func() error {
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		w.index, w.src = dev.Index, dev.HardwareAddr
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		return err
	}))
	t.Cleanup(func() { unix.Close(w.fd) })
	return w
}

// send puts a frame on the wire; it is lost where there is no room.
func (w *wire) send(frame []byte) error {
	var proto [2]byte
	copy(proto[:], frame[12:14])
	err := unix.Sendto(w.fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: w.index, Protocol: binary.NativeEndian.Uint16(proto[:])})
	if errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return err
}

// frame builds an Ethernet frame with an IP packet that holds what transport says, lengths and checksums right.
func (w *wire) frame(t *testing.T, src, dst netip.Addr, proto layers.IPProtocol, transport ...gopacket.SerializableLayer) []byte {
	t.Helper()
	return w.frameIP(t, ipHeader(src, dst, proto), transport...)
}

// ipHeader is a header as a host would begin with; TTL 64.
func ipHeader(src, dst netip.Addr, proto layers.IPProtocol) gopacket.SerializableLayer {
	if src.Is4() {
		return &layers.IPv4{Version: 4, TTL: 64, Id: 1, Protocol: proto, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
	}
	return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: proto, SrcIP: src.AsSlice(), DstIP: dst.AsSlice()}
}

func (w *wire) frameIP(t *testing.T, ip gopacket.SerializableLayer, transport ...gopacket.SerializableLayer) []byte {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: w.src, DstMAC: w.dst, EthernetType: layers.EthernetTypeIPv4}
	if _, ok := ip.(*layers.IPv6); ok {
		eth.EthernetType = layers.EthernetTypeIPv6
	}
	for _, l := range transport {
		if c, ok := l.(interface {
			SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
		}); ok {
			require.NoError(t, c.SetNetworkLayerForChecksum(ip.(gopacket.NetworkLayer)))
		}
	}
	buf := gopacket.NewSerializeBuffer()
	require.NoError(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, append([]gopacket.SerializableLayer{eth, ip}, transport...)...))
	return buf.Bytes()
}

// flood sends what next makes, as fast as one thread can, until ctx ends. It returns how many frames.
func (w *wire) flood(ctx context.Context, next func(i int) []byte) (int, error) {
	for i := 0; ; i++ {
		if i%64 == 0 && ctx.Err() != nil {
			return i, nil
		}
		if err := w.send(next(i)); err != nil {
			return i, err
		}
	}
}

// put16 replaces two bytes that a checksum covers.
func put16(b []byte, at, checksum int, v uint16) {
	sum := uint32(^binary.BigEndian.Uint16(b[checksum:])) + uint32(^binary.BigEndian.Uint16(b[at:])) + uint32(v)
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(b[checksum:], ^uint16(sum+sum>>16))
	binary.BigEndian.PutUint16(b[at:], v)
}

// greed makes packets of one pod to one address, each of which opens a session: TCP SYNs to a port, and UDP datagrams and echo
// requests.
func greed(t *testing.T, w *wire, src, dst netip.Addr, port uint16) func(i int) []byte {
	l4 := 14 + 20
	icmp, echo := layers.IPProtocolICMPv4, gopacket.SerializableLayer(&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeEchoRequest, 0)})
	if src.Is6() {
		l4 = 14 + 40
		icmp, echo = layers.IPProtocolICMPv6, &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeEchoRequest, 0)}
	}
	syn := w.frame(t, src, dst, layers.IPProtocolTCP, &layers.TCP{SYN: true, Window: 65535, DstPort: layers.TCPPort(port)})
	datagram := w.frame(t, src, dst, layers.IPProtocolUDP, &layers.UDP{}, gopacket.Payload("greedy"))
	ping := w.frame(t, src, dst, icmp, echo, gopacket.Payload(make([]byte, 12)))
	return func(i int) []byte {
		n := i / 4
		// Every source port, then the same to the next destination port.
		sport, round := uint16(1024+n%64000), uint16(n/64000)
		switch i % 4 {
		case 0:
			put16(syn, l4, l4+16, sport)
			return syn
		case 1:
			put16(ping, l4+4, l4+2, sport)
			return ping
		}
		put16(datagram, l4, l4+6, sport)
		put16(datagram, l4+2, l4+6, 20000+2*round+uint16(i%2))
		return datagram
	}
}

// synFlood makes SYNs to many ports of many hosts.
func synFlood(t *testing.T, w *wire, src netip.Addr, dsts []netip.Addr) func(i int) []byte {
	l4 := map[bool]int{true: 14 + 20, false: 14 + 40}[src.Is4()]
	var frames [][]byte
	for _, dst := range dsts {
		frames = append(frames, w.frame(t, src, dst, layers.IPProtocolTCP, &layers.TCP{SYN: true, Window: 65535}))
	}
	return func(i int) []byte {
		f := frames[i%len(frames)]
		n := i / len(frames)
		put16(f, l4, l4+16, uint16(1024+n%64000))
		put16(f, l4+2, l4+16, uint16(30000+n/64000))
		return f
	}
}

// fragmentFlood makes fragments of datagrams that never become whole: first ones, and ones whose first never comes.
func fragmentFlood(t *testing.T, w *wire, srcs []netip.Addr, dst netip.Addr) func(i int) []byte {
	var frames [][]byte
	v4 := dst.Is4()
	for _, src := range srcs {
		for _, first := range []bool{true, false} {
			data := gopacket.Payload(make([]byte, 32)) // the first begins with a UDP header
			data[1], data[3], data[5] = 80, 80, 200
			if v4 {
				ip := ipHeader(src, dst, layers.IPProtocolUDP).(*layers.IPv4)
				ip.Flags = layers.IPv4MoreFragments
				if !first {
					ip.FragOffset = 4
				}
				frames = append(frames, w.frameIP(t, ip, data))
				continue
			}
			ext := make([]byte, 8)
			ext[0] = byte(layers.IPProtocolUDP)
			binary.BigEndian.PutUint16(ext[2:], 1)
			if !first {
				binary.BigEndian.PutUint16(ext[2:], 4<<3|1)
			}
			frames = append(frames, w.frame(t, src, dst, layers.IPProtocolIPv6Fragment, gopacket.Payload(append(ext, data...))))
		}
	}
	return func(i int) []byte {
		f := frames[i%len(frames)]
		id := uint16(i / len(frames))
		if v4 {
			put16(f, 14+4, 14+10, id)
		} else {
			binary.BigEndian.PutUint16(f[14+40+4+2:], id)
		}
		return f
	}
}

// interleave takes from each in turn.
func interleave(makers []func(i int) []byte) func(i int) []byte {
	return func(i int) []byte { return makers[i%len(makers)](i / len(makers)) }
}

// during runs a flood, of one thread, while the others do something. It returns how many frames a second it sent.
func during(t *testing.T, w *wire, next func(i int) []byte, others func()) (rate float64) {
	t.Helper()
	ctx, stop := context.WithCancel(testContext(t))
	begin, ended := time.Now(), make(chan error, 1)
	go func() {
		n, err := w.flood(ctx, next)
		rate = float64(n) / time.Since(begin).Seconds()
		ended <- err
	}()
	defer func() {
		stop()
		require.NoError(t, <-ended)
	}()
	others()
	stop()
	require.NoError(t, <-ended)
	ended <- nil
	return rate
}
