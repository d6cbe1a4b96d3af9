package api

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// patch is an empty patch from the version of s to the next.
func patchOf(s *controlv1.NodeState) *controlv1.StatePatch {
	next := proto.CloneOf(s.GetVersion())
	next.Revision++
	return &controlv1.StatePatch{Node: s.GetNode(), Base: proto.CloneOf(s.GetVersion()), Version: next}
}

func TestApplyUpsertsAndRemoves(t *testing.T) {
	state := cluster()
	Seal(state)
	before := proto.CloneOf(state)
	p := patchOf(state)
	p.UpsertMembers = []*controlv1.Member{{Name: "n4", Ipv4: "10.240.0.14"}, {Name: "n3", Ipv4: "10.240.0.33"}}
	p.UpsertRoutes = []*controlv1.Route{toNode("10.244.4.0/24", "n4")}
	p.RemoveRoutes = []string{"10.244.7.0/24", "10.244.99.0/24"} // the second is not there
	p.RemoveSnat = true
	given := proto.CloneOf(p)

	got, err := Apply(state, p)
	require.NoError(t, err)
	require.NoError(t, Validate(got))
	requireSame(t, before, state)
	require.True(t, proto.Equal(given, p), "the patch was changed")

	want := cluster()
	want.Version.Revision++
	want.Members[2] = &controlv1.Member{Name: "n3", Ipv4: "10.240.0.33"}
	want.Members = append(want.Members, &controlv1.Member{Name: "n4", Ipv4: "10.240.0.14"})
	want.Routes[4] = toNode("10.244.4.0/24", "n4")
	want.Snat = nil
	Seal(want)
	requireSame(t, want, got)
}

func TestApplyTakesTheHashesItIsGiven(t *testing.T) {
	state := cluster()
	p := patchOf(state)
	p.UpsertRoutes = []*controlv1.Route{toNode("10.244.2.0/24", "n3")}
	p.UpsertRoutes[0].Hash = 99
	got, err := Apply(state, p) // a state without hashes is sealed on the way
	require.NoError(t, err)
	require.Equal(t, uint64(99), got.Routes[0].Hash)
	require.NoError(t, Validate(got))
	require.False(t, Sealed(state), "the state was changed")
}

func TestApplyRefuses(t *testing.T) {
	tests := []struct {
		name   string
		change func(*controlv1.StatePatch)
		want   []string
	}{
		{"other node", func(p *controlv1.StatePatch) { p.Node = "n2" }, []string{`"n2"`, `"n1"`}},
		{"version does not move", func(p *controlv1.StatePatch) { p.Version = p.Base }, []string{"does not follow base"}},
		{"version goes back", func(p *controlv1.StatePatch) { p.Version.Revision = 3 }, []string{"/3 does not follow base"}},
		{"no version", func(p *controlv1.StatePatch) { p.Version = nil }, []string{"version none does not follow base"}},
		{"another history", func(p *controlv1.StatePatch) { p.Version.Incarnation = "other" }, []string{"version other/8"}},
		{"upsert twice, and removed: both at once", func(p *controlv1.StatePatch) {
			p.UpsertRoutes = []*controlv1.Route{toHost("10.1.0.0/16"), toHost("10.1.0.0/16")}
			p.UpsertPools = []*controlv1.Pool{{Cidr: "10.9.0.0/16", BlockPrefixLength: 24}}
			p.RemovePools = []string{"10.9.0.0/16"}
		}, []string{`upsert of route "10.1.0.0/16": the key stands twice`, `removal of pool "10.9.0.0/16": the patch also upserts it`}},
		{"snat upserted and removed", func(p *controlv1.StatePatch) {
			p.UpsertSnat, p.RemoveSnat = &controlv1.SnatRules{}, true
		}, []string{"removal of snat"}},
		{"digest of something else", func(p *controlv1.StatePatch) { p.Digest, p.EntryCount = 1, 13 }, []string{"want 0x0000000000000001 over 13"}},
		{"count of something else", func(p *controlv1.StatePatch) { p.EntryCount = 12 }, []string{"over 13 entries, want", "over 12"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			state := cluster()
			p := patchOf(state)
			tt.change(p)
			got, err := Apply(state, p)
			require.Nil(t, got)
			for _, want := range tt.want {
				require.ErrorContains(t, err, want)
			}
		})
	}
}

