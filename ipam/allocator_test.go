package ipam_test

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

func pool(bits int) ipam.PodRange {
	return ipam.PodRange{CIDR: netip.MustParsePrefix(fmt.Sprintf("10.244.0.0/%d", bits)), BlockBits: 24}
}

// clock is a clock that tests move.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

type fataler interface {
	require.TestingT
	Helper()
}

// leader is an allocator on a store that leads.
func leader(t fataler, m *store.Memory, cfg ipam.Config) (*ipam.Allocator, *store.Store) {
	t.Helper()
	s, err := m.Open(context.Background())
	require.NoError(t, err)
	_, err = s.Campaign(context.Background(), "test")
	require.NoError(t, err)
	return ipam.NewAllocator(s, cfg), s
}

func facts(i int) ipam.Facts {
	return ipam.Facts{Name: fmt.Sprintf("n%d", i), IPv4: netip.AddrFrom4([4]byte{10, 240, byte(i / 250), byte(i%250 + 1)}), MAC: fmt.Sprintf("02:00:00:00:%02x:%02x", i/256, i%256)}
}

// held is the one block that a node owns, or nil.
func held(t require.TestingT, s *store.Store, node string) (out *ipam.Block) {
	latest, err := s.Latest(context.Background())
	require.NoError(t, err)
	require.NoError(t, s.Read(context.Background(), latest, func(tb *ipam.Table) {
		for _, b := range tb.Owned(node) {
			if b.Held() {
				require.Nil(t, out, "node %s owns two blocks", node)
				out = b
			}
		}
	}))
	return out
}

func everybody(p ipam.Progress) func(string) ipam.Progress {
	return func(string) ipam.Progress { return p }
}

func TestRegisterAgainChangesNothing(t *testing.T) {
	a, s := leader(t, store.NewMemory(), ipam.Config{})
	ctx := t.Context()
	_, _, err := a.AddPool(ctx, pool(16))
	require.NoError(t, err)
	r1, err := a.Register(ctx, facts(1))
	require.NoError(t, err)
	b := held(t, s, "n1")
	require.Equal(t, "10.244.0.0/24", b.CIDR.String())
	r2, err := a.Register(ctx, facts(1))
	require.NoError(t, err)
	require.GreaterOrEqual(t, r2, r1)
	require.Equal(t, b, held(t, s, "n1"))
}

func TestCooldownWaitsForTimeAndNodesAndNamesLaggards(t *testing.T) {
	c := newClock()
	a, s := leader(t, store.NewMemory(), ipam.Config{Now: c.Now, Cooldown: time.Minute, Deadline: 10 * time.Minute})
	ctx := t.Context()
	_, _, err := a.AddPool(ctx, pool(16))
	require.NoError(t, err)
	for i := range 3 {
		_, err := a.Register(ctx, facts(i))
		require.NoError(t, err)
	}
	revision, err := a.Release(ctx, "n2", true)
	require.NoError(t, err)
	progress := map[string]ipam.Progress{
		"n0": {Waited: true, Connected: true, Programmed: revision}, "n1": {Waited: true, Connected: true, Programmed: revision - 1},
	}
	of := func(n string) ipam.Progress { return progress[n] }
	tick := func() []ipam.Freed {
		f, err := a.Tick(ctx, of)
		require.NoError(t, err)
		return f
	}
	require.Empty(t, tick())
	r, err := a.Resting(ctx, of)
	require.NoError(t, err)
	require.Equal(t, time.Minute, r[0].Remaining)
	require.Equal(t, []string{"n1"}, r[0].WaitsFor)
	c.add(time.Hour * 24 * 365) // the wall clock jumps: of no concern to a real clock's monotonic reading, but the longest wait there is
	freed := tick()
	require.Len(t, freed, 1)
	require.Equal(t, []string{"n1"}, freed[0].Laggards)

	// Again, with everybody answering: time decides.
	_, err = a.Register(ctx, facts(2))
	require.NoError(t, err)
	revision, err = a.Release(ctx, "n2", true)
	require.NoError(t, err)
	progress["n1"] = ipam.Progress{Waited: true, Connected: true, Programmed: revision}
	progress["n0"] = progress["n1"]
	require.Empty(t, tick())
	c.add(59 * time.Second)
	require.Empty(t, tick())

	// A controller that takes over waits the whole time: it cannot know how long the block rested.
	require.NoError(t, s.Resign(ctx))
	_, err = s.Campaign(ctx, "next")
	require.NoError(t, err)
	a = ipam.NewAllocator(s, ipam.Config{Now: c.Now, Cooldown: time.Minute})
	require.Empty(t, tick())
	c.add(59 * time.Second)
	require.Empty(t, tick())
	c.add(time.Second)
	require.Len(t, tick(), 1)
}

