package server

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

// Config is what a Server may be told. The zero value of every field but Version is complete.
type Config struct {
	// Name is who this controller is, for other controllers' logs.
	Name    string
	Version string
	IPAM    ipam.Config
	// Ranges are made the cluster's, with SNAT, when this controller comes to lead; no pods: those of the store stay as they are.
	Ranges ipam.Ranges
	SNAT   []byte // SnatRules as protobuf's JSON
	// AckTimeout is how long a node may take to accept what it is sent; 0: 30 s.
	AckTimeout time.Duration
	// Grace is how long after a start nodes that have not said hello count as connected; 0: 60 s.
	Grace time.Duration
	// Pace is the least time between versions; 0: 20 ms. It grows with the number of nodes.
	Pace time.Duration
	Log  *slog.Logger
}

const (
	defaultAckTimeout = 30 * time.Second
	defaultGrace      = 60 * time.Second
	defaultPace       = 20 * time.Millisecond
	// pacePerNode keeps a storm of joins from making as many messages as there are pairs of nodes.
	pacePerNode = 20 * time.Microsecond
	tickEvery   = time.Second
	// snapshotSlots is how many nodes are sent snapshots at once.
	snapshotSlots = 64
	// maxSlotTime is how long one node may have a slot, whatever it does.
	maxSlotTime = time.Second
)

// Server is a controller on a store. Run leads the cluster while it can; the services are in Sync and Admin.
type Server struct {
	cfg      Config
	log      *slog.Logger
	store    *store.Store
	alloc    *ipam.Allocator
	graph    *graph
	progress *progress
	metrics  *metrics

	slots chan struct{}
	poke  chan struct{} // tick now

	mu      sync.Mutex
	leading bool
	leads   func(bool) // told when leading changes
	pending []pending
	reset   bool
	changed chan struct{}

	allowed allowance
}

// New returns a server. The store is the caller's to close, after Run returned.
func New(s *store.Store, cfg Config) *Server {
	if cfg.AckTimeout == 0 {
		cfg.AckTimeout = defaultAckTimeout
	}
	if cfg.Grace == 0 {
		cfg.Grace = defaultGrace
	}
	if cfg.Pace == 0 {
		cfg.Pace = defaultPace
	}
	if cfg.IPAM.Now == nil {
		cfg.IPAM.Now = time.Now
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	v := &Server{
		cfg: cfg, log: cfg.Log, store: s, alloc: ipam.NewAllocator(s, cfg.IPAM), graph: newGraph(cfg.Log),
		progress: &progress{now: cfg.IPAM.Now, nodes: make(map[string]*nodeProgress)},
		slots:    make(chan struct{}, snapshotSlots), poke: make(chan struct{}, 1), changed: make(chan struct{}, 1), reset: true,
		leads: func(bool) {},
	}
	v.metrics = newMetrics(v)
	s.Follow(v.follow)
	return v
}

// OnLead has f called whenever this controller comes to lead or leads no more. Call it before Run.
func (v *Server) OnLead(f func(bool)) { v.leads = f }

// follow takes the store's changes; it is called with the store's lock held.
func (v *Server) follow(revision int64, changes []ipam.Change) {
	v.mu.Lock()
	if changes == nil {
		v.reset, v.pending = true, nil
	} else {
		v.pending = append(v.pending, pending{revision, changes})
	}
	v.mu.Unlock()
	select {
	case v.changed <- struct{}{}:
	default:
	}
}

// Run keeps the table up to date and leads the cluster whenever it can, until ctx ends.
func (v *Server) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { v.publish(ctx) })
	defer wg.Wait()
	for ctx.Err() == nil {
		if err := v.lead(ctx); err != nil && ctx.Err() == nil {
			v.log.Error("leading ended", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
	resign, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return v.store.Resign(resign)
}

// lead waits for the lead and uses it until it is lost.
func (v *Server) lead(ctx context.Context) error {
	lost, err := v.store.Campaign(ctx, v.cfg.Name)
	if err != nil {
		return err
	}
	v.log.Info("this controller leads")
	v.progress.lead(v.cfg.Grace)
	if len(v.cfg.Ranges.Pods) > 0 {
		warnings, err := v.alloc.Configure(ctx, v.cfg.Ranges, v.cfg.SNAT)
		for _, w := range warnings {
			v.log.Warn("ranges", "warning", w)
		}
		if err != nil {
			return errors.Join(err, v.store.Resign(ctx))
		}
	}
	v.setLeading(true)
	defer func() {
		v.setLeading(false)
		v.progress.endAll(errNotLeading)
	}()
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-lost:
			return errors.New("the lease of the lead was lost")
		case <-tick.C:
		case <-v.poke:
		}
		if err := v.tick(ctx); errors.Is(err, ipam.ErrNotLeader) {
			return err
		} else if err != nil && ctx.Err() == nil {
			v.log.Warn("what is due could not be done; it is tried again", "error", err)
		}
	}
}

