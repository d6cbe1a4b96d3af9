package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sort"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

const (
	congestion  = "cubic" // the default elsewhere may be BBR, which paces
	writeSize   = 256 << 10
	readSize    = 1 << 20
	dialTimeout = 5 * time.Second
	// rampUp is how long streams run before their bytes count.
	rampUp = 200 * time.Millisecond
	stall  = 10 * time.Second
)

// listen listens in a namespace; cubic is chosen before connections inherit it.
func listen(at Endpoint) (net.Listener, error) {
	var l net.Listener
	err := lab.InNetns(at.Netns, func() (err error) {
		lc := net.ListenConfig{Control: control}
		l, err = lc.Listen(context.Background(), "tcp4", netip.AddrPortFrom(at.Addr, 0).String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listening at %v in %s: %w", at.Addr, at.Netns, err)
	}
	return l, nil
}

func control(_, _ string, c syscall.RawConn) error {
	var err error
	err2 := c.Control(func(fd uintptr) {
		err = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestion)
	})
	return errors.Join(err, err2)
}

// dial connects from one namespace to a listener in another. The socket belongs to the namespace of the thread that makes it.
func dial(from Endpoint, to net.Addr) (c net.Conn, err error) {
	err = lab.InNetns(from.Netns, func() (err error) {
		d := net.Dialer{Timeout: dialTimeout, Control: control}
		c, err = d.Dial("tcp4", to.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("from %s: %w", from.Netns, err)
	}
	return c, nil
}

// Streams sends by n TCP connections at once and returns bits a second as the receivers saw them together. Threads are not pinned.
func Streams(ctx context.Context, from, to Endpoint, n int, span time.Duration) (float64, error) {
	l, err := listen(to)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	var received atomic.Uint64
	var all sync.WaitGroup
	var conns []io.Closer
	closeAll := func() {
		for _, c := range conns {
			c.Close()
		}
		all.Wait()
	}
	defer closeAll()
	for range n {
		c, err := dial(from, l.Addr())
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
		_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(dialTimeout))
		s, err := l.Accept()
		if err != nil {
			return 0, fmt.Errorf("accepting at %v: %w", l.Addr(), err)
		}
		conns = append(conns, s)
		all.Go(func() { write(c) })
		all.Go(func() { read(s, &received) })
	}
	if err := Wait(ctx, rampUp); err != nil {
		return 0, err
	}
	first, begin := received.Load(), time.Now()
	if err := Wait(ctx, span); err != nil {
		return 0, err
	}
	total, took := received.Load()-first, time.Since(begin)
	if total == 0 {
		return 0, fmt.Errorf("%s to %v: nothing arrived within %v", from.Netns, to.Addr, took.Round(time.Millisecond))
	}
	return float64(total) * 8 / took.Seconds(), nil
}

func write(c net.Conn) {
	b := make([]byte, writeSize)
	for {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func read(c net.Conn, received *atomic.Uint64) {
	b := make([]byte, readSize)
	for {
		n, err := c.Read(b)
		received.Add(uint64(n))
		if err != nil {
			return
		}
	}
}

// Wait is a sleep that a context ends, with its error.
func Wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// RoundTrips are the times of request/response exchanges, sorted.
type RoundTrips []time.Duration

// Quantile is the time below which the share q of the exchanges took.
func (r RoundTrips) Quantile(q float64) time.Duration {
	if len(r) == 0 {
		return 0
	}
	return r[min(len(r)-1, int(q*float64(len(r))))]
}

// Ping exchanges 64-byte requests and responses, one at a time, over one TCP connection.
func Ping(ctx context.Context, from, to Endpoint, span time.Duration) (RoundTrips, error) {
	l, err := listen(to)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	c, err := dial(from, l.Addr())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(dialTimeout))
	s, err := l.Accept()
	if err != nil {
		return nil, fmt.Errorf("accepting at %v: %w", l.Addr(), err)
	}
	defer s.Close()
	go func() {
		b := make([]byte, 64)
		for {
			if _, err := io.ReadFull(s, b); err != nil {
				return
			}
			if _, err := s.Write(b); err != nil {
				return
			}
		}
	}()
	var trips RoundTrips
	b := make([]byte, 64)
	begin := time.Now()
	for last := begin; ctx.Err() == nil && last.Sub(begin) < span+rampUp; {
		_ = c.SetDeadline(last.Add(stall))
		if _, err := c.Write(b); err != nil {
			return nil, err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return nil, err
		}
		now := time.Now()
		if now.Sub(begin) > rampUp {
			trips = append(trips, now.Sub(last))
		}
		last = now
	}
	sort.Slice(trips, func(i, j int) bool { return trips[i] < trips[j] })
	return trips, ctx.Err()
}
