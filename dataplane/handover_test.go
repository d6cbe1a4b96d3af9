package dataplane

import (
	"context"
	"math/rand/v2"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/mem"
	"github.com/overplane/overplane/snat"
)

// crew is a data plane of several workers over memory ports with a queue for each.
type crew struct {
	t            testing.TB
	d            *Dataplane
	pools        []*port.Pool
	uplink, host *mem.Port
	pods         []*mem.Port
	free         int
}

func newCrew(t testing.TB, workers int) *crew {
	c := &crew{t: t}
	a, err := snat.NewAllocator(snat.AllocatorConfig{MaxPods: 4, Workers: workers})
	require.NoError(t, err)
	var cfg Config
	for i := range workers {
		pool, err := port.NewPool(make([]byte, testPool.Size()), testPool)
		require.NoError(t, err)
		tr, err := snat.New(snat.Config{Worker: i, Sessions4: 1024, Sessions6: 1024, Mapping: snat.EndpointIndependent, Filtering: snat.FilterNone}, a)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, tr.Close()) })
		c.pools = append(c.pools, pool)
		cfg.Workers = append(cfg.Workers, WorkerConfig{Pool: pool, CPU: -1, Translator: tr})
	}
	n := &node{t: t}
	n.uplink = mem.New(mem.Config{Name: "eth0", Pools: c.pools})
	n.host = mem.New(mem.Config{Name: "ovp0", Pools: c.pools, Caps: tapCaps})
	for _, name := range []string{"a", "b"} {
		n.pods = append(n.pods, mem.New(mem.Config{Name: name, Pools: c.pools, Caps: tapCaps}))
	}
	c.uplink, c.host, c.pods = n.uplink, n.host, n.pods
	c.d, err = New(cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.d.Stop(context.Background())) })
	c.d.Publish(n.snapshot())
	c.poll()
	c.free = c.available()
	return c
}

func (c *crew) available() (n int) {
	for _, p := range c.pools {
		chunks, large := p.Available()
		n += chunks + large
	}
	return n
}

// poll lets all workers work until none finds anything, and checks that no frame leaked and that every packet is accounted for.
func (c *crew) poll() {
	c.t.Helper()
	for busy := true; busy; {
		busy = false
		for _, w := range c.d.Workers() {
			busy = w.Poll() > 0 || busy || w.expecting()
		}
	}
	if c.free != 0 {
		require.Equal(c.t, c.free, c.available(), "frames leaked")
	}
	for _, w := range c.d.Workers() {
		s := w.collect()
		var in, out uint64
		for _, sl := range s.Slots {
			in, out = in+sl.In.Packets, out+sl.Out.Packets
			for r := range sl.DropsIn {
				out += sl.DropsIn[r] + sl.DropsOut[r]
			}
		}
		require.Equal(c.t, in, out+s.Answers.Sum()-s.Generated, "worker %d", w.index)
	}
}

// sent drains all queues of a port.
func (c *crew) sent(p *mem.Port) (out []mem.Packet) {
	for q := range p.NumQueues() {
		out = append(out, p.Sent(q)...)
	}
	return out
}

