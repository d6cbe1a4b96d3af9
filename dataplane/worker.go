package dataplane

import (
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

const (
	// batch is how many packets take each stage together: few enough for their headers and verdicts to stay in the first-level cache.
	batch = 64
	// manyFrames is how many of the uplink's frames at once say that more are waiting.
	manyFrames = 16
	// queueFrames is how many frames a port's queue holds within a batch.
	queueFrames = 256
)

// Worker is one forwarding thread's state. It owns the queues q of every port with q mod workers = its index, its pool and its counters; only the
// goroutine that calls Poll touches them. Other goroutines reach it through the atomic fields.
type Worker struct {
	index int
	cpu   int
	of    int // number of workers
	pool  *port.Pool
	log   *slog.Logger

	// Shared with other goroutines.
	published *atomic.Pointer[Snapshot]
	heartbeat *uint64                      // CLOCK_MONOTONIC nanoseconds of the last poll; nil: nobody listens
	passed    atomic.Uint64                // generation of the snapshot by which the last finished poll forwarded
	request   atomic.Pointer[statsRequest] // somebody wants the counters
	clock     clock

	snap   *Snapshot
	slots  []*slot
	polled []source // queues asked on every poll
	// The uplink's queues, whichever way they are asked; backlog: one of them gave much when it was asked last.
	uplinks []source
	backlog bool
	wait    waiter  // all other queues, asked when epoll names them
	kicks   []*slot // ports that Flush is due for: something was transmitted since, or is outstanding
	now     int64   // monotonic nanoseconds at the start of the poll

	// One batch on its journey.
	batch    []port.Frame
	frames   [batch * 2]port.Frame
	journeys [batch * 2]journey
	made     [port.MaxChain]port.Frame // scratch: frames the worker made
	touched  []*slot
	fetched  byte // keeps the compiler from dropping the loads of fetch

	coalescer packet.Coalescer
	held      int
	limiter   *icmp.Limiter

	translator *snat.Translator      // nil: none
	asked      [batch]*packet.Packet // of prefetch
	tellFlows  func(events []snat.FlowEvent, lost bool)
	unsettled  bool // the translator does not know all the snapshot's pods yet
	waiting    waitingFragments
	released   []waitingFragment // fragments that waited and go on after the batch

	// Handing over between workers; handover.go.
	peers      []*Worker // by index; nil: there is only this one, or nothing is translated
	inbox      []*ring   // by sender
	parked     atomic.Bool
	completing bool              // the batch was handed over
	handed     [batch]handed     // with it
	handedOver uint64            // packets
	again      [batch]port.Frame // a batch of them

	polls, busyPolls, parks, received uint64
	answers                           Answers
	icmpErrors                        [icmp.NumErrors]uint64
	icmpRefused, generated            uint64
	left                              [NumPortKinds]SlotStats // counters of ports that have left
}

// journey is one packet of a batch on its way through the stages.
type journey struct {
	packet        packet.Packet
	verdict       Verdict
	size          uint32 // of the largest IP packet it stands for
	segments      uint32 // packets it stands for: 1, or those of a GSO frame
	first, frames uint16 // where it lies in the batch
}

// chain is the packet's frames, of those of its batch.
func (j *journey) chain(batch []port.Frame) []port.Frame {
	return batch[j.first : j.first+j.frames]
}

// source is a queue packets are received from, and its slot.
type source struct {
	slot  *slot
	queue port.Queue
}

// slot is a worker's end of the port in one slot of the snapshot.
type slot struct {
	index  int
	info   *PortInfo
	kind   PortKind // with name: whose counters these are, also while the device is away
	name   string
	port   port.Port
	queues []int // of the port, that this worker owns

	tx      port.Queue // nil: no device, or none of its queues is ours
	caps    port.Caps
	accept  packet.Accept // trains the port takes
	queue   []port.Frame
	flusher port.Flusher // tx, if it needs kicks
	kick    bool         // it is among the worker's kicks

	in, sent          Traffic
	dropsIn, dropsOut [drop.NumReasons]uint64
}

// takes reports whether the port takes GSO frames of this type.
func (s *slot) takes(gso uint8) bool {
	switch gso &^ port.GSOECN {
	case port.GSOTCP4:
		return s.caps.TSO4
	case port.GSOTCP6:
		return s.caps.TSO6
	default:
		return s.caps.USO
	}
}

// account counts packets the device took.
func (s *slot) account(frames []port.Frame) {
	var plain, bytes uint64
	for len(frames) > 0 && frames[0].Flags == 0 && frames[0].Offload.GSO == port.GSONone {
		plain++
		bytes += uint64(frames[0].Len)
		frames = frames[1:]
	}
	s.sent.add(&Traffic{Frames: plain, Packets: plain, Bytes: bytes})
	for len(frames) > 0 {
		bytes, n := int(frames[0].Len), 1
		if frames[0].Flags&port.More != 0 {
			bytes, n = port.PacketLen(frames)
		}
		s.sent.Frames++
		s.sent.Bytes += uint64(bytes)
		s.sent.Packets += uint64(segmentsOf(&frames[0], bytes))
		frames = frames[n:]
	}
}

// Poll takes one turn: adopt what was published, receive from every queue that has something, forward, flush. It returns how many frames were received.
// It is what Run loops over and what tests drive; one goroutine at a time.
func (w *Worker) Poll() int {
	w.now = w.clock.now()
	if s := w.published.Load(); s != w.snap {
		w.adopt(s)
	}
	if w.translator != nil {
		w.expireSessions()
	}
	total := w.servePolled()
	for _, i := range w.wait.ready() {
		total += w.serve(&w.wait.sources[i])
	}
	if w.inbox != nil {
		total += w.takeOver()
	}
	w.kick()
	w.polls++
	if total > 0 {
		w.busyPolls++
	}
	w.finish()
	return total
}

// servePolled serves the queues that cost no system call.
func (w *Worker) servePolled() (total int) {
	for i := range w.polled {
		total += w.serve(&w.polled[i])
	}
	return total
}

// kick flushes the ports that it is due for.
func (w *Worker) kick() {
	due := w.kicks[:0]
	for _, sl := range w.kicks {
		if sl.kick = sl.flusher.Flush(); sl.kick {
			due = append(due, sl)
		}
	}
	w.kicks = due
}

// serve serves one queue, and after a pod's the uplink for as much again if that has a backlog. What pods send is answered: if each took its turn and the
// uplink one, many answers would wait there, and those that find no room are anybody's. This way a pod that sends more than can be forwarded fills its own queue.
func (w *Worker) serve(from *source) int {
	n := w.receive(from)
	if n > 0 && from.slot.index != UplinkSlot {
		n += w.relieve(n)
	}
	return n
}

// relieve receives so many frames from the uplink's queues while they have a backlog.
func (w *Worker) relieve(frames int) (total int) {
	for w.backlog && total < frames {
		w.backlog = false
		for i := range w.uplinks {
			total += w.receive(&w.uplinks[i])
		}
	}
	return total
}

// receive takes one batch from a queue through the journey.
func (w *Worker) receive(from *source) int {
	n := from.queue.Receive(w.frames[:])
	if n >= manyFrames && from.slot.index == UplinkSlot {
		w.backlog = true
	}
	for done := 0; done < n; {
		// Whole packets, at most a batch of them.
		end := n
		if n-done > batch {
			end = done + batch
			for w.frames[end-1].Flags&port.More != 0 {
				end++
			}
		}
		w.batch = w.frames[done:end]
		w.forward(from.slot, w.batch)
		if len(w.released) > 0 {
			w.forwardReleased()
		}
		done = end
	}
	return n
}

// finish tells the rest of the process, and the steering program, that a poll is over.
func (w *Worker) finish() {
	if w.heartbeat != nil {
		atomic.StoreUint64(w.heartbeat, uint64(w.now))
	}
	if w.snap != nil && w.passed.Load() != w.snap.Generation {
		w.passed.Store(w.snap.Generation)
	}
	if r := w.request.Load(); r != nil {
		w.request.Store(nil)
		if r.stats = w.collect(); r.ask != nil {
			r.ask(w.translator, &r.stats)
		}
		close(r.done)
	}
}

// adopt makes s the snapshot the worker forwards by: queues of ports that left are let go, those of new ones taken up.
func (w *Worker) adopt(s *Snapshot) {
	w.snap = s
	for len(w.slots) < len(s.Ports) {
		w.slots = append(w.slots, &slot{index: len(w.slots)})
	}
	for i, sl := range w.slots {
		var info PortInfo
		if i < len(s.Ports) {
			sl.info = &s.Ports[i]
			info = s.Ports[i]
		} else {
			sl.info = &PortInfo{}
		}
		if sl.port != info.Port {
			w.attach(sl, info.Port)
		}
		if info.Kind != sl.kind || info.Name != sl.name {
			index, kept := sl.index, *sl
			before := kept.stats()
			w.left[kept.kind].Add(&before)
			*sl = slot{index: index, info: kept.info, kind: info.Kind, name: info.Name, port: kept.port, queues: kept.queues,
				tx: kept.tx, flusher: kept.flusher, kick: kept.kick, caps: kept.caps, accept: kept.accept, queue: kept.queue}
		}
	}
	if w.translator != nil {
		w.translator.SetNow(w.now)
		if n := w.translator.SetNodeAddresses(s.Node4, s.Node6); n > 0 {
			w.log.Warn("the node's address changed: its translated sessions ended", "sessions", n)
		}
		w.unsettled = true
	}
}

// attach lets a slot's device go and takes another up; nil: none.
func (w *Worker) attach(sl *slot, p port.Port) {
	w.detach(sl)
	if p == nil {
		return
	}
	sl.port, sl.caps = p, p.Caps()
	if sl.caps.TSO4 {
		sl.accept |= packet.AcceptTCP4
	}
	if sl.caps.TSO6 {
		sl.accept |= packet.AcceptTCP6
	}
	if sl.caps.USO {
		sl.accept |= packet.AcceptUDP
	}
	for q := w.index; q < p.NumQueues(); q += w.of {
		queue := p.Queue(q)
		sl.queues = append(sl.queues, q)
		if sl.tx == nil {
			sl.tx = queue
			sl.flusher, _ = queue.(port.Flusher)
			sl.queue = make([]port.Frame, 0, queueFrames)
		}
		src := source{slot: sl, queue: queue}
		if sl.index == UplinkSlot {
			w.uplinks = append(w.uplinks, src)
		}
		if sl.caps.Polled {
			w.polled = append(w.polled, src)
		}
		if err := w.wait.add(src, sl.caps.Polled); err != nil {
			w.log.Error("cannot wait for a port's frames", "port", p.Name(), "queue", q, "error", err)
		}
	}
}

// detach forgets a slot's device. Nothing is queued for it: queues are empty between batches.
func (w *Worker) detach(sl *slot) {
	if sl.port == nil {
		return
	}
	if sl.index == UplinkSlot {
		w.uplinks = w.uplinks[:0]
	}
	polled := w.polled[:0]
	for _, src := range w.polled {
		if src.slot != sl {
			polled = append(polled, src)
		}
	}
	w.polled = polled
	w.wait.remove(sl)
	if i := slices.Index(w.kicks, sl); i >= 0 {
		w.kicks = slices.Delete(w.kicks, i, i+1)
	}
	sl.flusher, sl.kick = nil, false
	sl.port, sl.tx, sl.caps, sl.accept, sl.queues, sl.queue = nil, nil, port.Caps{}, 0, nil, nil
}

// clock gives CLOCK_MONOTONIC nanoseconds without a system call: the runtime reads the clock in the vDSO.
type clock struct {
	start time.Time
	base  int64 // CLOCK_MONOTONIC at start
}

func (c *clock) now() int64 { return c.base + int64(time.Since(c.start)) }
