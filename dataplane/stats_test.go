package dataplane

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
)

// What scrapes add up over all ports of a kind must not go back when one of them leaves its slot, or its slot is given to another.
func TestSumsOfCountersOutliveTheirPorts(t *testing.T) {
	n := newNode(t)
	sum := func() SlotStats {
		s := n.w.collect()
		total := s.Left[PortPod]
		for i := range s.Slots {
			if s.Slots[i].Kind == PortPod {
				total.Add(&s.Slots[i])
			}
		}
		return total
	}
	n.inject(n.pods[0], fromPod(0, podAddrs4[1], 100).bytes(t), fromPod(1, podAddrs4[1], 100).bytes(t)) // the second from a source that is not its own
	before := sum()
	require.EqualValues(t, 2, before.In.Packets)
	require.EqualValues(t, 1, before.Out.Packets)
	require.EqualValues(t, 1, before.DropsIn[drop.SourceNotPods])

	for range 2 { // gone, and another in its place
		s := *n.snap
		s.Ports = append([]PortInfo(nil), s.Ports...)
		s.Ports[FirstPodSlot] = PortInfo{}
		n.d.Publish(&s)
		n.w.Poll()
		require.Equal(t, before.In, sum().In)
		require.Equal(t, before.DropsIn, sum().DropsIn)
		n.d.Publish(n.snapshot())
		n.w.Poll()
		require.Equal(t, before.In, sum().In)
	}
	require.Equal(t, before.Out, sum().Out)
}
