package result

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func run(t *testing.T, settings map[string]string, values map[string][]float64) *Run {
	t.Helper()
	r := New("test", "tcp")
	r.Settings = settings
	for system, vs := range values {
		for round, v := range vs {
			r.Add(Key{"tcp", "same-node", system, "throughput"}, "Gbit/s", false, round, v)
		}
	}
	return r
}

func TestCompareRefusesDifferentSettings(t *testing.T) {
	a := run(t, map[string]string{"span": "1s", "rounds": "5", "only": "tap"}, map[string][]float64{"kernel": {1, 2}})
	b := run(t, map[string]string{"span": "2s", "rounds": "5"}, map[string][]float64{"kernel": {1, 2}})
	_, err := Compare(a, b)
	require.ErrorContains(t, err, "span: 1s, 2s")
	require.ErrorContains(t, err, "only: tap, not set")
	require.NotContains(t, err.Error(), "rounds")
}

func TestCompareRefusesWhatHasNothingInCommon(t *testing.T) {
	a := run(t, nil, map[string][]float64{"kernel": {1}})
	b := run(t, nil, map[string][]float64{"vxlan": {1}})
	_, err := Compare(a, b)
	require.ErrorContains(t, err, "no figure in common")

	c := run(t, nil, map[string][]float64{"kernel": {1}})
	c.Series[0].Unit = "Mbit/s"
	_, err = Compare(a, c)
	require.ErrorContains(t, err, "Mbit/s")
}

func TestCompareTellsChangeFromChance(t *testing.T) {
	a := run(t, nil, map[string][]float64{"same": {10, 11, 9, 10, 12, 8}, "less": {10, 11, 9, 10, 12, 8}})
	b := run(t, nil, map[string][]float64{"same": {11, 9, 10, 12, 8, 10}, "less": {5, 6, 5.5, 5.2, 6.1, 4.9}})
	rows, err := Compare(a, b)
	require.NoError(t, err)
	require.Len(t, rows, 2)
	for _, r := range rows {
		switch r.System {
		case "same":
			require.False(t, r.Significant)
		case "less":
			require.True(t, r.Significant)
			require.False(t, r.Better)
			require.InDelta(t, -0.46, r.Delta, 0.03)
		}
	}
	var out strings.Builder
	require.NoError(t, WriteComparison(&out, rows))
	require.Contains(t, out.String(), "~")
	require.Contains(t, out.String(), "(worse)")

	// More is worse where less is better.
	for _, r := range []*Run{a, b} {
		for _, s := range r.Series {
			s.Lower = true
		}
	}
	rows, err = Compare(a, b)
	require.NoError(t, err)
	for _, r := range rows {
		require.Equal(t, r.System == "less", r.Significant && r.Better)
	}
}

func TestFilesAreReadAsWritten(t *testing.T) {
	r := run(t, map[string]string{"span": "1s"}, map[string][]float64{"kernel": {1, 2}})
	path := filepath.Join(t.TempDir(), "result.json")
	require.NoError(t, r.Write(path))
	got, err := Read(path)
	require.NoError(t, err)
	require.False(t, got.Complete, "a run is not complete until it says so")
	require.Equal(t, r.Series[0].Values, got.Find(r.Series[0].Key).Values)

	r.Format = 99
	require.NoError(t, r.Write(path))
	_, err = Read(path)
	require.ErrorContains(t, err, "format 99")
	_, err = Read("/proc/version")
	require.ErrorContains(t, err, "no result of overplane-bench")
}

func TestWorseThanABaseline(t *testing.T) {
	a := run(t, map[string]string{"span": "1s"}, map[string][]float64{"poll": {2, 1, 3}, "parse": {1, 1, 1}})
	b := run(t, map[string]string{"span": "1s"}, map[string][]float64{"poll": {9, 1.4, 9}, "parse": {5, 2.1, 3}})
	for _, r := range []*Run{a, b} {
		for _, s := range r.Series {
			s.Lower = true
		}
	}
	worse, err := Worse(a, b, "throughput", 1.5)
	require.NoError(t, err)
	require.Len(t, worse, 1, "the best round of poll is within the limit")
	require.Contains(t, worse[0], "parse")

	_, err = Worse(a, b, "latency", 1.5)
	require.ErrorContains(t, err, "latency")
	b.Settings["span"] = "2s"
	_, err = Worse(a, b, "throughput", 1.5)
	require.ErrorContains(t, err, "span: 1s, 2s")
	_, err = Worse(a, run(t, map[string]string{"span": "1s"}, map[string][]float64{"poll": {1}}), "throughput", 1.5)
	require.ErrorContains(t, err, "parse")
}
