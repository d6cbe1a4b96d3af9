package server_test

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Connections that nobody speaks on, and some that say a byte and no more, hold no node up.
func TestSilentConnectionsHoldNobodyUp(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	for i := range 200 {
		conn, err := net.Dial("tcp", c.node)
		require.NoError(t, err)
		defer conn.Close()
		if i < 20 {
			_, err = conn.Write([]byte{0x16})
			require.NoError(t, err)
		}
	}
	start := time.Now()
	n1, n2 := c.join(1, nil), c.join(2, nil)
	c.converged(n1, n2)
	t.Logf("two nodes joined past them in %v", time.Since(start))
}
