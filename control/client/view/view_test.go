package view

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func TestTableAlignsColumns(t *testing.T) {
	table := newTable("NAME", ">N", "NOTE")
	table.row("a", "1", "")
	table.row("längst", "18446744073709551615", "x")
	var out strings.Builder
	require.NoError(t, table.write(&out))
	require.Equal(t, "NAME                       N  NOTE\n"+
		"a                          1  -\n"+
		"längst  18446744073709551615  x\n", out.String())
}

func TestAge(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59600 * time.Millisecond: "1m0s", 90 * time.Second: "1m30s", time.Hour: "1h0m", 26*time.Hour + 59*time.Minute: "1d2h",
		1000 * 24 * time.Hour: "1000d0h",
	} {
		require.Equal(t, want, age(now, now.Add(-d)))
	}
}

func TestQueues(t *testing.T) {
	require.Equal(t, "", queues(nil))
	require.Equal(t, "0-2,5,7-8", queues([]uint32{5, 0, 1, 2, 8, 7}))
}

func TestDestinations(t *testing.T) {
	for text, want := range map[string]string{
		"10.244.2.7": "10.244.2.7/32", "fd00::1": "fd00::1/128", "10.244.2.7/24": "10.244.2.0/24", "::ffff:10.0.0.1": "10.0.0.1/32", "::/0": "::/0",
	} {
		p, err := ParseDestination(text)
		require.NoError(t, err)
		require.Equal(t, want, p.String())
	}
	for _, text := range []string{"", "x", "10.0.0", "fe80::1%eth0", "10.0.0.0/33"} {
		_, err := ParseDestination(text)
		require.Error(t, err, text)
	}
}

func TestLookupIsTheLongestMatch(t *testing.T) {
	routes := []*controlv1.ProgrammedRoute{
		{Prefix: "10.244.0.0/16", Kind: "unreachable"},
		{Prefix: "10.250.0.0/24", Kind: "unreachable"}, // a pool of one block
		{Prefix: "10.250.0.0/24", Kind: "node", Target: "n3"},
		{Prefix: "0.0.0.0/0", Kind: "outside"},
		{Prefix: "10.244.2.0/24", Kind: "node", Target: "n2"},
		{Prefix: "10.244.2.128/25", Kind: "node", Target: "n3"},
		{Prefix: "not a prefix", Kind: "node"},
	}
	tests := []struct{ to, prefix, kind string }{
		{"10.244.2.127", "10.244.2.0/24", "node"},
		{"10.244.2.128", "10.244.2.128/25", "node"},
		{"10.244.9.9", "10.244.0.0/16", "unreachable"}, // not outside
		{"10.244.2.0/24", "10.244.2.0/24", "node"},     // more specific ones do not cover all of it
		{"10.244.2.0/23", "10.244.0.0/16", "unreachable"},
		{"10.250.0.1", "10.250.0.0/24", "node"},
		{"192.0.2.1", "0.0.0.0/0", "outside"},
	}
	for range 3 {
		for _, tt := range tests {
			to, err := ParseDestination(tt.to)
			require.NoError(t, err)
			got := Lookup(routes, to)
			require.Equal(t, tt.prefix, got.GetPrefix(), tt.to)
			require.Equal(t, tt.kind, got.GetKind(), tt.to)
		}
		rand.Shuffle(len(routes), func(i, j int) { routes[i], routes[j] = routes[j], routes[i] })
	}
	require.Nil(t, Lookup(routes, netip.MustParsePrefix("fd00::1/128"))) // the other family's default does not count
}

func TestDropsSince(t *testing.T) {
	d := func(reason string, worker uint32, packets uint64) *controlv1.DropCount {
		return &controlv1.DropCount{Port: "web", Kind: "pod", Direction: "in", Reason: reason, Worker: worker, Packets: packets}
	}
	before := []*controlv1.DropCount{d("a", 0, 5), d("a", 1, 5), d("b", 0, 9), d("gone", 0, 3)}
	after := []*controlv1.DropCount{d("a", 1, 7), d("a", 0, 5), d("b", 0, 2), d("new", 0, 1)}
	got := DropsSince(before, after)
	require.Len(t, got, 3)
	require.True(t, proto.Equal(d("a", 1, 2), got[0]))
	require.True(t, proto.Equal(d("b", 0, 2), got[1])) // counts anew
	require.True(t, proto.Equal(d("new", 0, 1), got[2]))
	require.Equal(t, uint64(7), after[0].Packets, "the argument was changed")
	require.Empty(t, DropsSince(after, after))
}

func TestSumsShareNothing(t *testing.T) {
	drops := []*controlv1.DropCount{{Port: "a", Worker: 1, Packets: 1}, {Port: "a", Worker: 2, Packets: 2}}
	sum := SumDrops(drops)
	require.Len(t, sum, 1)
	require.Equal(t, uint64(3), sum[0].Packets)
	require.Equal(t, uint64(1), drops[0].Packets)

	// A pod and an interface may have one name.
	ports := []*controlv1.PortCounters{
		{Port: "eth0", Kind: "uplink", In: &controlv1.Traffic{Frames: 1}}, {Port: "eth0", Kind: "pod", In: &controlv1.Traffic{Frames: 2}},
		{Port: "eth0", Kind: "uplink", Worker: 1, In: &controlv1.Traffic{Frames: 4}},
	}
	sums := SumPorts(ports)
	require.Len(t, sums, 2)
	require.Equal(t, uint64(5), sums[0].GetIn().GetFrames())
	require.Equal(t, uint64(2), sums[1].GetIn().GetFrames())
	require.Equal(t, uint64(1), ports[0].GetIn().GetFrames())
}
