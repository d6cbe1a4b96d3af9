package syncclient

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// full is a table of so many nodes, n1 being the reader, at a revision.
func full(nodes int, incarnation string, revision uint64) *controlv1.NodeState {
	s := &controlv1.NodeState{
		Node: "n1", Version: &controlv1.Version{Incarnation: incarnation, Revision: revision},
		Pools: []*controlv1.Pool{{Cidr: "10.244.0.0/16", BlockPrefixLength: 24}}, OwnBlocks: []*controlv1.OwnBlock{{Cidr: "10.244.1.0/24"}},
	}
	for i := 1; i <= nodes; i++ {
		s.Members = append(s.Members, &controlv1.Member{Name: fmt.Sprintf("n%d", i), Ipv4: fmt.Sprintf("10.240.0.%d", i)})
		s.Routes = append(s.Routes, &controlv1.Route{Prefix: fmt.Sprintf("10.244.%d.0/24", i), Target: &controlv1.Route_Node{Node: fmt.Sprintf("n%d", i)}})
	}
	api.Seal(s)
	return s
}

// batch is the snapshot that a controller with this table sends.
func batch(s *controlv1.NodeState) *controlv1.SyncResponse {
	return &controlv1.SyncResponse{
		UpsertPools: s.GetPools(), UpsertMembers: s.GetMembers(), UpsertRoutes: s.GetRoutes(), UpsertSnat: s.GetSnat(), OwnBlocks: s.GetOwnBlocks(),
		Version: s.GetVersion(), Digest: s.GetDigest(), EntryCount: s.GetEntryCount(), Snapshot: true, Last: true, Nonce: 1,
	}
}

func TestWhatIsTakenAndWhatIsNot(t *testing.T) {
	have := full(20, "a", 10)
	tests := []struct {
		name string
		have *controlv1.NodeState
		b    *controlv1.SyncResponse
		want controlv1.Rejection // 0: taken
	}{
		{"the first", nil, batch(full(20, "a", 10)), 0},
		{"a newer one", have, batch(full(21, "a", 11)), 0},
		{"the same again", have, batch(full(20, "a", 10)), 0},
		{"an older one, replayed", have, batch(full(20, "a", 9)), controlv1.Rejection_REJECTION_REGRESSION},
		{"other contents at the same version", have, batch(full(21, "a", 10)), controlv1.Rejection_REJECTION_REGRESSION},
		{"an empty one", have, batch(&controlv1.NodeState{Version: &controlv1.Version{Incarnation: "a", Revision: 11}}), controlv1.Rejection_REJECTION_REMOVALS},
		{"an empty one of another store", have, batch(&controlv1.NodeState{Version: &controlv1.Version{Incarnation: "b", Revision: 1}}), controlv1.Rejection_REJECTION_REMOVALS},
		{"the same of another store", have, batch(full(20, "b", 1)), 0},
		{"ten removals", have, batch(full(15, "a", 11)), 0},
		{"more", have, batch(full(14, "a", 11)), controlv1.Rejection_REJECTION_REMOVALS},
		{"more, intended", have, func() *controlv1.SyncResponse {
			b := batch(full(14, "a", 11))
			b.IntendedRemovals = 12
			return b
		}(), 0},
		{"cut short", have, func() *controlv1.SyncResponse {
			b := batch(full(21, "a", 11))
			b.UpsertRoutes = b.UpsertRoutes[:15]
			return b
		}(), controlv1.Rejection_REJECTION_DIGEST},
		{"a difference to nothing", nil, &controlv1.SyncResponse{Version: have.GetVersion(), Last: true}, controlv1.Rejection_REJECTION_DIGEST},
		{"a difference of another store", have, &controlv1.SyncResponse{Version: &controlv1.Version{Incarnation: "b", Revision: 50}, Last: true}, controlv1.Rejection_REJECTION_DIGEST},
		{"an empty difference", have, &controlv1.SyncResponse{
			Version: &controlv1.Version{Incarnation: "a", Revision: 12}, Digest: have.GetDigest(), EntryCount: have.GetEntryCount(), OwnBlocks: have.GetOwnBlocks(), Last: true,
		}, 0},
		{"a difference without a digest", have, &controlv1.SyncResponse{Version: &controlv1.Version{Incarnation: "a", Revision: 12}, OwnBlocks: have.GetOwnBlocks(), Last: true},
			controlv1.Rejection_REJECTION_DIGEST},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := proto.CloneOf(tt.have)
			var have *table
			if tt.have != nil {
				have = newTable(tt.have)
			}
			var g group
			complete, err := g.add(proto.CloneOf(tt.b))
			require.NoError(t, err)
			require.True(t, complete)
			next, err := g.next("n1", have, DefaultRemovalPercent, nil)
			require.True(t, proto.Equal(before, tt.have), "what there was changed")
			if tt.want == 0 {
				require.NoError(t, err)
				require.Equal(t, tt.b.GetDigest(), next.all().GetDigest())
				require.NoError(t, api.Validate(next.state()))
				return
			}
			var r *rejection
			require.ErrorAs(t, err, &r)
			require.Equal(t, tt.want, r.kind, "%v", err)
		})
	}
}

