package dataplane

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/mem"
)

// kickedPort is a memory port whose queue wants to be flushed, and says so for some polls after each Transmit.
type kickedPort struct {
	*mem.Port
	queue kickedQueue
}

type kickedQueue struct {
	port.Queue
	flushes, outstanding, after int
}

func (p *kickedPort) Queue(int) port.Queue { return &p.queue }

func (q *kickedQueue) Transmit(frames []port.Frame) (int, port.TxStatus) {
	q.outstanding = q.after
	return q.Queue.Transmit(frames)
}

func (q *kickedQueue) Flush() bool {
	q.flushes++
	q.outstanding--
	return q.outstanding > 0
}

func TestPortsAreFlushedWhileSomethingIsOutstanding(t *testing.T) {
	n := newNode(t)
	p := &kickedPort{Port: n.pods[1]}
	p.queue = kickedQueue{Queue: n.pods[1].Queue(0), after: 3}
	snap := *n.snap
	snap.Ports = append([]PortInfo(nil), snap.Ports...)
	snap.Ports[FirstPodSlot+1].Port = p
	n.d.Publish(&snap)
	poll := func(want int) {
		t.Helper()
		n.w.Poll()
		require.Equal(t, want, p.queue.flushes)
	}
	poll(0)
	poll(0)
	send := func() {
		require.NoError(t, n.pods[0].Inject(0, fromPod(0, podAddrs4[1], 64).bytes(t), port.Offload{}))
	}
	send()
	poll(1)
	poll(2)
	send() // again before it is done
	poll(3)
	poll(4)
	poll(5)
	poll(5) // done
	require.Len(t, n.pods[1].Sent(0), 2)

	// A port that leaves is flushed no more, whatever was outstanding.
	send()
	poll(6)
	n.d.Publish(n.snap)
	poll(6)
	poll(6)
}
