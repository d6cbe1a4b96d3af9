package dataplane

import (
	"encoding/binary"
	"sync/atomic"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

// A session belongs to one worker, but its packets may arrive at any: the NIC spreads by a hash of its own, a TAP by another. A worker that finds a packet to be another's
// copies it into the ring that leads there, and the owner takes it through its whole journey as if it had received it. Rings have one writer and one reader, and no
// locks. A packet counts as received where it is handled.

// ringBytes is the size of each ring. With many workers, of which there are as many rings as pairs, they are smaller.
func ringBytes(workers int) int {
	if workers > 4 {
		return 1 << 18
	}
	return 1 << 20
}

const (
	recordAlign  = 32
	recordHeader = 32
	recordSkip   = 1 << 31 // in a record's length: nothing, go on at the ring's beginning
)

const (
	// A port's packets may take waitingShare times as many bytes of a ring as are free, so that one port's never take the room of all others.
	waitingShare = 4
	// maxWaiting is how many packets of one pod may wait in a ring: those of others wait behind them.
	maxWaiting = 1024
	// heldSlots is how many slots are told apart; those beyond share with others.
	heldSlots = 512
)

// waiting is what a slot's packets take of a ring.
type waiting struct{ packets, bytes uint32 }

// ring carries packets from one worker to another.
type ring struct {
	data []byte
	_    [64]byte
	head atomic.Uint64 // bytes the reader is done with
	_    [64]byte
	tail atomic.Uint64 // bytes the writer has written
	_    [64]byte

	// The writer's own: what waits, by slot, counting as waiting all from settled on.
	settled uint64
	held    [heldSlots]waiting
}

// settle stops counting what the reader is done with. The writer reads what it wrote itself, and nobody else writes there.
func (r *ring) settle(head uint64) {
	for r.settled != head {
		at := r.settled & uint64(len(r.data)-1)
		total := binary.LittleEndian.Uint32(r.data[at:])
		if total == recordSkip {
			r.settled += uint64(len(r.data)) - at
			continue
		}
		size := recordSize(int(total))
		h := &r.held[binary.LittleEndian.Uint16(r.data[at+4:])%heldSlots]
		h.packets--
		h.bytes -= uint32(size)
		r.settled += uint64(size)
	}
}

// recordSize is how many bytes of a ring a packet of total bytes takes.
func recordSize(total int) int { return (recordHeader + total + recordAlign - 1) &^ (recordAlign - 1) }

// handed is a packet's record, beside its bytes.
type handed struct {
	slot    uint16
	offload port.Offload
	// What a fragment's own bytes do not say, if completed.
	completed        bool
	icmpType         uint8
	srcPort, dstPort uint16
	id               uint32
}

func (h *handed) encode(b []byte, length uint32) {
	binary.LittleEndian.PutUint32(b[0:], length)
	binary.LittleEndian.PutUint16(b[4:], h.slot)
	b[6], b[7] = h.offload.Flags, h.offload.GSO
	binary.LittleEndian.PutUint16(b[8:], h.offload.HeaderLen)
	binary.LittleEndian.PutUint16(b[10:], h.offload.SegmentSize)
	binary.LittleEndian.PutUint16(b[12:], h.offload.ChecksumStart)
	binary.LittleEndian.PutUint16(b[14:], h.offload.ChecksumOffset)
	b[16], b[17] = 0, h.icmpType
	if h.completed {
		b[16] = 1
	}
	binary.LittleEndian.PutUint16(b[18:], h.srcPort)
	binary.LittleEndian.PutUint16(b[20:], h.dstPort)
	binary.LittleEndian.PutUint32(b[24:], h.id)
}

func (h *handed) decode(b []byte) {
	h.slot = binary.LittleEndian.Uint16(b[4:])
	h.offload = port.Offload{Flags: b[6], GSO: b[7], HeaderLen: binary.LittleEndian.Uint16(b[8:]), SegmentSize: binary.LittleEndian.Uint16(b[10:]),
		ChecksumStart: binary.LittleEndian.Uint16(b[12:]), ChecksumOffset: binary.LittleEndian.Uint16(b[14:])}
	h.completed, h.icmpType = b[16] != 0, b[17]
	h.srcPort, h.dstPort, h.id = binary.LittleEndian.Uint16(b[18:]), binary.LittleEndian.Uint16(b[20:]), binary.LittleEndian.Uint32(b[24:])
}

// put copies a packet into the ring, for the writer. It reports false if there is no room, or none for this slot's packets.
func (r *ring) put(pool *port.Pool, h *handed, chain []port.Frame, total int) bool {
	size := recordSize(total)
	tail, head := r.tail.Load(), r.head.Load()
	r.settle(head)
	free := len(r.data) - int(tail-head)
	held := &r.held[h.slot%heldSlots]
	if int(held.bytes)+size > waitingShare*free || held.packets >= maxWaiting && h.slot >= FirstPodSlot {
		return false
	}
	at := int(tail & uint64(len(r.data)-1))
	if rest := len(r.data) - at; size > rest {
		if size+rest > free {
			return false
		}
		binary.LittleEndian.PutUint32(r.data[at:], recordSkip)
		tail += uint64(rest)
		at = 0
	} else if size > free {
		return false
	}
	h.encode(r.data[at:], uint32(total))
	b := r.data[at+recordHeader:]
	for i := range chain {
		b = b[copy(b, pool.Bytes(&chain[i])):]
	}
	held.packets++
	held.bytes += uint32(size)
	r.tail.Store(tail + uint64(size))
	return true
}

// peek is the oldest packet, for the reader; nil: none. next is what head becomes when it is done with it.
func (r *ring) peek() (record []byte, next uint64) {
	head := r.head.Load()
	if head == r.tail.Load() {
		return nil, 0
	}
	at := head & uint64(len(r.data)-1)
	total := binary.LittleEndian.Uint32(r.data[at:])
	if total == recordSkip { // a record follows: both were published at once
		head += uint64(len(r.data)) - at
		at = 0
		total = binary.LittleEndian.Uint32(r.data)
	}
	return r.data[at : at+recordHeader+uint64(total)], head + uint64(recordSize(int(total)))
}

// handOver gives a packet to the worker that owns its session.
func (w *Worker) handOver(in *slot, j *journey, chain []port.Frame) {
	v, p := &j.verdict, &j.packet
	to := w.peers[v.Owner]
	h := handed{slot: uint16(in.index), offload: chain[0].Offload}
	if p.Flags&packet.FlagFragment != 0 && (v.Fragmented || p.Flags&packet.FlagCompleted != 0) {
		h.completed, h.icmpType, h.srcPort, h.dstPort, h.id = true, p.ICMPType, p.SrcPort, p.DstPort, p.FragmentID
	}
	total, _ := port.PacketLen(chain)
	if !to.inbox[w.index].put(w.pool, &h, chain, total) {
		in.dropsIn[drop.HandoverFull] += uint64(j.segments)
		w.pool.FreeAll(chain)
		return
	}
	in.in.Frames--
	in.in.Packets -= uint64(j.segments)
	in.in.Bytes -= uint64(total)
	w.received -= uint64(j.segments)
	w.handedOver += uint64(j.segments)
	w.pool.FreeAll(chain)
	if to.parked.Load() {
		to.wait.interrupt()
	}
}

// expecting reports whether another worker handed something over.
func (w *Worker) expecting() bool {
	for _, r := range w.inbox {
		if r != nil && r.head.Load() != r.tail.Load() {
			return true
		}
	}
	return false
}

// takeOver takes packets that other workers handed over through their journey, at most a batch from each.
func (w *Worker) takeOver() (total int) {
	for _, r := range w.inbox {
		if r == nil {
			continue
		}
		for left := batch; left > 0; {
			packets, frames := w.take(r, left)
			if packets == 0 {
				break
			}
			left -= packets
			total += frames + w.relieve(frames)
		}
	}
	return total
}

// take takes packets of one slot off a ring, at most max of them.
func (w *Worker) take(r *ring, max int) (packets, frames int) {
	var from *slot
	for packets < max {
		record, next := r.peek()
		if record == nil {
			break
		}
		h := &w.handed[packets]
		h.decode(record)
		if int(h.slot) >= len(w.slots) {
			h.slot = UplinkSlot // of a snapshot that this worker has not adopted: it dies of its source
		}
		if from == nil {
			from = w.slots[h.slot]
		} else if from != w.slots[h.slot] {
			break
		}
		n := w.copyIn(w.frames[frames:], record[recordHeader:], h.offload)
		r.head.Store(next)
		if n == 0 {
			from.in.add(&Traffic{Frames: 1, Packets: 1, Bytes: uint64(len(record) - recordHeader)})
			w.received++
			from.dropsIn[drop.NoFrame]++
			max--
			continue
		}
		packets, frames = packets+1, frames+n
	}
	if packets > 0 {
		w.batch, w.completing = w.frames[:frames], true
		w.forward(from, w.batch)
		if len(w.released) > 0 {
			w.forwardReleased()
		}
	}
	return packets, frames
}

// copyIn makes a packet of at most two frames from bytes. It returns the number of frames; 0: there is no memory for it.
func (w *Worker) copyIn(to []port.Frame, b []byte, o port.Offload) int {
	f, ok := w.pool.Alloc()
	if !ok {
		return 0
	}
	f.Len, f.Offload = uint32(copy(w.pool.Buffer(&f)[:w.pool.MaxLen(&f)], b)), o
	to[0] = f
	if int(f.Len) == len(b) {
		return 1
	}
	tail, ok := w.pool.AllocLarge()
	if !ok || len(b)-int(f.Len) > w.pool.MaxLen(&tail) {
		if ok {
			w.pool.Free(tail)
		}
		w.pool.Free(f)
		return 0
	}
	to[0].Flags = port.More
	tail.Len = uint32(copy(w.pool.Buffer(&tail), b[f.Len:]))
	to[1] = tail
	return 2
}

// complete gives the batch's fragments what the worker that handed them over knew.
func (w *Worker) complete(n int) {
	w.completing = false
	for i := range w.journeys[:n] {
		if h, p := &w.handed[i], &w.journeys[i].packet; h.completed && p.Reason == drop.None && p.Flags&packet.FlagFragment != 0 {
			p.Flags |= packet.FlagCompleted
			p.SrcPort, p.DstPort, p.ICMPType, p.FragmentID = h.srcPort, h.dstPort, h.icmpType, h.id
		}
	}
}

// connect makes the rings between workers.
func connect(workers []*Worker) {
	if len(workers) < 2 {
		return
	}
	for _, w := range workers {
		w.peers = workers
		w.inbox = make([]*ring, len(workers))
		for i := range w.inbox {
			if i != w.index {
				w.inbox[i] = &ring{data: make([]byte, ringBytes(len(workers)))}
			}
		}
	}
}
