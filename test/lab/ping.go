package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// ICMP types of RFC 792 and RFC 4443 that probes understand.
const (
	icmp4EchoReply    = 0
	icmp4Unreachable  = 3
	icmp4EchoRequest  = 8
	icmp4TimeExceeded = 11
	icmp6Unreachable  = 1
	icmp6TooBig       = 2
	icmp6TimeExceeded = 3
	icmp6EchoRequest  = 128
	icmp6EchoReply    = 129
)

// ICMPError is an ICMP error that came back for a probe.
type ICMPError struct {
	From       netip.Addr
	Type, Code uint8
	// MTU is what a fragmentation-needed or packet-too-big message says.
	MTU int
}

func (e *ICMPError) Error() string {
	return fmt.Sprintf("ICMP type %d code %d from %v", e.Type, e.Code, e.From)
}

// TimeExceeded reports whether the packet's hop limit ran out in transit.
func (e *ICMPError) TimeExceeded() bool {
	if e.From.Is4() {
		return e.Type == icmp4TimeExceeded && e.Code == 0
	}
	return e.Type == icmp6TimeExceeded && e.Code == 0
}

// TooBig reports whether the packet did not fit a link.
func (e *ICMPError) TooBig() bool {
	if e.From.Is4() {
		return e.Type == icmp4Unreachable && e.Code == 4
	}
	return e.Type == icmp6TooBig
}

// ErrNoReply says that nothing came back in time.
var ErrNoReply = errors.New("no reply")

// Pinger sends ICMP echo requests from one namespace to one address.
type Pinger struct {
	conn *net.IPConn
	dst  netip.Addr
	id   uint16
	seq  uint16
}

// NewPinger opens a raw ICMP socket in the namespace.
func NewPinger(netns string, dst netip.Addr) (*Pinger, error) {
	p := &Pinger{dst: dst, id: uint16(rand.Uint32())}
	network := "ip4:icmp"
	if dst.Is6() {
		network = "ip6:ipv6-icmp"
	}
	err := InNetns(netns, func() (err error) {
		p.conn, err = net.ListenIP(network, nil)
		return err
	})
	return p, err
}

// Close closes the socket.
func (p *Pinger) Close() error { return p.conn.Close() }

// control runs a setsockopt on the socket.
func (p *Pinger) control(fn func(fd int) error) error {
	raw, err := p.conn.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = fn(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// SetTTL sets the hop limit of what is sent from now on.
func (p *Pinger) SetTTL(ttl int) error {
	return p.control(func(fd int) error {
		if p.dst.Is4() {
			return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_TTL, ttl)
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS, ttl)
	})
}

// SetDF sets whether this host may fragment what is sent: never (true; packets go out whole whatever path MTU is known), or as needed
// (false; IPv4 packets then go out without the DF bit).
func (p *Pinger) SetDF(df bool) error {
	return p.control(func(fd int) error {
		if p.dst.Is4() {
			value := unix.IP_PMTUDISC_DONT
			if df {
				value = unix.IP_PMTUDISC_PROBE
			}
			return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, value)
		}
		value := unix.IPV6_PMTUDISC_DONT
		if df {
			value = unix.IPV6_PMTUDISC_PROBE
		}
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, value)
	})
}

// Once sends one echo request with size bytes behind the ICMP header and waits for its reply or for an ICMP error about it (*ICMPError);
// ErrNoReply when neither came in time. from is who answered.
func (p *Pinger) Once(size int, timeout time.Duration) (from netip.Addr, rtt time.Duration, err error) {
	p.seq++
	msg := make([]byte, 8+size)
	msg[0] = icmp4EchoRequest
	if p.dst.Is6() {
		msg[0] = icmp6EchoRequest
	}
	binary.BigEndian.PutUint16(msg[4:], p.id)
	binary.BigEndian.PutUint16(msg[6:], p.seq)
	for i := range size {
		msg[8+i] = byte(i)
	}
	if p.dst.Is4() { // for IPv6 the kernel does it (RFC 3542, section 3.1)
		binary.BigEndian.PutUint16(msg[2:], internetChecksum(msg))
	}
	begin := time.Now()
	if _, err := p.conn.WriteToIP(msg, &net.IPAddr{IP: p.dst.AsSlice()}); err != nil {
		return from, 0, err
	}
	_ = p.conn.SetReadDeadline(begin.Add(timeout))
	buf := make([]byte, 65535)
	for {
		n, src, err := p.conn.ReadFromIP(buf)
		if err != nil {
			var netErr net.Error
			if errors.As(err, &netErr) && netErr.Timeout() {
				return from, 0, ErrNoReply
			}
			// An error about an earlier probe may be reported here as the socket's (EHOSTUNREACH, EMSGSIZE): the message itself follows.
			if time.Since(begin) < timeout {
				continue
			}
			return from, 0, err
		}
		from, _ := netip.AddrFromSlice(src.IP)
		from = from.Unmap()
		done, err := p.match(buf[:n], msg, from)
		if done {
			return from, time.Since(begin), err
		}
	}
}

