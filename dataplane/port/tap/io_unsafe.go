package tap

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls below are raw: the descriptor is non-blocking, so the goroutine's thread does not need the scheduler's leave, which costs
// more than the call. The kernel does not keep any of the addresses beyond the call.

// read2 reads one packet into a, then b.
func (q *Queue) read2(a, b []byte) (int, unix.Errno) {
	q.iov[0].Base, q.iov[1].Base = &a[0], &b[0]
	q.iov[0].SetLen(len(a))
	q.iov[1].SetLen(len(b))
	// Invariant: q.iov lives in q, which the receiver keeps alive and Go does not move (heap); the buffers its entries point to are in the
	// pool's memory or in q. The conversion to uintptr stands in the call, as unsafe.Pointer's rule 4 asks.
	n, _, errno := unix.RawSyscall(unix.SYS_READV, uintptr(q.fd), uintptr(unsafe.Pointer(&q.iov[0])), 2)
	return int(n), errno
}

// write writes one packet that is one buffer, with its header in front.
func (q *Queue) write(b []byte) (int, unix.Errno) {
	// Invariant: b is not empty (it has the header) and stays referenced by the pool; conversion in the call.
	n, _, errno := unix.RawSyscall(unix.SYS_WRITE, uintptr(q.fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)))
	return int(n), errno
}

// writev writes one packet from the first n entries of q.iov.
func (q *Queue) writev(n int) (int, unix.Errno) {
	// Invariant: as for read2; n <= len(q.iov) by the limit on chains.
	r, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(q.fd), uintptr(unsafe.Pointer(&q.iov[0])), uintptr(n))
	return int(r), errno
}