func (v *Server) setLeading(leading bool) {
	v.mu.Lock()
	v.leading = leading
	v.mu.Unlock()
	v.leads(leading)
}

// Leading reports whether this controller leads.
func (v *Server) Leading() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.leading
}

// tick moves blocks on: RELEASING ones whose owners acknowledged, COOLDOWN ones that rested.
func (v *Server) tick(ctx context.Context) error {
	incarnation := v.graph.version().GetIncarnation()
	owners := make(map[string]int64)
	err := v.store.Read(ctx, 0, func(t *ipam.Table) {
		for _, b := range t.Blocks() {
			if b.State != ipam.Releasing {
				continue
			}
			if r := v.progress.withdrawn(b.Owner, incarnation); r >= b.Revision {
				owners[b.Owner] = r
			}
		}
	})
	if err != nil {
		return err
	}
	for owner, r := range owners {
		if _, err := v.alloc.OwnerAcked(ctx, owner, r); err != nil {
			return err
		}
		v.log.Info("the owner acknowledged the release of its blocks", "node", owner)
	}
	freed, err := v.alloc.Tick(ctx, v.progress.of(incarnation))
	for _, f := range freed {
		if len(f.Laggards) > 0 {
			v.log.Warn("a block is free after its deadline, though nodes have not withdrawn its route", "block", f.Block.CIDR, "last_owner", f.Block.Owner, "nodes", f.Laggards)
			v.metrics.laggards.Add(float64(len(f.Laggards)))
			continue
		}
		v.log.Info("a block is free", "block", f.Block.CIDR, "last_owner", f.Block.Owner)
	}
	return err
}

func (v *Server) tickNow() {
	select {
	case v.poke <- struct{}{}:
	default:
	}
}

// publish makes versions of the store's changes, not faster than the pace.
func (v *Server) publish(ctx context.Context) {
	var last time.Time
	for {
		v.mu.Lock()
		idle := !v.reset && len(v.pending) == 0
		v.mu.Unlock()
		if idle {
			select {
			case <-ctx.Done():
				return
			case <-v.changed:
				continue
			}
		}
		pace := v.cfg.Pace + time.Duration(v.metrics.streams.Load())*pacePerNode
		if rest := pace - time.Since(last); rest > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(rest):
			}
		}
		last = time.Now()
		v.mu.Lock()
		reset, list := v.reset, v.pending
		v.reset, v.pending = false, nil
		v.mu.Unlock()
		if reset {
			if err := v.store.Read(ctx, 0, v.graph.reset); err != nil {
				return
			}
		}
		v.graph.apply(list)
	}
}

// allowance is how many removals an operator allows, and until when.
type allowance struct {
	mu    sync.Mutex
	count uint32
	until time.Time
	moved chan struct{}
}

func (a *allowance) set(count uint32, until time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.count, a.until = count, until
	if a.moved != nil {
		close(a.moved)
		a.moved = nil
	}
}

// get returns the count, and a channel that is closed when it changes.
func (a *allowance) get(now time.Time) (uint32, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.moved == nil {
		a.moved = make(chan struct{})
	}
	if now.After(a.until) {
		return 0, a.moved
	}
	return a.count, a.moved
}
