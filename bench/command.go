package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/bench/control"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
	"github.com/overplane/overplane/test/lab"
)

const (
	runDir        = "/run/overplane-bench"
	defaultPrefix = "ovpb"
)

var prefixPattern = regexp.MustCompile(`^[a-z][a-z0-9]{0,4}$`)

// flags are what all measuring commands have.
type flags struct {
	Options
	prefix  string
	out     string
	page    string // docs/benchmarks.md
	version string
}

func (f *flags) declare(c *cobra.Command) {
	s := c.Flags()
	s.IntVar(&f.Rounds, "rounds", 5, "rounds: each measures every system once, in turn")
	s.DurationVar(&f.Span, "span", time.Second, "length of one measurement")
	s.Float64Var(&f.Loss, "loss", 0.001, "share of packets that may be lost where nothing may: a virtual machine loses some whatever is measured")
	s.StringVar(&f.Only, "only", "", "measure systems only whose names match this regular expression")
	s.BoolVar(&f.Quick, "short", false, "fewer cases")
	s.StringVar(&f.prefix, "prefix", defaultPrefix, "what the names of all network namespaces begin with, 1 to 5 letters and digits")
	s.StringVar(&f.page, "report", "", "also write the documentation's page to this file, and plots and raw figures into the folder of the same name beside it")
	s.StringVar(&f.out, "out", "bench-out", "folder for result.json, report.md and plots")
}

// Command is overplane-bench. version goes into the results.
func Command(version string) *cobra.Command {
	root := &cobra.Command{
		Use:   "overplane-bench",
		Short: "How fast Overplane is, beside its peers, in one run on this machine",
		Long: `Measures Overplane and what one would use instead, in turn, in network namespaces of this machine, and writes raw figures (JSON), tables (Markdown)
and plots (SVG). It needs root, the built programs, and ip, ethtool and nft; peers that are not installed are named with the command that installs them.

  overplane-bench quick                 the most important figures, under 4 minutes
  overplane-bench all --report docs/benchmarks.md
  overplane-bench tcp --rounds 7
  overplane-bench compare A.json B.json`,
		Version: version, SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	for _, s := range scenarios {
		root.AddCommand(scenarioCommand(version, s))
	}
	root.AddCommand(allCommand(version), quickCommand(version), control.Command(), compareCommand(), renderCommand(), forwardCommand())
	return root
}

func scenarioCommand(version string, s *Scenario) *cobra.Command {
	f := &flags{version: version}
	c := &cobra.Command{
		Use: s.Name, Short: s.Short, Long: s.Long, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return f.run(c, s.Name, []*Scenario{s}) },
	}
	f.declare(c)
	return c
}

func allCommand(version string) *cobra.Command {
	f := &flags{version: version}
	c := &cobra.Command{
		Use: "all", Short: "Measure everything, unattended", Args: cobra.NoArgs,
		Long: "Measures every scenario, one after the other, and writes one report. It takes 35 minutes on 2 cores, with the default settings.",
		RunE: func(c *cobra.Command, _ []string) error {
			return f.run(c, "all", selected(func(s *Scenario) bool { return s.All }))
		},
	}
	f.declare(c)
	return c
}

func quickCommand(version string) *cobra.Command {
	f := &flags{version: version}
	c := &cobra.Command{
		Use: "quick", Short: "Measure the most important figures, with wider spread", Args: cobra.NoArgs,
		Long: "Measures the most important cases of the most important scenarios in 3 short rounds, under 4 minutes on 2 cores.",
		RunE: func(c *cobra.Command, _ []string) error {
			f.Quick = true
			return f.run(c, "quick", selected(func(s *Scenario) bool { return s.Quick }))
		},
	}
	f.declare(c)
	for name, value := range map[string]string{"rounds": "3", "span": "300ms"} {
		flag := c.Flags().Lookup(name)
		flag.DefValue = value
		_ = flag.Value.Set(value)
	}
	return c
}

func selected(want func(*Scenario) bool) (list []*Scenario) {
	for _, s := range scenarios {
		if want(s) {
			list = append(list, s)
		}
	}
	return list
}

