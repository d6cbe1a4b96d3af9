package snat

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
)

// A lookup compares every part of the tuple, not only its hash's tag: among many flows that differ in one part only, others of the kind are not found.
func TestLookupsCompareEveryPart(t *testing.T) {
	for fam := range families {
		w := benchWorld(t, fam, 1<<13, Config{})
		tb := w.tr.v4
		if fam == 1 {
			tb = w.tr.v6
		}
		base := tuple{inside: packet.AddrFrom(w.pod(0)), remote: packet.AddrFrom(w.far(0)), inPort: 1000, remPort: 80, extPort: 10000, proto: udp}
		for part, set := range map[string]func(k *tuple, i int){
			"inside": func(k *tuple, i int) { k.inside.Lo += uint64(i); k.extPort += uint16(i) }, "inside, high": func(k *tuple, i int) {
				if fam == 1 {
					k.inside.Hi += uint64(i)
				} else {
					k.inside.Lo += uint64(i) << 12
				}
				k.extPort += uint16(i)
			},
			"inPort":  func(k *tuple, i int) { k.inPort += uint16(i); k.extPort += uint16(i) },
			"remote":  func(k *tuple, i int) { k.remote.Lo += uint64(i) },
			"remPort": func(k *tuple, i int) { k.remPort += uint16(i) },
			"proto":   func(k *tuple, i int) { k.proto = uint8(i); k.extPort += uint16(i) >> 8; k.inPort += uint16(i) >> 8 },
		} {
			var records []uint32
			for i := range 4000 {
				k := base
				set(&k, i)
				n := tb.take()
				require.NotZero(t, n)
				tb.recs[n-1] = record{expires: w.tr.tick + 100}
				tb.link(n, &k, flagLive)
				records = append(records, n)
			}
			for i := range 16000 {
				k := base
				set(&k, i)
				if i < 4000 {
					require.Equal(t, records[i], tb.findOut(&k), part)
					require.Equal(t, records[i], tb.findIn(&k), part)
				} else if part != "proto" {
					require.Zero(t, tb.findOut(&k), "%s %d", part, i)
					require.Zero(t, tb.findIn(&k), "%s %d", part, i)
				}
			}
			for i, n := range records { // taken out in another order than put in
				if i%2 == 0 {
					tb.unlink(n)
				}
			}
			for i := range records {
				k := base
				set(&k, i)
				if i%2 == 0 {
					require.Zero(t, tb.findOut(&k))
					require.Zero(t, tb.findIn(&k))
				} else {
					require.Equal(t, records[i], tb.findOut(&k))
					tb.unlink(records[i])
				}
			}
			require.Zero(t, tb.used)
		}
	}
}