func TestApplySaysWhichVersionItWanted(t *testing.T) {
	state := cluster()
	p := patchOf(state)
	p.Base.Revision = 6
	_, err := Apply(state, p)
	var mismatch *BaseMismatchError
	require.ErrorAs(t, err, &mismatch)
	require.Equal(t, uint64(7), mismatch.Have.GetRevision())
	require.Equal(t, uint64(6), mismatch.Base.GetRevision())

	// A state without a version is the zero version.
	state.Version = nil
	p = &controlv1.StatePatch{Node: "n1", Version: &controlv1.Version{Revision: 1}}
	_, err = Apply(state, p)
	require.NoError(t, err)
}

// model is the obvious implementation: a table by kind and key, rebuilt into a state and sealed from scratch.
type model struct {
	pools   map[string]*controlv1.Pool
	own     map[string]*controlv1.OwnBlock
	members map[string]*controlv1.Member
	routes  map[string]*controlv1.Route
	snat    *controlv1.SnatRules
}

func newModel() *model {
	return &model{map[string]*controlv1.Pool{}, map[string]*controlv1.OwnBlock{}, map[string]*controlv1.Member{}, map[string]*controlv1.Route{}, nil}
}

func (m *model) apply(p *controlv1.StatePatch) {
	for _, e := range p.UpsertPools {
		m.pools[e.Cidr] = proto.CloneOf(e)
	}
	for _, e := range p.UpsertOwnBlocks {
		m.own[e.Cidr] = proto.CloneOf(e)
	}
	for _, e := range p.UpsertMembers {
		m.members[e.Name] = proto.CloneOf(e)
	}
	for _, e := range p.UpsertRoutes {
		m.routes[e.Prefix] = proto.CloneOf(e)
	}
	for _, k := range p.RemovePools {
		delete(m.pools, k)
	}
	for _, k := range p.RemoveOwnBlocks {
		delete(m.own, k)
	}
	for _, k := range p.RemoveMembers {
		delete(m.members, k)
	}
	for _, k := range p.RemoveRoutes {
		delete(m.routes, k)
	}
	if p.UpsertSnat != nil {
		m.snat = proto.CloneOf(p.UpsertSnat)
	}
	if p.RemoveSnat {
		m.snat = nil
	}
}

func (m *model) state(node string, v *controlv1.Version) *controlv1.NodeState {
	s := &controlv1.NodeState{Node: node, Version: v, Snat: proto.CloneOf(m.snat)}
	if m.snat == nil {
		s.Snat = nil
	}
	for _, e := range m.pools {
		s.Pools = append(s.Pools, proto.CloneOf(e))
	}
	for _, e := range m.own {
		s.OwnBlocks = append(s.OwnBlocks, proto.CloneOf(e))
	}
	for _, e := range m.members {
		s.Members = append(s.Members, proto.CloneOf(e))
	}
	for _, e := range m.routes {
		s.Routes = append(s.Routes, proto.CloneOf(e))
	}
	Seal(s)
	Sort(s)
	return s
}

// drawPatch draws a patch over few keys, so that they meet again. Each key is upserted, removed or left alone.
func drawPatch(t *rapid.T, base *controlv1.NodeState) *controlv1.StatePatch {
	p := patchOf(base)
	each := func(what string, upsert func(i int), remove func(i int)) {
		for i := range 5 {
			switch rapid.IntRange(0, 3).Draw(t, fmt.Sprintf("%s%d", what, i)) {
			case 0:
				upsert(i)
			case 1:
				remove(i)
			}
		}
	}
	number := rapid.Uint32Range(0, 3)
	each("pool", func(i int) {
		p.UpsertPools = append(p.UpsertPools, &controlv1.Pool{Cidr: fmt.Sprintf("10.%d.0.0/16", i), BlockPrefixLength: number.Draw(t, "length")})
	}, func(i int) { p.RemovePools = append(p.RemovePools, fmt.Sprintf("10.%d.0.0/16", i)) })
	each("own", func(i int) {
		p.UpsertOwnBlocks = append(p.UpsertOwnBlocks, &controlv1.OwnBlock{Cidr: fmt.Sprintf("10.%d.0.0/24", i)})
	}, func(i int) { p.RemoveOwnBlocks = append(p.RemoveOwnBlocks, fmt.Sprintf("10.%d.0.0/24", i)) })
	each("member", func(i int) {
		p.UpsertMembers = append(p.UpsertMembers, &controlv1.Member{Name: fmt.Sprint("n", i), Ipv4: fmt.Sprint("10.240.0.", number.Draw(t, "address"))})
	}, func(i int) { p.RemoveMembers = append(p.RemoveMembers, fmt.Sprint("n", i)) })
	each("route", func(i int) {
		p.UpsertRoutes = append(p.UpsertRoutes, toNode(fmt.Sprintf("10.7.%d.0/24", i), fmt.Sprint("n", number.Draw(t, "node"))))
	}, func(i int) { p.RemoveRoutes = append(p.RemoveRoutes, fmt.Sprintf("10.7.%d.0/24", i)) })
	switch rapid.IntRange(0, 3).Draw(t, "snat") {
	case 0:
		p.UpsertSnat = &controlv1.SnatRules{FirstPort: number.Draw(t, "port")}
	case 1:
		p.RemoveSnat = true
	}
	return p
}

