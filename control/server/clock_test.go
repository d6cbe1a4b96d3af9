package server_test

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/server"
)

// Somebody sets the controller's clock, far ahead and far back, while blocks rest and nodes join: a rest is as long as it was to be, and nothing ends or stays for ever.
func TestClockJumps(t *testing.T) {
	requireWallShifts(t)
	const cooldown = 700 * time.Millisecond
	for _, jump := range []time.Duration{10 * 365 * 24 * time.Hour, -10 * 365 * 24 * time.Hour} {
		t.Run(jump.String(), func(t *testing.T) {
			var shift atomic.Int64
			c := newCluster(t, onePool(23), func(cfg *server.Config) { // two blocks
				cfg.IPAM.Now = func() time.Time { return wallShifted(time.Duration(shift.Load())) }
				cfg.IPAM.Cooldown, cfg.IPAM.Deadline = cooldown, 20*time.Second
			})
			n1, n2 := c.join(1, nil), c.join(2, nil)
			c.converged(n1, n2)
			own := n2.own()[0]
			n2.stop()
			start := time.Now()
			c.release("n2", true)
			b := c.block(own)
			require.Equal(t, controlv1.BlockState_BLOCK_STATE_COOLDOWN, b.GetState())
			require.Positive(t, b.GetRemaining().AsDuration())
			shift.Store(int64(jump))
			b = c.block(own)
			require.LessOrEqual(t, b.GetRemaining().AsDuration(), cooldown)

			// The only one left: who joins now waits for its rest, no less and no more.
			n3 := c.join(3, nil)
			c.eventually(func() bool { return len(n3.own()) == 1 }, "the block rests for ever")
			require.Equal(t, own, n3.own()[0])
			require.GreaterOrEqual(t, time.Since(start), cooldown, "the block was given out before its time")
			require.True(t, c.server.Leading())
			c.converged(n1, n3)
			shift.Store(0)
			c.converged(n1, n3)
			require.Equal(t, []string{own}, n3.own())
		})
	}
}
