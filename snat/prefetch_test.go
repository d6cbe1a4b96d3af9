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
	var ps []packet.Packet
	var which []uint16
	for i := range 200 {
		w.family = &families[i%2]
		f := w.to(i%4, []uint8{tcp, udp, sctp, packet.ProtoICMP, protoGRE}[i%5], uint16(32768+i%16), i/3, 443)
		if i%7 == 0 {
			f = flow{src: w.far(i), dst: w.node, proto: udp, sport: 443, dport: before[i].ExternalPort}
		}
		ps = append(ps, w.parse(f.frame()))
		if i%3 != 0 {
			which = append(which, uint16(i))
		}
	}
	w.tr.PrefetchOut(ps, which)
	w.tr.PrefetchIn(ps, which)
	w.tr.PrefetchIn(ps, nil)
	require.Equal(t, before, w.sessions())
	require.NotZero(t, w.tr.fetched)
}
