package result

import (
	"math"
	"slices"
	"sort"
)

// Summary is what a report shows of a series.
type Summary struct {
	Median, Min, Max float64
	N                int
}

// Summarize returns median and range; zero if there are no values.
func Summarize(values []float64) Summary {
	if len(values) == 0 {
		return Summary{}
	}
	v := slices.Clone(values)
	sort.Float64s(v)
	return Summary{Median: median(v), Min: v[0], Max: v[len(v)-1], N: len(v)}
}

// Spread is the range as a share of the median.
func (s Summary) Spread() float64 {
	if s.Median == 0 {
		return 0
	}
	return (s.Max - s.Min) / math.Abs(s.Median)
}

func median(sorted []float64) float64 {
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// Ratios are a's values over b's of the same round, for rounds that both have.
func Ratios(a, b *Series) []float64 {
	if a == nil || b == nil {
		return nil
	}
	var ratios []float64
	for i, round := range a.Rounds {
		if j := slices.Index(b.Rounds, round); j >= 0 && b.Values[j] != 0 {
			ratios = append(ratios, a.Values[i]/b.Values[j])
		}
	}
	return ratios
}

// Search finds the highest rate at which trial loses no more than the share tolerance, between 0 and most, by bisection (RFC 2544, section 26.1) down to the share resolution of most. trial returns the
// share that was lost at a rate. The first trial is at most itself.
func Search(most, tolerance, resolution float64, trial func(rate float64) (loss float64, err error)) (rate float64, err error) {
	low, high := 0.0, most
	for at := most; ; at = (low + high) / 2 {
		loss, err := trial(at)
		if err != nil {
			return low, err
		}
		if loss <= tolerance {
			low = at
		} else {
			high = at
		}
		if high-low <= resolution*most || low == most {
			return low, nil
		}
	}
}
