// Package result is what a benchmark run has found: raw figures by round, what they depend on, and the statistics over them. A run's file is JSON and holds all
// that its report is made of, so that a report can be made again, and two runs compared.
package result

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Format is the version of the file's form.
const Format = 1

// Run is the content of a result file. It is not for concurrent use.
type Run struct {
	Format   int       `json:"format"`
	Version  string    `json:"version"` // of overplane-bench
	Command  string    `json:"command"`
	Started  time.Time `json:"started"`
	Finished time.Time `json:"finished"`
	// Complete: everything that was asked for was measured. Otherwise Problem says what ended the run.
	Complete bool   `json:"complete"`
	Problem  string `json:"problem,omitempty"`

	Machine Machine `json:"machine"`
	// Settings are what figures depend on. Runs whose settings differ cannot be compared.
	Settings map[string]string `json:"settings"`
	// Systems by name.
	Systems map[string]System `json:"systems"`
	// Missing are the peers that the machine lacks, with what to do; Failed what could not be measured, with the reason.
	Missing map[string]string `json:"missing,omitempty"`
	Failed  map[string]string `json:"failed,omitempty"`
	Notes   []string          `json:"notes,omitempty"`

	Series   []*Series  `json:"series"`
	Curves   []*Curve   `json:"curves,omitempty"`
	Balances []*Balance `json:"balances,omitempty"`

	index map[Key]*Series
}

// System describes who was measured.
type System struct {
	About     string `json:"about"`
	Placement string `json:"placement,omitempty"` // which cores do what
	Peer      bool   `json:"peer"`                // not Overplane
}

// Machine is what the run ran on.
type Machine struct {
	Kernel string `json:"kernel"`
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory string `json:"memory"`
	Go     string `json:"go"`
	Arch   string `json:"arch"`
}

// Key names a series.
type Key struct {
	Scenario string `json:"scenario"` // pps, tcp, ...
	Case     string `json:"case"`     // same-node/streams=1, ...
	System   string `json:"system"`
	Metric   string `json:"metric"`
}

func (k Key) String() string {
	return strings.Join([]string{k.Scenario, k.Case, k.System, k.Metric}, " | ")
}

// Series is one figure of one system, a value a round. Values of the same round of different systems were measured one right after the other.
type Series struct {
	Key
	Unit string `json:"unit"`
	// Lower: less is better.
	Lower  bool      `json:"lower_is_better,omitempty"`
	Rounds []int     `json:"rounds"`
	Values []float64 `json:"values"`
}

// Curve is one system's behaviour over a range of loads.
type Curve struct {
	Scenario string  `json:"scenario"`
	Case     string  `json:"case"`
	System   string  `json:"system"`
	Points   []Point `json:"points"`
}

// Point is one load of a curve: packets a second, and how old packets were on arrival.
type Point struct {
	Offered  float64       `json:"offered_pps"`
	Received float64       `json:"received_pps"`
	Loss     float64       `json:"loss"` // share of what was offered
	P50      time.Duration `json:"p50_ns"`
	P99      time.Duration `json:"p99_ns"`
	P999     time.Duration `json:"p999_ns"`
}

// Balance reconciles what was offered with what became of it, summed up over all runs of a case.
type Balance struct {
	Scenario string            `json:"scenario"`
	Case     string            `json:"case"`
	System   string            `json:"system"`
	Offered  uint64            `json:"offered"`
	Received uint64            `json:"received"`
	Drops    map[string]uint64 `json:"drops,omitempty"`
}

// Unaccounted is how many packets neither arrived nor are among the drops; negative if more are than were offered, as when a drop is counted twice.
func (b *Balance) Unaccounted() int64 {
	n := int64(b.Offered) - int64(b.Received)
	for _, d := range b.Drops {
		n -= int64(d)
	}
	return n
}

// New begins a run.
func New(version, command string) *Run {
	return &Run{
		Format: Format, Version: version, Command: command, Started: time.Now().UTC().Truncate(time.Second), Machine: thisMachine(),
		Settings: map[string]string{}, Systems: map[string]System{}, Missing: map[string]string{}, Failed: map[string]string{}, Problem: "the run was not finished",
	}
}

// Find returns a series, nil if there is none.
func (r *Run) Find(k Key) *Series {
	if r.index == nil || len(r.index) != len(r.Series) {
		r.index = map[Key]*Series{}
		for _, s := range r.Series {
			r.index[s.Key] = s
		}
	}
	return r.index[k]
}

// Add adds a round's value of a series.
func (r *Run) Add(k Key, unit string, lower bool, round int, value float64) {
	s := r.Find(k)
	if s == nil {
		s = &Series{Key: k, Unit: unit, Lower: lower}
		r.Series = append(r.Series, s)
		r.index[k] = s
	}
	s.Rounds = append(s.Rounds, round)
	s.Values = append(s.Values, value)
}

// Balance returns the balance of a case and system, which it makes if there is none.
func (r *Run) Balance(scenario, name, system string) *Balance {
	for _, b := range r.Balances {
		if b.Scenario == scenario && b.Case == name && b.System == system {
			return b
		}
	}
	b := &Balance{Scenario: scenario, Case: name, System: system, Drops: map[string]uint64{}}
	r.Balances = append(r.Balances, b)
	return b
}

// Write writes the file, whole or not at all.
func (r *Run) Write(path string) error {
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", append(data, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Read reads a result file.
func Read(path string) (*Run, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &Run{}
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("%s is no result of overplane-bench: %w", path, err)
	}
	if r.Format != Format {
		return nil, fmt.Errorf("%s has format %d, this program knows %d: use the overplane-bench that wrote it", path, r.Format, Format)
	}
	return r, nil
}

func thisMachine() Machine {
	m := Machine{Cores: runtime.NumCPU(), Go: runtime.Version(), Arch: runtime.GOARCH, CPU: "unknown"}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		m.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			m.CPU = strings.TrimSpace(value)
			break
		}
	}
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		m.Memory = fmt.Sprintf("%.0f GiB", float64(si.Totalram)*float64(si.Unit)/(1<<30))
	}
	return m
}
