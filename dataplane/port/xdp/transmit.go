package xdp

import (
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// Transmit queues packets for sending; the kernel is shown them by Flush. A chain goes out as one packet of several buffers; one that the
// kernel would not take as it is (large buffers, too many of them, no multi-buffer) is copied into as few chunks as it needs.
func (q *Queue) Transmit(frames []port.Frame) (int, port.TxStatus) {
	if q.down {
		if q.Flush(); q.down {
			return 0, port.TxDown
		}
	}
	n := 0
	for n < len(frames) {
		f := &frames[n]
		if f.Flags&port.More != 0 || !q.direct(f) {
			k, status := q.transmitSlow(frames[n:])
			if status != port.TxOK {
				return n, status
			}
			n += k
			continue
		}
		if !q.sendable(f, int(f.Len)) {
			return n, port.TxRejected
		}
		if q.txHeld == q.ringSize && !q.makeRoom(1) {
			return n, q.fullOrDown()
		}
		q.put(f.Off, f.Len, false)
		n++
	}
	return n, port.TxOK
}

// direct reports whether the kernel can send from the frame's own memory: not empty, and within one chunk. A descriptor that is neither is
// skipped by the kernel and never completed.
func (q *Queue) direct(f *port.Frame) bool {
	return f.Off < q.limit && f.Len != 0 && f.Off&(q.chunkSize-1)+f.Len <= q.chunkSize
}

// sendable reports whether a packet of length bytes with first frame f is one that the device takes: finished, and of a length that
// Ethernet allows.
func (q *Queue) sendable(f *port.Frame, length int) bool {
	return length >= ethernetHeader && length <= q.maxFrame && f.Offload.Flags&port.NeedsChecksum == 0 && f.Offload.GSO == port.GSONone
}

// makeRoom tries to have n free descriptors: it sends what was queued and takes back what is done.
func (q *Queue) makeRoom(n uint32) bool {
	q.reclaim()
	if q.ringSize-q.txHeld >= n {
		return true
	}
	q.Flush()
	q.reclaim()
	return q.ringSize-q.txHeld >= n
}

// transmitSlow sends the packet at the front of frames that is not one plain chunk. It returns how many frames it took.
func (q *Queue) transmitSlow(frames []port.Frame) (int, port.TxStatus) {
	length, n := port.PacketLen(frames)
	if !q.sendable(&frames[0], length) {
		return 0, port.TxRejected
	}
	frames = frames[:n]
	asIs := n <= q.maxSegments
	for i := range frames {
		asIs = asIs && q.direct(&frames[i])
	}
	if !asIs {
		return q.transmitCopied(frames, length)
	}
	if q.ringSize-q.txHeld < uint32(n) && !q.makeRoom(uint32(n)) {
		return 0, q.fullOrDown()
	}
	for i := range frames {
		q.put(frames[i].Off, frames[i].Len, i < n-1)
	}
	return n, port.TxOK
}

func (q *Queue) put(off, length uint32, more bool) {
	options := uint32(0)
	if more {
		options = unix.XDP_PKT_CONTD
	}
	q.sender.put(uint64(off), length, options)
	q.toggle(off)
}

// transmitCopied copies a packet of length bytes into new chunks, sends those and frees the frames.
func (q *Queue) transmitCopied(frames []port.Frame, length int) (int, port.TxStatus) {
	payload := int(q.chunkSize) - port.Headroom
	chunks := (length + payload - 1) / payload
	if chunks > q.maxSegments {
		return 0, port.TxRejected
	}
	if free, _ := q.pool.Available(); free < chunks {
		q.reclaim()
		if free, _ = q.pool.Available(); free < chunks {
			return 0, port.TxFull
		}
	}
	if q.ringSize-q.txHeld < uint32(chunks) && !q.makeRoom(uint32(chunks)) {
		return 0, q.fullOrDown()
	}
	from, src := 0, q.pool.Bytes(&frames[0])
	for left := length; left > 0; {
		f, _ := q.pool.Alloc() // there are enough: counted above
		f.Len = uint32(min(left, payload))
		for dst := q.pool.Bytes(&f); len(dst) > 0; {
			for len(src) == 0 {
				from++
				src = q.pool.Bytes(&frames[from])
			}
			k := copy(dst, src)
			dst, src = dst[k:], src[k:]
		}
		left -= int(f.Len)
		q.put(f.Off, f.Len, left > 0)
	}
	q.pool.FreeAll(frames)
	return len(frames), port.TxOK
}

// Flush shows the kernel what was queued and, where it takes a system call to send, makes it: in copy mode until all is sent, in zero-copy
// mode when the driver sleeps. Call it once a batch, and on every poll while frames are outstanding: it costs nothing when there is nothing to do. A link that is
// down keeps what was queued and is tried again.
func (q *Queue) Flush() (outstanding bool) {
	if q.push() {
		q.reclaim()
	}
	return q.txHeld > 0
}