// Packets of a flow reach their session whatever queue they come by.
func TestAnyWorkerReceivesForAnySession(t *testing.T) {
	const workers = 3
	for _, f := range families {
		c := newCrew(t, workers)
		for flow := range 60 {
			out := fromPod(0, f.outside, 30)
			out.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: layers.UDPPort(1000 + flow), DstPort: 2000}}
			external := uint16(0)
			for q := range workers {
				require.NoError(t, c.pods[0].Inject(q, out.bytes(t), port.Offload{}))
				c.poll()
				s := c.sent(c.uplink)
				require.Len(t, s, 1)
				decode(t, s[0].Bytes)
				p := parse(t, s[0].Bytes)
				require.Equal(t, addr(f.self), p.Src)
				if external == 0 {
					external = p.SrcPort
				}
				require.Equal(t, external, p.SrcPort, "one session")
			}
			for q := range workers {
				back := fromOutside(f.outside, f.self, layers.IPProtocolUDP, &layers.UDP{SrcPort: 2000, DstPort: layers.UDPPort(external)}, 10)
				require.NoError(t, c.uplink.Inject(q, back.bytes(t), port.Offload{}))
				c.poll()
				s := c.sent(c.pods[0])
				require.Len(t, s, 1)
				decode(t, s[0].Bytes)
				require.Equal(t, uint16(1000+flow), parse(t, s[0].Bytes).DstPort)
			}
			// By hairpin from the other pod.
			p := fromPod(1, f.self, 10)
			p.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: layers.UDPPort(3000 + flow), DstPort: layers.UDPPort(external)}}
			require.NoError(t, c.pods[1].Inject(flow%workers, p.bytes(t), port.Offload{}))
			c.poll()
			s := c.sent(c.pods[0])
			require.Len(t, s, 1)
			require.EqualValues(t, 63, hopLimit(decode(t, s[0].Bytes)))
			require.Equal(t, addr(f.self), parse(t, s[0].Bytes).Src)
		}
		over := uint64(0)
		for _, w := range c.d.Workers() {
			over += w.handedOver
		}
		require.Greater(t, over, uint64(100))
		require.Empty(t, c.sent(c.host))
	}
}

func TestFragmentsOnAnyQueueInAnyOrder(t *testing.T) {
	const workers = 3
	f := families[0]
	c := newCrew(t, workers)
	for flow := range 40 {
		out := fromPod(0, f.outside, 1300)
		out.df = false
		out.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: layers.UDPPort(1000 + flow), DstPort: 2000}}
		b := out.bytes(t)
		b[18], b[24], b[25] = byte(flow), 0, 0 // the identification, and the header's checksum
		sum := packet.Checksum(b[14:34], 0)
		b[24], b[25] = byte(sum>>8), byte(sum)
		pieces := cut(t, b, 576)
		free := c.free
		c.free = 0 // some wait in between
		for _, i := range rand.Perm(len(pieces)) {
			require.NoError(t, c.pods[0].Inject(rand.IntN(workers), pieces[i], port.Offload{}))
			c.poll()
		}
		c.free = free
		c.poll()
		s := c.sent(c.uplink)
		require.Len(t, s, len(pieces))
		ids := map[uint32]bool{}
		for _, s := range s {
			p := parse(t, s.Bytes)
			require.Equal(t, addr(f.self), p.Src)
			ids[p.FragmentID] = true
		}
		require.Len(t, ids, 1)
	}
}

// A whole GSO frame is handed over as one.
func TestGSOFrameIsHandedOver(t *testing.T) {
	for _, f := range families {
		c := newCrew(t, 2)
		syn := fromPod(0, f.outside, 0)
		syn.proto, syn.l4 = layers.IPProtocolTCP, []gopacket.SerializableLayer{&layers.TCP{SrcPort: 1000, DstPort: 2000, SYN: true, Window: 100}}
		for q := range 2 {
			require.NoError(t, c.pods[0].Inject(q, syn.bytes(t), port.Offload{}))
			c.poll()
			require.Len(t, c.sent(c.uplink), 1)
			b, o := gsoFrame(t, f.podA, f.outside, podMACs[0], gatewayMAC, 40000, 1000)
			require.NoError(t, c.pods[0].Inject(q, b, o))
			c.poll()
			sent := c.sent(c.uplink)
			require.Len(t, sent, 40)
			for _, s := range sent {
				decode(t, s.Bytes)
				require.Equal(t, addr(f.self), parse(t, s.Bytes).Src)
			}
		}
	}
}

