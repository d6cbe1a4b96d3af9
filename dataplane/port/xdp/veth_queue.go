package xdp

import (
	"encoding/binary"
	"errors"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// txMetadataLen is sizeof(struct xsk_tx_metadata) of Linux 6.14, in front of a frame to send. Older kernels have a shorter one and read its front.
const txMetadataLen = 24

// VethQueue is one worker's end of a pod's port. Only the owning worker may call its methods, except FD, Stats and those of the port.
//
// Its memory is divided once: the first chunks circulate between FILL and RX ring, and a received frame is copied out before its chunk goes
// back; the others are to transmit from, in txFree or with the kernel.
type VethQueue struct {
	sender
	pool   *port.Pool
	memory []byte
	txFree []uint32 // chunks to transmit from

	chunkMask uint32 // chunk size - 1
	rxRoom    uint32 // bytes of a received frame that one frame of the pool takes
	txRoom    uint32 // bytes of a frame that one chunk takes
	maxFrame  int    // bytes of one packet
	metadata  bool   // unfinished checksums can be left to the kernel

	dead atomic.Bool // the device was unregistered
}

var (
	_ port.Queue   = (*VethQueue)(nil)
	_ port.Flusher = (*VethQueue)(nil)
)

func newVethQueue(cfg *VethConfig, s *socket, memory []byte, chunk int, pool *port.Pool, metadata bool) *VethQueue {
	q := &VethQueue{
		sender: sender{socket: s}, pool: pool, memory: memory, metadata: metadata,
		chunkMask: uint32(chunk) - 1,
		rxRoom:    uint32(pool.Config().ChunkSize - port.Headroom),
		txRoom:    uint32(chunk - vethTxOffset),
	}
	q.maxFrame = min(cfg.MTU+ethernetHeader, chunk-XDPHeadroom)
	if s.sg {
		q.maxFrame = min(cfg.MTU+ethernetHeader, maxSegmentsCopy*int(q.txRoom))
	}
	for i := range cfg.RingSize {
		q.fill.put(uint64(i * chunk))
	}
	q.fill.publish()
	for i := range vethTxChunks {
		q.txFree = append(q.txFree, uint32((cfg.RingSize+vethTxChunks-1-i)*chunk))
	}
	return q
}

// FD is the socket: readable while received frames wait.
func (q *VethQueue) FD() int { return q.fd }

// Receive copies received frames into the pool. Their checksums are what the pod's stack made them; it finishes them when the offload is off at its end. While the
// pool is empty, frames wait in the ring.
func (q *VethQueue) Receive(frames []port.Frame) int {
	n := min(q.rx.available(uint32(len(frames))), uint32(len(frames)))
	if n == 0 {
		return 0
	}
	used, made := uint32(0), 0
	for used < n && made < len(frames) {
		d := q.rx.peek(used)
		if d.Len > q.rxRoom || d.Options&unix.XDP_PKT_CONTD != 0 {
			took, put := q.receiveLong(used, n, frames[made:])
			if took == 0 {
				break
			}
			used, made = used+took, made+put
			continue
		}
		f, ok := q.pool.Alloc()
		if !ok {
			break
		}
		f.Len = d.Len
		copy(q.pool.Bytes(&f), q.memory[d.Addr:])
		frames[made] = f
		made++
		q.fill.put(d.Addr &^ uint64(q.chunkMask))
		used++
	}
	if used > 0 {
		q.rx.release(used)
		q.fill.publish()
	}
	return made
}

// receiveLong copies the packet at descriptor first, of several buffers or longer than one frame of the pool. It returns how many descriptors it took
// and how many frames it stored: none of both if the packet has not arrived whole or the pool has no room, only no frames if there are more than anybody takes.
func (q *VethQueue) receiveLong(first, n uint32, frames []port.Frame) (took uint32, made int) {
	length, end, whole := uint32(0), first, false
	for ; end < n && !whole; end++ {
		d := q.rx.peek(end)
		length += d.Len
		whole = d.Options&unix.XDP_PKT_CONTD == 0
	}
	if !whole {
		return 0, 0 // the kernel shows whole packets only: the rest is behind n, and a call has room for it
	}
	need := int((length + q.rxRoom - 1) / q.rxRoom)
	if need <= port.MaxChain {
		if free, _ := q.pool.Available(); need > len(frames) || need > free {
			return 0, 0
		}
		var dst []byte
		for i := first; i < end; i++ {
			d := q.rx.peek(i)
			for src := q.memory[d.Addr:][:d.Len]; len(src) > 0; {
				if len(dst) == 0 {
					f, _ := q.pool.Alloc() // there are enough: counted above
					f.Len, f.Flags = min(length, q.rxRoom), port.More
					length -= f.Len
					dst = q.pool.Bytes(&f)
					frames[made] = f
					made++
				}
				k := copy(dst, src)
				dst, src = dst[k:], src[k:]
			}
		}
		frames[made-1].Flags = 0
	}
	for i := first; i < end; i++ {
		q.fill.put(q.rx.peek(i).Addr &^ uint64(q.chunkMask))
	}
	return end - first, made
}

// Transmit copies packets into the queue's own memory and frees the frames; the kernel is shown them by Flush.
func (q *VethQueue) Transmit(frames []port.Frame) (int, port.TxStatus) {
	if q.down {
		if q.Flush(); q.down {
			return 0, port.TxDown
		}
	}
	n := 0
	for n < len(frames) {
		f := &frames[n]
		length, k := int(f.Len), 1
		if f.Flags&port.More != 0 {
			length, k = port.PacketLen(frames[n:])
		}
		if length < ethernetHeader || length > q.maxFrame || !q.takes(f) {
			return n, port.TxRejected
		}
		if need := (uint32(length) + q.txRoom - 1) / q.txRoom; uint32(len(q.txFree)) < need && !q.makeRoom(need) {
			return n, q.fullOrDown()
		}
		if k == 1 && f.Len <= q.txRoom {
			at := q.take()
			copy(q.memory[at:], q.pool.Bytes(f))
			q.put(uint64(at), f.Len, q.describe(at, f))
			q.pool.Free(*f)
		} else {
			q.gather(frames[n:n+k], length)
		}
		n += k
	}
	return n, port.TxOK
}

// takes reports whether what is unfinished about the packet is something the kernel finishes.
func (q *VethQueue) takes(f *port.Frame) bool {
	o := &f.Offload
	if o.GSO != port.GSONone {
		return false
	}
	return o.Flags&port.NeedsChecksum == 0 ||
		q.metadata && uint32(o.ChecksumStart)+uint32(o.ChecksumOffset)+2 <= min(f.Len, q.txRoom)
}

// take removes a chunk from the free ones and returns where its frame begins.
func (q *VethQueue) take() uint32 {
	last := len(q.txFree) - 1
	at := q.txFree[last] + vethTxOffset
	q.txFree = q.txFree[:last]
	return at
}

// describe writes the metadata of the packet whose frame begins at, and returns its descriptor's options. In copy mode the kernel makes the
// sk_buff's checksum partial, which the pod's stack takes as good and finishes if it forwards the packet.
func (q *VethQueue) describe(at uint32, f *port.Frame) uint32 {
	if f.Offload.Flags&port.NeedsChecksum == 0 {
		return 0
	}
	m := q.memory[at-txMetadataLen : at]
	binary.NativeEndian.PutUint64(m, unix.XDP_TXMD_FLAGS_CHECKSUM)
	binary.NativeEndian.PutUint16(m[8:], f.Offload.ChecksumStart)
	binary.NativeEndian.PutUint16(m[10:], f.Offload.ChecksumOffset)
	return unix.XDP_TX_METADATA
}

// gather copies a packet of length bytes that is in several frames, or takes several chunks, and frees the frames. There are enough chunks.
func (q *VethQueue) gather(frames []port.Frame, length int) {
	from, src := 0, q.pool.Bytes(&frames[0])
	for left := uint32(length); left > 0; {
		at := q.take()
		n := min(left, q.txRoom)
		options := uint32(0)
		if left == uint32(length) {
			options = q.describe(at, &frames[0])
		}
		for dst := q.memory[at:][:n]; len(dst) > 0; {
			for len(src) == 0 {
				from++
				src = q.pool.Bytes(&frames[from])
			}
			k := copy(dst, src)
			dst, src = dst[k:], src[k:]
		}
		if left -= n; left > 0 {
			options |= unix.XDP_PKT_CONTD
		}
		q.put(uint64(at), n, options)
	}
	q.pool.FreeAll(frames)
}

// makeRoom tries to have n free chunks: it takes back what is done, and sends what was queued if that is not enough.
func (q *VethQueue) makeRoom(n uint32) bool {
	q.reclaim()
	if uint32(len(q.txFree)) >= n {
		return true
	}
	q.Flush()
	return uint32(len(q.txFree)) >= n
}

// Flush shows the kernel what was queued and has it sent: by the time it returns, the pod's stack has mostly done its part, on this core. Call it once a
// batch, and on every poll while frames are outstanding.
func (q *VethQueue) Flush() (outstanding bool) {
	if q.push() {
		q.reclaim()
	}
	return q.txHeld > 0
}

// reclaim takes transmitted chunks back.
func (q *VethQueue) reclaim() {
	n := q.completion.available(q.txHeld)
	if n == 0 {
		return
	}
	for range n {
		q.txFree = append(q.txFree, uint32(q.completion.take())&^q.chunkMask)
	}
	q.completion.release()
	q.txHeld -= n
}

// Stats reads the kernel's counters: a system call. It may be called from any goroutine while the port is open.
func (q *VethQueue) Stats() (Stats, error) { return statsOf(q.fd) }

// close closes the socket and gives the memory back; the kernel keeps pages that it still uses.
func (q *VethQueue) close() error {
	err := q.socket.close()
	if q.memory != nil {
		err = errors.Join(err, unix.Munmap(q.memory))
		q.memory = nil
	}
	return err
}
