package dataplane

import (
	"net/netip"
	"testing"

	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/fib"
)

// On a link with jumbo frames a segment is longer than a chunk. The pool's four large buffers are fewer than the segments: the port must
// be made to give some back on the way.
func TestSegmentsLongerThanAChunk(t *testing.T) {
	for _, f := range families {
		t.Run(f.name, func(t *testing.T) {
			n := newNode(t)
			b := fib.NewBuilder()
			remote := netip.MustParseAddr(f.remotePod)
			require.NoError(t, b.AddPool(netip.PrefixFrom(remote, map[bool]int{true: 16, false: 64}[remote.Is4()]).Masked(), map[bool]int{true: 24, false: 80}[remote.Is4()]))
			a, err := b.AddAdjacency(fib.Adjacency{Dst: node2MAC, Src: uplinkMAC, Port: UplinkSlot, MTU: 9000})
			require.NoError(t, err)
			require.NoError(t, b.Add(netip.PrefixFrom(remote, remote.BitLen()), fib.MakeEntry(fib.Node, a)))
			snap := n.snapshot()
			snap.FIB = b.Build()
			n.d.Publish(snap)

			const mss, payload = 8900, 60000
			frame, o := gsoFrame(t, f.podA, f.remotePod, podMACs[0], gatewayMAC, payload, mss)
			require.NoError(t, n.pods[0].Inject(0, frame, o))
			n.poll()
			total := 0
			for i, s := range n.uplink.Sent(0) {
				tcp := decode(t, s.Bytes).Layer(layers.LayerTypeTCP).(*layers.TCP)
				require.EqualValues(t, 1+i*mss, tcp.Seq)
				total += len(tcp.Payload)
			}
			require.Equal(t, payload, total)
		})
	}
}
