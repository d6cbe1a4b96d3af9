package dataplane

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

// parseOffload checks what a frame's sender left unfinished and notes the frame's segments. p.Reason says what is wrong with it, if anything.
func (w *Worker) parseOffload(j *journey, chain []port.Frame, total int) {
	p, f := &j.packet, &chain[0]
	if p.Reason != drop.None {
		return
	}
	o := packet.Offload(f.Offload)
	p.Reason = packet.CheckOffload(p, w.pool.Bytes(f), w.rest(chain), &o)
	f.Offload = port.Offload(o)
	if p.Reason == drop.None && o.GSO != port.GSONone {
		j.segments = segmentsOf(f, total)
		j.size = uint32(p.Payload-p.L3) + uint32(o.SegmentSize)
	}
}

// segmentsOf is how many packets a frame of total bytes stands for. Its Offload must have passed packet.CheckOffload.
func segmentsOf(f *port.Frame, total int) uint32 {
	if f.Offload.GSO == port.GSONone {
		return 1
	}
	size := uint32(f.Offload.SegmentSize)
	return (uint32(total) - uint32(f.Offload.HeaderLen) + size - 1) / size
}

// rewrite makes the packet one that leaves by its adjacency: Ethernet addresses, hop limit. A VLAN tag does not survive.
func (w *Worker) rewrite(v *Verdict, adj *fib.Adjacency, p *packet.Packet, f *port.Frame) {
	b := w.pool.Bytes(f)
	if v.Decrement {
		packet.DecrementTTL(p, b)
	}
	if moved := packet.SetEthernet(b, p, adj.Dst, adj.Src); moved != 0 {
		f.Off += uint32(moved)
		f.Len -= uint32(moved)
		if f.Offload.Flags&port.NeedsChecksum != 0 {
			f.Offload.ChecksumStart -= uint16(moved)
			f.Offload.HeaderLen -= uint16(moved)
		}
	}
}

// enqueue puts packet i of the batch into the queue of its port, in a form the port takes. The packet's headers are final.
func (w *Worker) enqueue(out *slot, j *journey, i int, chain []port.Frame) {
	f := &chain[0]
	switch {
	case out.tx == nil:
		w.dropOut(out, drop.PortDown, chain, j.segments)
	case f.Offload.Flags|f.Offload.GSO != 0 || len(chain) > 1:
		w.enqueueLarge(out, j, i, chain)
	case out.accept != 0:
		w.hold(out, i, f, out.accept)
	default:
		w.pushOne(out, f)
	}
}

// enqueueLarge is enqueue for packets that are unfinished or in several frames.
func (w *Worker) enqueueLarge(out *slot, j *journey, i int, chain []port.Frame) {
	p, f := &j.packet, &chain[0]
	total, _ := port.PacketLen(chain)
	unfinished := f.Offload.Flags&port.NeedsChecksum != 0
	if f.Offload.GSO != port.GSONone && !out.takes(f.Offload.GSO) {
		w.segment(out, p, chain)
		return
	}
	if unfinished && !out.caps.Checksum {
		packet.FinishChecksum(p, w.pool.Bytes(f), w.rest(chain))
		unfinished = false
	}
	if !unfinished {
		f.Offload = port.Offload{} // "data valid" was the sender's claim: the receiver finds out for itself
	}
	switch {
	case total > out.caps.MaxFrame || len(chain) > 1 && f.Offload.GSO == port.GSONone && !out.caps.Chains:
		w.dropOut(out, drop.FrameTooLong, chain, j.segments)
	case out.accept != 0:
		w.hold(out, i, f, 0)
	default:
		w.push(out, chain)
	}
}

// rest is what follows the first frame of a chain of at most two: what a TAP delivers. Chains of more frames come from AF_XDP, with finished checksums
// and no segments; flatten makes them two.
func (w *Worker) rest(chain []port.Frame) []byte {
	if len(chain) < 2 {
		return nil
	}
	return w.pool.Bytes(&chain[1])
}

