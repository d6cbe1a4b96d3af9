package bench

import (
	"context"
	"time"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

var churnScenario = Scenario{
	Name: "churn", Short: "Routes and pods that change under traffic: what is lost, and what is late",
	Long: `64-byte frames from pod to pod of one node at 20,000 a second, while nothing else happens, while a hundred routes come and go again and again, and while another
pod is detached and attached again and again. Changes follow each other without a pause; how many a second there were is a figure, too.`,
	All: true, Run: runChurn,
}

const churnRate = 20e3

func runChurn(ctx context.Context, r *Runner) error {
	kinds := r.kinds(append(rig.Kinds(overplaneVeth, overplaneTAP)[:2:2], rig.Kernel)...)
	return r.with(ctx, "churn", kinds, rig.Spec{Topology: rig.SameNode, Frames: true}, func(systems []*rig.System) error {
		for _, c := range []struct {
			name   string
			change func(*rig.System) func(context.Context, int) error
		}{
			{"quiet", nil},
			{"routes", func(s *rig.System) func(context.Context, int) error { return s.ChangeRoutes }},
			{"pods", func(s *rig.System) func(context.Context, int) error {
				return func(ctx context.Context, _ int) error { return s.ChangePods(ctx) }
			}},
		} {
			err := r.rounds(ctx, "churn "+c.name, systems, func(ctx context.Context, round int, s *rig.System) error {
				var change func(context.Context, int) error
				if c.change != nil {
					change = c.change(s)
				}
				return r.churn(ctx, c.name, round, s, change)
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// churn sends for a while and makes changes meanwhile, an even number of them.
func (r *Runner) churn(ctx context.Context, name string, round int, s *rig.System, change func(context.Context, int) error) error {
	type changes struct {
		n   int
		err error
	}
	done, end := make(chan changes, 1), time.Now().Add(2*r.Span)
	go func() {
		var c changes
		for change != nil && c.err == nil && (c.n%2 == 1 || time.Now().Before(end)) {
			c.err = change(ctx, c.n)
			c.n++
		}
		done <- c
	}()
	m, err := r.shootAs(ctx, "churn", name, ppsCase{load.MinFrame, 100}, s, churnRate, 2*r.Span)
	c := <-done
	if err != nil {
		return err
	}
	if c.err != nil {
		return c.err
	}
	add := func(metric, unit string, v float64) {
		r.Result.Add(result.Key{Scenario: "churn", Case: name, System: s.Name, Metric: metric}, unit, true, round, v)
	}
	add("lost", "%", m.loss()*100)
	add("age p50", "µs", float64(m.received.Quantile(0.5))/1e3)
	add("age p99", "µs", float64(m.received.Quantile(0.99))/1e3)
	if change != nil {
		r.Result.Add(result.Key{Scenario: "churn", Case: name, System: s.Name, Metric: "changes"}, "1/s", false, round, float64(c.n)/(2*r.Span).Seconds())
	}
	return nil
}
