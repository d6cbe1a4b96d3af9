package tap

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

const (
	// headerLen is sizeof(struct virtio_net_hdr).
	headerLen = 10

	// One Receive reads at most so much, so that a pod that floods does not keep its worker from the others, and so that what was read is still in the
	// second-level cache when it is written to the next device.
	maxReads = 32
	maxBytes = 128 << 10

	// canary is put where a frame's first byte will be. The kernel leaves it there only if somebody gave the device a longer virtio-net
	// header (a pod with CAP_NET_ADMIN and /dev/net/tun can): it then skips bytes of our buffer instead of writing them, and what
	// an earlier packet left there would pass as the pod's. No sender uses it: the group bit is set, and it is no known multicast prefix.
	canary = 0xfd
)

// Queue is one descriptor of a device. Receive and Transmit belong to one worker; Dead, Err and Stats may be called from any goroutine.
type Queue struct {
	fd        int
	header    int // bytes of virtio-net header in front of every packet: headerLen, or 0
	pool      *port.Pool
	mem       []byte // the pool's, for the life of the queue
	chunkSize int
	iov       [port.MaxChain + 1]unix.Iovec // arguments of the call being made
	scratch   [headerLen]byte               // header of the packet being written, when there is no room in front of it
	spill     [1]byte                       // catches a frame's excess when there is no large buffer

	errno  atomic.Uint32 // why the queue is dead, or 0
	onDead func()        // told once it is; may be nil
	mu     sync.Mutex    // guards the descriptor's number against being given to another file by bury or close
	// Rare events only, so that atomics cost nothing that matters.
	truncated, badHeader, starved, readErrors atomic.Uint64
}

var _ port.Queue = (*Queue)(nil)

// Stats are the packets and events a queue counts beside the worker's own counters. All since it was opened.
type Stats struct {
	Truncated  uint64 // packets dropped: longer than the buffers that could be had
	BadHeader  uint64 // packets dropped: the device's virtio-net header is not as it was set up, or there was no packet behind it
	ReadErrors uint64 // packets lost in read(2) otherwise
	Starved    uint64 // Receive calls that ended because the pool had no chunk
}

func (s *Stats) add(t Stats) {
	s.Truncated += t.Truncated
	s.BadHeader += t.BadHeader
	s.ReadErrors += t.ReadErrors
	s.Starved += t.Starved
}

func newQueue(fd, header int, pool *port.Pool, onDead func()) *Queue {
	return &Queue{fd: fd, header: header, pool: pool, mem: pool.Memory(), chunkSize: pool.Config().ChunkSize, onDead: onDead}
}

// die notes that the device is deleted. Its descriptor would report an error to epoll for ever, and the worker would never sleep again, so it is taken away; by a
// goroutine of its own, because giving up a descriptor of a TAP waits for the kernel's configuration lock.
func (q *Queue) die(errno unix.Errno) {
	if q.errno.Swap(uint32(errno)) == 0 {
		go q.bury()
	}
}

// bury replaces the descriptor by one that never becomes readable. It keeps its number, which others know; the old file leaves all epoll sets.
func (q *Queue) bury() {
	q.mu.Lock()
	if q.fd >= 0 {
		if silent, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
			_ = unix.Dup3(silent, q.fd, unix.O_CLOEXEC)
			_ = unix.Close(silent)
		}
	}
	q.mu.Unlock()
	if q.onDead != nil {
		q.onDead()
	}
}

// close gives up the descriptor. Harmless twice.
func (q *Queue) close() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.fd < 0 {
		return nil
	}
	fd := q.fd
	q.fd = -1
	return unix.Close(fd)
}

// FD implements port.Queue: the descriptor, or -1 when the queue is closed. It stays the same and harmless when the device is deleted: see die.
func (q *Queue) FD() int { return q.fd }

// Dead reports whether the queue found that its device was deleted.
func (q *Queue) Dead() bool { return q.errno.Load() != 0 }

// Err is why the queue is dead, or nil.
func (q *Queue) Err() error {
	if e := q.errno.Load(); e != 0 {
		return unix.Errno(e)
	}
	return nil
}

// Stats are the queue's counters.
func (q *Queue) Stats() Stats {
	return Stats{Truncated: q.truncated.Load(), BadHeader: q.badHeader.Load(), ReadErrors: q.readErrors.Load(), Starved: q.starved.Load()}
}

