package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// scrapeNode asks a node's daemon for its metrics where operators' scrapers do: at its default address, in the node's network namespace. By name and labels.
func scrapeNode(t *testing.T, n *lab.Node) map[string]float64 {
	t.Helper()
	var conn net.Conn
	// An address in digits is dialled on the calling thread.
	require.NoError(t, lab.InNetns(n.Netns(), func() (err error) {
		conn, err = net.DialTimeout("tcp", "127.0.0.1:7446", 5*time.Second)
		return err
	}))
	dial := func(context.Context, string, string) (net.Conn, error) { return conn, nil }
	r, err := (&http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: 5 * time.Second}).Get("http://127.0.0.1:7446/metrics")
	require.NoError(t, err)
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	values := make(map[string]float64)
	for line := range strings.Lines(string(text)) {
		i := strings.LastIndexByte(line, ' ')
		if v, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64); i > 0 && err == nil && line[0] != '#' {
			values[line[:i]] = v
		}
	}
	return values
}

// What a scrape says of a node that forwards: every count where its packets went.
func TestMetricsOfForwardingNodes(t *testing.T) {
	l := newLab(t, lab.Options{Name: "ovptmet", Nodes: 2, Pods: 1, Workers: 2, State: lab.StateController})
	n1, p1, p2 := l.Node("n1"), l.Node("n1").Pods[0], l.Node("n2").Pods[0]
	before := scrapeNode(t, n1)
	for name, want := range map[string]float64{
		"overplane_ready": 1, "overplane_problems": 0, "overplane_members": 2, `overplane_pods{state="ready"}`: 1, `overplane_pods{state="failed"}`: 0,
		"overplane_uplink_up": 1, `overplane_worker_up{worker="0"}`: 1, `overplane_worker_up{worker="1"}`: 1, `overplane_state_source_info{source="controller"}`: 1,
		"overplane_control_connected": 1, "overplane_control_stale_seconds": 0, "overplane_control_refused": 0,
	} {
		v, ok := before[name]
		require.True(t, ok, "no %s", name)
		require.Equal(t, want, v, name)
	}
	require.NotZero(t, before["overplane_state_desired_revision"])
	require.Equal(t, before["overplane_state_desired_revision"], before["overplane_state_programmed_revision"])
	require.Equal(t, before["overplane_state_desired_revision"], before["overplane_control_programmed_revision"])

	const pings = 20
	for range pings {
		_, err := lab.Ping(testContext(t), p1.Netns(), p2.End().Addr(4))
		require.NoError(t, err)
	}
	after := scrapeNode(t, n1)
	rose := func(name string) float64 { return after[name] - before[name] }
	for _, name := range []string{
		`overplane_port_packets_total{direction="in",kind="pod"}`, `overplane_port_packets_total{direction="out",kind="uplink"}`,
		`overplane_port_packets_total{direction="in",kind="uplink"}`, `overplane_port_packets_total{direction="out",kind="pod"}`,
	} {
		require.GreaterOrEqual(t, rose(name), float64(pings), name)
	}

	// A packet for an address that nobody has dies of the reason that says so.
	p, err := lab.NewPinger(p1.Netns(), netip.AddrFrom4([4]byte{10, 244, 200, 1}))
	require.NoError(t, err)
	defer p.Close()
	_, _, _ = p.Once(56, 300*time.Millisecond)
	require.Equal(t, after[`overplane_drops_total{direction="in",kind="pod",reason="unreachable"}`]+1,
		scrapeNode(t, n1)[`overplane_drops_total{direction="in",kind="pod",reason="unreachable"}`])

	// A controller that dies shows as staleness, and in nothing else.
	require.NoError(t, l.KillController())
	require.Eventually(t, func() bool {
		m := scrapeNode(t, n1)
		return m["overplane_control_connected"] == 0 && m["overplane_control_stale_seconds"] > 0 && m["overplane_ready"] == 1
	}, 10*time.Second, 100*time.Millisecond)
}
