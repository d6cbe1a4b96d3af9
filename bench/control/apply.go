package control

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"sync/atomic"
	"time"

	"github.com/overplane/overplane/control/agent"
	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

// The node that forwards: its uplink, and its one pod.
var (
	uplinkMAC = packet.MAC{2, 0, 0, 0, 0, 1}
	podMAC    = packet.MAC{2, 0, 0, 0, 0, 2}
	podAddr   = netip.MustParseAddr("10.0.0.2")
)

// inFlight is how many packets go round between pod and uplink.
const inFlight = 1024

// source is the pod's queue: it always has packets to random other nodes' pods.
type source struct {
	pool    *port.Pool
	packets [][]byte
	next    int
}

func (q *source) Receive(frames []port.Frame) int {
	for i := range frames {
		f, ok := q.pool.Alloc()
		if !ok {
			return i
		}
		f.Len = uint32(copy(q.pool.Buffer(&f), q.packets[q.next]))
		frames[i] = f
		if q.next++; q.next == len(q.packets) {
			q.next = 0
		}
	}
	return len(frames)
}

func (q *source) Transmit(frames []port.Frame) (int, port.TxStatus) {
	q.pool.FreeAll(frames)
	return len(frames), port.TxOK
}

func (q *source) FD() int { return -1 }

// sink is the uplink's queue: nothing comes, everything goes.
type sink struct {
	pool *port.Pool
	sent uint64
}

func (q *sink) Receive([]port.Frame) int { return 0 }

func (q *sink) Transmit(frames []port.Frame) (int, port.TxStatus) {
	q.sent += uint64(len(frames))
	q.pool.FreeAll(frames)
	return len(frames), port.TxOK
}

func (q *sink) FD() int { return -1 }

// onePort is a port of one queue.
type onePort struct {
	name string
	q    port.Queue
}

func (p *onePort) Name() string         { return p.name }
func (p *onePort) NumQueues() int       { return 1 }
func (p *onePort) Queue(int) port.Queue { return p.q }
func (p *onePort) Caps() port.Caps      { return port.Caps{Polled: true, MaxFrame: 1514} }
func (p *onePort) Close() error         { return nil }

// table is the state of a cluster of so many nodes as n0 sees it. generation tells one from the next.
func table(nodes int, generation uint64) *controlv1.NodeState {
	s := &controlv1.NodeState{
		Node: "n0", Version: &controlv1.Version{Incarnation: "bench", Revision: generation},
		Pools: []*controlv1.Pool{{Cidr: podCIDR, BlockPrefixLength: 24}}, OwnBlocks: []*controlv1.OwnBlock{{Cidr: "10.0.0.0/24"}},
	}
	for i := range nodes + 1 {
		name := fmt.Sprintf("n%d", i)
		// Every table leads elsewhere than the one before it.
		mac := fmt.Sprintf("02:00:%02x:%02x:%02x:%02x", generation>>8&255, generation&255, i>>8, i&255)
		if i == 0 {
			mac = "02:00:00:00:00:01"
		}
		s.Members = append(s.Members, &controlv1.Member{Name: name, Ipv4: fmt.Sprintf("172.16.%d.%d", i>>8, i&255), Mac: mac})
		if i > 0 {
			s.Routes = append(s.Routes, &controlv1.Route{Prefix: fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255), Target: &controlv1.Route_Node{Node: name}})
		}
	}
	api.Seal(s)
	return s
}

