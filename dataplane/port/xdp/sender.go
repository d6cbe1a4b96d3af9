package xdp

import (
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// maxKicks bounds the system calls of one Flush. Each sends at most the socket's budget.
const maxKicks = 64

// sender is the transmitting half of a socket: what is in its TX ring, and how the kernel is made to look. It belongs to one worker.
type sender struct {
	*socket
	txHeld   uint32 // descriptors that were put and whose chunks the kernel has not given back
	txPut    uint32 // descriptors put but not published
	down     bool   // the device was found down or gone
	txErrors uint64
}

// put adds a descriptor; txHeld must be below the ring's size.
func (s *sender) put(addr uint64, length, options uint32) {
	s.tx.put(addr, length, options)
	s.txHeld++
	s.txPut++
}

// push publishes what was put and makes the kernel send it. It reports whether system calls were made that may have completed something.
func (s *sender) push() bool {
	if s.txPut > 0 {
		s.tx.publish()
		s.txPut = 0
	}
	if s.txHeld == 0 {
		return false
	}
	if s.zeroCopy {
		if s.tx.needWakeup() {
			s.handle(kick(s.fd))
		}
		return false
	}
	pending := s.tx.pending()
	for i := 0; pending > 0 && i < maxKicks; i++ {
		again := s.handle(kick(s.fd))
		before := pending
		pending = s.tx.pending()
		if !again || pending == before {
			break // no progress: the send buffer or the device is full, the next poll goes on
		}
	}
	return true
}

// handle draws the conclusions from a kick's answer, and reports whether another kick may send more.
func (s *sender) handle(errno unix.Errno) (again bool) {
	switch errno {
	case 0, unix.EAGAIN, unix.EINTR: // EAGAIN: the budget is used up, or there is no room
		s.down = false
		return true
	case unix.EBUSY, unix.EOVERFLOW: // the device dropped one packet; the kernel goes on behind it
		s.down = false
		s.txErrors++
		return true
	case unix.ENETDOWN, unix.ENXIO, unix.ENODEV: // link down; device unbound
		s.down = true
	default: // ENOBUFS, ENOMEM: later
		s.down = false
	}
	return false
}

// fullOrDown is why there was no room.
func (s *sender) fullOrDown() port.TxStatus {
	if s.down {
		return port.TxDown
	}
	return port.TxFull
}

// TxErrors is how many packets the device dropped after the kernel had taken them (a full queueing discipline or ring of the device).
func (s *sender) TxErrors() uint64 { return s.txErrors }
