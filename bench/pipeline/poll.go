package pipeline

import (
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/netip"

	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

const (
	pollBatch = 64
	inflight  = 1024 // a multiple of a batch
)

var (
	uplinkMAC  = packet.MAC{2, 0, 0, 0, 0, 1}
	gatewayMAC = packet.MAC{2, 0, 0, 0, 0, 2}
	podMAC     = packet.MAC{2, 0, 0, 0, 0, 3}
)

// table routes to 5,000 blocks of other nodes, one pod of this one, and outside.
func table() (*fib.Builder, error) {
	b := fib.NewBuilder()
	if err := b.AddPool(netip.MustParsePrefix("10.0.0.0/11"), 24); err != nil {
		return nil, err
	}
	add := func(p netip.Prefix, k fib.Kind, a fib.Adjacency) error {
		i, err := b.AddAdjacency(a)
		if err != nil {
			return err
		}
		return b.Add(p, fib.MakeEntry(k, i))
	}
	for i := 1; i <= blocks; i++ {
		v := blockAddr(i, 0)
		prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), 0}), 24)
		a := fib.Adjacency{Dst: packet.MAC{2, 1, 0, 0, byte(i >> 8), byte(i)}, Src: uplinkMAC, Port: dataplane.UplinkSlot, MTU: 1500}
		if err := add(prefix, fib.Node, a); err != nil {
			return nil, err
		}
	}
	if err := add(netip.MustParsePrefix("10.0.0.2/32"), fib.Pod, fib.Adjacency{Dst: podMAC, Src: gatewayMAC, Port: dataplane.FirstPodSlot, MTU: 1500}); err != nil {
		return nil, err
	}
	return b, add(netip.MustParsePrefix("0.0.0.0/0"), fib.Outside, fib.Adjacency{Dst: gatewayMAC, Src: uplinkMAC, Port: dataplane.UplinkSlot, MTU: 1500})
}

// wheel is a queue of frames in memory: what the worker transmits is what it receives next, with its headers as they were. FIFO order keeps frames at random places.
type wheel struct {
	pool      *port.Pool
	ring      []port.Frame
	head      int
	templates [][64]byte
	sent      int
}

// Receive gives the next batch.
func (w *wheel) Receive(frames []port.Frame) int { return copy(frames[:pollBatch], w.ring[w.head:]) }

// Transmit takes a batch back.
func (w *wheel) Transmit(frames []port.Frame) (int, port.TxStatus) {
	for i := range frames {
		*(*[64]byte)(w.pool.Bytes(&frames[i])) = w.templates[w.head+i]
	}
	copy(w.ring[w.head:], frames)
	if w.head += len(frames); w.head == len(w.ring) {
		w.head = 0
	}
	w.sent += len(frames)
	return len(frames), port.TxOK
}

// FD is none.
func (w *wheel) FD() int { return -1 }

// end is a port whose only queue is the wheel, or the transmitting half of it.
type end struct {
	name  string
	queue port.Queue
	caps  port.Caps
}

// Name is the port's name.
func (e *end) Name() string { return e.name }

// NumQueues is 1.
func (e *end) NumQueues() int { return 1 }

// Queue is the queue.
func (e *end) Queue(int) port.Queue { return e.queue }

// Caps are a plain device's.
func (e *end) Caps() port.Caps { return e.caps }

// Close does nothing.
func (e *end) Close() error { return nil }

// deaf only transmits.
type deaf struct{ *wheel }

// Receive has nothing.
func (deaf) Receive([]port.Frame) int { return 0 }

// poll is a worker between one pod and the uplink.
func poll(outside bool) (*Stage, error) {
	cfg := port.PoolConfig{Chunks: 8192, ChunkSize: chunk, LargeBuffers: 4}
	pool, err := port.NewPool(make([]byte, cfg.Size()), cfg)
	if err != nil {
		return nil, err
	}
	b, err := table()
	if err != nil {
		return nil, err
	}
	w := &wheel{pool: pool}
	s := &dataplane.Snapshot{
		FIB: b.Build(), Node4: packet.AddrFrom4(0x0af0000b), GatewayMAC: gatewayMAC, Gateway4: packet.AddrFrom(netip.MustParseAddr("169.254.1.1")),
		Ports: []dataplane.PortInfo{
			{Kind: dataplane.PortUplink, Name: "eth0", MAC: uplinkMAC, Port: &end{"eth0", deaf{w}, port.Caps{MaxFrame: 1514}}},
			{Kind: dataplane.PortHost, Name: "ovp0"},
			{Kind: dataplane.PortPod, Name: "pod", MAC: podMAC, Addr4: packet.AddrFrom4(blockAddr(0, 2)), Port: &end{"pod", w, port.Caps{MaxFrame: 1514, Polled: true}}},
		},
	}
	wc := dataplane.WorkerConfig{Pool: pool, CPU: -1}
	stage := &Stage{Name: "poll"}
	if outside {
		stage.Name = "poll-snat"
		if wc.Translator, err = translatorFor(); err != nil {
			return nil, err
		}
		stage.Done = func() { wc.Translator.Close() }
	}
	random := rand.New(rand.NewPCG(7, 8))
	var frames []port.Frame
	for range inflight {
		f, ok := pool.Alloc()
		if !ok {
			return nil, fmt.Errorf("the pool has no room for %d frames", inflight)
		}
		f.Len = 64
		frames = append(frames, f)
	}
	random.Shuffle(len(frames), func(i, j int) { frames[i], frames[j] = frames[j], frames[i] })
	w.ring, w.templates = frames, make([][64]byte, inflight)
	for i := range frames {
		dst, sport := blockAddr(1+random.IntN(blocks), byte(2+random.IntN(250))), uint16(1000)
		if outside {
			dst, sport = 0xc6336400|uint32(i&255), uint16(20000+i)
		}
		t := w.templates[i][:]
		ipv4(t, blockAddr(0, 2), dst, sport, 443)
		copy(t, gatewayMAC[:])
		copy(t[6:], podMAC[:])
		copy(pool.Bytes(&frames[i]), t)
	}
	d, err := dataplane.New(dataplane.Config{Workers: []dataplane.WorkerConfig{wc}, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		return nil, err
	}
	d.Publish(s)
	worker := d.Workers()[0]
	stage.Run = func(_ *Clock, n int) int {
		done, before := 0, w.sent
		for done < n {
			got := worker.Poll()
			if got != pollBatch {
				panic(fmt.Sprintf("a poll received %d packets", got))
			}
			done += got
		}
		if w.sent-before != done {
			panic(fmt.Sprintf("%d of %d packets were sent", w.sent-before, done))
		}
		return done
	}
	return stage, nil
}
