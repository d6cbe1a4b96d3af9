// Package report writes what a run has found for people: Markdown tables, the floors, and SVG plots. It computes nothing that is not in the run's file.
package report

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/overplane/overplane/bench/result"
)

// table is the figures of one metric in one case.
type table struct {
	scenario, name, metric string
	series                 []*result.Series
}

// tables groups series in the order they were measured.
func tables(r *result.Run) []*table {
	var all []*table
	index := map[string]*table{}
	for _, s := range r.Series {
		key := s.Scenario + "|" + s.Case + "|" + s.Metric
		t := index[key]
		if t == nil {
			t = &table{scenario: s.Scenario, name: s.Case, metric: s.Metric}
			index[key] = t
			all = append(all, t)
		}
		t.series = append(t.series, s)
	}
	return all
}

// peers are the systems of a table that Overplane is compared with.
func (t *table) peers(r *result.Run) []*result.Series {
	var peers []*result.Series
	for _, s := range t.series {
		if r.Systems[s.System].Peer {
			peers = append(peers, s)
		}
	}
	return peers
}

// Figures writes the tables of one scenario: a row for each case and system, medians, ranges, and Overplane's ratios to each peer.
func Figures(w io.Writer, r *result.Run, scenario string) error {
	all := slices.DeleteFunc(tables(r), func(t *table) bool { return t.scenario != scenario })
	// Metrics are sections, cases rows.
	var metrics []string
	for _, t := range all {
		if !slices.Contains(metrics, t.metric) {
			metrics = append(metrics, t.metric)
		}
	}
	for _, metric := range metrics {
		var mine []*table
		var names []string
		for _, t := range all {
			if t.metric == metric {
				mine = append(mine, t)
				for _, p := range t.peers(r) {
					if !slices.Contains(names, p.System) {
						names = append(names, p.System)
					}
				}
			}
		}
		direction := "more is better"
		if mine[0].series[0].Lower {
			direction = "less is better"
		}
		fmt.Fprintf(w, "**%s: %s**, %s, %s\n\n| case | system | median | range | rounds |", scenario, metric, mine[0].series[0].Unit, direction)
		for _, n := range names {
			fmt.Fprintf(w, " × %s |", n)
		}
		fmt.Fprintf(w, "\n|---|---|---|---|---|%s\n", strings.Repeat("---|", len(names)))
		for _, t := range mine {
			for i, s := range t.series {
				sum := result.Summarize(s.Values)
				name := t.name
				if i > 0 {
					name = ""
				}
				fmt.Fprintf(w, "| %s | %s | %s | %s–%s | %d |", name, s.System, result.Number(sum.Median), result.Number(sum.Min), result.Number(sum.Max), sum.N)
				for _, n := range names {
					fmt.Fprintf(w, " %s |", t.ratio(r, s, n))
				}
				fmt.Fprintln(w)
			}
		}
		if _, err := fmt.Fprintln(w); err != nil {
			return err
		}
	}
	return nil
}

// ratio is the median of the paired ratios of a series of ours to a peer's.
func (t *table) ratio(r *result.Run, s *result.Series, peer string) string {
	if r.Systems[s.System].Peer {
		return ""
	}
	for _, p := range t.series {
		if p.System != peer {
			continue
		}
		if ratios := result.Ratios(s, p); len(ratios) > 0 {
			sum := result.Summarize(ratios)
			return fmt.Sprintf("%.2f (%.2f–%.2f)", sum.Median, sum.Min, sum.Max)
		}
	}
	return "–"
}

