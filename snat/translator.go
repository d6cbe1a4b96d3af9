package snat

import (
	"fmt"
	"math/rand/v2"
	"os"

	"github.com/overplane/overplane/dataplane/packet"
)

// Translator is one worker's address translation. Only the worker's goroutine may call its methods. It reads no clock: SetNow and Expire
// tell it the time.
type Translator struct {
	cfg   Config
	alloc *Allocator
	mem   *memory
	rand  *rand.ChaCha8

	now     int64 // nanoseconds
	started bool
	tick    uint32 // that now lies in

	v4, v6   *table
	node4    packet.Addr // external addresses; zero: none
	node6    packet.Addr
	timeouts [numTimers]int64

	pods    []podState
	leaving int // pods that are
	ports   [NumClasses]leases
	hostV   uint32 // version of the host's ports that all sessions respect
	sweep   [2]int // records of each table still to be looked at because it changed
	check   int    // next chunk to look at for return
	full    [64]saturated

	ids    identifiers
	frags  *fragments
	events [maxEvents]FlowEvent
	nEvent int
	lost   bool // events did not fit
	counts Counts

	fetched uint32 // see prefetch
}

// timer is the index of a session's timer in Translator.timeouts.
type timer = uint8

const (
	timerUDP timer = iota
	timerICMP
	timerTCPOpening
	timerTCPEstablished
	timerTCPClosing
	timerTCPReset
	timerOther
	numTimers
)

// podState is what a translator knows of a pod.
type podState struct {
	attached, leaving bool
	addr4, addr6      packet.Addr
	chunks            [NumClasses][]uint16 // held, in the order of their lease
}

// Counts count since the translator was made. They wrap.
type Counts struct {
	Created, Expired, Ended uint64 // sessions
	HostPort                uint64 // sessions ended because the host took their port
	Flushed                 uint64 // sessions ended because the node's address changed
	Saturated               uint64 // new sessions that found most ports towards their destination taken
	ErrorsIn, ErrorsOut     uint64 // ICMP errors translated
	FragmentsTracked        uint64
	FragmentsHeld           uint64
}

func (c *Counts) add(o *Counts) {
	c.Created += o.Created
	c.Expired += o.Expired
	c.Ended += o.Ended
}

// New makes a translator with empty tables in a new memfd.
func New(cfg Config, a *Allocator) (*Translator, error) {
	cfg.setDefaults(a.cfg.MaxPods)
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Worker < 0 || cfg.Worker >= a.cfg.Workers {
		return nil, fmt.Errorf("snat: worker %d of %d", cfg.Worker, a.cfg.Workers)
	}
	m, err := newMemory(&cfg, a)
	if err != nil {
		return nil, err
	}
	return newTranslator(cfg, a, m), nil
}