// flatten turns a chain into one of at most two frames. It reports false, with the chain as it was, if no large buffer is left.
func (w *Worker) flatten(chain []port.Frame) ([]port.Frame, bool) {
	if len(chain) <= 2 {
		return chain, true
	}
	tail, ok := w.pool.AllocLarge()
	if !ok {
		return chain, false
	}
	buffer := w.pool.Buffer(&tail)
	for i := range chain[1:] {
		tail.Len += uint32(copy(buffer[tail.Len:], w.pool.Bytes(&chain[1+i])))
	}
	w.pool.FreeAll(chain[1:])
	chain[1] = tail
	return chain[:2], true
}

// segment cuts a GSO frame into frames that its port takes (RFC 9293 section 3.7.1 calls them segments; for UDP, datagrams).
func (w *Worker) segment(out *slot, p *packet.Packet, chain []port.Frame) {
	o := packet.Offload(chain[0].Offload)
	var s packet.Segmenter
	s.Init(p, w.pool.Bytes(&chain[0]), w.rest(chain), &o, out.caps.Checksum)
	w.overtake(out)
	left := uint32(s.Segments())
	offload := port.Offload(s.Offload())
	for ; left > 0; left-- {
		f, ok := w.allocFor(s.Size())
		if !ok { // the port's queue may hold what we need
			w.transmit(out)
			if f, ok = w.allocFor(s.Size()); !ok {
				break
			}
		}
		if s.Size() > w.pool.MaxLen(&f) {
			w.pool.Free(f)
			w.dropOut(out, drop.FrameTooLong, chain, left)
			return
		}
		f.Len = uint32(s.Next(w.pool.Buffer(&f)))
		f.Offload = offload
		w.pushOne(out, &f)
	}
	if left > 0 {
		w.dropOut(out, drop.NoFrame, chain, left)
		return
	}
	w.pool.FreeAll(chain)
}

// allocFor takes a frame with room for size bytes: a chunk, or a large buffer (on links with jumbo frames). A size beyond both gets a large one.
func (w *Worker) allocFor(size int) (port.Frame, bool) {
	f, ok := w.pool.Alloc()
	if !ok || size <= w.pool.MaxLen(&f) {
		return f, ok
	}
	w.pool.Free(f)
	return w.pool.AllocLarge()
}

// fragment cuts an IPv4 packet into fragments of its next hop's MTU (RFC 791).
func (w *Worker) fragment(out *slot, mtu int, p *packet.Packet, chain []port.Frame) {
	if out.tx == nil {
		w.dropOut(out, drop.PortDown, chain, 1)
		return
	}
	chain, ok := w.flatten(chain)
	if !ok {
		w.dropOut(out, drop.NoFrame, chain, 1)
		return
	}
	head := w.pool.Bytes(&chain[0])
	if chain[0].Offload.Flags&port.NeedsChecksum != 0 {
		packet.FinishChecksum(p, head, w.rest(chain))
	}
	var fr packet.Fragmenter
	if !fr.Init(p, head, w.rest(chain), mtu) {
		w.dropOut(out, drop.TooBig, chain, 1)
		return
	}
	w.overtake(out)
	made := uint64(0)
	for more := true; more; made++ {
		f, ok := w.allocFor(packet.EthernetHeaderLen + packet.VLANTagLen + mtu)
		if !ok {
			w.generated += made
			w.dropOut(out, drop.NoFrame, chain, 1)
			return
		}
		var n int
		if n, more = fr.Next(w.pool.Buffer(&f)); n == 0 { // the MTU is larger than any buffer
			w.pool.Free(f)
			w.generated += made
			w.dropOut(out, drop.FrameTooLong, chain, 1)
			return
		}
		f.Len = uint32(n)
		w.pushOne(out, &f)
	}
	w.generated += made - 1
	w.pool.FreeAll(chain)
}

const _ = uint(packet.MaxCoalesce - 2*batch) // the coalescer has room for whatever a batch holds

