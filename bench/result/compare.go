package result

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/perf/benchmath"
)

// confidence is that of the ranges that are printed, and 1 less it the significance level, as benchstat has them.
const confidence = 0.95

// Differences lists the settings in which two runs differ: sentences for people.
func Differences(a, b *Run) []string {
	names := map[string]bool{}
	for _, s := range []map[string]string{a.Settings, b.Settings} {
		for name := range s {
			names[name] = true
		}
	}
	var diff []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		x, inA := a.Settings[name]
		y, inB := b.Settings[name]
		if x == y && inA == inB {
			continue
		}
		word := func(v string, there bool) string {
			if !there {
				return "not set"
			}
			return v
		}
		diff = append(diff, fmt.Sprintf("%s: %s, %s", name, word(x, inA), word(y, inB)))
	}
	return diff
}

// Row is one series in two runs.
type Row struct {
	Key
	Unit   string
	A, B   benchmath.Summary
	Delta  float64 // of the medians, as a share of A's
	Better bool    // B is better than A
	Test   benchmath.Comparison
	// Significant: the difference is not chance, by the test's level.
	Significant bool
}

// Compare tests every series that both runs have with benchstat's statistics: medians, Mann-Whitney U test. It refuses runs whose settings differ and
// names the differences.
func Compare(a, b *Run) ([]Row, error) {
	if diff := Differences(a, b); len(diff) > 0 {
		return nil, fmt.Errorf("the runs were made with different settings, their figures mean different things:\n  %s", strings.Join(diff, "\n  "))
	}
	var rows []Row
	for _, x := range a.Series {
		y := b.Find(x.Key)
		if y == nil || len(x.Values) == 0 || len(y.Values) == 0 {
			continue
		}
		if x.Unit != y.Unit {
			return nil, fmt.Errorf("%v: %s in one run, %s in the other", x.Key, x.Unit, y.Unit)
		}
		t := benchmath.DefaultThresholds
		sa, sb := benchmath.NewSample(slices.Clone(x.Values), &t), benchmath.NewSample(slices.Clone(y.Values), &t)
		r := Row{Key: x.Key, Unit: x.Unit, A: benchmath.AssumeNothing.Summary(sa, confidence), B: benchmath.AssumeNothing.Summary(sb, confidence)}
		r.Test = benchmath.AssumeNothing.Compare(sa, sb)
		r.Significant = r.Test.P <= r.Test.Alpha
		if r.A.Center != 0 {
			r.Delta = r.B.Center/r.A.Center - 1
		}
		r.Better = (r.Delta < 0) == x.Lower
		rows = append(rows, r)
	}
	if len(rows) == 0 {
		return nil, fmt.Errorf("the runs have no figure in common: one is of `%s`, the other of `%s`", a.Command, b.Command)
	}
	return rows, nil
}

// WriteComparison prints rows as a table. What is no more than chance is a tilde.
func WriteComparison(w io.Writer, rows []Row) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "FIGURE\tSYSTEM\tA\tB\tUNIT\tB VS A\t")
	few := false
	for _, r := range rows {
		delta := "~"
		if r.Significant {
			word := map[bool]string{true: "better", false: "worse"}[r.Better]
			delta = fmt.Sprintf("%+.1f %% (%s)", r.Delta*100, word)
		}
		fmt.Fprintf(t, "%s %s, %s\t%s\t%s ±%s\t%s ±%s\t%s\t%s\t(p=%.3f n=%d+%d)\n", r.Scenario, r.Case, r.Metric, r.System,
			Number(r.A.Center), percent(r.A), Number(r.B.Center), percent(r.B), r.Unit, delta, r.Test.P, r.Test.N1, r.Test.N2)
		few = few || len(r.Test.Warnings) > 0
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if few {
		_, err := fmt.Fprintln(w, "\nToo few rounds to tell every difference from chance: use --rounds 6 or more in both runs.")
		return err
	}
	return nil
}

func percent(s benchmath.Summary) string {
	return strings.TrimSpace(strings.TrimPrefix(s.PctRangeString(), "±"))
}

// Worse compares the best rounds of two runs, and lists the series of one metric of which b's is worse than a's by more than a factor: for a baseline that is committed, since the best
// round is the one that the rest of the machine disturbed least. It is an error if a series of a is not in b.
func Worse(a, b *Run, metric string, limit float64) (worse []string, err error) {
	if diff := Differences(a, b); len(diff) > 0 {
		return nil, fmt.Errorf("the runs were made with different settings:\n  %s", strings.Join(diff, "\n  "))
	}
	compared := 0
	for _, x := range a.Series {
		if x.Metric != metric || len(x.Values) == 0 {
			continue
		}
		y := b.Find(x.Key)
		if y == nil || len(y.Values) == 0 {
			return nil, fmt.Errorf("%v is not in the second run: if the stage is gone, make the baseline anew", x.Key)
		}
		compared++
		sx, sy := Summarize(x.Values), Summarize(y.Values)
		was, is, factor := sx.Max, sy.Max, sx.Max/sy.Max
		if x.Lower {
			was, is, factor = sx.Min, sy.Min, sy.Min/sx.Min
		}
		if factor > limit {
			worse = append(worse, fmt.Sprintf("%v: %s, was %s %s: %.2f times worse (limit %.2f)", x.Key, Number(is), Number(was), x.Unit, factor, limit))
		}
	}
	if compared == 0 {
		return nil, fmt.Errorf("the first run has no figure %q", metric)
	}
	return worse, nil
}

// Number writes a figure with three significant digits.
func Number(v float64) string {
	switch a := max(v, -v); {
	case a == 0:
		return "0"
	case a >= 1000:
		return fmt.Sprintf("%.0f", v)
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	case a >= 0.1:
		return fmt.Sprintf("%.3f", v)
	}
	return fmt.Sprintf("%.3g", v)
}
