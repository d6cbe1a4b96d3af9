package dataplane

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

// loop is the benchmark's port: what the worker transmits becomes what it receives next, in the order it was transmitted. The Ethernet addresses
// are set back; hop limits run down, and the benchmark renews the frames before they are used up. FIFO order keeps frames random in memory.
type loop struct {
	pool   *port.Pool
	ring   []port.Frame // as many as are in flight, a multiple of a batch: neither copy wraps around
	head   int          // next to receive; also where transmitted frames go
	header [12]byte
	rounds int // how often the ring went round
}

func (q *loop) Receive(frames []port.Frame) int {
	return copy(frames[:batch], q.ring[q.head:])
}

func (q *loop) Transmit(frames []port.Frame) (int, port.TxStatus) {
	for i := range frames {
		*(*[12]byte)(q.pool.Bytes(&frames[i])) = q.header
	}
	copy(q.ring[q.head:], frames)
	if q.head += len(frames); q.head == len(q.ring) {
		q.head = 0
		q.rounds++
	}
	return len(frames), port.TxOK
}

func (q *loop) FD() int { return -1 }

type loopPort struct {
	name string
	rx   *loop
}

func (p *loopPort) Name() string         { return p.name }
func (p *loopPort) NumQueues() int       { return 1 }
func (p *loopPort) Queue(int) port.Queue { return p.rx }
func (p *loopPort) Caps() port.Caps      { return port.Caps{Polled: true, MaxFrame: 1514} }
func (p *loopPort) Close() error         { return nil }

// txOnly is a port whose transmitted frames go back to the pod they came from.
type txOnly struct{ *loop }

func (txOnly) Receive([]port.Frame) int { return 0 }

type txPort struct {
	loopPort
	q port.Queue
}

func (p *txPort) Queue(int) port.Queue { return p.q }

// Caps: such a port is not polled, as a pod's TAP is not.
func (p *txPort) Caps() port.Caps { return port.Caps{MaxFrame: 1514} }

// BenchmarkPoll measures one whole Worker.Poll, memory ports included, per packet: 64-byte UDP frames from one pod to random pods, of 5,000
// remote blocks and 250 local pods.
func BenchmarkPoll(b *testing.B) {
	for _, family := range []int{4, 6} {
		for _, frames := range []int{64, 1024, 8192} {
			for _, dst := range []string{"remote", "mixed"} {
				b.Run(fmt.Sprintf("family=%d/frame=64/blocks=5000/pods=250/inflight=%d/to=%s", family, frames, dst), func(b *testing.B) {
					benchmarkPoll(b, family, frames, dst)
				})
			}
		}
	}
}

