package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Options say what is measured. The zero value of a field but Binaries is its default.
type Options struct {
	Binaries string // the folder with overplane-controller
	Nodes    int    // 5,000
	Stuck    int    // clients that say hello and never read; 50, negative: none
	Changes  int    // 20
	Applies  int    // how often the table is applied by the one node that forwards; 30
	Dir      string // for the stores and certificates; empty: a temporary one
	// Log, if set, is told what happens, one line a call.
	Log func(format string, args ...any)
}

// Result is what was measured. Times are seconds unless their names say otherwise.
type Result struct {
	Nodes int `json:"nodes"`
	Stuck int `json:"clients_that_never_read"`
	Cores int `json:"cores"` // that controller and nodes share

	// From the first node's dial until the last one forwards by the whole table and the controller knows it.
	ColdStart float64 `json:"cold_start_s"`
	// What the controller's process spent meanwhile, user and system.
	ColdStartCPU float64 `json:"cold_start_controller_cpu_s"`
	// What this process spent meanwhile, for comparison.
	ColdStartNodesCPU float64 `json:"cold_start_nodes_cpu_s"`

	// From the hello of a node that joins until the others forward to it: over all others and all changes.
	Changes   int     `json:"changes"`
	ChangeP50 float64 `json:"change_p50_s"`
	ChangeP99 float64 `json:"change_p99_s"`
	ChangeMax float64 `json:"change_max_s"`
	// Until the controller has everybody's acknowledgement, for each change.
	Acknowledged []float64 `json:"change_acknowledged_by_all_s"`
	// What the controller spends on a change.
	ChangeCPU float64 `json:"change_controller_cpu_s"`

	// Of the controller's process, at its peak and at the end.
	PeakResident uint64 `json:"controller_peak_resident_bytes"`
	Resident     uint64 `json:"controller_resident_bytes"`

	Apply Apply `json:"apply"`
}

// Apply is what one node takes for a table of as many routes as there are other nodes, while it forwards.
type Apply struct {
	Routes int `json:"routes"`
	Runs   int `json:"runs"`
	// From the parsed table until every worker forwards by it.
	Median float64 `json:"median_ms"`
	Worst  float64 `json:"worst_ms"`
	// What comes before, off the agent's goroutine: the checks and the parsing of the table.
	CheckMedian float64 `json:"check_median_ms"`
	// The longest turn of the forwarding loop, 64 packets, by the wall clock: while tables are applied, and while none is.
	LongestPoll     float64 `json:"longest_poll_us"`
	LongestPollIdle float64 `json:"longest_poll_without_us"`
	Packets         uint64  `json:"packets_forwarded"`
}

// Bounds are what the figures must stay under.
const (
	MaxColdStart    = 60.0
	MaxColdStartCPU = 20.0
	MaxChangeP99    = 1.0
	MaxResident     = 1 << 30
	MaxApply        = 10.0 // ms
)

// Exceeded lists the bounds that the figures exceed: sentences for people.
func (r *Result) Exceeded() (out []string) {
	over := func(what string, is, most float64, unit string) {
		if is >= most {
			out = append(out, fmt.Sprintf("%s: %.3g %s, want less than %.3g %s", what, is, unit, most, unit))
		}
	}
	over("cold start", r.ColdStart, MaxColdStart, "s")
	over("the controller's CPU time for the cold start", r.ColdStartCPU, MaxColdStartCPU, "s")
	over("a change, 99th percentile", r.ChangeP99, MaxChangeP99, "s")
	over("the controller's memory at its peak", float64(r.PeakResident)/(1<<20), MaxResident/(1<<20), "MiB")
	over("applying a table, median", r.Apply.Median, MaxApply, "ms")
	return out
}

// String is the result for people.
func (r *Result) String() string {
	return fmt.Sprintf(`%d nodes, %d clients that never read, %d cores for controller and nodes
cold start             %8.1f s     under %g s
  controller's CPU     %8.1f s     under %g s (the nodes': %.1f s)
one change, p50        %8.3f s
            p99        %8.3f s     under %g s
            worst      %8.3f s     (%d changes; the controller spends %.3f s of CPU on each)
controller's memory    %8.0f MiB   under %d MiB (peak; at the end %.0f MiB)
applying %d routes   %8.1f ms    under %g ms (worst of %d: %.1f ms; checks before it: %.1f ms)
  longest poll         %8.0f us    (%.0f us while nothing is applied; %d packets forwarded)
`, r.Nodes, r.Stuck, r.Cores, r.ColdStart, MaxColdStart, r.ColdStartCPU, MaxColdStartCPU, r.ColdStartNodesCPU, r.ChangeP50, r.ChangeP99, MaxChangeP99, r.ChangeMax, r.Changes, r.ChangeCPU,
		float64(r.PeakResident)/(1<<20), MaxResident>>20, float64(r.Resident)/(1<<20), r.Apply.Routes, r.Apply.Median, MaxApply, r.Apply.Runs, r.Apply.Worst, r.Apply.CheckMedian,
		r.Apply.LongestPoll, r.Apply.LongestPollIdle, r.Apply.Packets)
}

// cores is how many cores controller and nodes share.
const cores = 2

// Run measures. It restricts this process to the first two cores, for good.
func Run(ctx context.Context, o Options) (r Result, err error) {
	setDefault := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	setDefault(&o.Nodes, 5000)
	setDefault(&o.Stuck, 50)
	setDefault(&o.Changes, 20)
	setDefault(&o.Applies, 30)
	o.Stuck = max(o.Stuck, 0)
	if o.Nodes+o.Stuck+o.Changes > 8192 {
		return r, fmt.Errorf("%d nodes, %d clients that never read, %d changes: there are blocks for 8192 in all", o.Nodes, o.Stuck, o.Changes)
	}
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	if o.Dir == "" {
		if o.Dir, err = os.MkdirTemp("", "overplane-bench-control-"); err != nil {
			return r, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(o.Dir)) }()
	}
	if err := restrict(); err != nil {
		return r, err
	}
	r.Nodes, r.Stuck, r.Changes, r.Cores = o.Nodes, o.Stuck, o.Changes, min(cores, runtime.NumCPU())
	if r.Apply, err = measureApply(ctx, o); err != nil {
		return r, fmt.Errorf("applying a table: %w", err)
	}
	return r, measureCluster(ctx, o, &r)
}

// restrict keeps all threads of this process, and those that they start, on the first two cores.
func restrict() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return err
	}
	n := 0
	for cpu := range len(set) * 64 {
		if !set.IsSet(cpu) {
			continue
		}
		if n++; n > cores {
			set.Clear(cpu)
		}
	}
	for _, t := range threads {
		var tid int
		if _, err := fmt.Sscan(t.Name(), &tid); err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("sched_setaffinity: %w", err)
		}
	}
	runtime.GOMAXPROCS(min(n, cores))
	return nil
}

func seconds(d time.Duration) float64 { return d.Seconds() }
