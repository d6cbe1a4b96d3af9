package snat

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
)

// Prefetching sees packets of any kind, of sessions or not, and changes nothing.
func TestPrefetch(t *testing.T) {
	w := benchWorld(t, 0, 1<<15, Config{})
	fill(t, w, prefetchFrom)
	before := w.sessions()
	var ps []*packet.Packet
	for i := range 200 {
		w.family = &families[i%2]
		f := w.to(i%4, []uint8{tcp, udp, sctp, packet.ProtoICMP, protoGRE}[i%5], uint16(32768+i%16), i/3, 443)
		if i%7 == 0 {
			f = flow{src: w.far(i), dst: w.node, proto: udp, sport: 443, dport: before[i].ExternalPort}
		}
		p := w.parse(f.frame())
		ps = append(ps, &p)
	}
	require.True(t, w.tr.PrefetchPays())
	for rest := ps; len(rest) > 0; rest = rest[min(len(rest), 50):] {
		w.tr.Prefetch(rest, true) // all but 64 are left out
		w.tr.Prefetch(rest, false)
	}
	w.tr.Prefetch(nil, false)
	require.Equal(t, before, w.sessions())
	require.NotZero(t, w.tr.fetched)
}
