package xdp

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// rxRing has the received frames: this side consumes descriptors.
type rxRing struct {
	ring
	descs []unix.XDPDesc // shared; this side reads [consumer, producer)
}

// available is how many descriptors can be peeked at. The shared index is loaded only when fewer than want are known of.
func (r *rxRing) available(want uint32) uint32 {
	n := r.peer - r.own
	if n < want {
		r.peer = atomic.LoadUint32(r.producer)
		n = r.peer - r.own
	}
	return n
}

// peek is the descriptor i places behind the first, i < available. It is valid until release.
func (r *rxRing) peek(i uint32) *unix.XDPDesc { return &r.descs[(r.own+i)&r.mask] }

// release gives the first n entries back to the kernel to write.
func (r *rxRing) release(n uint32) {
	r.own += n
	atomic.StoreUint32(r.consumer, r.own)
}