// match reports whether a received ICMP message answers the request, and the error it reports.
func (p *Pinger) match(got, sent []byte, from netip.Addr) (bool, error) {
	if len(got) < 8 {
		return false, nil
	}
	isReply := p.dst.Is4() && got[0] == icmp4EchoReply || p.dst.Is6() && got[0] == icmp6EchoReply
	if isReply {
		if from != p.dst || string(got[4:8]) != string(sent[4:8]) {
			return false, nil
		}
		if string(got[8:]) != string(sent[8:]) {
			return true, errors.New("other bytes came back than were sent")
		}
		return true, nil
	}
	// An error quotes the packet: its IP header, then at least 8 bytes.
	quoted := got[8:]
	var inner []byte
	switch {
	case p.dst.Is4() && (got[0] == icmp4Unreachable || got[0] == icmp4TimeExceeded) && len(quoted) >= 28:
		if hl := int(quoted[0]&15) * 4; len(quoted) >= hl+8 {
			inner = quoted[hl:]
		}
	case p.dst.Is6() && got[0] >= icmp6Unreachable && got[0] <= 4 && len(quoted) >= 48:
		inner = quoted[40:]
	}
	if len(inner) < 8 || inner[0] != sent[0] || string(inner[4:8]) != string(sent[4:8]) {
		return false, nil
	}
	e := &ICMPError{From: from, Type: got[0], Code: got[1]}
	if p.dst.Is4() {
		e.MTU = int(binary.BigEndian.Uint16(got[6:]))
	} else if got[0] == icmp6TooBig {
		e.MTU = int(binary.BigEndian.Uint32(got[4:]))
	}
	return true, e
}

// Ping sends echo requests until one is answered, at most four. lost is how many were not.
func Ping(ctx context.Context, netns string, dst netip.Addr) (lost int, err error) {
	p, err := NewPinger(netns, dst)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	for lost = range probeAttempts {
		if ctx.Err() != nil {
			return lost, ctx.Err()
		}
		_, _, err = p.Once(56, time.Second)
		if !errors.Is(err, ErrNoReply) {
			return lost, err
		}
	}
	return probeAttempts, err
}

// Trace lists who answers echo requests with growing hop limits, the destination last. A hop that says nothing is the zero Addr; after two
// of them in a row it gives up.
func Trace(ctx context.Context, netns string, dst netip.Addr, maxHops int) ([]netip.Addr, error) {
	p, err := NewPinger(netns, dst)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	var hops []netip.Addr
	for ttl := 1; ttl <= maxHops; ttl++ {
		if err := p.SetTTL(ttl); err != nil {
			return hops, err
		}
		var hop netip.Addr
		for range 3 {
			if ctx.Err() != nil {
				return hops, ctx.Err()
			}
			from, _, err := p.Once(32, time.Second)
			if errors.Is(err, ErrNoReply) {
				continue
			}
			var icmpErr *ICMPError
			if err != nil && !(errors.As(err, &icmpErr) && icmpErr.TimeExceeded()) {
				return append(hops, from), err
			}
			hop = from
			break
		}
		hops = append(hops, hop)
		if hop == dst {
			return hops, nil
		}
		if n := len(hops); n >= 2 && !hop.IsValid() && !hops[n-2].IsValid() {
			return hops, ErrNoReply
		}
	}
	return hops, fmt.Errorf("%v is more than %d hops away", dst, maxHops)
}

// internetChecksum is the sum of RFC 1071 as it goes into a header.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) >= 2; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
