package dataplane

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// waiter is a worker's epoll instance: it names the queues that have something, and it is where an idle worker sleeps. An eventfd wakes it.
type waiter struct {
	epoll, wake int
	sources     []source // by the index that events carry; holes have a nil queue
	blocking    int      // queues that are not polled: if there are none, ready needs no system call
	events      [64]unix.EpollEvent
	named       []int32
	fresh       bool // named is what ended a sleep, and no queue has left since
}

const wakeIndex = -1

func (p *waiter) open() error {
	var err error
	if p.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("dataplane: epoll_create1: %w", err)
	}
	if p.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Close(p.epoll)
		return fmt.Errorf("dataplane: eventfd: %w", err)
	}
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: wakeIndex}
	if err = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, p.wake, &e); err != nil {
		p.close()
		return fmt.Errorf("dataplane: epoll_ctl: %w", err)
	}
	return nil
}

func (p *waiter) close() {
	unix.Close(p.epoll)
	unix.Close(p.wake)
}

// add watches a queue's descriptor. Polled queues are watched too: they wake a sleeping worker, but are never named by ready.
func (p *waiter) add(s source, polled bool) error {
	fd := s.queue.FD()
	if fd < 0 {
		return nil
	}
	i := 0
	for i < len(p.sources) && p.sources[i].queue != nil {
		i++
	}
	if i == len(p.sources) {
		p.sources = append(p.sources, source{})
	}
	// The index travels in Fd, whether the queue is polled in Pad.
	e := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(i)}
	if polled {
		e.Pad = 1
	}
	if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &e); err != nil {
		return err
	}
	p.sources[i] = s
	if !polled {
		p.blocking++
	}
	return nil
}

// remove stops watching all queues of a slot.
func (p *waiter) remove(sl *slot) {
	for i := range p.sources {
		if p.sources[i].queue == nil || p.sources[i].slot != sl {
			continue
		}
		// A descriptor whose device is gone may refuse; it leaves the set when it is closed.
		_ = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, p.sources[i].queue.FD(), nil)
		if !sl.caps.Polled {
			p.blocking--
		}
		p.sources[i] = source{}
		p.fresh = false // named may have it
	}
}

// ready returns the indices in sources of queues to receive from, valid until the next call: those that ended a sleep just now, or those that
// have something at present.
func (p *waiter) ready() []int32 {
	if p.fresh {
		p.fresh = false
		return p.named
	}
	if p.blocking == 0 {
		return nil
	}
	p.ask(0)
	return p.named
}

// sleep waits until a queue has something, or interrupt is called, but not longer than limit.
func (p *waiter) sleep(limit time.Duration) {
	p.ask(int(limit / time.Millisecond))
	p.fresh = true
}

// ask fills in named.
func (p *waiter) ask(timeout int) {
	p.named = p.named[:0]
	n, err := unix.EpollWait(p.epoll, p.events[:], timeout)
	if err != nil { // EINTR: a signal for the runtime
		return
	}
	for _, e := range p.events[:n] {
		if e.Fd == wakeIndex {
			var b [8]byte
			_, _ = unix.Read(p.wake, b[:])
			continue
		}
		if e.Pad == 0 && p.sources[e.Fd].queue != nil {
			p.named = append(p.named, e.Fd)
		}
	}
}

// interrupt ends a sleep, the current or the next. Any goroutine may call it.
func (p *waiter) interrupt() {
	var one = [8]byte{1}
	_, _ = unix.Write(p.wake, one[:])
}
