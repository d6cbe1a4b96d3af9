package server

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestNewestWaitsLeast(t *testing.T) {
	l := &lifo{free: 1}
	require.True(t, l.take(time.Minute))
	require.False(t, l.take(time.Millisecond), "there is one slot")
	require.Empty(t, l.waiting, "who gave up waits on")
	turns := make(chan int, 3)
	for i := range 3 {
		go func() {
			l.take(time.Minute)
			turns <- i
		}()
		require.Eventually(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.waiting) == i+1 }, 5*time.Second, time.Millisecond)
	}
	for _, want := range []int{2, 1, 0} {
		l.give()
		require.Equal(t, want, <-turns)
	}
	l.give()
	require.Equal(t, 1, l.free)
}