func TestCapacityInNumbers(t *testing.T) {
	a, s := leader(t, store.NewMemory(), ipam.Config{})
	ctx := t.Context()
	_, _, err := a.AddPool(ctx, pool(22)) // four blocks
	require.NoError(t, err)
	warnings := func() (w []string) {
		latest, err := s.Latest(ctx)
		require.NoError(t, err)
		require.NoError(t, s.Read(ctx, latest, func(tb *ipam.Table) { w = tb.Warnings() }))
		return w
	}
	for i := range 3 {
		_, err := a.Register(ctx, facts(i))
		require.NoError(t, err)
		require.Empty(t, warnings())
	}
	_, err = a.Register(ctx, facts(3))
	require.NoError(t, err)
	_, err = a.Register(ctx, facts(4))
	var e *ipam.ExhaustedError
	require.ErrorAs(t, err, &e)
	require.Equal(t, "there is no IPv4 block left for node n4; pool 10.244.0.0/22 fits 4 nodes, 4 used; add a pool: overplane pools add CIDR --block 24", err.Error())
	require.Equal(t, []string{"IPv4: all 4 blocks are in use, so no node can join: add a pool: overplane pools add CIDR --block 24"}, warnings())
	_, _, err = a.AddPool(ctx, ipam.PodRange{CIDR: netip.MustParsePrefix("10.245.0.0/24"), BlockBits: 24})
	require.NoError(t, err)
	require.Equal(t, []string{"IPv4: 4 of 5 blocks are in use (80 %): add a pool: overplane pools add CIDR --block 24"}, warnings())
	_, err = a.Register(ctx, facts(4))
	require.NoError(t, err)
	_, _, err = a.AddPool(ctx, ipam.PodRange{CIDR: netip.MustParsePrefix("10.240.0.0/16"), BlockBits: 24})
	require.ErrorContains(t, err, "contains the address of node n0")
	_, _, err = a.AddPool(ctx, ipam.PodRange{CIDR: netip.MustParsePrefix("10.244.0.0/16"), BlockBits: 24})
	require.ErrorContains(t, err, "pod range 10.244.0.0/16 overlaps pod range 10.244.0.0/22")
	_, _, err = a.AddPool(ctx, ipam.PodRange{CIDR: netip.MustParsePrefix("10.244.0.0/22"), BlockBits: 25})
	require.ErrorContains(t, err, "has blocks of /24 already")
}

func TestWritesOfUnknownOutcome(t *testing.T) {
	for _, happens := range []bool{false, true} {
		m := store.NewMemory()
		faults := 0
		m.Fault = func(tx ipam.Tx) (bool, error) {
			if faults > 0 && len(tx.If) > 0 {
				faults--
				return happens, ipam.ErrUnknownOutcome
			}
			return true, nil
		}
		a, s := leader(t, m, ipam.Config{})
		_, _, err := a.AddPool(t.Context(), pool(16))
		require.NoError(t, err)
		for i := range 10 {
			faults = 1
			_, err = a.Register(t.Context(), facts(i))
			require.NoError(t, err)
			require.Zero(t, faults)
			require.Equal(t, fmt.Sprintf("10.244.%d.0/24", i), held(t, s, facts(i).Name).CIDR.String(), "a claim whose outcome was not known was made twice")
		}
	}
}

func TestDeposedLeaderWritesNothing(t *testing.T) {
	m := store.NewMemory()
	a, s := leader(t, m, ipam.Config{})
	_, _, err := a.AddPool(t.Context(), pool(16))
	require.NoError(t, err)
	m.Depose()
	b, _ := leader(t, m, ipam.Config{})
	_, err = a.Register(t.Context(), facts(1))
	require.ErrorIs(t, err, ipam.ErrNotLeader)
	require.Nil(t, held(t, s, "n1"))
	_, err = b.Register(t.Context(), facts(1))
	require.NoError(t, err)
}
