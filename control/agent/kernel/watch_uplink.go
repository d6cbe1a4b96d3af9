package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// Events come in bursts: wait for the end of one, but not for ever.
	settle    = 50 * time.Millisecond
	settleMax = 500 * time.Millisecond
	// reread bounds what a lost event can cost, and is how often a gateway's entry that went stale is confirmed.
	reread = 30 * time.Second
	// An unresolved gateway is asked for again after resolveFirst, then twice as long each time up to reread.
	resolveFirst = time.Second
	// A gateway that stops answering keeps its Ethernet address so long: it may be about to answer with another one, and until then the old one is the
	// better guess.
	holdTime = 10 * time.Second
)

// WatchUplink calls changed with the facts about the interface in the caller's namespace ("" = whatever the best default route leads to), once at the beginning
// and then whenever something differs, until ctx ends; then it returns nil. Calls come from the calling goroutine, so never two at a time, and events meanwhile are not
// lost. A missing interface is reported as Gone, and found again by its name.
//
// The data plane's packets do not pass the kernel's neighbour table, so nothing there would ask for the gateways: WatchUplink has them resolved when they
// are missing and confirmed when they went stale, at most one request a second for each, and fewer the longer there is no answer.
//
// An error is returned only when watching can not begin.
func WatchUplink(ctx context.Context, name string, changed func(Uplink)) error {
	w := &uplinkWatch{name: name, changed: changed, dirty: make(chan struct{}, 1)}
	return w.run(ctx)
}

type uplinkWatch struct {
	name    string
	changed func(Uplink)
	buffer  int // bytes of the socket's receive buffer; 0 = the system's default

	socket   *nl.NetlinkSocket
	dirty    chan struct{} // something happened
	broken   atomic.Bool   // the subscription ended
	overruns atomic.Int64  // how often events were lost
	interest atomic.Pointer[interest]

	resolve4, resolve6 resolver
}

func (w *uplinkWatch) run(ctx context.Context) error {
	if err := w.subscribe(); err != nil {
		return fmt.Errorf("uplink: watching: %w", err)
	}
	defer func() { w.unsubscribe() }()

	var (
		last  Uplink
		first = true
	)
	for ctx.Err() == nil {
		if w.broken.Swap(false) {
			w.unsubscribe()
			if err := w.subscribe(); err != nil {
				w.broken.Store(true) // again at the next turn; until then it polls
			}
		}
		u, states, err := readUplink(w.name)
		switch {
		case errors.Is(err, ErrNoLink):
			u = Uplink{Name: w.name, Gone: true}
		case err != nil && first:
			return fmt.Errorf("uplink: %w", err)
		case err != nil: // in the middle of a change; the next turn reads again
			u = last
		}
		if in := (interest{u.Index, u.Gateway4, u.Gateway6}); w.interest.Load() == nil || *w.interest.Load() != in {
			w.interest.Store(&in)
			w.markDirty() // what came since the reading was judged by the old interest
		}
		hold := min(w.resolve4.hold(u, u.Gateway4, &u.GatewayMAC4), w.resolve6.hold(u, u.Gateway6, &u.GatewayMAC6))
		if first || !u.Equal(last) {
			first, last = false, u
			w.changed(u)
		}
		next := min(reread, hold, w.resolve4.turn(u, u.Gateway4, states.v4), w.resolve6.turn(u, u.Gateway6, states.v6))
		if err != nil && !errors.Is(err, ErrNoLink) || w.broken.Load() {
			next = min(next, time.Second)
		}
		w.wait(ctx, next)
	}
	return nil
}

// interest says which events matter.
type interest struct {
	index              int
	gateway4, gateway6 netip.Addr
}

// wait returns when events came and have settled, after the timeout, or when ctx ends.
func (w *uplinkWatch) wait(ctx context.Context, timeout time.Duration) {
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return
	case <-timer.C:
		return
	case <-w.dirty:
	}
	limit := time.NewTimer(settleMax)
	defer limit.Stop()
	for {
		timer.Reset(settle)
		select {
		case <-ctx.Done():
			return
		case <-limit.C:
			return
		case <-timer.C:
			return
		case <-w.dirty:
		}
	}
}