// Scenarios lists the scenarios that a run has anything of, in order.
func Scenarios(r *result.Run) []string {
	var names []string
	add := func(n string) {
		if !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	for _, s := range r.Series {
		add(s.Scenario)
	}
	for _, c := range r.Curves {
		add(c.Scenario)
	}
	return names
}

// Curves writes the tables of a scenario's curves.
func Curves(w io.Writer, r *result.Run, scenario string) error {
	for _, c := range r.Curves {
		if c.Scenario != scenario {
			continue
		}
		fmt.Fprintf(w, "**%s, %s, %s**\n\n| offered, Mpps | received, Mpps | lost | p50, µs | p99, µs | p99.9, µs |\n|---|---|---|---|---|---|\n", scenario, c.Case, c.System)
		for _, p := range c.Points {
			fmt.Fprintf(w, "| %s | %s | %.2f %% | %s | %s | %s |\n", result.Number(p.Offered/1e6), result.Number(p.Received/1e6), p.Loss*100,
				result.Number(float64(p.P50)/1e3), result.Number(float64(p.P99)/1e3), result.Number(float64(p.P999)/1e3))
		}
		fmt.Fprintln(w)
	}
	return nil
}

// Balances writes how what was offered and what became of it agree.
func Balances(w io.Writer, r *result.Run) error {
	if len(r.Balances) == 0 {
		return nil
	}
	fmt.Fprint(w, "| case | system | offered | received | dropped, by name | not accounted for |\n|---|---|---|---|---|---|\n")
	for _, b := range r.Balances {
		var drops []string
		names := slices.SortedFunc(maps.Keys(b.Drops), func(x, y string) int {
			return cmp.Or(cmp.Compare(b.Drops[y], b.Drops[x]), cmp.Compare(x, y))
		})
		for i, n := range names {
			if i == 4 {
				drops = append(drops, fmt.Sprintf("and %d more", len(names)-i))
				break
			}
			drops = append(drops, fmt.Sprintf("%s %d", n, b.Drops[n]))
		}
		off := 0.0
		if b.Offered > 0 {
			off = float64(b.Unaccounted()) / float64(b.Offered) * 100
		}
		if _, err := fmt.Fprintf(w, "| %s %s | %s | %d | %d | %s | %d (%.2f %%) |\n", b.Scenario, b.Case, b.System, b.Offered, b.Received, strings.Join(drops, ", "), b.Unaccounted(), off); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(w)
	return err
}

// Preamble writes what the figures depend on, who was measured, and what is missing.
func Preamble(w io.Writer, r *result.Run) error {
	m := r.Machine
	fmt.Fprintf(w, "`overplane-bench %s`, version %s, %s, %s. %d cores (%s), %s, Linux %s, %s %s.\n\n", r.Command, r.Version, r.Started.Format("2006-01-02 15:04 UTC"),
		r.Finished.Sub(r.Started).Round(1e9), m.Cores, m.CPU, m.Memory, m.Kernel, m.Go, m.Arch)
	if !r.Complete {
		fmt.Fprintf(w, "**This run is not complete: %s.** What follows is what it had measured by then.\n\n", r.Problem)
	}
	var settings []string
	for _, name := range slices.Sorted(maps.Keys(r.Settings)) {
		settings = append(settings, name+" "+r.Settings[name])
	}
	fmt.Fprintf(w, "Settings: %s.\n\n", strings.Join(settings, ", "))
	if len(r.Systems) > 0 {
		fmt.Fprint(w, "| system | what it is | which cores |\n|---|---|---|\n")
		for _, name := range slices.Sorted(maps.Keys(r.Systems)) {
			fmt.Fprintf(w, "| %s | %s | %s |\n", name, r.Systems[name].About, r.Systems[name].Placement)
		}
		fmt.Fprintln(w)
	}
	list := func(title string, items map[string]string) {
		if len(items) == 0 {
			return
		}
		fmt.Fprintf(w, "%s:\n\n", title)
		for _, name := range slices.Sorted(maps.Keys(items)) {
			fmt.Fprintf(w, "- %s: %s\n", name, strings.ReplaceAll(strings.TrimSpace(items[name]), "\n", " "))
		}
		fmt.Fprintln(w)
	}
	list("Not on this machine", r.Missing)
	list("Could not be measured", r.Failed)
	for _, n := range r.Notes {
		fmt.Fprintf(w, "- %s\n", n)
	}
	if len(r.Notes) > 0 {
		fmt.Fprintln(w)
	}
	return nil
}
