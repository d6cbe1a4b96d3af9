package lab

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// proveOutside checks that every pod reaches the host outside by ping, TCP and UDP, and that its node's address is what is seen there.
func proveOutside(ctx context.Context, l *Lab, family int) (string, error) {
	ext := l.ExtEnd()
	var pairs []podPair
	nodes := map[string]netip.Addr{}
	for _, p := range l.Pods() {
		pairs = append(pairs, podPair{p.End(), ext})
		nodes[p.Name()] = p.node.End().Addr(family)
	}
	if len(pairs) == 0 {
		return "", errors.New("no pods")
	}
	proto := byte(unix.IPPROTO_ICMP)
	if family == 6 {
		proto = unix.IPPROTO_ICMPV6
	}
	capture, err := StartCapture(l.Gateway(), func(f []byte) bool {
		ip, ok := ParseOuterIP(f)
		return ok && ip.Dst == ext.Addr(family) && ip.Protocol == proto
	})
	if err != nil {
		return "", err
	}
	defer capture.Stop()
	detail, err := forPairs(ctx, pairs, func(ctx context.Context, p podPair) (int, error) {
		lost, err := Ping(ctx, p.from.Netns, p.to.Addr(family))
		if err != nil {
			return lost, fmt.Errorf("ping: %w", err)
		}
		if err := echoTCP(ctx, p.from, p.to, family, nodes[p.from.Name]); err != nil {
			return lost, fmt.Errorf("TCP: %w", err)
		}
		n, err := echoUDP(ctx, p.from, p.to, family, nil, nodes[p.from.Name])
		if err != nil {
			err = fmt.Errorf("UDP: %w", err)
		}
		return lost + n, err
	})
	if err != nil {
		return "", err
	}
	for _, f := range capture.Frames() {
		ip, _ := ParseOuterIP(f.Bytes)
		known := ip.Src == ext.Addr(family)
		for _, a := range nodes {
			known = known || ip.Src == a
		}
		if !known {
			return "", fmt.Errorf("an ICMP packet for %v came from %v, no node's address", ip.Dst, ip.Src)
		}
	}
	return detail, nil
}

// proveClosed checks that a pod's external port is open to the peer that the pod sent to and to nobody else.
func proveClosed(ctx context.Context, l *Lab, family int) (string, error) {
	ext, pod := l.ExtEnd(), l.Pods()[0]
	peer, err := ListenUDP(ext, family)
	if err != nil {
		return "", err
	}
	defer peer.Close()
	stranger, err := ListenUDP(ext, family)
	if err != nil {
		return "", err
	}
	defer stranger.Close()
	inside, err := ListenUDP(pod.End(), family)
	if err != nil {
		return "", err
	}
	defer inside.Close()

	external, err := firstDatagram(ctx, inside, peer)
	if err != nil {
		return "", err
	}
	for range 5 {
		if _, err := stranger.WriteToUDPAddrPort([]byte("stranger"), external); err != nil {
			return "", err
		}
	}
	if _, err := peer.WriteToUDPAddrPort([]byte("peer"), external); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	_ = inside.SetReadDeadline(time.Now().Add(2 * time.Second))
	n, err := inside.Read(buf)
	if err != nil {
		return "", fmt.Errorf("the peer's answer did not arrive: %w", err)
	}
	if got := string(buf[:n]); got != "peer" {
		return "", fmt.Errorf("a stranger's datagram to %v reached the pod", external)
	}
	_ = inside.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if _, err := inside.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		return "", fmt.Errorf("a stranger's datagram to %v reached the pod, or an error did: %v", external, err)
	}
	// A connection attempt is met by silence: an answer of any kind would be the host's.
	short, cancel := context.WithTimeout(ctx, 700*time.Millisecond)
	defer cancel()
	c, err := DialTCP(short, ext, external)
	if err == nil {
		c.Close()
		return "", fmt.Errorf("a connection from outside to %v was accepted", external)
	}
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		return "", fmt.Errorf("a connection from outside to %v was answered: %w", external, err)
	}
	return external.String(), nil
}

// firstDatagram sends from one socket to the other until something arrives, and returns whom the receiver saw.
func firstDatagram(ctx context.Context, from, to *net.UDPConn) (netip.AddrPort, error) {
	token := make([]byte, 16)
	_, _ = rand.Read(token)
	buf := make([]byte, 64)
	for range probeAttempts {
		if err := ctx.Err(); err != nil {
			return netip.AddrPort{}, err
		}
		if _, err := from.WriteToUDPAddrPort(token, to.LocalAddr().(*net.UDPAddr).AddrPort()); err != nil {
			return netip.AddrPort{}, err
		}
		_ = to.SetReadDeadline(time.Now().Add(time.Second))
		n, src, err := to.ReadFromUDPAddrPort(buf)
		if err == nil && string(buf[:n]) == string(token) {
			return netip.AddrPortFrom(src.Addr().Unmap(), src.Port()), nil
		}
	}
	return netip.AddrPort{}, fmt.Errorf("%d datagrams to outside were lost", probeAttempts)
}

// proveNodesOutside checks that nodes themselves reach the host outside, small and in fragments, as they would without a data plane.
func proveNodesOutside(ctx context.Context, l *Lab, family int) (string, error) {
	var pairs []podPair
	for i, n := range l.Nodes {
		next := l.Nodes[(i+1)%len(l.Nodes)]
		pairs = append(pairs, podPair{n.End(), l.ExtEnd()}, podPair{l.ExtEnd(), n.End()}, podPair{n.End(), next.End()})
	}
	large := make([]byte, 5000)
	_, _ = rand.Read(large)
	return proveEchoes(ctx, pairs, family, large)
}
