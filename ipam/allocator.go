package ipam

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// Config is what an Allocator may be told. The zero value is complete.
type Config struct {
	// Cooldown is how long a block rests before another node may get it; 0: DefaultCooldown.
	Cooldown time.Duration
	// Deadline is how long nodes that do not acknowledge a withdrawal can hold a block in COOLDOWN; 0: DefaultDeadline. It is never less than Cooldown.
	Deadline time.Duration
	// Remember is how long nodes that are gone are remembered; 0: a day.
	Remember time.Duration
	// Now is the clock; nil: time.Now.
	Now func() time.Time
}

// Defaults of Config.
const (
	DefaultCooldown = 60 * time.Second
	DefaultDeadline = 10 * time.Minute
	defaultRemember = 24 * time.Hour
)

// attempts is how often a transaction that loses races is planned anew, before somebody is told.
const attempts = 100

// Allocator gives blocks out. It may be used by any number of goroutines; plans run one at a time.
type Allocator struct {
	store Store
	cfg   Config

	mu   sync.Mutex // held from reading to knowing the outcome, so that one process never races itself
	seen int64      // revision of the last transaction

	restMu sync.Mutex
	rest   map[rested]time.Time // when this process first saw a block in COOLDOWN
}

// rested is one stay of a block in COOLDOWN.
type rested struct {
	key      string
	revision int64
}

