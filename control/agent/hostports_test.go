package agent

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/snat"
)

// The node's ports stay its own when its sockets cannot be listed, which is told once until they can; a look for connections that failed is made again.
func TestHostPortsStayWhenSocketsCannotBeListed(t *testing.T) {
	var log strings.Builder
	f := &fakePlatform{}
	a := &Agent{plat: f, log: slog.New(slog.NewTextHandler(&log, nil))}
	tr := &translation{settings: settingsOf(nil)}
	var err error
	tr.alloc, err = snat.NewAllocator(snat.AllocatorConfig{First: tr.settings.first, Last: tr.settings.last, Workers: 1, MaxPods: 4})
	require.NoError(t, err)
	told := func() int { return strings.Count(log.String(), "cannot be listed") }

	require.True(t, a.watchHostPorts(tr))
	require.Equal(t, []uint16{10250, 10251}, tr.hostTCP)
	require.True(t, tr.alloc.HostPort(packet.ProtoTCP, 10251))
	require.False(t, a.watchHostPorts(tr), "nothing changed")

	f.socketsErr = errors.New("no such protocol")
	for range 3 {
		require.False(t, a.watchHostPorts(tr))
	}
	require.Equal(t, 1, told())
	require.Equal(t, []uint16{10250, 10251}, tr.hostTCP)

	f.socketsErr, f.connectionsErr = nil, errors.New("interrupted")
	tr.looks = connectionsEvery
	require.False(t, a.watchHostPorts(tr))
	require.Equal(t, []uint16{10251, 22}, []uint16{tr.connections[1], tr.connections[0]}, "not forgotten")
	require.Equal(t, 1, told(), "the same trouble")
	f.connectionsErr = nil
	require.False(t, a.watchHostPorts(tr))
	require.Equal(t, connectionsEvery+1, tr.looks, "made again, and well")
	f.socketsErr = errors.New("again")
	a.watchHostPorts(tr)
	require.Equal(t, 2, told())
}