// hold gives packet i of the batch to the coalescer, which returns it when the batch is flushed, perhaps as part of a train.
func (w *Worker) hold(out *slot, i int, f *port.Frame, accept packet.Accept) {
	w.coalescer.Add(&w.journeys[i].packet, w.pool.Bytes(f), uint32(out.index), accept, uint32(i))
	w.held++
}

// overtake queues what is held for a port before packets that are not held go there: those of one flow stay in order.
func (w *Worker) overtake(out *slot) {
	if out.accept != 0 {
		w.release()
	}
}

// release queues what the coalescer holds: trains as chains whose first frame is whole and whose others are cut to their payload.
func (w *Worker) release() {
	if w.held == 0 {
		return
	}
	w.held = 0
	var t packet.Train
	for w.coalescer.Next(&t) {
		out, chain := w.slots[t.Out], w.journeys[t.Handle].chain(w.batch)
		if t.Segments <= 1 {
			w.push(out, chain)
			continue
		}
		chain[0].Offload = port.Offload(w.coalescer.Finish(&t, w.pool.Bytes(&chain[0])))
		train := append(w.made[:0], chain[0])
		for h, off, n, ok := w.coalescer.NextSegment(&t); ok; h, off, n, ok = w.coalescer.NextSegment(&t) {
			f := w.batch[w.journeys[h].first]
			f.Off, f.Len = f.Off+uint32(off), uint32(n)
			train[len(train)-1].Flags |= port.More
			train = append(train, f)
		}
		w.push(out, train)
	}
	w.coalescer.Reset()
}

// push appends one packet to the port's queue, which is sent first if it is full.
func (w *Worker) push(out *slot, chain []port.Frame) {
	if len(out.queue)+len(chain) > cap(out.queue) {
		w.transmit(out)
	}
	if len(out.queue) == 0 {
		w.touched = append(w.touched, out)
	}
	out.queue = append(out.queue, chain...)
}

// pushOne is push for a packet of one frame, as most are. Append would copy the frame by way of the stack, in two pieces that overlap, and wait for itself.
func (w *Worker) pushOne(out *slot, f *port.Frame) {
	n := len(out.queue)
	if n == cap(out.queue) {
		w.transmit(out)
		n = 0
	}
	if n == 0 {
		w.touched = append(w.touched, out)
	}
	out.queue = out.queue[:n+1]
	out.queue[n] = *f
}

// flush hands every touched port its queue.
func (w *Worker) flush() {
	w.release()
	for _, out := range w.touched {
		w.transmit(out)
	}
	w.touched = w.touched[:0]
}

// transmit sends a port's queue and accounts for every packet of it.
func (w *Worker) transmit(out *slot) {
	for frames := out.queue; len(frames) > 0; {
		n, status := out.tx.Transmit(frames)
		out.account(frames[:n])
		frames = frames[n:]
		switch status {
		case port.TxRejected:
			bytes, n := port.PacketLen(frames)
			w.dropOut(out, drop.PortRejected, frames[:n], segmentsOf(&frames[0], bytes))
			frames = frames[n:]
		case port.TxFull:
			w.dropAll(out, drop.PortFull, frames)
			frames = nil
		case port.TxDown:
			w.dropAll(out, drop.PortDown, frames)
			frames = nil
		}
	}
	out.queue = out.queue[:0]
	if out.flusher != nil && !out.kick {
		out.kick = true
		w.kicks = append(w.kicks, out)
	}
}

// dropOut ends a packet of so many segments that could not leave by its port.
func (w *Worker) dropOut(out *slot, reason drop.Reason, chain []port.Frame, segments uint32) {
	out.dropsOut[reason] += uint64(segments)
	w.pool.FreeAll(chain)
}

// dropAll ends every packet of a queue.
func (w *Worker) dropAll(out *slot, reason drop.Reason, frames []port.Frame) {
	for len(frames) > 0 {
		bytes, n := port.PacketLen(frames)
		w.dropOut(out, reason, frames[:n], segmentsOf(&frames[0], bytes))
		frames = frames[n:]
	}
}