// NewAllocator returns an allocator on a store.
func NewAllocator(s Store, cfg Config) *Allocator {
	if cfg.Cooldown == 0 {
		cfg.Cooldown = DefaultCooldown
	}
	if cfg.Deadline == 0 {
		cfg.Deadline = DefaultDeadline
	}
	cfg.Deadline = max(cfg.Deadline, cfg.Cooldown)
	if cfg.Remember == 0 {
		cfg.Remember = defaultRemember
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Allocator{store: s, cfg: cfg, rest: make(map[rested]time.Time)}
}

// commit runs plan until its transaction went through or it has nothing to write, and returns the revision that what it found or did holds at. plan
// is called with a table at least as new as the last transaction; what it returns as error ends the attempts.
func (a *Allocator) commit(ctx context.Context, plan func(*Table, *Tx) error) (int64, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for try := 1; ; try++ {
		var tx Tx
		var planned error
		revision := a.seen
		err := a.store.Read(ctx, a.seen, func(t *Table) {
			planned = plan(t, &tx)
			revision = t.Revision
		})
		var exhausted *ExhaustedError
		if try == 1 && err == nil && errors.As(planned, &exhausted) {
			// Perhaps a block became free that this process has not seen yet.
			var latest int64
			if latest, err = a.store.Latest(ctx); err == nil {
				a.seen = max(a.seen, latest)
				continue
			}
		}
		if err := errors.Join(err, planned); err != nil {
			return 0, err
		}
		if tx.Empty() {
			return revision, nil
		}
		revision, err = a.store.Commit(ctx, tx)
		switch {
		case err == nil:
			a.seen = revision
			return revision, nil
		case ctx.Err() != nil:
			return 0, err
		case try == attempts || !errors.Is(err, ErrConflict) && !errors.Is(err, ErrUnknownOutcome):
			return 0, err
		}
		// Whatever happened is in the store by now, and a plan on it finds out.
		latest, err := a.store.Latest(ctx)
		if err != nil {
			return 0, err
		}
		a.seen = max(a.seen, latest)
		if err := pause(ctx, try); err != nil {
			return 0, err
		}
	}
}

// pause lets others go first, for longer the more attempts failed.
func pause(ctx context.Context, try int) error {
	t := time.NewTimer(rand.N(time.Millisecond * time.Duration(min(try, 50))))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// UnknownNodeError says that there is no node of this name.
type UnknownNodeError struct{ Node string }

// Error implements error.
func (e *UnknownNodeError) Error() string {
	return fmt.Sprintf("there is no node %q: overplane nodes lists them", e.Node)
}

// AddPool adds a pool, after those there are. A pool that is there already with the same blocks is no error. It returns the revision.
func (a *Allocator) AddPool(ctx context.Context, r PodRange) (revision int64, warnings []string, err error) {
	revision, err = a.commit(ctx, func(t *Table, tx *Tx) error {
		if p := t.Pool(r.CIDR); p != nil {
			if p.BlockBits != r.BlockBits {
				return fmt.Errorf("pool %s has blocks of /%d already: the size of a pool's blocks is fixed", p.CIDR, p.BlockBits)
			}
			return nil
		}
		order := 0
		for _, p := range t.pools {
			order = max(order, p.Order+1)
		}
		p := &Pool{CIDR: r.CIDR, BlockBits: r.BlockBits, Order: order, Created: a.cfg.Now().UTC()}
		all := t.Ranges()
		all.Pods = append(all.Pods, r)
		warnings, err = all.Validate()
		if err != nil {
			return err
		}
		if err := t.clear(r); err != nil {
			return err
		}
		tx.put(p)
		tx.must(p.key(), 0)
		return nil
	})
	return revision, warnings, err
}

// clear says why a new pool cannot be: a node or a static route is in its way.
func (t *Table) clear(r PodRange) error {
	var errs []error
	for _, n := range t.Nodes() {
		if !n.Gone && (r.CIDR.Contains(n.IPv4) || r.CIDR.Contains(n.IPv6)) {
			errs = append(errs, fmt.Errorf("pod range %s contains the address of node %s (%v %v): pod and node ranges must not overlap one another", r.CIDR, n.Name, n.IPv4, n.IPv6))
		}
	}
	for _, route := range t.Routes() {
		if route.Prefix.Overlaps(r.CIDR) {
			errs = append(errs, fmt.Errorf("pod range %s overlaps static route %s: remove the route first", r.CIDR, route.Prefix))
		}
	}
	return errors.Join(errs...)
}

// Ranges are all ranges of the cluster, its pools included.
func (t *Table) Ranges() Ranges {
	r := t.settings.Ranges
	r.Pods = nil
	// Those that the families' order speaks of come first, as they did when the first pools were made.
	for _, p := range t.pools {
		r.Pods = append(r.Pods, PodRange{p.CIDR, p.BlockBits})
	}
	return r
}

// Configure makes ranges and SNAT rules the cluster's, and creates the pools among them that are not there yet. Pools are never removed.
func (a *Allocator) Configure(ctx context.Context, r Ranges, snat []byte) (warnings []string, err error) {
	if warnings, err = r.Validate(); err != nil {
		return warnings, err
	}
	_, err = a.commit(ctx, func(t *Table, tx *Tx) error {
		s := &Settings{Ranges: r, SNAT: snat}
		s.Ranges.Pods = nil
		with, order := s.Ranges, 0
		with.Pods = t.Ranges().Pods
		for _, p := range t.pools {
			order = max(order, p.Order+1)
		}
		for _, p := range r.Pods {
			if have := t.Pool(p.CIDR); have != nil {
				if have.BlockBits != p.BlockBits {
					return fmt.Errorf("pool %s has blocks of /%d, not of /%d: the size of a pool's blocks is fixed", p.CIDR, have.BlockBits, p.BlockBits)
				}
				continue
			}
			if err := t.clear(p); err != nil {
				return err
			}
			with.Pods = append(with.Pods, p)
			pool := &Pool{CIDR: p.CIDR, BlockBits: p.BlockBits, Order: order, Created: a.cfg.Now().UTC()}
			order++
			tx.put(pool)
			tx.must(pool.key(), 0)
		}
		if _, err := with.Validate(); err != nil {
			return fmt.Errorf("together with the pools that there are: %w", err)
		}
		var want, have Tx
		want.put(s)
		have.put(t.settings)
		if string(want.Put[0].Value) != string(have.Put[0].Value) || t.settings.Revision == 0 {
			tx.put(s)
			tx.must(s.key(), t.settings.Revision)
		}
		return nil
	})
	return warnings, err
}