func benchmarkPoll(b *testing.B, family, inflight int, to string) {
	const blocks, pods = 5000, 250
	cfg := port.PoolConfig{Chunks: 8192, ChunkSize: 2048, LargeBuffers: 4}
	pool, err := port.NewPool(make([]byte, cfg.Size()), cfg)
	require.NoError(b, err)
	src := &loop{pool: pool}
	copy(src.header[:], gatewayMAC[:])
	copy(src.header[6:], podMACs[0][:])

	s := &Snapshot{GatewayMAC: gatewayMAC, Gateway4: addr("169.254.1.1"), Gateway6: addr("fe80::1")}
	back := txOnly{src}
	s.Ports = []PortInfo{
		{Kind: PortUplink, Name: "eth0", MAC: uplinkMAC, Port: &txPort{loopPort{name: "eth0"}, back}},
		{Kind: PortHost, Name: "ovp0"},
	}
	fb := fib.NewBuilder()
	require.NoError(b, fb.AddPool(netip.MustParsePrefix("10.0.0.0/11"), 24))
	require.NoError(b, fb.AddPool(netip.MustParsePrefix("fd12:3456:789a::/64"), 80))
	block4 := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), 0}) }
	block6 := func(i int) netip.Addr {
		return netip.AddrFrom16([16]byte{0xfd, 0x12, 0x34, 0x56, 0x78, 0x9a, 0, 0, byte(i >> 8), byte(i)})
	}
	host := func(a netip.Addr, n byte) netip.Addr {
		v := a.AsSlice()
		v[len(v)-1] = n
		h, _ := netip.AddrFromSlice(v)
		return h
	}
	add := func(p netip.Prefix, k fib.Kind, a fib.Adjacency) {
		i, err := fb.AddAdjacency(a)
		require.NoError(b, err)
		require.NoError(b, fb.Add(p, fib.MakeEntry(k, i)))
	}
	for i := 1; i <= blocks; i++ {
		a := fib.Adjacency{Dst: packet.MAC{2, 1, 0, 0, byte(i >> 8), byte(i)}, Src: uplinkMAC, Port: UplinkSlot, MTU: 1500}
		add(netip.PrefixFrom(block4(i), 24), fib.Node, a)
		add(netip.PrefixFrom(block6(i), 80), fib.Node, a)
	}
	for i := range pods {
		h4, h6 := host(block4(0), byte(i+2)), host(block6(0), byte(i+2))
		s.Ports = append(s.Ports, PortInfo{Kind: PortPod, Name: fmt.Sprint("pod", i), Port: &txPort{loopPort{name: "pod"}, back},
			Addr4: packet.AddrFrom(h4), Addr6: packet.AddrFrom(h6)})
		a := fib.Adjacency{Dst: packet.MAC{2, 2, 0, 0, 0, byte(i)}, Src: gatewayMAC, Port: uint16(FirstPodSlot + i), MTU: 1500}
		add(netip.PrefixFrom(h4, 32), fib.Pod, a)
		add(netip.PrefixFrom(h6, 128), fib.Pod, a)
	}
	s.Ports[FirstPodSlot].Port = &loopPort{name: "pod0", rx: src}
	s.FIB = fb.Build()

	random := rand.New(rand.NewPCG(1, 2))
	var templates [][]byte
	for range inflight {
		i := 1 + random.IntN(blocks)
		if to == "mixed" && random.IntN(2) == 0 {
			i = 0
		}
		from, dst := host(block4(0), 2), host(block4(i), byte(2+random.IntN(pods)))
		payload := 64 - 42
		if family == 6 {
			from, dst = host(block6(0), 2), host(block6(i), byte(2+random.IntN(pods)))
			payload = 2
		}
		templates = append(templates, udp(from.String(), dst.String(), podMACs[0], gatewayMAC, payload).bytes(b))
	}
	var own []port.Frame
	for range inflight {
		f, ok := pool.Alloc()
		require.True(b, ok)
		own = append(own, f)
	}
	random.Shuffle(len(own), func(i, j int) { own[i], own[j] = own[j], own[i] })
	renew := func() {
		src.ring, src.head, src.rounds = src.ring[:0], 0, 0
		for i, f := range own {
			f.Len = uint32(len(templates[i]))
			copy(pool.Bytes(&f), templates[i])
			src.ring = append(src.ring, f)
		}
	}
	const rounds = 60
	src.ring = make([]port.Frame, 0, inflight)
	d, err := New(Config{Workers: []WorkerConfig{{Pool: pool, CPU: -1}}})
	require.NoError(b, err)
	d.Publish(s)
	w := d.Workers()[0]
	renew()
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; {
		if src.rounds >= rounds {
			b.StopTimer()
			renew()
			b.StartTimer()
		}
		n := w.Poll()
		if n != batch {
			b.Fatalf("a poll received %d packets", n)
		}
		done += n
	}
	b.StopTimer()
	var drops uint64
	for _, sl := range w.slots {
		for r := range sl.dropsIn {
			drops += sl.dropsIn[r] + sl.dropsOut[r]
		}
	}
	require.Zero(b, drops)
}
