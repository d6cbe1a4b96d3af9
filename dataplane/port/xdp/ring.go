package xdp

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ring is what the four kinds of ring share: two free-running indices in memory shared with the kernel, of which each side writes one, and a
// power-of-two array of entries. This side has the cached copies and touches the shared words only when they run out (the other
// side's) or once a batch (its own). The owner is the queue's worker; nobody else on this side may touch it.
//
// Ordering: entries are written before the producer index is stored and read after it was loaded, and the same for the consumer index in the other direction
// (Documentation/networking/af_xdp.rst, net/xdp/xsk_queue.h). Package atomic's operations are at least release stores and acquire loads.
type ring struct {
	producer *uint32 // shared
	consumer *uint32 // shared
	flags    *uint32 // shared; written by the kernel
	mask     uint32  // entries - 1

	own  uint32 // this side's index; ahead of the shared word between publications
	peer uint32 // the other side's index when last loaded
}

// needWakeup reports whether the kernel asks for a system call to look at the ring. Ask after publishing: the kernel sets the flag
// before it looks a last time, and the store and this load are not reordered (both are sequentially consistent).
func (r *ring) needWakeup() bool { return atomic.LoadUint32(r.flags)&unix.XDP_RING_NEED_WAKEUP != 0 }
