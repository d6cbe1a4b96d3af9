package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

var natScenario = Scenario{
	Name: "nat", Short: "Translation: new sessions a second, how many there can be, rates with many of them",
	Long: `64-byte UDP frames of many flows from a pod to outside. New sessions: flows that are all new, a frame each, as fast as they come; what arrives are
as many sessions. Rates with 1,000 and 100,000 sessions: all flows are opened first, at a pace. To the limit: a million flows are offered at a pace, and the sessions
that there are then counted.`,
	All: true, Run: runNAT,
}

const (
	openRate  = 150e3 // at which flows are opened, a second
	manyFlows = 1000000
)

func runNAT(ctx context.Context, r *Runner) error {
	kinds := r.kinds(rig.Kinds(overplaneVethXDP, overplaneTUN)...)
	spec := rig.Spec{Topology: rig.Outside, Link: rig.Wire, Frames: true}
	if err := r.with(ctx, "nat", kinds, spec, func(systems []*rig.System) error { return r.newSessions(ctx, systems) }); err != nil {
		return err
	}
	return r.with(ctx, "nat", kinds, spec, func(systems []*rig.System) error {
		for _, flows := range []int{1000, 100000} {
			if err := r.establish(ctx, flows, systems); err != nil {
				return err
			}
			if err := r.floodAs(ctx, "nat", fmt.Sprintf("sessions=%d", flows), ppsCase{load.MinFrame, flows}, systems); err != nil {
				return err
			}
		}
		return r.limit(ctx, systems)
	})
}

// newSessions sends flows that nobody has seen before, one frame each. Every round has others, and all rounds together fit everybody's table.
func (r *Runner) newSessions(ctx context.Context, systems []*rig.System) error {
	flows := min(40000, 200000/r.Rounds)
	return r.rounds(ctx, "nat new sessions", systems, func(ctx context.Context, round int, s *rig.System) error {
		got, took, err := r.turn(ctx, s, load.Shape{Size: load.MinFrame, Flows: flows, Salt: 1 + round%40, Limit: flows}, 0, 10*time.Second)
		if err != nil {
			return err
		}
		r.Result.Add(result.Key{Scenario: "nat", Case: "new sessions", System: s.Name, Metric: "opened"}, "1000/s", false, round, float64(got)/took.Seconds()/1e3)
		return nil
	})
}

// turn sends frames of a shape and counts what arrives.
func (r *Runner) turn(ctx context.Context, s *rig.System, shape load.Shape, rate float64, span time.Duration) (uint64, time.Duration, error) {
	sink, err := load.NewSink(s.Sink())
	if err != nil {
		return 0, 0, err
	}
	defer sink.Close()
	gen, err := load.NewLive(s.From, s.To, shape, rig.LoadCore())
	if err != nil {
		return 0, 0, err
	}
	defer gen.Close()
	_, took, err := gen.Run(ctx, rate, span)
	if err != nil {
		return 0, 0, err
	}
	got, err := sink.Settle()
	return got.Packets, took, err
}

// establish opens flows at a pace, for each system.
func (r *Runner) establish(ctx context.Context, flows int, systems []*rig.System) error {
	for _, s := range systems {
		if err := s.Resume(); err != nil {
			return err
		}
		_, _, err := r.turn(ctx, s, load.Shape{Size: load.MinFrame, Flows: flows, Limit: flows + flows/10}, openRate, time.Minute)
		if perr := s.Pause(); err == nil {
			err = perr
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			r.failed(ctx, fmt.Sprintf("nat opening %d sessions", flows), s.Name, err)
		}
	}
	return nil
}

// limit offers more flows than anybody holds.
func (r *Runner) limit(ctx context.Context, systems []*rig.System) error {
	r.Log("  nat: a million flows, to the limit")
	if err := r.establish(ctx, manyFlows, systems); err != nil {
		return err
	}
	for _, s := range systems {
		if s.Sessions == nil {
			continue
		}
		n, err := s.Sessions(ctx)
		if err != nil {
			r.failed(ctx, "nat to the limit", s.Name, err)
			continue
		}
		r.Result.Add(result.Key{Scenario: "nat", Case: fmt.Sprintf("to the limit, %d flows offered", manyFlows), System: s.Name, Metric: "sessions"}, "1000", false, 0, float64(n)/1e3)
	}
	return nil
}
