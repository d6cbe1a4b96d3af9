package xdp

import (
	"math/bits"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// refillBatch is how many chunks have to be missing before the FILL ring is topped up: publishing an index moves a cache line to the core
// that receives.
const refillBatch = 64

// Queue is one worker's end of a port: one AF_XDP socket. Only the owning worker may call its methods, except FD and Stats.
//
// Every chunk is in one of three hands: the pool's, the caller's (a received frame that was not freed or transmitted), or the kernel's,
// which is what rxHeld and the sender's txHeld count.
type Queue struct {
	sender
	pool *port.Pool

	limit     uint32 // end of the chunks in the pool's memory
	chunkSize uint32
	ringSize  uint32

	fillTarget uint32   // chunks that should wait for frames
	rxHeld     uint32   // chunks the kernel has to receive into, at most fillTarget
	held       []uint64 // a bit per chunk: the kernel has it. What rxHeld and txHeld count
	shift      uint8    // log2 of chunkSize

	maxFrame    int  // bytes of one packet
	maxSegments int  // buffers of one packet, 1 without multi-buffer
	discarding  bool // in the middle of a packet of more buffers than a caller can be given
}

func newQueue(cfg *Config, s *socket, index, numQueues int) *Queue {
	pool := cfg.Pools[index%len(cfg.Pools)]
	pc := pool.Config()
	q := &Queue{
		sender:      sender{socket: s},
		pool:        pool,
		limit:       uint32(pc.Chunks * pc.ChunkSize),
		chunkSize:   uint32(pc.ChunkSize),
		ringSize:    uint32(cfg.RingSize),
		held:        make([]uint64, (pc.Chunks+63)/64),
		shift:       uint8(bits.TrailingZeros(uint(pc.ChunkSize))),
		maxSegments: 1,
	}
	if cfg.Steering != nil {
		perPool := (numQueues + len(cfg.Pools) - 1) / len(cfg.Pools)
		q.fillTarget = uint32(max(1, min(cfg.RingSize, pc.Chunks/(2*perPool))))
	}
	payload := pc.ChunkSize - port.Headroom
	if s.sg {
		q.maxSegments = maxSegmentsCopy
		if s.zeroCopy {
			q.maxSegments = maxSegmentsZeroCopy
		}
	}
	q.maxFrame = min(cfg.MTU+ethernetHeader, q.maxSegments*payload)
	return q
}

// FD is the socket: readable while received frames wait.
func (q *Queue) FD() int { return q.fd }

// Receive stores received packets. It also takes back what was transmitted and gives the kernel new memory to receive into, so it is to be
// called on every poll. Nothing of that is a system call, unless a zero-copy driver asks to be woken.
func (q *Queue) Receive(frames []port.Frame) int {
	if q.txHeld > 0 {
		q.reclaim()
	}
	n := min(q.rx.available(uint32(len(frames))), uint32(len(frames)))
	whole := uint32(0)
	if n > 0 {
		frames := frames[:n]
		for i := range frames {
			d := q.rx.peek(uint32(i))
			f := port.Frame{Off: uint32(d.Addr), Len: d.Len}
			if d.Options&unix.XDP_PKT_CONTD != 0 {
				f.Flags = port.More
			} else {
				whole = uint32(i) + 1
			}
			frames[i] = f
		}
		if q.discarding || (whole == 0 && n >= port.MaxChain) {
			whole = q.discard(frames)
		} else {
			q.took(frames[:whole])
		}
	}
	q.refill()
	return int(whole)
}

// discard frees the received buffers up to the end of a packet that has too many, and returns 0: what comes behind is for the next call.
// The kernel makes no such packet of today's limits; one would block the queue for ever.
func (q *Queue) discard(frames []port.Frame) uint32 {
	n := port.PacketFrames(frames)
	q.discarding = frames[n-1].Flags&port.More != 0
	q.took(frames[:n])
	q.pool.FreeAll(frames[:n])
	return 0
}

// took makes the received frames the caller's and gives their descriptors back.
func (q *Queue) took(frames []port.Frame) {
	for i := range frames {
		q.toggle(frames[i].Off)
	}
	q.rx.release(uint32(len(frames)))
	q.rxHeld -= uint32(len(frames))
}

// refill gives the kernel chunks to receive into, as far as the pool has them.
func (q *Queue) refill() {
	missing := q.fillTarget - q.rxHeld
	if missing >= refillBatch || missing >= (q.fillTarget+1)/2 {
		n := uint32(0)
		for ; n < missing; n++ {
			f, ok := q.pool.Alloc()
			if !ok {
				break
			}
			q.fill.put(uint64(f.Off &^ (q.chunkSize - 1)))
			q.toggle(f.Off)
		}
		if n > 0 {
			q.rxHeld += n
			q.fill.publish()
		}
	}
	if q.zeroCopy && q.fillTarget > 0 && q.fill.needWakeup() {
		wake(q.fd) // whatever it answers, the next poll asks again
	}
}

// reclaim gives transmitted chunks back to the pool.
func (q *Queue) reclaim() {
	n := q.completion.available(q.txHeld)
	if n == 0 {
		return
	}
	for range n {
		f := port.Frame{Off: uint32(q.completion.take())}
		q.toggle(f.Off)
		q.pool.Free(f)
	}
	q.completion.release()
	q.txHeld -= n
}

// toggle notes that the chunk around off went to the kernel or came back.
func (q *Queue) toggle(off uint32) {
	i := off >> q.shift
	q.held[i>>6] ^= 1 << (i & 63)
}

// Recover gives the pool back the chunks that the kernel held when the port was closed. Only the owning worker may call it, after Close, and in
// zero-copy mode not before the device is gone or was opened again: until then the driver may still write to them. Without it they are lost with the pool.
func (q *Queue) Recover() {
	for w, set := range q.held {
		for ; set != 0; set &= set - 1 {
			q.pool.Free(port.Frame{Off: uint32(w*64+bits.TrailingZeros64(set)) << q.shift})
		}
		q.held[w] = 0
	}
	q.rxHeld, q.txHeld, q.txPut = 0, 0, 0
}

// Outstanding is how many chunks the kernel holds: to receive into, and to transmit from. With Pool.Available and the frames in the caller's
// hands they add up to all chunks.
func (q *Queue) Outstanding() (rx, tx int) { return int(q.rxHeld), int(q.txHeld) }

// Stats are the kernel's counters of a socket (XDP_STATISTICS) since it was bound, in frames, and of what sending was refused.
type Stats struct {
	// RxDropped counts frames larger than a chunk without multi-buffer, and in copy mode also those of FillRingEmpty.
	RxDropped uint64
	// RxRingFull should stay 0: the queue gives the kernel no more memory than the RX ring has entries.
	RxRingFull uint64
	// FillRingEmpty counts frames for which there was no memory: the worker was too slow, or its pool is empty.
	FillRingEmpty uint64
	RxInvalid     uint64 // invalid addresses in the FILL ring: a bug
	TxInvalid     uint64 // invalid descriptors in the TX ring: a bug, their chunks are lost
}

// Stats reads the counters: a system call. It may be called from any goroutine while the port is open.
func (q *Queue) Stats() (Stats, error) { return statsOf(q.fd) }

func statsOf(fd int) (Stats, error) {
	st, err := statistics(fd)
	return Stats{
		RxDropped:     st.Rx_dropped,
		RxRingFull:    st.Rx_ring_full,
		FillRingEmpty: st.Rx_fill_ring_empty_descs,
		RxInvalid:     st.Rx_invalid_descs,
		TxInvalid:     st.Tx_invalid_descs,
	}, err
}
