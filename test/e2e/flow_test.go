package e2e

import (
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// flow is an established TCP connection between two ends that lives as long as the test.
type flow struct {
	name           string
	client, server *net.TCPConn
	rounds         byte
}

// openFlow connects two ends and exchanges the first bytes.
func openFlow(t *testing.T, from, to lab.End, family int) *flow {
	t.Helper()
	l, err := lab.ListenTCP(to, family)
	require.NoError(t, err)
	defer l.Close()
	require.NoError(t, l.SetDeadline(time.Now().Add(10*time.Second)))
	client, err := lab.DialTCP(testContext(t), from, l.Addr().(*net.TCPAddr).AddrPort())
	require.NoError(t, err, "%s to %s, IPv%d", from.Name, to.Name, family)
	t.Cleanup(func() { client.Close() })
	server, err := l.AcceptTCP()
	require.NoError(t, err)
	t.Cleanup(func() { server.Close() })
	f := &flow{name: fmt.Sprintf("%s to %s, IPv%d", from.Name, to.Name, family), client: client, server: server}
	f.requireAlive(t, 5*time.Second)
	return f
}

// exchange sends a byte each way, in order.
func (f *flow) exchange(limit time.Duration) error {
	f.rounds++
	deadline := time.Now().Add(limit)
	for _, dir := range [][2]*net.TCPConn{{f.client, f.server}, {f.server, f.client}} {
		_ = dir[0].SetDeadline(deadline)
		_ = dir[1].SetDeadline(deadline)
		if _, err := dir[0].Write([]byte{f.rounds}); err != nil {
			return err
		}
		var got [1]byte
		if _, err := io.ReadFull(dir[1], got[:]); err != nil {
			return err
		}
		if got[0] != f.rounds {
			return fmt.Errorf("received round %d in round %d", got[0], f.rounds)
		}
	}
	return nil
}

// requireAlive checks that bytes go both ways within the limit, which must leave room for TCP's retransmission timer after an outage.
func (f *flow) requireAlive(t *testing.T, limit time.Duration) {
	t.Helper()
	require.NoError(t, f.exchange(limit), "established connection %s", f.name)
}
