package dataplane

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// flows is a benchmark's port that makes 64-byte UDP packets of its sessions, in random order, and takes back what other
// ports transmit. Writing the addresses and ports of a template is part of the measured time, as a generator's is of its peers' figures.
type flows struct {
	pool *port.Pool
	free []port.Frame
	made []flow
	next int
	sent *int
}

// flow is what tells the packets of one session from those of the others: a template of its family and direction, and what is written into it.
type flow struct {
	template *[64]byte
	addr     [16]byte // destination from pods, source from outside: 4 or 16 bytes
	check    uint16   // IPv4 header checksum
	port     uint16   // source port from pods, destination port from outside
	far      uint16   // the far end's port
	out      bool
}

func (q *flows) Receive(frames []port.Frame) int {
	n := min(batch, len(q.free), len(frames))
	if len(q.made) == 0 {
		return 0
	}
	for i := range frames[:n] {
		f := q.free[i]
		f.Off, f.Len, f.Flags, f.Offload = f.Off&^2047+256, 64, 0, port.Offload{}
		x := &q.made[q.next]
		if q.next++; q.next == len(q.made) {
			q.next = 0
		}
		b := q.pool.Bytes(&f)
		*(*[64]byte)(b) = *x.template
		if b[12] == 8 { // IPv4
			binary.BigEndian.PutUint16(b[24:], x.check)
			if x.out {
				*(*[4]byte)(b[30:]) = [4]byte(x.addr[:4])
			} else {
				*(*[4]byte)(b[26:]) = [4]byte(x.addr[:4])
			}
			x.ports(b[34:])
		} else {
			if x.out {
				*(*[16]byte)(b[38:]) = x.addr
			} else {
				*(*[16]byte)(b[22:]) = x.addr
			}
			x.ports(b[54:])
		}
		frames[i] = f
	}
	q.free = q.free[:copy(q.free, q.free[n:])]
	return n
}

func (x *flow) ports(b []byte) {
	from, to := x.port, x.far
	if !x.out {
		from, to = to, from
	}
	binary.BigEndian.PutUint16(b, from)
	binary.BigEndian.PutUint16(b[2:], to)
}

func (q *flows) Transmit(frames []port.Frame) (int, port.TxStatus) {
	q.free = append(q.free, frames...)
	*q.sent += len(frames)
	return len(frames), port.TxOK
}

func (q *flows) FD() int { return -1 }

// flowPort is a port on such a queue.
type flowPort struct {
	name   string
	queue  *flows
	polled bool
}

func (p *flowPort) Name() string         { return p.name }
func (p *flowPort) NumQueues() int       { return 1 }
func (p *flowPort) Queue(int) port.Queue { return p.queue }
func (p *flowPort) Caps() port.Caps      { return port.Caps{Polled: p.polled, MaxFrame: 1514} }
func (p *flowPort) Close() error         { return nil }

// BenchmarkPollTranslated measures one whole Worker.Poll per packet, as BenchmarkPoll does, of packets that leave the cluster or come back: 64-byte UDP frames of
// established sessions, hit at random, of 16 of 250 pods. dir=none is the generator and the sink alone.
func BenchmarkPollTranslated(b *testing.B) {
	for _, family := range []int{4, 6} {
		for _, sessions := range []int{1000, 1_000_000} {
			for _, dir := range []string{"none", "out", "in"} {
				b.Run(fmt.Sprintf("family=%d/frame=64/sessions=%d/dir=%s", family, sessions, dir), func(b *testing.B) {
					benchmarkPollTranslated(b, family, sessions, dir)
				})
			}
		}
	}
}