// subscribe opens the socket in the calling thread's namespace and starts its reader.
func (w *uplinkWatch) subscribe() error {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return err
	}
	if w.buffer > 0 {
		if err := s.SetReceiveBufferSize(w.buffer, false); err != nil {
			s.Close()
			return err
		}
	}
	w.socket = s
	go w.read(s)
	return nil
}

func (w *uplinkWatch) unsubscribe() {
	if w.socket != nil {
		w.socket.Close()
		w.socket = nil
	}
}

// read turns messages into the dirty flag. What they say is not used: everything is read again.
func (w *uplinkWatch) read(s *nl.NetlinkSocket) {
	for {
		msgs, _, err := s.Receive()
		relevant := err != nil
		for i := range msgs {
			relevant = relevant || w.relevant(&msgs[i])
		}
		if relevant {
			w.markDirty()
		}
		switch {
		case err == nil, errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS):
			w.overruns.Add(1)
			// Events were lost; the socket is fine. Reading everything again makes up for it.
		default:
			w.broken.Store(true)
			w.markDirty()
			return
		}
	}
}

func (w *uplinkWatch) markDirty() {
	select {
	case w.dirty <- struct{}{}:
	default:
	}
}

// relevant looks at the fixed part of a message. On a busy node most are about other interfaces and neighbours.
func (w *uplinkWatch) relevant(m *syscall.NetlinkMessage) bool {
	in := w.interest.Load()
	if in == nil {
		return true
	}
	switch m.Header.Type {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK, unix.RTM_NEWADDR, unix.RTM_DELADDR:
		// struct ifinfomsg and struct ifaddrmsg both have the index at 4. Without an interface any may become it.
		return in.index == 0 || len(m.Data) >= 8 && int(binary.NativeEndian.Uint32(m.Data[4:])) == in.index
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return len(m.Data) > 1 && m.Data[1] == 0 // struct rtmsg: destination length
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		n, err := netlink.NeighDeserialize(m.Data)
		if err != nil || n.LinkIndex != in.index {
			return false
		}
		a, ok := netip.AddrFromSlice(n.IP)
		return ok && (a.Unmap() == in.gateway4 || a.Unmap() == in.gateway6)
	}
	return false
}

// resolver decides when the kernel is asked to look for one gateway.
type resolver struct {
	gateway netip.Addr
	index   int
	asked   time.Time
	backoff time.Duration // 0: the gateway was resolved since

	mac  net.HardwareAddr // the last one known
	lost time.Time        // since when it is not; zero while it is
}

// hold fills in the last known address for holdTime, and returns when to look again.
func (r *resolver) hold(u Uplink, gateway netip.Addr, mac *net.HardwareAddr) time.Duration {
	if r.gateway != gateway || r.index != u.Index {
		*r = resolver{gateway: gateway, index: u.Index}
	}
	switch {
	case *mac != nil:
		r.mac, r.lost = *mac, time.Time{}
		return reread
	case r.mac == nil || !u.Up:
		return reread
	case r.lost.IsZero():
		r.lost = time.Now()
	}
	left := holdTime - time.Since(r.lost)
	if left <= 0 {
		r.mac = nil
		return reread
	}
	*mac = r.mac
	return left
}

// turn, after hold, looks at the state of the gateway's entry, asks if it is time to, and returns when to look again.
func (r *resolver) turn(u Uplink, gateway netip.Addr, state int) time.Duration {
	if !gateway.IsValid() || !u.Up || state&(netlink.NUD_PERMANENT|netlink.NUD_NOARP) != 0 {
		return reread
	}
	since := time.Since(r.asked)
	if state&usable != 0 {
		r.backoff = 0
		if state&netlink.NUD_STALE != 0 && since >= reread {
			r.ask()
		}
		return reread
	}
	wait := max(r.backoff, resolveFirst)
	if since < wait {
		return wait - since
	}
	r.backoff = min(wait*2, reread)
	r.ask()
	return r.backoff
}

func (r *resolver) ask() {
	r.asked = time.Now()
	// Failing is no news: the interface just went, and the watch will hear of it.
	_ = provoke(r.index, r.gateway)
}
