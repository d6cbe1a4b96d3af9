package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"
)

// Probes are made of sockets that this process opens inside the lab's namespaces: no external tool is needed, and a check knows both ends.

const (
	probeTimeout  = 5 * time.Second
	probeAttempts = 4
	probeBytes    = 3000 // more than an MTU's worth, so that TCP sends several segments
	udpProbeBytes = 700
)

// End is what a probe runs from or to: a namespace and its address of each family.
type End struct {
	Name, Netns string
	IPv4, IPv6  netip.Addr
}

// Addr is the address of a family, 4 or 6.
func (e End) Addr(family int) netip.Addr {
	if family == 4 {
		return e.IPv4
	}
	return e.IPv6
}

// End is the node as an end of probes.
func (n *Node) End() End { return End{n.Name(), n.Netns(), n.IPv4(), n.IPv6()} }

// End is the pod as an end of probes.
func (p *Pod) End() End { return End{p.Name(), p.Netns(), p.IPv4(), p.IPv6()} }

// ExtEnd is the host outside as an end of probes.
func (l *Lab) ExtEnd() End {
	return End{"ext", l.Ext(), netip.MustParseAddr(extIPv4), netip.MustParseAddr(extIPv6)}
}

// ListenTCP opens a listener inside an end's namespace, on its address and a free port.
func ListenTCP(e End, family int) (*net.TCPListener, error) {
	var l *net.TCPListener
	err := InNetns(e.Netns, func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(e.Addr(family), 0)))
		return err
	})
	return l, err
}

// DialTCP connects from inside an end's namespace.
func DialTCP(ctx context.Context, from End, to netip.AddrPort) (*net.TCPConn, error) {
	var c net.Conn
	err := InNetns(from.Netns, func() (err error) {
		// An address without a name to resolve and without an alternative: the socket is made on this very thread.
		c, err = (&net.Dialer{Timeout: probeTimeout}).DialContext(ctx, "tcp", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// ListenUDP opens a UDP socket inside an end's namespace, on its address and a free port.
func ListenUDP(e End, family int) (*net.UDPConn, error) {
	var c *net.UDPConn
	err := InNetns(e.Netns, func() (err error) {
		c, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(e.Addr(family), 0)))
		return err
	})
	return c, err
}

// EchoTCP sends bytes from one end to another and back over TCP. It is an error if the server sees another source than the client's own
// address.
func EchoTCP(ctx context.Context, from, to End, family int) error {
	return echoTCP(ctx, from, to, family, from.Addr(family))
}

// echoTCP is EchoTCP for a client that the server must see by another address.
func echoTCP(ctx context.Context, from, to End, family int, as netip.Addr) error {
	l, err := ListenTCP(to, family)
	if err != nil {
		return err
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		_ = l.SetDeadline(time.Now().Add(probeTimeout))
		c, err := l.AcceptTCP()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(probeTimeout))
		if seen := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); seen != as {
			served <- fmt.Errorf("the server saw %v as source, not %v", seen, as)
			return
		}
		_, err = io.CopyN(c, c, probeBytes)
		served <- err
	}()
	c, err := DialTCP(ctx, from, l.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(probeTimeout))
	sent, got := make([]byte, probeBytes), make([]byte, probeBytes)
	_, _ = rand.Read(sent)
	if _, err := c.Write(sent); err != nil {
		return err
	}
	if _, err := io.ReadFull(c, got); err != nil {
		select {
		case serverErr := <-served:
			return errors.Join(err, serverErr)
		default:
			return err
		}
	}
	if !bytes.Equal(sent, got) {
		return errors.New("other bytes came back than were sent")
	}
	return <-served
}

// EchoUDP sends a datagram from one end to another and back, again if it gets lost. lost is how often it was. It is an error if the
// server sees another source than the client's own address.
func EchoUDP(ctx context.Context, from, to End, family int, payload []byte) (lost int, err error) {
	return echoUDP(ctx, from, to, family, payload, from.Addr(family))
}

// echoUDP is EchoUDP for a client that the server must see by another address, and then by any port.
func echoUDP(ctx context.Context, from, to End, family int, payload []byte, as netip.Addr) (lost int, err error) {
	server, err := ListenUDP(to, family)
	if err != nil {
		return 0, err
	}
	defer server.Close()
	client, err := ListenUDP(from, family)
	if err != nil {
		return 0, err
	}
	defer client.Close()
	want := client.LocalAddr().(*net.UDPAddr).AddrPort()
	translated := as != want.Addr()
	want = netip.AddrPortFrom(as, want.Port())
	wrongSource := make(chan netip.AddrPort, 1)
	go func() {
		buf := make([]byte, 65535)
		for {
			n, src, err := server.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if src = netip.AddrPortFrom(src.Addr().Unmap(), src.Port()); src.Addr() != as || !translated && src != want {
				select {
				case wrongSource <- src:
				default:
				}
			}
			_, _ = server.WriteToUDPAddrPort(buf[:n], src)
		}
	}()
	if payload == nil {
		payload = make([]byte, udpProbeBytes)
		_, _ = rand.Read(payload)
	}
	got := make([]byte, 65535)
	for lost = range probeAttempts {
		if err := ctx.Err(); err != nil {
			return lost, err
		}
		if _, err := client.WriteToUDPAddrPort(payload, server.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
			return lost, err
		}
		_ = client.SetReadDeadline(time.Now().Add(time.Second))
		n, err := client.Read(got)
		if err != nil {
			continue
		}
		select {
		case src := <-wrongSource:
			return lost, fmt.Errorf("the server saw %v as source, not %v", src, want)
		default:
		}
		if !bytes.Equal(got[:n], payload) {
			return lost, errors.New("other bytes came back than were sent")
		}
		return lost, nil
	}
	return probeAttempts, fmt.Errorf("no answer to %d datagrams", probeAttempts)
}
