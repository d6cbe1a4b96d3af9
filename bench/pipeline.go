package bench

import (
	"context"
	"fmt"
	"runtime"

	"github.com/overplane/overplane/bench/pipeline"
	"github.com/overplane/overplane/bench/result"
)

var pipelineScenario = Scenario{
	Name: "pipeline", Short: "The data plane's stages in memory: nanoseconds a packet, and as multiples of a reference loop",
	Long: `64-byte packets through parsing, lookup, translation and one whole turn of a worker, in memory, without devices and without root. The multiples of the reference loop,
measured in the same round, are what can be compared between machines: CI does, with the committed baseline.`,
	InMemory: true, All: true, Quick: true, Run: runPipeline,
}

// Names of the pipeline's metrics.
const (
	metricTime  = "time"
	metricRatio = "relative to the reference loop"
)

func runPipeline(ctx context.Context, r *Runner) error {
	stages, err := pipeline.Stages()
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	counters, err := pipeline.OpenCounters()
	if err != nil {
		r.note("%v", err)
	} else {
		defer counters.Close()
	}
	for _, s := range stages {
		if s.Done != nil {
			defer s.Done()
		}
		pipeline.Measure(s, r.Span/10) // warm up
	}
	r.Result.Systems["overplane"] = result.System{About: "the data plane's functions in this process", Placement: "one thread, not pinned"}
	for round := range r.Rounds {
		r.Log("  pipeline: round %d of %d", round+1, r.Rounds)
		for i, s := range stages {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			name := fmt.Sprintf("stage=%s/frame=64", s.Name)
			add := func(metric, unit string, v float64) {
				r.Result.Add(result.Key{Scenario: "pipeline", Case: name, System: "overplane", Metric: metric}, unit, true, round, v)
			}
			// The machine's speed changes from one moment to the next: the loop is measured right before each stage.
			base, _ := pipeline.Measure(stages[0], r.Span/8)
			var cycles, misses uint64
			if counters != nil {
				cycles, misses = counters.Read()
			}
			ns, n := pipeline.Measure(s, r.Span/4)
			add(metricTime, "ns/packet", ns)
			if i > 0 {
				add(metricRatio, "×", ns/base)
			}
			if counters != nil {
				c, m := counters.Read()
				add("cycles", "1/packet", float64(c-cycles)/float64(n))
				add("cache misses", "1/packet", float64(m-misses)/float64(n))
			}
		}
	}
	return nil
}