// run measures scenarios and writes what they found, also if they were interrupted.
func (f *flags) run(c *cobra.Command, command string, list []*Scenario) (err error) {
	r, cleanup, err := f.prepare(c.ErrOrStderr(), command, list)
	if err != nil {
		return err
	}
	ctx, stop := lab.Interruptible(c)
	defer stop()
	err = r.measure(ctx, list)
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	r.Log("cleaning up")
	if cerr := cleanup(); cerr != nil {
		err = errors.Join(err, cerr)
	}
	r.Result.Finished = time.Now().UTC().Truncate(time.Second)
	if r.Result.Complete = err == nil; r.Result.Complete {
		r.Result.Problem = ""
	} else {
		r.Result.Problem = err.Error()
	}
	return errors.Join(err, f.write(c.OutOrStdout(), r.Result))
}

// measure runs scenarios one after the other.
func (r *Runner) measure(ctx context.Context, list []*Scenario) error {
	for i, s := range list {
		r.Log("%s (%d of %d): %s", s.Name, i+1, len(list), s.Short)
		begin := time.Now()
		if err := s.Run(ctx, r); err != nil {
			return fmt.Errorf("%s: %w", s.Name, err)
		}
		r.Log("%s took %v", s.Name, time.Since(begin).Round(time.Second))
	}
	return ctx.Err()
}

// prepare checks everything that can be checked before the first measurement, and removes what an earlier run left.
func (f *flags) prepare(progress io.Writer, command string, list []*Scenario) (r *Runner, cleanup func() error, err error) {
	if f.Rounds < 1 || f.Span < 10*time.Millisecond || f.Span > time.Minute || f.Loss < 0 || f.Loss >= 1 {
		return nil, nil, fmt.Errorf("--rounds %d --span %v --loss %v: want at least 1 round, spans of 10ms to 1m, a share from 0 to below 1", f.Rounds, f.Span, f.Loss)
	}
	if !prefixPattern.MatchString(f.prefix) {
		return nil, nil, fmt.Errorf("--prefix %q: want 1 to 5 lower-case letters and digits, a letter first", f.prefix)
	}
	begin := time.Now()
	r = &Runner{Options: f.Options, Result: result.New(f.version, command), noted: map[string]bool{}, Log: func(format string, args ...any) {
		fmt.Fprintf(progress, "%6.1f s  %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
	}}
	inMemory := true
	for _, s := range list {
		inMemory = inMemory && s.InMemory
	}
	r.settings(inMemory)
	if f.Only != "" {
		if r.only, err = regexp.Compile(f.Only); err != nil {
			return nil, nil, fmt.Errorf("--only: %w", err)
		}
		r.Result.Settings["only"] = f.Only
	}
	if inMemory {
		return r, func() error { return nil }, nil
	}
	cleanup, err = f.prepareRigs(r)
	return r, cleanup, err
}

func (f *flags) prepareRigs(r *Runner) (cleanup func() error, err error) {
	if err := lab.CheckRoot(); err != nil {
		return nil, err
	}
	if lack := rig.Tools(); lack != "" {
		return nil, errors.New(lack)
	}
	bin, err := lab.FindBinaries()
	if err != nil {
		return nil, err
	}
	if err := lockMemory(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(runDir, f.prefix+".lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("another overplane-bench measures with prefix %s: wait for it (two at once would measure each other), or choose another --prefix", f.prefix)
	}
	dir := filepath.Join(runDir, f.prefix)
	removed, err := rig.Clean(f.prefix)
	err = errors.Join(err, os.RemoveAll(dir), os.MkdirAll(dir, 0o700))
	if len(removed) > 0 {
		r.Log("removed what an earlier run left: %s", strings.Join(removed, ", "))
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	if r.Result.Machine.Cores < 2 {
		r.note("This machine has one core: generator, forwarding and receiver take turns on it, and ratios say little about more cores.")
	}
	self, _ := os.Executable()
	r.Env = &rig.Env{Prefix: f.prefix, Dir: dir, Self: self, Bin: bin, Log: r.Log}
	return func() error {
		// What a scenario could not take down, and files.
		_, err := rig.Clean(f.prefix)
		err = errors.Join(err, os.RemoveAll(dir))
		lock.Close()
		return err
	}, nil
}

func (r *Runner) note(format string, args ...any) {
	n := fmt.Sprintf(format, args...)
	r.Log("note: %s", n)
	r.Result.Notes = append(r.Result.Notes, n)
}