func benchmarkPollTranslated(b *testing.B, family, sessions int, dir string) {
	const pods, busy, inflight, farPort, destinations = 250, 16, 2048, 443, 1024
	cfg := port.PoolConfig{Chunks: 4096, ChunkSize: 2048, LargeBuffers: 4}
	pool, err := port.NewPool(make([]byte, cfg.Size()), cfg)
	require.NoError(b, err)
	a, err := snat.NewAllocator(snat.AllocatorConfig{MaxPods: pods})
	require.NoError(b, err)
	t, err := snat.New(snat.Config{Sessions4: 1 << 20, Sessions6: 1 << 20, HalfOpen: 1 << 20, SessionGuarantee: 1}, a)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, t.Close()) })

	sent := 0
	sink := &flows{pool: pool, sent: &sent}
	sources := make([]*flows, 0, busy)
	pod4 := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 2)}) }
	pod6 := func(i int) netip.Addr {
		return netip.AddrFrom16([16]byte{0xfd, 0x12, 0x34, 0x56, 0x78, 0x9a, 15: byte(i + 2)})
	}
	self4, self6 := netip.MustParseAddr("10.240.0.11"), netip.MustParseAddr("fd00:240::11")
	far := func(i int) netip.Addr {
		if family == 4 {
			return netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		}
		return netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(i >> 8), 15: byte(i)})
	}
	s := &Snapshot{GatewayMAC: gatewayMAC, Gateway4: addr("169.254.1.1"), Gateway6: addr("fe80::1"), Node4: packet.AddrFrom(self4), Node6: packet.AddrFrom(self6)}
	uplink := &flowPort{name: "eth0", queue: sink, polled: true}
	s.Ports = []PortInfo{{Kind: PortUplink, Name: "eth0", MAC: uplinkMAC, Port: uplink}, {Kind: PortHost, Name: "ovp0"}}
	fb := fib.NewBuilder()
	require.NoError(b, fb.AddPool(netip.MustParsePrefix("10.0.0.0/16"), 24))
	require.NoError(b, fb.AddPool(netip.MustParsePrefix("fd12:3456:789a::/64"), 80))
	add := func(p netip.Prefix, k fib.Kind, a fib.Adjacency) {
		i, err := fb.AddAdjacency(a)
		require.NoError(b, err)
		require.NoError(b, fb.Add(p, fib.MakeEntry(k, i)))
	}
	way := fib.Adjacency{Dst: routerMAC, Src: uplinkMAC, Port: UplinkSlot, MTU: 1500}
	add(netip.MustParsePrefix("0.0.0.0/0"), fib.Outside, way)
	add(netip.MustParsePrefix("::/0"), fib.Outside, way)
	for i := range pods {
		q := sink
		if i < busy {
			q = &flows{pool: pool, sent: &sent}
			sources = append(sources, q)
		}
		s.Ports = append(s.Ports, PortInfo{Kind: PortPod, Name: fmt.Sprint("pod", i), Port: &flowPort{"pod", q, i < busy && dir != "in"},
			Addr4: packet.AddrFrom(pod4(i)), Addr6: packet.AddrFrom(pod6(i))})
		adj := fib.Adjacency{Dst: packet.MAC{2, 2, 0, 0, 0, byte(i)}, Src: gatewayMAC, Port: uint16(FirstPodSlot + i), MTU: 1500}
		add(netip.PrefixFrom(pod4(i), 32), fib.Pod, adj)
		add(netip.PrefixFrom(pod6(i), 128), fib.Pod, adj)
	}
	s.FIB = fb.Build()
	d, err := New(Config{Workers: []WorkerConfig{{Pool: pool, CPU: -1, Translator: t}}})
	require.NoError(b, err)
	d.Publish(s)
	w := d.Workers()[0]
	w.Poll() // takes the snapshot: from here on the translator knows the pods

	// The sessions are made as packets make them.
	for i := range sessions {
		pod, k := i%busy, i/busy
		p := packet.Packet{Kind: packet.KindIPv4, Proto: packet.ProtoUDP, Src: s.Ports[FirstPodSlot+pod].Addr4, Dst: packet.AddrFrom(far(k % destinations)),
			SrcPort: 32768 + uint16(k/destinations), DstPort: farPort}
		if family == 6 {
			p.Kind, p.Src = packet.KindIPv6, s.Ports[FirstPodSlot+pod].Addr6
		}
		var v snat.View
		if t.Outbound(&p, nil, pod, &v); v.Action != snat.Create {
			b.Fatalf("session %d: %v %v", i, v.Action, v.Reason)
		}
		if reason := t.Create(&p, &v); reason != 0 {
			b.Fatalf("session %d: %v", i, reason)
		}
	}
	template := func(src, dst netip.Addr, ethSrc, ethDst packet.MAC) *[64]byte {
		payload := 64 - 42
		if family == 6 {
			payload = 2
		}
		return (*[64]byte)(udp(src.String(), dst.String(), ethSrc, ethDst, payload).bytes(b))
	}
	finish := func(x *flow, peer netip.Addr) {
		copy(x.addr[:], peer.AsSlice())
		if family == 4 {
			h := *x.template
			if h[24], h[25] = 0, 0; x.out {
				*(*[4]byte)(h[30:]) = [4]byte(x.addr[:4])
			} else {
				*(*[4]byte)(h[26:]) = [4]byte(x.addr[:4])
			}
			x.check = packet.Checksum(h[14:34], 0)
		}
	}
	self := self4
	if family == 6 {
		self = self6
	}
	fromFar := template(far(0), self, routerMAC, uplinkMAC)
	var fromPods []*[64]byte
	for i := range busy {
		src := pod4(i)
		if family == 6 {
			src = pod6(i)
		}
		fromPods = append(fromPods, template(src, far(0), packet.MAC{2, 2, 0, 0, 0, byte(i)}, gatewayMAC))
	}
	list, _ := t.Snapshot(nil, snat.Cursor{}, 4<<20)
	require.Len(b, list, sessions)
	rand.New(rand.NewPCG(1, 2)).Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	for i := range list {
		l := &list[i]
		x := flow{far: l.RemotePort}
		if dir == "in" {
			x.template, x.port = fromFar, l.ExternalPort
			finish(&x, l.Remote.Netip())
			sink.made = append(sink.made, x)
		} else {
			x.template, x.port, x.out = fromPods[l.Pod], l.InsidePort, true
			finish(&x, l.Remote.Netip())
			sources[l.Pod].made = append(sources[l.Pod].made, x)
		}
	}
	// Frames circle: what the uplink sends is what pods receive next, and the other way round.
	give := func() {
		if dir == "in" {
			for _, q := range sources {
				sink.free, q.free = append(sink.free, q.free...), q.free[:0]
			}
			return
		}
		for _, q := range sources {
			n := min(len(sink.free), batch-len(q.free))
			q.free, sink.free = append(q.free, sink.free[len(sink.free)-n:]...), sink.free[:len(sink.free)-n]
		}
	}
	for range inflight {
		f, ok := pool.Alloc()
		require.True(b, ok)
		sink.free = append(sink.free, f)
	}
	var frames [batch]port.Frame
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; {
		give()
		if dir == "none" {
			for _, q := range sources {
				n := q.Receive(frames[:])
				sink.Transmit(frames[:n])
				done += n
			}
			continue
		}
		done += w.Poll()
	}
	b.StopTimer()
	var drops uint64
	for _, sl := range w.slots {
		for r := range sl.dropsIn {
			drops += sl.dropsIn[r] + sl.dropsOut[r]
		}
	}
	require.Zero(b, drops)
	require.GreaterOrEqual(b, sent, b.N)
	require.EqualValues(b, sessions, t.Stats().Sessions4+t.Stats().Sessions6)
}
