package dataplane

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// Pods that send as much as they can have their answers: the uplink, where those of all pods come by, does not fill up.
func TestTheUplinkKeepsUpWithPods(t *testing.T) {
	for _, f := range families {
		n := newNode(t, withSNAT)
		n.w.Poll()
		frames := func(b []byte) (all [][]byte) {
			for range 64 {
				all = append(all, b)
			}
			return all
		}
		for i := range n.w.polled {
			src := &n.w.polled[i]
			q := &sink{pool: n.pool}
			switch {
			case src.slot.index >= FirstPodSlot:
				q.frames = frames(fromPod(src.slot.index-FirstPodSlot, f.outside, 30).bytes(t))
			case src.slot.index == UplinkSlot:
				q.frames = frames(fromNode2(f.remotePod, f.podA, 30).bytes(t))[:32] // as many as a TAP gives at once
				n.w.uplinks[0].queue = q
			}
			src.queue, src.slot.tx, src.slot.flusher = q, &sink{pool: n.pool}, nil
		}
		for range 100 {
			n.w.Poll()
		}
		var pods uint64
		for _, sl := range n.w.slots[FirstPodSlot:] {
			require.Positive(t, sl.in.Packets, "and nobody starves")
			pods += sl.in.Packets
		}
		require.GreaterOrEqual(t, n.w.slots[UplinkSlot].in.Packets, pods)
		// Without a backlog there are no turns beyond those that all have.
		for i := range n.w.uplinks {
			n.w.uplinks[i].queue.(*sink).frames = nil
		}
		n.w.Poll()
		before := n.w.slots[UplinkSlot].in.Packets
		n.w.Poll()
		require.Equal(t, before, n.w.slots[UplinkSlot].in.Packets)
		require.False(t, n.w.backlog)
	}
}
