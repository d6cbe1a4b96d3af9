package xdp

import "sync/atomic"

// fillRing gives memory to the kernel to receive into: this side produces addresses of chunks.
type fillRing struct {
	ring
	addrs []uint64 // shared; the kernel reads [consumer, producer)
}

// put adds a chunk. The caller keeps count of what the kernel holds, which never exceeds the entries: there is room without asking.
func (r *fillRing) put(addr uint64) {
	r.addrs[r.own&r.mask] = addr
	r.own++
}

// publish shows the kernel what was put.
func (r *fillRing) publish() { atomic.StoreUint32(r.producer, r.own) }
