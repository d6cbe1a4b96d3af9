package report

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/bench/result"
)

var update = flag.Bool("update", false, "write the golden files anew")

// sample is a run with a bit of everything.
func sample() *result.Run {
	r := &result.Run{
		Format: result.Format, Version: "v1", Command: "all", Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Finished: time.Date(2026, 1, 2, 3, 5, 5, 0, time.UTC),
		Complete: true, Machine: result.Machine{Kernel: "6.12", CPU: "Some CPU", Cores: 2, Memory: "8 GiB", Go: "go1.26", Arch: "amd64"},
		Settings: map[string]string{"rounds": "3", "span": "1s"},
		Systems: map[string]result.System{
			"kernel": {About: "routing", Placement: "anywhere", Peer: true}, "vxlan": {About: "tunnels", Peer: true},
			"overplane tap": {About: "ours", Placement: "core 1"}, "overplane tap/tun": {About: "ours, tun"},
		},
		Missing: map[string]string{"vpp": "VPP is not installed. To measure it too: apt-get install vpp"},
		Failed:  map[string]string{"tcp/outside | kernel+nft": "no\nnft"},
		Notes:   []string{"one note"},
	}
	add := func(scenario, name, system, metric, unit string, lower bool, values ...float64) {
		for i, v := range values {
			r.Add(result.Key{Scenario: scenario, Case: name, System: system, Metric: metric}, unit, lower, i, v)
		}
	}
	add("tcp", "same-node/streams=1", "overplane tap", "throughput", "Gbit/s", false, 18, 20, 19)
	add("tcp", "same-node/streams=1", "kernel", "throughput", "Gbit/s", false, 20, 25, 19)
	add("tcp", "two-nodes/wire/streams=1", "overplane tap/tun", "throughput", "Gbit/s", false, 5, 6, 7)
	add("tcp", "two-nodes/wire/streams=1", "vxlan", "throughput", "Gbit/s", false, 6, 7, 8)
	add("idle", "pods=50", "overplane tap", "CPU", "% of a core", true, 0.1, 0.15, 0.2)
	r.Curves = []*result.Curve{{Scenario: "pps", Case: "same-node/frame=64", System: "kernel", Points: []result.Point{
		{Offered: 1e5, Received: 1e5, P50: 10 * time.Microsecond, P99: 20 * time.Microsecond, P999: time.Millisecond},
		{Offered: 2e5, Received: 1.5e5, Loss: 0.25, P50: 11 * time.Microsecond, P99: 30 * time.Microsecond, P999: time.Millisecond},
	}}}
	r.Balances = []*result.Balance{{Scenario: "pps", Case: "same-node/frame=64", System: "kernel", Offered: 1000, Received: 900,
		Drops: map[string]uint64{"a": 1, "b": 50, "c": 20, "d": 10, "e": 9, "f": 2}}}
	return r
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(path, []byte(got), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), got, "go test -update writes the golden file anew")
}

func TestMarkdown(t *testing.T) {
	var out strings.Builder
	require.NoError(t, Markdown(&out, sample(), map[string][]string{"tcp": {"tcp.svg"}}))
	golden(t, "report.md", out.String())
}

func TestAnIncompleteRunSaysSo(t *testing.T) {
	r := sample()
	r.Complete, r.Problem = false, "interrupted"
	var out strings.Builder
	require.NoError(t, Markdown(&out, r, nil))
	require.Contains(t, out.String(), "This run is not complete: interrupted")
}

func TestPageHasFiguresAndLinks(t *testing.T) {
	var out strings.Builder
	require.NoError(t, Page(&out, sample(), map[string][]string{"tcp": {"tcp.svg"}}, "benchmarks"))
	for _, want := range []string{"# Benchmarks", "What it does not show", "(benchmarks/tcp.svg)", "(benchmarks/result.json)", "| kernel | 20.0 |"} {
		require.Contains(t, out.String(), want)
	}
	require.NotContains(t, out.String(), mark)
}

func TestFloors(t *testing.T) {
	r := sample()
	least := Floor{Scenario: "tcp", Case: "same-node/streams=1", Metric: "throughput", Ours: []string{"overplane"}, Peer: "kernel", Floor: 0.75, Goal: 1}
	o := Judge(r, least)
	require.Equal(t, "overplane tap", o.System)
	require.InDelta(t, 0.9, o.Value.Median, 1e-9, "the median of the ratios, not the ratio of the medians")
	require.True(t, o.Met)
	least.Floor = 0.95
	require.False(t, Judge(r, least).Met)

	most := Floor{Scenario: "idle", Case: "pods=50", Metric: "CPU", Ours: []string{"overplane"}, Floor: 0.15, AtMost: true}
	require.True(t, Judge(r, most).Met)
	most.Floor = 0.1
	require.False(t, Judge(r, most).Met)

	missing := Floor{Scenario: "tcp", Case: "same-node/streams=1", Metric: "throughput", Ours: []string{"overplane"}, Peer: "vpp", Floor: 0}
	require.Empty(t, Judge(r, missing).System)
	require.False(t, Judge(r, missing).Met, "what was not measured does not hold")

	// The best of ours counts, whichever way is better.
	for i, v := range []float64{40, 41, 42} {
		r.Add(result.Key{Scenario: "tcp", Case: "same-node/streams=1", System: "overplane veth", Metric: "throughput"}, "Gbit/s", false, i, v)
		r.Add(result.Key{Scenario: "idle", Case: "pods=50", System: "overplane veth", Metric: "CPU"}, "% of a core", true, i, v)
	}
	require.Equal(t, "overplane veth", Judge(r, least).System)
	require.Equal(t, "overplane tap", Judge(r, most).System)
}

// Every floor names a scenario and a metric that some scenario really adds: a typing error would show as "not measured" for ever. The names are checked against
// a complete run by the people who read its report; here only that they are unique.
func TestFloorsAreUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range Floors {
		require.False(t, seen[f.Figure], f.Figure)
		seen[f.Figure] = true
		if f.AtMost {
			require.Less(t, f.Goal, f.Floor, f.Figure)
		} else {
			require.Greater(t, f.Goal, f.Floor, f.Figure)
		}
	}
}

func TestPlots(t *testing.T) {
	dir := t.TempDir()
	files, err := Plots(dir, sample())
	require.NoError(t, err)
	require.Equal(t, map[string][]string{
		"tcp": {"tcp-throughput-same-node.svg", "tcp-throughput-two-nodes.svg"}, "idle": {"idle-cpu.svg"},
		"pps": {"pps-same-node-frame-64-received.svg", "pps-same-node-frame-64-latency.svg"},
	}, files)
	for _, names := range files {
		for _, n := range names {
			data, err := os.ReadFile(filepath.Join(dir, n))
			require.NoError(t, err)
			require.Contains(t, string(data), "<svg")
		}
	}
	// A run without anything has no plots, and a curve without points does not fail.
	files, err = Plots(dir, &result.Run{Curves: []*result.Curve{{Scenario: "pps", Case: "x", System: "kernel"}}})
	require.NoError(t, err)
	require.Len(t, files["pps"], 2)
}