func TestRing(t *testing.T) {
	pool, err := port.NewPool(make([]byte, testPool.Size()), testPool)
	require.NoError(t, err)
	r := &ring{data: make([]byte, 8192)}
	rng := rand.New(rand.NewPCG(1, 2))
	type record struct {
		h handed
		b []byte
	}
	var model []record
	for range 20000 {
		if rng.IntN(2) == 0 {
			f, _ := pool.Alloc()
			f.Len = uint32(1 + rng.IntN(2000))
			b := pool.Bytes(&f)
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			h := handed{slot: uint16(rng.Uint32()), offload: port.Offload{Flags: 1, GSO: 3, HeaderLen: 4, SegmentSize: 5, ChecksumStart: 6, ChecksumOffset: 7},
				completed: rng.IntN(2) == 0, icmpType: 9, srcPort: 10, dstPort: 11, id: rng.Uint32()}
			if r.put(pool, &h, []port.Frame{f}, len(b)) {
				model = append(model, record{h, append([]byte(nil), b...)})
			} else {
				require.NotEmpty(t, model, "an empty ring took nothing")
			}
			pool.Free(f)
			continue
		}
		got, next := r.peek()
		if len(model) == 0 {
			require.Nil(t, got)
			continue
		}
		var h handed
		h.decode(got)
		require.Equal(t, model[0].h, h)
		require.Equal(t, model[0].b, got[recordHeader:])
		r.head.Store(next)
		model = model[1:]
	}
}

func TestHandingOverAllocatesNothing(t *testing.T) {
	c := newCrew(t, 2)
	f := families[0]
	ws := c.d.Workers()
	b := fromPod(0, f.outside, 30).bytes(t)
	var p packet.Packet
	packet.Parse(&p, b, len(b))
	wrong := ws[1-snat.OwnerOut(&p, b, 2)]
	q := &sink{pool: wrong.pool, frames: [][]byte{b}}
	for _, w := range ws {
		for _, sl := range w.slots {
			sl.tx, sl.flusher = &sink{pool: w.pool}, nil
		}
	}
	require.Zero(t, testing.AllocsPerRun(100, func() {
		wrong.receive(&source{slot: wrong.slots[FirstPodSlot], queue: q})
		for _, w := range ws {
			w.Poll()
		}
	}))
	require.Greater(t, wrong.handedOver, uint64(50))
}

// A pod that sends more than the owner of its sessions can take leaves room in the ring for others, and does not make them wait behind all that the ring
// could hold.
func TestHandingOverIsFair(t *testing.T) {
	f := families[0]
	for _, size := range []int{10, 1400} {
		c := newCrew(t, 2)
		ws := c.d.Workers()
		owned := func(pod int) (b []byte, owner *Worker) { // by the second worker
			for sport := 1000; ; sport++ {
				p := fromPod(pod, f.outside, size)
				p.l4 = []gopacket.SerializableLayer{&layers.UDP{SrcPort: layers.UDPPort(sport), DstPort: 2000}}
				var q packet.Packet
				b := p.bytes(t)
				packet.Parse(&q, b, len(b))
				if snat.OwnerOut(&q, b, 2) == 1 {
					return b, ws[1]
				}
			}
		}
		greedy, owner := owned(0)
		modest, _ := owned(1)
		wrong := ws[0]
		q := &sink{pool: wrong.pool, frames: [][]byte{greedy}}
		for range 20000 {
			wrong.receive(&source{slot: wrong.slots[FirstPodSlot], queue: q})
		}
		r := owner.inbox[0]
		require.Positive(t, wrong.slots[FirstPodSlot].dropsIn[drop.HandoverFull])
		waiting := r.tail.Load() - r.head.Load()
		require.LessOrEqual(t, waiting, uint64(len(r.data))*4/5+2048)
		if size == 10 {
			require.LessOrEqual(t, waiting, uint64(maxWaiting*128), "few packets, however small")
		}
		q.frames = [][]byte{modest}
		for range 50 {
			wrong.receive(&source{slot: wrong.slots[FirstPodSlot+1], queue: q})
		}
		require.Zero(t, wrong.slots[FirstPodSlot+1].dropsIn[drop.HandoverFull])
		for owner.expecting() {
			owner.Poll()
		}
		// What was taken counts no longer.
		refused := wrong.slots[FirstPodSlot].dropsIn[drop.HandoverFull]
		q.frames = [][]byte{greedy}
		for range 100 {
			wrong.receive(&source{slot: wrong.slots[FirstPodSlot], queue: q})
		}
		require.Equal(t, refused, wrong.slots[FirstPodSlot].dropsIn[drop.HandoverFull])
		require.EqualValues(t, 100, r.held[FirstPodSlot].packets)
	}
}
