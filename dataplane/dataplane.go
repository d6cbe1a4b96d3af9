package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// How an idle worker behaves.
const (
	// patience is how long a worker that ran dry goes on asking, if the next packet came within as much of it the last time. Being woken costs whoever waits for an answer, and waking costs
	// who sends a stream. Others find it asleep.
	patience = 50 * time.Microsecond
	// gather is how much of it passes before TAPs are asked.
	gather = 10 * time.Microsecond
	// sleep is the longest a worker stays in epoll, so that its heartbeat goes on. The steering program's limit is a multiple of it.
	sleep = 250 * time.Millisecond
	// sleepOwing is the same while a device has frames that it has not sent, or not given back: that it has room again wakes nobody.
	sleepOwing = 10 * time.Millisecond
)

// WorkerConfig is what one worker is given.
type WorkerConfig struct {
	Pool      *port.Pool // its frames; the worker is its owner from Start (or the first Poll) on
	CPU       int        // core to pin the thread to; -1: any
	Heartbeat *uint64    // where to store CLOCK_MONOTONIC nanoseconds on every poll; nil: nowhere

	// Translator translates what leaves the cluster; the worker is its owner from Start (or the first Poll) on, tells it the node's addresses and the pods, and does not close it.
	// nil: pods' packets for the outside are dropped.
	Translator *snat.Translator
	// Flows, if not nil, is told of translated flows of protocols without translated ports, on the worker's thread, before a flow's first packet is sent: it must not block.
	// lost: some ended of which it was not told. events is valid during the call only.
	Flows func(events []snat.FlowEvent, lost bool)
}

// Config configures a data plane.
type Config struct {
	Workers []WorkerConfig
	Logger  *slog.Logger // nil: slog.Default()
}

// Dataplane is a set of workers that forward by the last published snapshot. Its methods may be called from any goroutine, Publish from one at a time.
type Dataplane struct {
	snapshot   atomic.Pointer[Snapshot]
	generation uint64
	workers    []*Worker
	log        *slog.Logger

	running  atomic.Bool
	stop     atomic.Bool
	finished sync.WaitGroup
}

// New makes a data plane that forwards nothing until a snapshot is published and Start is called.
func New(cfg Config) (*Dataplane, error) {
	if len(cfg.Workers) == 0 {
		return nil, errors.New("dataplane: no workers")
	}
	d := &Dataplane{log: cfg.Logger}
	if d.log == nil {
		d.log = slog.Default()
	}
	var ts unix.Timespec
	start := time.Now()
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return nil, fmt.Errorf("dataplane: clock_gettime: %w", err)
	}
	for i, wc := range cfg.Workers {
		if wc.Pool == nil {
			return nil, fmt.Errorf("dataplane: worker %d has no pool", i)
		}
		w := &Worker{
			index: i, cpu: wc.CPU, of: len(cfg.Workers), pool: wc.Pool, log: d.log.With("worker", i),
			published: &d.snapshot, heartbeat: wc.Heartbeat, clock: clock{start: start, base: ts.Nano()},
			limiter: icmp.NewLimiter(icmp.Limits{}), translator: wc.Translator, tellFlows: wc.Flows,
		}
		if w.translator != nil {
			w.waiting.init(w.translator.Config().HeldFragments)
		}
		if err := w.wait.open(); err != nil {
			return nil, err
		}
		d.workers = append(d.workers, w)
	}
	if d.workers[0].translator != nil {
		connect(d.workers)
	}
	return d, nil
}

// Workers are the workers, for tests and benchmarks that drive Poll themselves instead of calling Start.
func (d *Dataplane) Workers() []*Worker { return d.workers }

// Publish makes s what the workers forward by from their next poll on, and returns its generation. s is immutable from here on. It panics if an
// adjacency names a slot the snapshot does not have: the packet path relies on it.
func (d *Dataplane) Publish(s *Snapshot) uint64 {
	for i := range s.FIB.NumAdjacencies() {
		if p := s.FIB.Adjacency(uint32(i)).Port; int(p) >= len(s.Ports) {
			panic(fmt.Sprintf("dataplane: adjacency %d names slot %d of %d", i, p, len(s.Ports)))
		}
	}
	for i := FirstPodSlot; i < len(s.Ports); i++ {
		s.Ports[i].Pod = i - FirstPodSlot
	}
	d.generation++
	s.Generation = d.generation
	d.snapshot.Store(s)
	if !d.stop.Load() {
		d.wake()
	}
	return s.Generation
}

