package xdp

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// txRing has the frames to send: this side produces descriptors.
type txRing struct {
	ring
	descs []unix.XDPDesc // shared; the kernel reads [consumer, producer)
}

// put adds a descriptor. The caller keeps count of frames that are not completed, which never exceeds the entries: there is room
// without asking.
func (r *txRing) put(addr uint64, length, options uint32) {
	r.descs[r.own&r.mask] = unix.XDPDesc{Addr: addr, Len: length, Options: options}
	r.own++
}

// publish shows the kernel what was put.
func (r *txRing) publish() { atomic.StoreUint32(r.producer, r.own) }

// pending is how many published descriptors the kernel has not taken yet.
func (r *txRing) pending() uint32 {
	r.peer = atomic.LoadUint32(r.consumer)
	return r.own - r.peer
}
