// Package mem has ports in memory: for tests, benchmarks and the replay of captures. They need no kernel and no root.
//
// A test injects packets at a port, lets the worker poll, and takes out what was sent:
//
//	Port.Inject -> (Queue.Receive, the worker, Queue.Transmit) -> Port.Sent
package mem

import (
	"bytes"
	"fmt"

	"github.com/overplane/overplane/dataplane/port"
)

// Config describes a port.
type Config struct {
	Name  string
	Pools []*port.Pool // queue i uses Pools[i]; one queue each
	Caps  port.Caps    // Polled is implied; MaxFrame 0 is 65,549: the longest IP packet with its Ethernet header
}

// Port is a port in memory. All its methods and those of its queues are for one goroutine, the one that calls Worker.Poll.
type Port struct {
	cfg    Config
	queues []*Queue
}

// Packet is one packet, whole, with what is unfinished about it.
type Packet struct {
	Bytes   []byte
	Offload port.Offload
	Frames  int // of the chain it was; how many on injection is decided by its length
}

// New makes a port.
func New(cfg Config) *Port {
	cfg.Caps.Polled = true
	if cfg.Caps.MaxFrame == 0 {
		cfg.Caps.MaxFrame = 65535 + 14
	}
	p := &Port{cfg: cfg}
	for _, pool := range cfg.Pools {
		p.queues = append(p.queues, &Queue{pool: pool})
	}
	return p
}

// Name implements port.Port.
func (p *Port) Name() string { return p.cfg.Name }

// NumQueues implements port.Port: one for each pool.
func (p *Port) NumQueues() int { return len(p.queues) }

// Queue implements port.Port.
func (p *Port) Queue(i int) port.Queue { return p.queues[i] }

// Caps implements port.Port: what the configuration said.
func (p *Port) Caps() port.Caps { return p.cfg.Caps }

// Close gives frames back that nobody received.
func (p *Port) Close() error {
	for _, q := range p.queues {
		q.pool.FreeAll(q.rx)
		q.rx = nil
	}
	return nil
}

// Inject puts a copy of a packet into queue q: one chunk if it fits, else a chunk and a large buffer, as a TAP delivers it.
func (p *Port) Inject(q int, b []byte, o port.Offload) error {
	queue := p.queues[q]
	f, ok := queue.pool.Alloc()
	if !ok {
		return fmt.Errorf("mem: port %s: no chunk left", p.cfg.Name)
	}
	f.Offload = o
	n := copy(queue.pool.Buffer(&f), b)
	f.Len = uint32(n)
	if n == len(b) {
		queue.rx = append(queue.rx, f)
		return nil
	}
	tail, ok := queue.pool.AllocLarge()
	if !ok || len(b)-n > port.LargeSize {
		queue.pool.Free(f)
		return fmt.Errorf("mem: port %s: no large buffer for a packet of %d bytes", p.cfg.Name, len(b))
	}
	f.Flags |= port.More
	tail.Len = uint32(copy(queue.pool.Buffer(&tail), b[n:]))
	queue.rx = append(queue.rx, f, tail)
	return nil
}

// Sent returns what was transmitted on queue q since the last call, in order.
func (p *Port) Sent(q int) []Packet {
	s := p.queues[q].sent
	p.queues[q].sent = nil
	return s
}

// SetTransmit makes queue q answer Transmit with status after it took limit more packets; TxOK takes everything again.
func (p *Port) SetTransmit(q, limit int, status port.TxStatus) {
	p.queues[q].limit, p.queues[q].status = limit, status
}

// Queue is one queue of a Port.
type Queue struct {
	pool   *port.Pool
	rx     []port.Frame
	sent   []Packet
	limit  int
	status port.TxStatus
}

// Receive implements port.Queue.
func (q *Queue) Receive(frames []port.Frame) int {
	n := 0
	for n < len(q.rx) {
		k := port.PacketFrames(q.rx[n:])
		if n+k > len(frames) {
			break
		}
		n += copy(frames[n:n+k], q.rx[n:])
	}
	q.rx = append(q.rx[:0], q.rx[n:]...)
	return n
}

// Transmit implements port.Queue: what is taken is copied out, and its frames freed.
func (q *Queue) Transmit(frames []port.Frame) (int, port.TxStatus) {
	n := 0
	for n < len(frames) {
		if q.status != port.TxOK {
			if q.limit == 0 {
				return n, q.status
			}
			q.limit--
		}
		k := port.PacketFrames(frames[n:])
		var b bytes.Buffer
		for i := range frames[n : n+k] {
			b.Write(q.pool.Bytes(&frames[n+i]))
		}
		q.sent = append(q.sent, Packet{Bytes: b.Bytes(), Offload: frames[n].Offload, Frames: k})
		q.pool.FreeAll(frames[n : n+k])
		n += k
	}
	return n, port.TxOK
}

// FD implements port.Queue: there is nothing to wait on.
func (q *Queue) FD() int { return -1 }