// Quiesce waits until every worker has finished a poll that forwarded by generation or a later one. From then on none of them knows ports
// and adjacencies that only earlier snapshots had: ports may be closed, slots given away. A sleeping worker is woken to pass; a stopped one has passed.
func (d *Dataplane) Quiesce(ctx context.Context, generation uint64) error {
	if d.stop.Load() {
		return nil
	}
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, 5*time.Millisecond) {
		behind := -1
		for _, w := range d.workers {
			if w.passed.Load() < generation {
				behind = w.index
			}
		}
		if behind < 0 {
			return nil
		}
		d.wake()
		select {
		case <-ctx.Done():
			return fmt.Errorf("dataplane: worker %d has not passed snapshot %d: %w", behind, generation, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// Start runs every worker on a thread of its own. Call it once.
func (d *Dataplane) Start() {
	d.running.Store(true)
	for _, w := range d.workers {
		d.finished.Add(1)
		go func() {
			defer d.finished.Done()
			w.run(&d.stop)
		}()
	}
}

// Stop ends the workers after their current poll and releases what New took, also if Start was never called. Ports and pools stay as they are;
// nobody forwards any more.
func (d *Dataplane) Stop(ctx context.Context) error {
	if d.stop.Swap(true) {
		return errors.New("dataplane: stopped already")
	}
	ended := make(chan struct{})
	go func() {
		d.finished.Wait()
		close(ended)
	}()
	for {
		d.wake()
		select {
		case <-ended:
			d.running.Store(false)
			for _, w := range d.workers {
				w.wait.close()
			}
			return nil
		case <-ctx.Done():
			return fmt.Errorf("dataplane: workers do not stop: %w", ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// Stats returns every worker's counters, each taken between two polls.
func (d *Dataplane) Stats(ctx context.Context) ([]WorkerStats, error) {
	all := make([]WorkerStats, len(d.workers))
	for i := range d.workers {
		if err := d.Ask(ctx, i, func(_ *snat.Translator, s *WorkerStats) { all[i] = *s }); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Ask calls f between two polls of worker i, on its thread if it runs, with its translator (nil if it has none) and its counters. Packets wait for f.
func (d *Dataplane) Ask(ctx context.Context, i int, f func(*snat.Translator, *WorkerStats)) error {
	w := d.workers[i]
	if !d.running.Load() {
		s := w.collect()
		f(w.translator, &s)
		return nil
	}
	r := &statsRequest{ask: f, done: make(chan struct{})}
	for !w.request.CompareAndSwap(nil, r) { // another reader's turn
		select {
		case <-ctx.Done():
			return fmt.Errorf("dataplane: counters of worker %d: %w", i, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
	w.wait.interrupt()
	select {
	case <-r.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("dataplane: counters of worker %d: %w", i, ctx.Err())
	}
}

func (d *Dataplane) wake() {
	for _, w := range d.workers {
		w.wait.interrupt()
	}
}

// watch goes on until there is something or patience, counted from since, has ended, and reports whether there was. At first it looks at nothing but the queues that cost no system call: what comes
// at once is the next of a stream, and better taken with those behind it. Whoever else wants the core gets it in between.
func (w *Worker) watch(since int64) bool {
	for w.now-since < int64(patience) {
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0)
		if w.now-since < int64(gather) {
			w.now = w.clock.now()
			if w.servePolled() > 0 {
				w.polls++
				w.busyPolls++
				return true
			}
			continue
		}
		if w.Poll() > 0 {
			return true
		}
	}
	return false
}

// park sleeps in epoll.
func (w *Worker) park() {
	w.parks++
	w.parked.Store(true)
	if !w.expecting() { // who hands something over from here on sees that it must wake this worker
		limit := sleep
		if len(w.kicks) > 0 {
			limit = sleepOwing
		}
		w.wait.sleep(limit)
	}
	w.parked.Store(false)
}

// run polls until told to stop; idle, it sleeps in epoll.
func (w *Worker) run(stop *atomic.Bool) {
	runtime.LockOSThread()
	if w.cpu >= 0 {
		var set unix.CPUSet
		set.Set(w.cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			w.log.Warn("cannot pin the worker to its core: it runs anywhere", "cpu", w.cpu, "error", err)
			w.cpu = -1
		}
	}
	brisk := false
	for !stop.Load() {
		if w.Poll() > 0 {
			continue
		}
		dry := w.now
		if brisk && w.watch(dry) {
			continue
		}
		w.park()
		brisk = w.clock.now()-dry < int64(patience)
	}
}
