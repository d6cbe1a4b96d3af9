package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/overplane/overplane/ipam"
)

// backend is what keeps the records: etcd or memory. Keys are without the store's prefix.
type backend interface {
	// load reads all records, and the revision that they are of.
	load(ctx context.Context) ([]ipam.KV, int64, error)
	// watch calls f with every revision's writes after the given one, in order, until it fails. A nil value is a removal.
	watch(ctx context.Context, after int64, f func(revision int64, writes []ipam.KV)) error
	// revision is the backend's newest one, whoever made it.
	revision(ctx context.Context) (int64, error)
	// commit runs a transaction; fence is the leader key's create revision, 0 for none.
	commit(ctx context.Context, tx ipam.Tx, fence int64) (int64, error)
	// campaign returns when this process leads. lost is closed when it does no more.
	campaign(ctx context.Context, name string) (fence int64, lost <-chan struct{}, err error)
	// resign gives the lead up.
	resign(ctx context.Context, fence int64) error
	close() error
}

// opTimeout bounds one access to the backend.
const opTimeout = 5 * time.Second

// syncKey is written to learn a revision.
const syncKey = "meta/sync"

// Store is a cluster's records. It implements ipam.Store. Its methods may be called concurrently.
type Store struct {
	b    backend
	log  *slog.Logger
	done chan struct{}
	once func() error // closes

	mu        sync.RWMutex
	table     *ipam.Table
	moved     chan struct{} // closed and replaced when the table moves on
	followers []func(revision int64, changes []ipam.Change)
	fence     int64
}

// open loads the records and starts to follow them.
func open(ctx context.Context, b backend, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Store{b: b, log: log, done: make(chan struct{}), moved: make(chan struct{})}
	if err := s.name(ctx); err != nil {
		return nil, err
	}
	if err := s.reload(ctx); err != nil {
		return nil, err
	}
	watch, stop := context.WithCancel(context.Background())
	s.once = sync.OnceValue(func() error {
		stop()
		<-s.done
		return b.close()
	})
	go s.follow(watch)
	return s, nil
}

// name gives the store its incarnation, if nobody did. It writes only then: a store that is full can be read.
func (s *Store) name(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 4*opTimeout)
	defer cancel()
	records, _, err := s.b.load(ctx)
	if err != nil {
		return fmt.Errorf("reading the store: %w", err)
	}
	if slices.ContainsFunc(records, func(kv ipam.KV) bool { return kv.Key == ipam.IncarnationKey }) {
		return nil
	}
	_, err = s.b.commit(ctx, ipam.Tx{
		If:  []ipam.Compare{{Key: ipam.IncarnationKey}},
		Put: []ipam.KV{{Key: ipam.IncarnationKey, Value: []byte(newUUID())}},
	}, 0)
	if errors.Is(err, ipam.ErrConflict) {
		return nil
	}
	return err
}

// newUUID is a random UUID (RFC 9562 section 5.4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// reload replaces the table by what the backend has.
func (s *Store) reload(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 4*opTimeout)
	defer cancel()
	records, revision, err := s.b.load(ctx)
	if err != nil {
		return fmt.Errorf("reading the store: %w", err)
	}
	t := ipam.NewTable()
	for _, kv := range records {
		if _, err := t.Apply(kv); err != nil {
			return fmt.Errorf("reading the store: %w", err)
		}
	}
	t.Revision = revision
	s.mu.Lock()
	defer s.mu.Unlock()
	s.table = t
	s.move(nil)
	return nil
}

// move tells everybody that the table moved on. nil changes: anything may have changed.
func (s *Store) move(changes []ipam.Change) {
	close(s.moved)
	s.moved = make(chan struct{})
	for _, f := range s.followers {
		f(s.table.Revision, changes)
	}
}

// follow keeps the table up to date.
func (s *Store) follow(ctx context.Context) {
	defer close(s.done)
	for {
		s.mu.RLock()
		after := s.table.Revision
		s.mu.RUnlock()
		err := s.b.watch(ctx, after, s.apply)
		for ctx.Err() == nil {
			s.log.Warn("the store's watch ended; reading all of it again", "error", err)
			if err = s.reload(ctx); err == nil {
				break
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
		if ctx.Err() != nil {
			return
		}
	}
}

func (s *Store) apply(revision int64, writes []ipam.KV) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changes := make([]ipam.Change, 0, len(writes))
	for _, kv := range writes {
		c, err := s.table.Apply(kv)
		if err != nil {
			// Somebody wrote to etcd by hand. The record that was is better than none.
			s.log.Error("a record of the store cannot be read and is ignored", "error", err)
			continue
		}
		changes = append(changes, c)
	}
	s.table.Revision = revision
	s.move(changes)
}

// Read implements ipam.Store.
func (s *Store) Read(ctx context.Context, least int64, f func(*ipam.Table)) error {
	for {
		s.mu.RLock()
		if s.table.Revision >= least {
			f(s.table)
			s.mu.RUnlock()
			return nil
		}
		moved := s.moved
		s.mu.RUnlock()
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for revision %d of the store: %w", least, ctx.Err())
		case <-s.done:
			return errors.New("the store is closed")
		case <-moved:
		}
	}
}

// Latest implements ipam.Store. It writes, since only a write's revision is sure to come by on the watch.
func (s *Store) Latest(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return s.b.commit(ctx, ipam.Tx{Put: []ipam.KV{{Key: syncKey, Value: []byte("1")}}}, 0)
}

// Newest is the backend's newest revision. Unlike Latest it writes nothing, and the table may not come to have it by itself.
func (s *Store) Newest(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return s.b.revision(ctx)
}

// Commit implements ipam.Store.
func (s *Store) Commit(ctx context.Context, tx ipam.Tx) (int64, error) {
	s.mu.RLock()
	fence := s.fence
	s.mu.RUnlock()
	if fence == 0 {
		return 0, ipam.ErrNotLeader
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return s.b.commit(ctx, tx, fence)
}

// Campaign returns when this process leads; name is who it is, for people. lost is closed when it leads no more.
func (s *Store) Campaign(ctx context.Context, name string) (lost <-chan struct{}, err error) {
	fence, lost, err := s.b.campaign(ctx, name)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.fence = fence
	s.mu.Unlock()
	return lost, nil
}

// Resign gives the lead up, if this process has it.
func (s *Store) Resign(ctx context.Context) error {
	s.mu.Lock()
	fence := s.fence
	s.fence = 0
	s.mu.Unlock()
	if fence == 0 {
		return nil
	}
	return s.b.resign(ctx, fence)
}

// Follow calls f after every change of the table from now on, in order, with what changed; nil means that anything may have. f holds the table up: it must be
// quick and may not call the store.
func (s *Store) Follow(f func(revision int64, changes []ipam.Change)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.followers = append(s.followers, f)
}

// Records reads all records from the backend, and their revision. For backups.
func (s *Store) Records(ctx context.Context) ([]ipam.KV, int64, error) { return s.b.load(ctx) }

// Close stops following and closes the backend. Closing again does nothing.
func (s *Store) Close() error { return s.once() }
