package tap

import (
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// wire is the smallest data plane: what one device's queues receive is transmitted by the other's. One goroutine, one pool, as a worker has it.
type wire struct {
	pool *port.Pool
	a, b *Port
	stop chan struct{}
	done sync.WaitGroup

	mu       sync.Mutex
	packets  int
	longest  int // bytes of the longest packet
	trains   map[uint8]int
	queues   map[int]int // packets by queue of a
	rejected int
	dropped  int
	turns    int
}

func newWire(t testing.TB, pool *port.Pool, a, b *Port) *wire {
	w := &wire{pool: pool, a: a, b: b, trains: map[uint8]int{}, queues: map[int]int{}}
	w.start()
	t.Cleanup(w.halt)
	return w
}

func (w *wire) start() {
	w.stop = make(chan struct{})
	w.done.Go(w.run)
}

// halt stops the worker; the pool may be looked at afterwards. Harmless twice.
func (w *wire) halt() {
	if w.stop != nil {
		close(w.stop)
		w.done.Wait()
		w.stop = nil
	}
}

func (w *wire) run() {
	frames := make([]port.Frame, port.MaxChain)
	for {
		select {
		case <-w.stop:
			return
		default:
		}
		var fds []unix.PollFd
		for _, p := range []*Port{w.a, w.b} {
			for i := range p.NumQueues() {
				if fd := p.Queue(i).FD(); fd >= 0 {
					fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
				}
			}
		}
		_, _ = unix.Poll(fds, 20)
		w.mu.Lock()
		w.turns++
		w.mu.Unlock()
		w.turn(w.a, w.b, frames)
		w.turn(w.b, w.a, frames)
	}
}

func (w *wire) turn(from, to *Port, frames []port.Frame) {
	for i := range from.NumQueues() {
		n := from.Queue(i).Receive(frames)
		got := frames[:n]
		w.mu.Lock()
		for k := 0; k < n; {
			length, c := port.PacketLen(got[k:])
			w.packets++
			w.longest = max(w.longest, length)
			w.trains[got[k].Offload.GSO&^port.GSOECN]++
			if from == w.a {
				w.queues[i]++
			}
			k += c
		}
		for len(got) > 0 {
			k, status := to.Queue(i % to.NumQueues()).Transmit(got)
			got = got[k:]
			if status == port.TxOK {
				break
			}
			c := len(got)
			if status == port.TxRejected {
				c = port.PacketFrames(got)
				w.rejected++
			}
			w.dropped += c
			w.pool.FreeAll(got[:c])
			got = got[c:]
		}
		w.mu.Unlock()
	}
}

// get reads a counter while the wire runs.
func get[T any](w *wire, f func() T) T {
	w.mu.Lock()
	defer w.mu.Unlock()
	return f()
}

// receiveOne waits for a packet at one queue.
func receiveOne(q port.Queue, frames []port.Frame, match func([]port.Frame) bool, pool *port.Pool) []port.Frame {
	for deadline := time.Now().Add(3 * time.Second); time.Now().Before(deadline); {
		n := q.Receive(frames)
		var found []port.Frame
		for k := 0; k < n; {
			_, c := port.PacketLen(frames[k:n])
			if p := frames[k : k+c]; found == nil && match(p) {
				found = append(found, p...)
			} else {
				pool.FreeAll(p)
			}
			k += c
		}
		if found != nil {
			return found
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}