// Receive implements port.Queue. A packet that fits a chunk is one frame; a longer one, which only a GSO frame or an MTU above the chunk can be, is
// a chain of a chunk and a large buffer. Without a free large buffer longer packets are dropped and counted; without a free chunk
// packets wait in the device. A deleted device (EBADFD) makes the queue dead: it receives nothing from then on.
//
// No buffers are kept between calls, so idle devices cost no frames; the pool hands the same warm ones out again.
func (q *Queue) Receive(frames []port.Frame) int {
	if q.Dead() {
		return 0
	}
	var (
		pool, header         = q.pool, q.header
		chunk, large         port.Frame
		haveChunk, haveLarge bool
		n, bytes             int
	)
	for reads := 0; reads < maxReads && bytes < maxBytes && n+2 <= len(frames); reads++ {
		if !haveChunk {
			if chunk, haveChunk = pool.Alloc(); !haveChunk {
				q.starved.Add(1)
				break
			}
		}
		if !haveLarge {
			large, haveLarge = pool.AllocLarge()
		}
		// The virtio-net header goes into the headroom, so that header and frame are one buffer.
		room := pool.MaxLen(&chunk)
		first := q.mem[int(chunk.Off)-header : int(chunk.Off)+room]
		first[header] = canary
		second := q.spill[:]
		if haveLarge {
			second = pool.Buffer(&large)
		}
		got, errno := q.read2(first, second)
		if errno != 0 {
			if errno == unix.EAGAIN {
				break
			}
			if errno == unix.EBADFD {
				q.die(errno)
				break
			}
			// The kernel took the packet off the queue and could not hand it over; the next may be fine.
			q.readErrors.Add(1)
			continue
		}
		length := got - header
		if length < 1 || first[header] == canary {
			q.badHeader.Add(1)
			continue
		}
		bytes += length
		if length >= room+len(second) {
			// All buffers are full: the driver cut the packet, or it is longer than any can be.
			q.truncated.Add(1)
			continue
		}
		if header != 0 {
			chunk.Offload = decode(first)
		}
		if length <= room {
			chunk.Len = uint32(length)
			frames[n] = chunk
			n++
		} else {
			chunk.Len = uint32(room)
			chunk.Flags = port.More
			large.Len = uint32(length - room)
			frames[n], frames[n+1] = chunk, large
			n += 2
			haveLarge = false
		}
		haveChunk = false
	}
	if haveChunk {
		pool.Free(chunk)
	}
	if haveLarge {
		pool.Free(large)
	}
	return n
}

// Transmit implements port.Queue: one write per packet, after which its frames are back in the pool. A device that is down answers
// TxDown, as a deleted one does; a packet whose metadata the kernel does not believe is TxRejected.
func (q *Queue) Transmit(frames []port.Frame) (int, port.TxStatus) {
	if q.Dead() {
		return 0, port.TxDown
	}
	pool, header := q.pool, q.header
	for n := 0; n < len(frames); {
		f := &frames[n]
		var (
			errno unix.Errno
			count = 1
		)
		if f.Flags&port.More == 0 && !pool.IsLarge(f) && q.chunkSize-pool.MaxLen(f) >= header {
			// Room in front of the frame: one buffer instead of two.
			start := f.Off - uint32(header)
			if header != 0 {
				encode(q.mem[start:], &f.Offload)
			}
			_, errno = q.write(q.mem[start : f.Off+f.Len])
		} else {
			count = port.PacketFrames(frames[n:])
			if count > port.MaxChain {
				return n, port.TxRejected
			}
			_, errno = q.writeChain(frames[n : n+count])
		}
		switch errno {
		case 0:
			pool.FreeAll(frames[n : n+count])
			n += count
		case unix.EINTR:
		case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
			return n, port.TxFull
		case unix.EIO:
			return n, port.TxDown
		case unix.EBADFD:
			q.die(errno)
			return n, port.TxDown
		default:
			return n, port.TxRejected
		}
	}
	return len(frames), port.TxOK
}

// writeChain writes one packet of several frames, or one without room for the header in front.
func (q *Queue) writeChain(frames []port.Frame) (int, unix.Errno) {
	k := 0
	if q.header != 0 {
		encode(q.scratch[:], &frames[0].Offload)
		q.iov[0].Base = &q.scratch[0]
		q.iov[0].SetLen(headerLen)
		k = 1
	}
	for i := range frames {
		b := q.pool.Bytes(&frames[i])
		if len(b) == 0 {
			continue
		}
		q.iov[k].Base = &b[0]
		q.iov[k].SetLen(len(b))
		k++
	}
	return q.writev(k)
}

// decode reads struct virtio_net_hdr.
func decode(b []byte) port.Offload {
	_ = b[headerLen-1]
	return port.Offload{
		Flags:          b[0],
		GSO:            b[1],
		HeaderLen:      binary.LittleEndian.Uint16(b[2:]),
		SegmentSize:    binary.LittleEndian.Uint16(b[4:]),
		ChecksumStart:  binary.LittleEndian.Uint16(b[6:]),
		ChecksumOffset: binary.LittleEndian.Uint16(b[8:]),
	}
}

// encode writes struct virtio_net_hdr.
func encode(b []byte, o *port.Offload) {
	_ = b[headerLen-1]
	b[0], b[1] = o.Flags, o.GSO
	binary.LittleEndian.PutUint16(b[2:], o.HeaderLen)
	binary.LittleEndian.PutUint16(b[4:], o.SegmentSize)
	binary.LittleEndian.PutUint16(b[6:], o.ChecksumStart)
	binary.LittleEndian.PutUint16(b[8:], o.ChecksumOffset)
}
