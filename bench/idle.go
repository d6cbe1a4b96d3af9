package bench

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

var idleScenario = Scenario{
	Name: "idle", Short: "CPU and memory of a node daemon with 0, 50 and 250 pods and nothing to do",
	Long: `The time that all threads of one node daemon ran (/proc/PID/task/*/schedstat) as a share of one core, and its memory (proportional set size), with pods attached and no traffic. Open
vSwitch, whose thread polls, and the same without pods are beside it.`,
	All: true, Quick: true, Run: runIdle,
}

// idleSpan is how long a daemon is watched, in spans of the other measurements: at a thousandth of a core there is little to count.
const idleSpan = 3

func runIdle(ctx context.Context, r *Runner) error {
	type idleCase struct {
		kind *rig.Kind
		pods int
	}
	cases := []idleCase{{overplaneTAP, 0}, {overplaneTAP, 50}, {overplaneTAP, 250}, {overplaneVeth, 50}, {rig.OVS, 2}}
	if r.Quick {
		cases = cases[:2]
	}
	for _, c := range cases {
		spec := rig.Spec{Topology: rig.PodsOnly, Pods: c.pods}
		if c.kind == rig.OVS {
			spec = rig.Spec{Topology: rig.SameNode}
		}
		r.Log("  idle: %s with %d pods", c.kind.Name, c.pods)
		err := r.with(ctx, "idle", r.kinds(c.kind), spec, func(systems []*rig.System) error {
			name := fmt.Sprintf("pods=%d", c.pods)
			// What the daemon does after pods came is not idling.
			if err := load.Wait(ctx, 2*time.Second); err != nil {
				return err
			}
			return r.rounds(ctx, "idle "+name, systems, func(ctx context.Context, round int, s *rig.System) error {
				first, err := ranFor(s.Pids)
				if err != nil {
					return err
				}
				begin := time.Now()
				if err := load.Wait(ctx, idleSpan*r.Span); err != nil {
					return err
				}
				last, err := ranFor(s.Pids)
				if err != nil {
					return err
				}
				share := float64(last-first) / float64(time.Since(begin))
				memory, err := proportionalSet(s.Pids)
				r.Result.Add(result.Key{Scenario: "idle", Case: name, System: s.Name, Metric: "CPU"}, "% of a core", true, round, share*100)
				r.Result.Add(result.Key{Scenario: "idle", Case: name, System: s.Name, Metric: "memory"}, "MiB", true, round, float64(memory)/(1<<20))
				return err
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ranFor is how long the processes' threads that live have run.
func ranFor(pids []int) (ran time.Duration, err error) {
	for _, pid := range pids {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(tasks) == 0 {
			return 0, fmt.Errorf("process %d is gone", pid)
		}
		for _, t := range tasks {
			data, err := os.ReadFile(t)
			if err != nil {
				continue // a thread that ended meanwhile
			}
			ns, err := strconv.ParseInt(strings.Fields(string(data))[0], 10, 64)
			if err != nil {
				return 0, err
			}
			ran += time.Duration(ns)
		}
	}
	return ran, nil
}

// proportionalSet is the processes' memory, in bytes, pages shared with others divided among them.
func proportionalSet(pids []int) (bytes uint64, err error) {
	for _, pid := range pids {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); f[0] == "Pss:" {
				kib, err := strconv.ParseUint(f[1], 10, 64)
				if err != nil {
					return 0, err
				}
				bytes += kib << 10
			}
		}
	}
	return bytes, nil
}
