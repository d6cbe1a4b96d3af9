package xdp

import "sync/atomic"

// completionRing gives memory back that the kernel has transmitted from: this side consumes addresses.
type completionRing struct {
	ring
	addrs []uint64 // shared; this side reads [consumer, producer)
}

// available is how many entries can be taken, at most limit.
func (r *completionRing) available(limit uint32) uint32 {
	n := r.peer - r.own
	if n < limit {
		r.peer = atomic.LoadUint32(r.producer)
		n = r.peer - r.own
	}
	return min(n, limit)
}

// take removes the first entry; only after available said there is one.
func (r *completionRing) take() uint64 {
	addr := r.addrs[r.own&r.mask]
	r.own++
	return addr
}

// release gives the entries that were taken back to the kernel to write.
func (r *completionRing) release() { atomic.StoreUint32(r.consumer, r.own) }