// udp is a UDP datagram of 64 bytes, Ethernet included, from the pod to a pod of another node.
func udp(to netip.Addr) []byte {
	b := make([]byte, 64)
	copy(b, agent.GatewayMAC[:])
	copy(b[6:], podMAC[:])
	b[12], b[13] = 8, 0
	ip := b[14:34]
	ip[0], ip[3], ip[8], ip[9] = 0x45, 50, 64, 17
	copy(ip[12:], podAddr.AsSlice())
	copy(ip[16:], to.AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(ip[i])<<8 | uint32(ip[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	ip[10], ip[11] = byte(^sum>>8), byte(^sum)
	b[34], b[36], b[39] = 16, 16, 30 // ports 4096 to 4096, no checksum (RFC 768)
	return b
}

// measureApply applies tables while a worker forwards.
func measureApply(ctx context.Context, o Options) (a Apply, err error) {
	a.Routes, a.Runs = o.Nodes, o.Applies
	cfg := port.PoolConfig{Chunks: 4 * inFlight, ChunkSize: 2048, LargeBuffers: 4}
	pool, err := port.NewPool(make([]byte, cfg.Size()), cfg)
	if err != nil {
		return a, err
	}
	from, to := &source{pool: pool}, &sink{pool: pool}
	for i := range inFlight {
		n := 1 + i*2654435761%o.Nodes
		from.packets = append(from.packets, udp(netip.AddrFrom4([4]byte{10, byte(n >> 8), byte(n), 9})))
	}
	dp, err := dataplane.New(dataplane.Config{Workers: []dataplane.WorkerConfig{{Pool: pool, CPU: -1}}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return a, err
	}
	in := agent.Input{
		Node: "n0", UplinkMTU: 1500, PodMTU: 1500, Uplink: &onePort{"eth0", to},
		Facts: agent.Facts{Name: "eth0", MAC: uplinkMAC, MTU: 1500, Up: true, Addresses: []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12")}},
		Pods:  []agent.PodPort{{Slot: dataplane.FirstPodSlot, Name: "pod", MAC: podMAC, Addr4: podAddr, Port: &onePort{"pod", from}}},
	}
	apply := func(s *controlv1.NodeState) (checked, applied time.Duration, err error) {
		start := time.Now()
		if err := in.Desire(s); err != nil {
			return 0, 0, err
		}
		checked = time.Since(start)
		start = time.Now()
		built := agent.Build(in)
		if len(built.Problems) > 0 {
			return 0, 0, fmt.Errorf("problems: %v", built.Problems)
		}
		generation := dp.Publish(built.Snapshot)
		err = dp.Quiesce(ctx, generation)
		return checked, time.Since(start), err
	}
	// The worker is driven here, so that each poll can be timed.
	var longest atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		runtime.LockOSThread()
		w := dp.Workers()[0]
		for {
			select {
			case <-stop:
				return
			default:
			}
			start := time.Now()
			w.Poll()
			if d := int64(time.Since(start)); d > longest.Load() {
				longest.Store(d)
			}
		}
	}()
	defer func() { close(stop); <-stopped; a.Packets = to.sent }()
	if _, _, err := apply(table(o.Nodes, 1)); err != nil {
		return a, err
	}
	var checks, applies []time.Duration
	var idle, busy time.Duration
	for i := range o.Applies {
		s := table(o.Nodes, uint64(i)+2)
		runtime.GC() // what is measured is not the garbage of making the table
		longest.Store(0)
		time.Sleep(20 * time.Millisecond)
		idle = max(idle, time.Duration(longest.Swap(0)))
		c, d, err := apply(s)
		if err != nil {
			return a, err
		}
		busy = max(busy, time.Duration(longest.Load()))
		checks, applies = append(checks, c), append(applies, d)
	}
	slices.Sort(checks)
	slices.Sort(applies)
	ms := func(d time.Duration) float64 { return d.Seconds() * 1000 }
	a.Median, a.Worst, a.CheckMedian = ms(applies[len(applies)/2]), ms(applies[len(applies)-1]), ms(checks[len(checks)/2])
	a.LongestPoll, a.LongestPollIdle = ms(busy)*1000, ms(idle)*1000
	o.Log("%d routes applied in %.1f ms (worst of %d: %.1f ms), the longest poll meanwhile %.0f us", a.Routes, a.Median, a.Runs, a.Worst, a.LongestPoll)
	return a, nil
}