func TestBatchesOfAGroup(t *testing.T) {
	whole := batch(full(20, "a", 10))
	first, second := proto.CloneOf(whole), proto.CloneOf(whole)
	first.UpsertRoutes, first.Last, first.Nonce = first.GetUpsertRoutes()[:7], false, 4
	second.UpsertRoutes, second.UpsertPools, second.UpsertMembers, second.Nonce = second.GetUpsertRoutes()[7:], nil, nil, 5
	var g group
	complete, err := g.add(first)
	require.NoError(t, err)
	require.False(t, complete)
	complete, err = g.add(second)
	require.NoError(t, err)
	require.True(t, complete)
	next, err := g.next("n1", nil, DefaultRemovalPercent, nil)
	require.NoError(t, err)
	require.Len(t, next.common.GetRoutes(), 20)

	for name, change := range map[string]func(*controlv1.SyncResponse){
		"one is missing":         func(b *controlv1.SyncResponse) { b.Nonce++ },
		"another version":        func(b *controlv1.SyncResponse) { b.Version = &controlv1.Version{Incarnation: "a", Revision: 11} },
		"a difference, suddenly": func(b *controlv1.SyncResponse) { b.Snapshot = false },
	} {
		var g group
		_, err := g.add(first)
		require.NoError(t, err)
		b := proto.CloneOf(second)
		change(b)
		_, err = g.add(b)
		require.Error(t, err, name)
	}
}

func TestOwnStateHasNoRouteToItself(t *testing.T) {
	s := newTable(full(3, "a", 10)).state()
	require.Len(t, s.GetRoutes(), 2)
	require.NoError(t, api.Validate(s))
}

func TestTableOnDisk(t *testing.T) {
	dir := t.TempDir()
	table, err := load(dir, "n1")
	require.NoError(t, err)
	require.Nil(t, table)
	require.NoError(t, save(dir, full(3, "a", 10)))
	require.NoError(t, save(dir, full(4, "a", 11)))
	table, err = load(dir, "n1")
	require.NoError(t, err)
	require.True(t, proto.Equal(full(4, "a", 11), table))
	_, err = load(dir, "n2")
	require.ErrorContains(t, err, `is node "n1"'s`)
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1)

	name := filepath.Join(dir, TableFile)
	good, err := os.ReadFile(name)
	require.NoError(t, err)
	for i := range good {
		bad := append([]byte(nil), good...)
		bad[i] ^= 0x40
		require.NoError(t, os.WriteFile(name, bad, 0o600))
		_, err = load(dir, "n1")
		require.Error(t, err, "byte %d is wrong and nobody sees it", i)
		require.NoError(t, os.WriteFile(name, good[:i], 0o600))
		_, err = load(dir, "n1")
		require.Error(t, err, "it ends after byte %d and nobody sees it", i)
	}
}

func FuzzGroupNeverBreaksTheTable(f *testing.F) {
	for _, s := range []*controlv1.NodeState{full(3, "a", 10), full(3, "a", 11), full(5, "b", 1)} {
		seed, err := proto.Marshal(batch(s))
		require.NoError(f, err)
		f.Add(seed)
	}
	have := full(4, "a", 10)
	f.Fuzz(func(t *testing.T, wire []byte) {
		b := &controlv1.SyncResponse{}
		if proto.Unmarshal(wire, b) != nil {
			return
		}
		before := proto.CloneOf(have)
		var g group
		_, _ = g.add(b)
		next, err := g.next("n1", newTable(have), DefaultRemovalPercent, nil)
		if !proto.Equal(before, have) {
			t.Fatal("what there was changed")
		}
		if err == nil {
			digest, count := api.Digest(next.all())
			require.Equal(t, digest, b.GetDigest())
			require.Equal(t, count, b.GetEntryCount())
			_ = api.Validate(next.state())
		}
	})
}
