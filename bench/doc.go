// Package bench is the benchmark harness: how fast Overplane is beside what one would use instead, in one run, on one machine.
//
//	scenario (tcp, pps, ...) ── builds ──► systems under test (package rig): Overplane in a lab, peers in topologies of the same shape
//	      │ rounds: every system in turn, so that figures of a round are pairs
//	      ├── load (package load): generators and sinks that share no code with the data plane
//	      ▼
//	result (package result): raw figures by round ──► report (package report): tables, floors, plots
//
// A scenario is a value in the list of scenarios.go with a function that measures and adds figures to the run; it becomes a command of overplane-bench, and part of `all` and `quick`
// if it says so. Everything else — flags, progress, cleaning up, partial results, files — is the runner's.
package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

// Options are the settings of a run that its figures depend on, and what is measured.
type Options struct {
	Rounds int           // of each system
	Span   time.Duration // of one measurement
	Loss   float64       // share that may be lost where nothing may
	Only   string        // regular expression on the names of systems; empty: all
	Quick  bool          // fewer cases, wider spread
}

// Runner is what scenarios measure by.
type Runner struct {
	Options
	Env    *rig.Env
	Result *result.Run
	Log    func(format string, args ...any)

	only  *regexp.Regexp
	noted map[string]bool
}

// kinds selects those of the wanted kinds that the machine has all for and the user has not excluded. What is missing is noted.
func (r *Runner) kinds(all ...*rig.Kind) []*rig.Kind {
	var kinds []*rig.Kind
	lacking := rig.Lacking(all)
	for _, k := range all {
		if r.only != nil && !r.only.MatchString(k.Name) {
			continue
		}
		if why := lacking[k.Name]; why != "" {
			if r.Result.Missing[k.Name] == "" {
				r.Log("  %s is not measured: %s", k.Name, why)
			}
			r.Result.Missing[k.Name] = why
			continue
		}
		kinds = append(kinds, k)
	}
	return kinds
}

// failed notes that a system could not be measured in a case, and goes on with the others. A context's end is not the system's failure.
func (r *Runner) failed(ctx context.Context, name, system string, err error) {
	if ctx.Err() != nil {
		return
	}
	key := name + " | " + system
	if _, known := r.Result.Failed[key]; !known {
		r.Result.Failed[key] = err.Error()
		r.Log("  %s: FAILED: %v", key, err)
	}
}

// with builds the kinds that fit the spec, has use measure them, and takes them down whatever happens.
func (r *Runner) with(ctx context.Context, scenario string, kinds []*rig.Kind, spec rig.Spec, use func([]*rig.System) error) (err error) {
	var systems []*rig.System
	defer func() {
		for _, s := range systems {
			if cerr := s.Close(); cerr != nil {
				err = errors.Join(err, fmt.Errorf("taking down %s: %w", s.Name, cerr))
			}
		}
	}()
	for _, k := range kinds {
		if !k.Fits(spec) {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		s, err := k.Build(ctx, r.Env, spec)
		if err != nil {
			r.failed(ctx, scenario+"/"+string(spec.Topology), k.Name, err)
			continue
		}
		s.Name = k.Name
		systems = append(systems, s)
		about := result.System{About: k.About, Placement: s.Placement, Peer: !strings.HasPrefix(k.Name, "overplane")}
		if old, known := r.Result.Systems[k.Name]; known && !strings.Contains(old.Placement, about.Placement) {
			about.Placement = old.Placement + "; " + string(spec.Topology) + ": " + about.Placement
		} else if known {
			about = old
		}
		r.Result.Systems[k.Name] = about
		if err := s.Pause(); err != nil {
			return err
		}
	}
	if len(systems) == 0 {
		return ctx.Err()
	}
	return use(systems)
}

// rounds has every system measured in turn, round by round, in the opposite order every other round. A system that fails is left out from then on.
func (r *Runner) rounds(ctx context.Context, what string, systems []*rig.System, measure func(ctx context.Context, round int, s *rig.System) error) error {
	out := map[*rig.System]bool{}
	for round := range r.Rounds {
		r.Log("  %s: round %d of %d", what, round+1, r.Rounds)
		order := slices.Clone(systems)
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, s := range order {
			if out[s] {
				continue
			}
			err := s.Resume()
			if err == nil {
				err = measure(ctx, round, s)
			}
			err = errors.Join(err, s.Pause())
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err != nil {
				r.failed(ctx, what, s.Name, err)
				out[s] = true
			}
		}
	}
	return nil
}

// books are counters as they were before a measurement.
type books struct {
	drops map[string]uint64
	taken uint64
}

func openBooks(ctx context.Context, s *rig.System) (b books, err error) {
	if b.drops, err = s.Drops(ctx); err == nil && s.TAP {
		b.taken, err = rig.Taken(s.From)
	}
	return b, err
}

// notTaken is the name of what a sending TAP had no room for.
const notTaken = "sender's device full"

// reconcile adds a measurement to the balance of a case, and what was dropped meanwhile.
func (r *Runner) reconcile(ctx context.Context, scenario, name string, s *rig.System, offered, received uint64, before books) error {
	b := r.Result.Balance(scenario, name, s.Name)
	now, err := openBooks(ctx, s)
	if err != nil {
		return err
	}
	b.Offered += offered
	b.Received += received
	for reason, n := range rig.Delta(now.drops, before.drops) {
		b.Drops[reason] += n
	}
	if taken := now.taken - before.taken; s.TAP && offered > taken {
		b.Drops[notTaken] += offered - taken
	}
	return nil
}

// settings writes down what figures depend on.
func (r *Runner) settings(inMemory bool) {
	maps.Copy(r.Result.Settings, map[string]string{"rounds": fmt.Sprint(r.Rounds), "span": r.Span.String()})
	if inMemory {
		return
	}
	maps.Copy(r.Result.Settings, map[string]string{
		"loss tolerance": fmt.Sprint(r.Loss), "congestion control": "cubic", "quick": fmt.Sprint(r.Quick),
		"generator core": fmt.Sprint(rig.LoadCore()), "forwarding core": fmt.Sprint(rig.ForwardCore()), "cores": fmt.Sprint(r.Result.Machine.Cores),
	})
}