// NewIn is New with the tables in an empty file, which should be in memory (tmpfs) and becomes the translator's, also if NewIn fails: where no service manager keeps descriptors,
// the next process finds the sessions by its name.
func NewIn(cfg Config, a *Allocator, file *os.File) (*Translator, error) {
	cfg.setDefaults(a.cfg.MaxPods)
	err := cfg.validate()
	if err == nil && (cfg.Worker < 0 || cfg.Worker >= a.cfg.Workers) {
		err = fmt.Errorf("snat: worker %d of %d", cfg.Worker, a.cfg.Workers)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	m, err := newMemoryIn(&cfg, a, file)
	if err != nil {
		return nil, err
	}
	return newTranslator(cfg, a, m), nil
}

func newTranslator(cfg Config, a *Allocator, m *memory) *Translator {
	t := &Translator{cfg: cfg, alloc: a, mem: m, rand: newRand(), pods: make([]podState, a.cfg.MaxPods+1), hostV: a.hostV.Load()}
	t.v4, t.v6 = m.tables()
	for _, tb := range []*table{t.v4, t.v6} {
		tb.seed, tb.filter = newSeeds(), &a.pins
		tb.pods = make([]podSessions, len(t.pods))
		tb.share = share{capacity: len(tb.recs), guarantee: cfg.SessionGuarantee}
		tb.half = share{capacity: cfg.HalfOpen, guarantee: max(1, min(cfg.HalfOpen/len(t.pods), cfg.SessionGuarantee))}
		tb.share.attach(0)
		tb.half.attach(0)
	}
	for c := range t.ports {
		t.ports[c] = newLeases(a)
	}
	t.pods[len(t.pods)-1].attached = true // flows without a pod
	tm := &cfg.Timers
	t.timeouts = [numTimers]int64{timerUDP: int64(tm.UDP), timerICMP: int64(tm.ICMP), timerTCPOpening: int64(tm.TCPOpening),
		timerTCPEstablished: int64(tm.TCPEstablished), timerTCPClosing: int64(tm.TCPClosing), timerTCPReset: int64(tm.TCPReset), timerOther: int64(tm.Other)}
	t.frags = newFragments(&cfg, len(t.pods))
	t.ids.init(t.rand, cfg.Worker, a.cfg.Workers)
	return t
}

// File is the memfd with the sessions, to be handed to the next process. It stays the translator's.
func (t *Translator) File() *os.File { return t.mem.file }

// Close unmaps the tables and closes the memfd. What was handed to another process lives on there.
func (t *Translator) Close() error { return t.mem.close() }

// SetNow sets the time, in nanoseconds of a monotonic clock that outlives the process (CLOCK_MONOTONIC). Expire does it, too.
func (t *Translator) SetNow(now int64) {
	t.now, t.tick = now, tickOf(now)
	if !t.started {
		t.started = true
		t.v4.wheel.cur, t.v6.wheel.cur = t.tick, t.tick
	}
}

// Config is the configuration with its defaults filled in.
func (t *Translator) Config() Config { return t.cfg }

// SetNodeAddresses sets the external addresses; the zero Addr for none. Sessions of a family whose address changes end, since replies
// to them cannot arrive any more: it returns how many. The first call after New or Adopt ends those made with another address. It takes as long as there are sessions.
func (t *Translator) SetNodeAddresses(v4, v6 packet.Addr) (flushed int) {
	flushed = t.setNode(t.v4, &t.node4, v4) + t.setNode(t.v6, &t.node6, v6)
	t.mem.head.node4, t.mem.head.node6 = t.node4, t.node6
	return flushed
}

func (t *Translator) setNode(tb *table, node *packet.Addr, to packet.Addr) (flushed int) {
	if *node == to {
		return 0
	}
	*node = to
	for n := *tb.high; n > 0; n-- {
		if f := tb.recs[n-1].flags; f&flagLive != 0 && f&(flagPin|flagMapping) == 0 {
			t.end(tb, n, true)
			flushed++
		}
	}
	t.counts.Flushed += uint64(flushed)
	return flushed
}

// AddPod attaches a pod: index below the allocator's MaxPods, and its addresses, the zero Addr for none. It is an error if the index is
// in use, or if its former pod's sessions are still being ended by Expire.
func (t *Translator) AddPod(pod int, addr4, addr6 packet.Addr) error {
	if pod < 0 || pod >= len(t.pods)-1 {
		return fmt.Errorf("snat: pod index %d: want 0 to %d", pod, len(t.pods)-2)
	}
	p := &t.pods[pod]
	if p.attached || p.leaving {
		return fmt.Errorf("snat: pod index %d is in use", pod)
	}
	p.attached, p.addr4, p.addr6 = true, addr4, addr6
	for _, tb := range []*table{t.v4, t.v6} {
		tb.share.attach(tb.pods[pod].sessions)
		tb.half.attach(tb.pods[pod].halfOpen)
	}
	t.frags.share.attach(t.frags.pods[pod])
	t.alloc.attach(pod)
	return nil
}

// RemovePod detaches a pod: it gets no new sessions from now on, Expire ends those it has, piece by piece, and then its ports go
// back to the allocator, to rest. Until Leaving says false, its address must not be given to another pod.
func (t *Translator) RemovePod(pod int) {
	if pod >= 0 && pod < len(t.pods)-1 && t.pods[pod].attached {
		p := &t.pods[pod]
		p.attached, p.leaving = false, true
		t.leaving++
	}
}

// Leaving reports whether sessions of a removed pod are still there.
func (t *Translator) Leaving(pod int) bool { return t.pods[pod].leaving }

// leave ends sessions of removed pods. It returns what is left of the budget.
func (t *Translator) leave(budget int) int {
	for pod := range t.pods {
		p := &t.pods[pod]
		if !p.leaving {
			continue
		}
		for _, tb := range []*table{t.v4, t.v6} {
			for tb.pods[pod].first != 0 {
				if budget <= 0 {
					return 0
				}
				budget--
				n := tb.pods[pod].first // never a mapping: its sessions are newer, and so in front of it
				t.end(tb, n, true)
				t.counts.Ended++
			}
		}
		rest := tickAfter(t.now + int64(t.cfg.Timers.PortRest))
		for class := range t.ports {
			for _, c := range p.chunks[class] {
				t.ports[class].give(int(c))
				t.alloc.giveBack(Class(class), int(c), t.cfg.Worker, pod, rest)
			}
			p.chunks[class] = p.chunks[class][:0]
		}
		for _, tb := range []*table{t.v4, t.v6} {
			tb.share.detach(tb.pods[pod].sessions)
			tb.half.detach(tb.pods[pod].halfOpen)
		}
		t.frags.share.detach(t.frags.pods[pod])
		t.alloc.detach(pod)
		p.leaving = false
		t.leaving--
	}
	return budget
}

// Expire sets the time and does the work that time brings, at most budget steps of it: ends sessions that are over, those of removed pods and those
// whose port the host took, and returns unused ports. It is to be called once a poll; a step costs at most a few hundred nanoseconds.
// It reports whether something is left to do.
func (t *Translator) Expire(now int64, budget int) (more bool) {
	t.SetNow(now)
	if t.leaving > 0 {
		budget = t.leave(budget)
	}
	if v := t.alloc.hostV.Load(); v != t.hostV {
		t.hostV = v
		t.sweep = [2]int{int(*t.v4.high), int(*t.v6.high)}
	}
	for i, tb := range [2]*table{t.v4, t.v6} {
		for t.sweep[i] > 0 && budget > 0 {
			budget--
			t.evictHost(tb, uint32(t.sweep[i]))
			t.sweep[i]--
		}
	}
	for _, tb := range []*table{t.v4, t.v6} {
		if tb.wheel.cur != t.tick {
			budget = t.expireTable(tb, t.tick, budget)
		}
	}
	t.checkChunks(min(budget, 8))
	t.frags.expire(t.tick)
	return budget <= 0
}

// evictHost ends a session whose port the host has bound.
func (t *Translator) evictHost(tb *table, n uint32) {
	r := &tb.recs[n-1]
	if r.flags&flagLive == 0 || r.flags&(flagPin|flagMapping) != 0 || !t.alloc.HostPort(r.proto, r.extPort) {
		return
	}
	t.end(tb, n, true)
	t.counts.HostPort++
}

// end ends a session: its record, and with it its mapping and its hold on the port if it was the last. rest says whether the port rests
// (RFC 6888 REQ-8), unless TCP's own end of the connection has seen to that.
func (t *Translator) end(tb *table, n uint32, rest bool) {
	r := &tb.recs[n-1]
	m, proto, port, flags := r.mapping, r.proto, r.extPort, r.flags
	if proto == packet.ProtoTCP && r.tcp&(tcpFinOut|tcpFinIn) == tcpFinOut|tcpFinIn {
		rest = false
	}
	if flags&flagPin == 0 {
		if _, ok := ClassOf(proto); !ok {
			t.event(tb, n, false)
		}
	}
	tb.unlink(n)
	if flags&flagPin != 0 {
		return
	}
	mapped := m != 0
	for m != 0 {
		mr := &tb.recs[m-1]
		if rest {
			mr.in = 1 // one session that needs it is enough for the port to rest
		}
		if mr.mapping--; mr.mapping > 0 {
			return
		}
		parent := mr.out
		rest = mr.in != 0
		tb.unlink(m)
		m = parent
	}
	if class, ok := ClassOf(proto); ok {
		t.release(class, port, mapped && rest)
	}
}

// Counts are the translator's counters.
func (t *Translator) Counts() Counts {
	c := t.counts
	c.add(&t.v4.counts)
	c.add(&t.v6.counts)
	c.FragmentsTracked, c.FragmentsHeld = t.frags.tracked, t.frags.heldTotal
	return c
}

// tableOf is the table and external address for a packet's family.
func (t *Translator) tableOf(k packet.Kind) (*table, packet.Addr) {
	if k == packet.KindIPv6 {
		return t.v6, t.node6
	}
	return t.v4, t.node4
}
