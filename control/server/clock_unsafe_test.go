package server_test

import (
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
)

// wallShifted is what time.Now returns after somebody set the machine's clock by d: another wall clock, the same monotonic one. Package time has no way to make it,
// since Add moves both.
func wallShifted(d time.Duration) time.Time {
	t := time.Now()
	// Invariant: the first word of a time.Time with a monotonic reading is 1 bit that says so, 33 bits of seconds since 1885, 30 bits of nanoseconds (time/time.go).
	// requireWallShifts checks that it holds.
	word := (*uint64)(unsafe.Pointer(&t))
	*word += uint64(int64(d/time.Second)) << 30 & (1<<63 - 1)
	*word |= 1 << 63
	return t
}

func requireWallShifts(t *testing.T) {
	t.Helper()
	for _, d := range []time.Duration{0, 1000 * time.Hour, -1000 * time.Hour} {
		before, now := time.Now(), wallShifted(d)
		require.Less(t, now.Sub(before), time.Minute, "the monotonic reading moved")
		require.GreaterOrEqual(t, now.Sub(before), time.Duration(0))
		require.InDelta(t, d.Seconds(), float64(now.Unix()-before.Unix()), 1, "the wall clock did not")
	}
}
