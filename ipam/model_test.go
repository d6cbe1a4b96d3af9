package ipam_test

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

// The state machine: what the allocator does against a model that is one line a transition.
func TestBlockLifeAgainstModel(t *testing.T) {
	const blocks, nodes = 4, 6
	rapid.Check(t, func(t *rapid.T) {
		c, m := newClock(), store.NewMemory()
		cfg := ipam.Config{Now: c.Now, Cooldown: time.Minute, Deadline: 5 * time.Minute}
		a, s := leader(t, m, cfg)
		defer func() { _ = s.Close() }()
		ctx := context.Background()
		_, _, err := a.AddPool(ctx, pool(22))
		require.NoError(t, err)

		type modelBlock struct {
			state  ipam.State
			owner  string
			rested time.Duration
		}
		model := map[string]*modelBlock{}
		draining, gone := map[string]bool{}, map[string]bool{}
		known := map[string]bool{}
		of := func(n string) (out []*modelBlock) {
			for _, b := range model {
				if b.owner == n {
					out = append(out, b)
				}
			}
			return out
		}
		isHeld := func(b *modelBlock) bool { return b.state == ipam.Allocated || b.state == ipam.Releasing }
		name := rapid.IntRange(0, nodes-1)
		t.Repeat(map[string]func(*rapid.T){
			"register": func(t *rapid.T) {
				f := facts(name.Draw(t, "node"))
				_, err := a.Register(ctx, f)
				mine := of(f.Name)
				has := slices.ContainsFunc(mine, isHeld)
				resting := slices.ContainsFunc(mine, func(b *modelBlock) bool { return b.state == ipam.Cooldown })
				available := len(model) < blocks
				for _, b := range model {
					available = available || b.state == ipam.Free
				}
				var exhausted *ipam.ExhaustedError
				var released *ipam.ReleasedError
				switch {
				case gone[f.Name] && draining[f.Name]:
					require.ErrorAs(t, err, &released)
					return
				case !draining[f.Name] && !has && !resting && !available:
					require.ErrorAs(t, err, &exhausted)
					return
				}
				require.NoError(t, err)
				known[f.Name], gone[f.Name] = true, false
				got := held(t, s, f.Name)
				if draining[f.Name] && !has {
					require.Nil(t, got)
					return
				}
				require.NotNil(t, got)
				b := model[got.CIDR.String()]
				switch {
				case has:
					require.True(t, isHeld(b) && b.owner == f.Name)
					if !draining[f.Name] {
						b.state = ipam.Allocated // what it never gave up it keeps
					}
					return
				case resting:
					require.True(t, b.state == ipam.Cooldown && b.owner == f.Name, "it did not get its own block back")
				case b != nil:
					require.Equal(t, ipam.Free, b.state)
				}
				model[got.CIDR.String()] = &modelBlock{state: ipam.Allocated, owner: f.Name}
			},
			"release": func(t *rapid.T) {
				n, fenced := facts(name.Draw(t, "node")).Name, rapid.Bool().Draw(t, "fenced")
				_, err := a.Release(ctx, n, fenced)
				if !known[n] {
					require.Error(t, err)
					return
				}
				require.NoError(t, err)
				draining[n] = draining[n] || !fenced
				gone[n] = gone[n] || fenced
				for _, b := range of(n) {
					switch {
					case fenced && isHeld(b):
						b.state, b.rested = ipam.Cooldown, -1
					case b.state == ipam.Allocated:
						b.state = ipam.Releasing
					}
				}
			},
			"undo": func(t *rapid.T) {
				n := facts(name.Draw(t, "node")).Name
				if _, err := a.Drain(ctx, n, true); known[n] {
					require.NoError(t, err)
					draining[n] = false
				}
			},
			"acknowledge": func(t *rapid.T) {
				n := facts(name.Draw(t, "node")).Name
				latest, err := s.Latest(ctx)
				require.NoError(t, err)
				old := rapid.Bool().Draw(t, "old")
				if old {
					latest = 1
				}
				_, err = a.OwnerAcked(ctx, n, latest)
				require.NoError(t, err)
				for _, b := range of(n) {
					if b.state == ipam.Releasing && !old {
						b.state, b.rested = ipam.Cooldown, -1
					}
				}
			},
			"time": func(t *rapid.T) {
				d := time.Duration(rapid.IntRange(1, 90).Draw(t, "seconds")) * time.Second
				c.add(d)
				for _, b := range model {
					if b.state == ipam.Cooldown && b.rested >= 0 {
						b.rested += d
					}
				}
			},
			"tick": func(t *rapid.T) {
				latest, err := s.Latest(ctx)
				require.NoError(t, err)
				lags := rapid.Bool().Draw(t, "lags")
				p := ipam.Progress{Waited: true, Connected: true, Programmed: latest}
				if lags {
					p.Programmed = 0
				}
				members := 0
				for n := range known {
					if !gone[n] {
						members++
					}
				}
				_, err = a.Tick(ctx, everybody(p))
				require.NoError(t, err)
				for _, b := range model {
					if b.state != ipam.Cooldown {
						continue
					}
					b.rested = max(b.rested, 0) // seen in COOLDOWN from now on
					if b.rested >= 5*time.Minute || b.rested >= time.Minute && (!lags || members == 0) {
						b.state = ipam.Free
					}
				}
			},
			"restart": func(t *rapid.T) {
				require.NoError(t, s.Close())
				m.Depose()
				a, s = leader(t, m, cfg)
				for _, b := range model {
					b.rested = -1
				}
			},
			"": func(t *rapid.T) {
				latest, err := s.Latest(ctx)
				require.NoError(t, err)
				require.NoError(t, s.Read(ctx, latest, func(tb *ipam.Table) {
					require.Len(t, tb.Blocks(), len(model))
					for _, b := range tb.Blocks() {
						want := model[b.CIDR.String()]
						require.NotNil(t, want)
						require.Equal(t, want.state, b.State, "block %s", b.CIDR)
						require.Equal(t, want.owner, b.Owner, "block %s", b.CIDR)
					}
				}))
			},
		})
	})
}
