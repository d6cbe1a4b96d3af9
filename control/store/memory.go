package store

import (
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/overplane/overplane/ipam"
)

// Memory is a store without etcd: what several controllers share in a test. Its methods may be called concurrently.
type Memory struct {
	mu      sync.Mutex
	at      int64 // revision
	records map[string]ipam.KV
	history []memoryWrite
	moved   chan struct{}
	leader  int64         // create revision of the leader's key; 0: nobody leads
	lost    chan struct{} // the leader's
	vacant  chan struct{} // closed while nobody leads

	// Fault, if set, is asked before every transaction, without locks held. If happens is false it is not run; err is what its caller gets in any case,
	// nil for the truth. Set it before the first use.
	Fault func(ipam.Tx) (happens bool, err error)
}

type memoryWrite struct {
	revision int64
	writes   []ipam.KV
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	m := &Memory{at: 1, records: make(map[string]ipam.KV), moved: make(chan struct{}), vacant: make(chan struct{})}
	close(m.vacant)
	return m
}

// Open is one controller's view of the store. Closing it leaves the records.
func (m *Memory) Open(ctx context.Context) (*Store, error) { return open(ctx, m, nil) }

func (m *Memory) load(context.Context) ([]ipam.KV, int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]ipam.KV, 0, len(m.records))
	for _, kv := range m.records {
		out = append(out, kv)
	}
	slices.SortFunc(out, func(a, b ipam.KV) int { return strings.Compare(a.Key, b.Key) })
	return out, m.at, nil
}

func (m *Memory) watch(ctx context.Context, after int64, f func(int64, []ipam.KV)) error {
	for {
		m.mu.Lock()
		i, _ := slices.BinarySearchFunc(m.history, after+1, func(w memoryWrite, r int64) int { return int(w.revision - r) })
		news, moved := m.history[i:], m.moved
		m.mu.Unlock()
		for _, w := range news {
			f(w.revision, w.writes)
			after = w.revision
		}
		if len(news) > 0 {
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-moved:
		}
	}
}

func (m *Memory) revision(context.Context) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at, nil
}

func (m *Memory) commit(ctx context.Context, tx ipam.Tx, fence int64) (int64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	var said error
	if m.Fault != nil {
		happens, err := m.Fault(tx)
		if !happens {
			return 0, err
		}
		said = err
	}
	revision, err := m.run(tx, fence)
	if said != nil {
		return 0, said
	}
	return revision, err
}

func (m *Memory) run(tx ipam.Tx, fence int64) (int64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if fence != 0 && fence != m.leader {
		return 0, ipam.ErrNotLeader
	}
	for _, c := range tx.If {
		if m.records[c.Key].Revision != c.Revision {
			return 0, ipam.ErrConflict
		}
	}
	m.at++
	w := memoryWrite{revision: m.at}
	for _, kv := range tx.Put {
		kv.Revision = m.at
		m.records[kv.Key] = kv
		w.writes = append(w.writes, kv)
	}
	for _, k := range tx.Delete {
		if _, ok := m.records[k]; ok {
			delete(m.records, k)
			w.writes = append(w.writes, ipam.KV{Key: k, Revision: m.at})
		}
	}
	m.history = append(m.history, w)
	close(m.moved)
	m.moved = make(chan struct{})
	return m.at, nil
}

func (m *Memory) campaign(ctx context.Context, _ string) (int64, <-chan struct{}, error) {
	for {
		m.mu.Lock()
		if m.leader == 0 {
			m.at++
			m.leader, m.lost, m.vacant = m.at, make(chan struct{}), make(chan struct{})
			defer m.mu.Unlock()
			return m.leader, m.lost, nil
		}
		vacant := m.vacant
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		case <-vacant:
		}
	}
}

func (m *Memory) resign(_ context.Context, fence int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.leader == fence {
		m.depose()
	}
	return nil
}

func (m *Memory) depose() {
	m.leader = 0
	close(m.lost)
	close(m.vacant)
}

// Depose takes the lead from whoever has it, as the expiry of its lease would.
func (m *Memory) Depose() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.leader != 0 {
		m.depose()
	}
}

func (m *Memory) close() error { return nil }

// Adopt gives s the fence of whoever leads m, so that several controllers may write at once: which election is to prevent, for tests of what holds if it
// does not.
func (s *Store) Adopt(m *Memory) {
	m.mu.Lock()
	fence := m.leader
	m.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fence = fence
}