func TestAppliedPatchesAreTheStateBuiltFromScratch(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel()
		state := &controlv1.NodeState{Node: "n1", Version: &controlv1.Version{Incarnation: "x", Revision: 1}}
		for range rapid.IntRange(1, 6).Draw(t, "patches") {
			p := drawPatch(t, state)
			next, err := Apply(state, p)
			require.NoError(t, err)
			m.apply(p)
			want := m.state("n1", p.Version)
			requireSame(t, want, sorted(next))

			// With the result's digest in the patch it is checked, and still right.
			p.Digest, p.EntryCount = want.Digest, want.EntryCount
			_, err = Apply(state, p)
			require.NoError(t, err)

			// Upserts and removals are idempotent: the same changes again change nothing.
			again := proto.CloneOf(p)
			again.Base, again.Version = p.Version, patchOf(next).Version
			twice, err := Apply(next, again)
			require.NoError(t, err)
			require.Equal(t, next.Digest, twice.Digest)
			require.Equal(t, next.EntryCount, twice.EntryCount)
			state = next
		}
	})
}

func TestDigestDoesNotDependOnOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		state := cluster()
		Seal(state)
		shuffled := proto.CloneOf(state)
		shuffled.Routes = rapid.Permutation(shuffled.Routes).Draw(t, "routes")
		shuffled.Members = rapid.Permutation(shuffled.Members).Draw(t, "members")
		shuffled.Pools = rapid.Permutation(shuffled.Pools).Draw(t, "pools")
		digest, entries := Digest(shuffled)
		require.Equal(t, state.Digest, digest)
		require.Equal(t, state.EntryCount, entries)
		requireSame(t, sorted(state), sorted(shuffled))

		p := patchOf(state)
		p.UpsertRoutes = []*controlv1.Route{toNode("10.244.2.0/24", "n3"), toNode("10.244.9.0/24", "n3"), toHost("10.1.0.0/16")}
		p.RemoveMembers = []string{"n2", "n3"}
		q := proto.CloneOf(p)
		q.UpsertRoutes = rapid.Permutation(q.UpsertRoutes).Draw(t, "upserts")
		slices.Reverse(q.RemoveMembers)
		a, err := Apply(state, p)
		require.NoError(t, err)
		b, err := Apply(shuffled, q)
		require.NoError(t, err)
		requireSame(t, sorted(a), sorted(b))
	})
}

// Benchmark of one new node in a cluster of 5,000, dual stack.
func BenchmarkApply(b *testing.B) {
	state := &controlv1.NodeState{Node: "n0", Version: &controlv1.Version{Revision: 1}}
	for i := range 5000 {
		state.Members = append(state.Members, &controlv1.Member{Name: fmt.Sprint("n", i), Ipv4: fmt.Sprintf("10.240.%d.%d", i>>8, i&255)})
		state.Routes = append(state.Routes, toNode(fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255), fmt.Sprint("n", i)),
			toNode(fmt.Sprintf("fd00::%x:0:0:0/80", i), fmt.Sprint("n", i)))
	}
	Seal(state)
	p := patchOf(state)
	p.UpsertMembers = []*controlv1.Member{{Name: "new", Ipv4: "10.241.0.1"}}
	p.UpsertRoutes = []*controlv1.Route{toNode("11.0.0.0/24", "new"), toNode("fd01::/80", "new")}
	b.Run("op=apply/members=5000/routes=10000", func(b *testing.B) {
		for b.Loop() {
			if _, err := Apply(state, p); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("op=seal/members=5000/routes=10000", func(b *testing.B) {
		for b.Loop() {
			Seal(state)
		}
	})
	b.Run("op=validate/members=5000/routes=10000", func(b *testing.B) {
		for b.Loop() {
			_ = Validate(state)
		}
	})
}
