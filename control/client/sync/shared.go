package syncclient

import (
	"sync"

	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Shared lets thousands of clients in one process have what is the same for all of them once: for simulations. What a difference makes of a table is
// worked out by the first client that gets it, and taken over by the others, which still decode, compare digests and acknowledge each for itself. Routes to
// the node itself are not taken out of the states that apply is called with.
type Shared struct {
	mu     sync.Mutex
	tables map[string]*controlv1.NodeState // by version
	order  []string                        // of tables, oldest first
}

// sharedTables is how many versions are kept.
const sharedTables = 64

// NewShared returns an empty Shared.
func NewShared() *Shared { return &Shared{tables: make(map[string]*controlv1.NodeState)} }

// delta is the function delta, once for each version.
func (s *Shared) delta(common *controlv1.NodeState, b *controlv1.SyncResponse) (*controlv1.NodeState, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := sharedKey(b.GetVersion())
	if t := s.tables[k]; t != nil {
		return s.as(common.GetNode(), t), nil
	}
	t, err := delta(common, b)
	if err == nil {
		s.keep(k, t)
	}
	return t, err
}

// intern replaces the lists of a table by those that others have of the same version, if the digests say that they are equal.
func (s *Shared) intern(t *table) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := sharedKey(t.version())
	have := s.tables[k]
	if have == nil {
		s.keep(k, t.common)
		return
	}
	if have.GetDigest() == t.common.GetDigest() && have.GetEntryCount() == t.common.GetEntryCount() {
		t.common = s.as(t.common.GetNode(), have)
	}
}

func (s *Shared) as(node string, t *controlv1.NodeState) *controlv1.NodeState {
	return &controlv1.NodeState{
		Node: node, Version: t.GetVersion(), Digest: t.GetDigest(), EntryCount: t.GetEntryCount(),
		Pools: t.GetPools(), Members: t.GetMembers(), Routes: t.GetRoutes(), Snat: t.GetSnat(),
	}
}

func (s *Shared) keep(k string, t *controlv1.NodeState) {
	s.tables[k] = t
	if s.order = append(s.order, k); len(s.order) > sharedTables {
		delete(s.tables, s.order[0])
		s.order = s.order[1:]
	}
}

func sharedKey(v *controlv1.Version) string {
	b, _ := proto.Marshal(v) // two plain fields
	return string(b)
}
