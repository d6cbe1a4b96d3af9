package result

import (
	"errors"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSummarize(t *testing.T) {
	for _, tc := range []struct {
		name   string
		values []float64
		want   Summary
	}{
		{"none", nil, Summary{}},
		{"one", []float64{3}, Summary{3, 3, 3, 1}},
		{"odd", []float64{9, 1, 2}, Summary{2, 1, 9, 3}},
		{"even", []float64{4, 1, 3, 2}, Summary{2.5, 1, 4, 4}},
	} {
		t.Run(tc.name, func(t *testing.T) { require.Equal(t, tc.want, Summarize(tc.values)) })
	}
	values := []float64{2, 1}
	Summarize(values)
	require.Equal(t, []float64{2, 1}, values, "values are the caller's")
}

func TestRatiosArePairedByRound(t *testing.T) {
	a := &Series{Rounds: []int{0, 1, 3}, Values: []float64{2, 4, 9}}
	b := &Series{Rounds: []int{3, 0, 2}, Values: []float64{3, 1, 5}}
	require.Equal(t, []float64{2, 3}, Ratios(a, b))
	require.Nil(t, Ratios(a, nil))
	require.Nil(t, Ratios(a, &Series{Rounds: []int{0}, Values: []float64{0}}), "nothing is a multiple of zero")
}

// A system that passes everything up to a limit, and loses the rest.
func TestSearchFindsTheHighestRateWithoutLoss(t *testing.T) {
	for _, limit := range []float64{1, 130, 500, 999, 1000, 2000} {
		trials := 0
		rate, err := Search(1000, 0, 1.0/64, func(rate float64) (float64, error) {
			trials++
			return max(0, 1-limit/rate), nil
		})
		require.NoError(t, err)
		require.LessOrEqual(t, rate, limit)
		require.GreaterOrEqual(t, rate, min(limit, 1000)-1000.0/64)
		require.LessOrEqual(t, trials, 8)
	}
	rate, err := Search(1000, 0.1, 1.0/64, func(rate float64) (float64, error) { return max(0, 1-500/rate), nil })
	require.NoError(t, err)
	require.InDelta(t, 500/0.9, rate, 1000.0/64, "with a tolerance of a tenth")

	broken := errors.New("broken")
	_, err = Search(1000, 0, 0.1, func(float64) (float64, error) { return 0, broken })
	require.ErrorIs(t, err, broken)
}

func TestNumberHasThreeDigits(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 1234.5: "1234", 123.4: "123", 12.34: "12.3", 1.234: "1.23", 0.1234: "0.123", 0.01234: "0.0123", -1.5: "-1.50"} {
		require.Equal(t, want, Number(v))
	}
}
