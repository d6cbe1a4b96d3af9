package dataplane

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/snat"
)

// Traffic counts what crossed a port in one direction.
type Traffic struct {
	Frames  uint64 // as they crossed: a GSO frame or a coalesced train is one
	Packets uint64 // a GSO frame or a train counts as its segments
	Bytes   uint64 // Ethernet bytes of the frames
}

func (t *Traffic) add(more *Traffic) {
	t.Frames += more.Frames
	t.Packets += more.Packets
	t.Bytes += more.Bytes
}

// SlotStats are the counters of one port as one worker keeps them. Directions are the data plane's: In is received from the port.
//
// For every worker, over all its slots: packets In = packets Out + DropsIn + DropsOut + Answered - Generated, where a packet is a packet of Traffic.
type SlotStats struct {
	Slot    int
	Name    string
	Kind    PortKind
	In, Out Traffic
	// DropsIn counts packets received from this port that died before they reached the port they were for; DropsOut those that
	// died at this port, where they were to leave.
	DropsIn, DropsOut [drop.NumReasons]uint64
}

// Add adds another port's counters, or another worker's of the same port.
func (s *SlotStats) Add(o *SlotStats) {
	s.In.add(&o.In)
	s.Out.add(&o.Out)
	for r := range o.DropsIn {
		s.DropsIn[r] += o.DropsIn[r]
		s.DropsOut[r] += o.DropsOut[r]
	}
}

// Answers counts packets that the data plane consumed by answering them itself.
type Answers struct {
	ARP, ND, Echo uint64
	// Ignored counts ARP and neighbour discovery that was valid and not for the gateway.
	Ignored uint64
}

// Sum is the number of packets consumed.
func (a *Answers) Sum() uint64 { return a.ARP + a.ND + a.Echo + a.Ignored }

// WorkerStats are one worker's counters, taken between two polls.
type WorkerStats struct {
	Index int
	CPU   int // -1: not pinned

	Polls     uint64 // turns of the loop
	BusyPolls uint64 // those that found packets
	Parks     uint64 // how often it slept in epoll
	Packets   uint64 // received, GSO frames counted as their segments

	Generation         uint64 // of the snapshot it forwards by
	Chunks, ChunksFree int
	Large, LargeFree   int
	UplinkQueues       []int
	Answers            Answers
	ICMPErrors         [icmp.NumErrors]uint64 // sent
	ICMPErrorsRefused  uint64                 // by their budget, or because no error may answer the packet
	Generated          uint64                 // packets that the worker made: ICMP errors, answers, fragments beyond the first
	HandedOver         uint64                 // packets that other workers' sessions own
	Slots              []SlotStats            // of non-empty slots

	// Left are, by kind, the counters of ports that have left their slots, so that sums over a kind's ports never go back. A Slot of them means nothing.
	Left [NumPortKinds]SlotStats
}

// statsRequest is a reader's order for a copy of a worker's counters. The worker fills stats and closes nothing: done is polled, because
// a thread that forwards must not wake goroutines through channels.
type statsRequest struct {
	ask   func(*snat.Translator, *WorkerStats) // nil: only the counters
	stats WorkerStats
	done  chan struct{} // closed by the goroutine that runs Poll; closing does not block
}

// collect copies the worker's counters. Runs on the worker's goroutine.
func (w *Worker) collect() WorkerStats {
	s := WorkerStats{
		Left:  w.left,
		Index: w.index, CPU: w.cpu,
		Polls: w.polls, BusyPolls: w.busyPolls, Parks: w.parks, Packets: w.received,
		Answers: w.answers, ICMPErrors: w.icmpErrors, ICMPErrorsRefused: w.icmpRefused, Generated: w.generated,
		HandedOver: w.handedOver,
	}
	if w.snap != nil {
		s.Generation = w.snap.Generation
	}
	cfg := w.pool.Config()
	s.Chunks, s.Large = cfg.Chunks, cfg.LargeBuffers
	s.ChunksFree, s.LargeFree = w.pool.Available()
	for i := range w.slots {
		sl := w.slots[i]
		if sl == nil || sl.kind == PortNone {
			continue
		}
		if i == UplinkSlot {
			s.UplinkQueues = append([]int(nil), sl.queues...)
		}
		s.Slots = append(s.Slots, sl.stats())
	}
	return s
}

func (s *slot) stats() SlotStats {
	return SlotStats{Slot: s.index, Name: s.name, Kind: s.kind, In: s.in, Out: s.sent, DropsIn: s.dropsIn, DropsOut: s.dropsOut}
}
