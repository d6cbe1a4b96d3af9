// Package forward measures the whole way of a packet through one worker over real devices: what a pod's neighbour can be sent.
package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/control/agent/kernel"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/xdp"
	"github.com/overplane/overplane/test/livegen"
)

const netnsPrefix = "ovpfwd-"

// TestMain removes namespaces that a crashed run left: their names carry its process id.
func TestMain(m *testing.M) {
	stale, _ := filepath.Glob("/run/netns/" + netnsPrefix + "*")
	for _, path := range stale {
		pid, _ := strconv.Atoi(strings.Split(filepath.Base(path), "-")[1])
		if errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
			_ = exec.Command("ip", "netns", "del", filepath.Base(path)).Run()
		}
	}
	os.Exit(m.Run())
}

var netnsCount atomic.Int32

func newNetns(b *testing.B) string {
	b.Helper()
	if os.Geteuid() != 0 {
		b.Skip("needs root: makes network namespaces and AF_XDP sockets")
	}
	name := fmt.Sprintf("%s%d-%d", netnsPrefix, os.Getpid(), netnsCount.Add(1))
	run(b, "ip", "netns", "add", name)
	b.Cleanup(func() { run(b, "ip", "netns", "del", name) })
	return name
}

func run(b *testing.B, name string, args ...string) {
	b.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(b, err, "%s %v: %s", name, args, out)
}

func addr(s string) packet.Addr { return packet.AddrFrom(netip.MustParseAddr(s)) }

// BenchmarkVethPods forwards frames from one veth pod to another on one worker: received, parsed, looked up, rewritten, sent. The generator
// and the softirq work of the sending pod's link have core 0, the worker core 1. The receiving pod's softirq work is on core 0, too, as the daemon has it by default
// (rps=1), or on the worker's. Mpps is what arrived at the second pod's device, where it is dropped before the pod's stack; full/op what did not
// fit the queue to it, worker-ns/op the worker's time for each that arrived.
//
//	generator -> eth0 === host's end -> worker -> host's end === eth0 -> dropped at ingress
func BenchmarkVethPods(b *testing.B) {
	for _, size := range []int{64, 1514} {
		for _, ring := range []int{xdp.DefaultVethRing, 2048, 16384} {
			for _, rps := range []int{0, 1} {
				b.Run(fmt.Sprintf("frame=%d/ring=%d/rps=%d", size, ring, rps), func(b *testing.B) { benchmarkVethPods(b, size, ring, rps == 1) })
			}
		}
	}
}

func benchmarkVethPods(b *testing.B, size, ring int, rps bool) {
	pc := port.PoolConfig{Chunks: 16384, ChunkSize: 4096, LargeBuffers: 8}
	memory, err := xdp.NewMemory(pc.Size())
	require.NoError(b, err)
	defer memory.Close()
	pool, err := port.NewPool(memory.Bytes(), pc)
	require.NoError(b, err)

	node := newNetns(b)
	pods := []kernel.PodDevice{
		{NetNS: newNetns(b), Host: "pod0", IPv4: netip.MustParseAddr("10.244.1.2")},
		{NetNS: newNetns(b), Host: "pod1", IPv4: netip.MustParseAddr("10.244.1.3")},
	}
	sink := pods[1].NetNS
	snapshot := &dataplane.Snapshot{
		Ports:      []dataplane.PortInfo{dataplane.UplinkSlot: {Kind: dataplane.PortUplink}, dataplane.HostSlot: {Kind: dataplane.PortHost}},
		GatewayMAC: packet.MAC(kernel.GatewayMAC), Gateway4: addr("169.254.1.1"), Gateway6: addr("fe80::1"),
	}
	table := fib.NewBuilder()
	require.NoError(b, table.AddPool(netip.MustParsePrefix("10.244.0.0/16"), 24))
	for i := range pods {
		d := &pods[i]
		d.NetNS, d.Name, d.MTU = "/run/netns/"+d.NetNS, "eth0", 1500
		var p *xdp.VethPort
		require.NoError(b, kernel.InNetNS("/run/netns/"+node, func() (err error) {
			p, err = kernel.AttachVeth(*d, xdp.VethConfig{Pools: []*port.Pool{pool}, RingSize: ring, TxBudget: 64})
			return err
		}))
		defer func() { require.NoError(b, p.Close()) }()
		if rps {
			require.NoError(b, kernel.SetReceiveCPUs(*d, []int{0}))
		}
		mac := packet.MAC(kernel.PodMAC(d.IPv4, d.IPv6))
		snapshot.Ports = append(snapshot.Ports, dataplane.PortInfo{Kind: dataplane.PortPod, Port: p, Name: d.Host, MAC: mac, Addr4: packet.AddrFrom(d.IPv4)})
		adj, err := table.AddAdjacency(fib.Adjacency{Dst: mac, Src: snapshot.GatewayMAC, Port: uint16(dataplane.FirstPodSlot + i), MTU: 1500})
		require.NoError(b, err)
		require.NoError(b, table.Add(netip.PrefixFrom(d.IPv4, 32), fib.MakeEntry(fib.Pod, adj)))
	}
	snapshot.FIB = table.Build()
	run(b, "ip", "netns", "exec", sink, "nft", "add table netdev sink; add chain netdev sink in { type filter hook ingress device eth0 priority 0; policy drop; }")

	d, err := dataplane.New(dataplane.Config{Workers: []dataplane.WorkerConfig{{Pool: pool, CPU: 1}}})
	require.NoError(b, err)
	d.Publish(snapshot)
	d.Start()
	defer func() { require.NoError(b, d.Stop(context.Background())) }()

	g, err := livegen.Start(pods[0].NetNS, "eth0", udpFrame(snapshot.GatewayMAC, snapshot.Ports[dataplane.FirstPodSlot].MAC, pods[0].IPv4, pods[1].IPv4, size), 0)
	require.NoError(b, err)
	defer func() { require.NoError(b, g.Stop()) }()
	for begin := received(b, sink); received(b, sink) < begin+10000; {
		time.Sleep(time.Millisecond)
	}
	b.ResetTimer()
	start, first, busy := time.Now(), received(b, sink), busyTime(b, 1)
	last := first
	for last < first+uint64(b.N) {
		time.Sleep(time.Millisecond)
		last = received(b, sink)
	}
	b.ReportMetric(float64(last-first)/time.Since(start).Seconds()/1e6, "Mpps")
	b.ReportMetric(float64(busyTime(b, 1)-busy)/float64(last-first), "worker-ns/op")
	b.StopTimer()
	stats, err := d.Stats(context.Background())
	require.NoError(b, err)
	full := uint64(0)
	for _, s := range stats[0].Slots {
		for r := range s.DropsIn {
			switch drop.Reason(r) {
			case drop.PortFull:
				full += s.DropsOut[r]
			case drop.IPMulticast: // the pod's stack asks for routers and listeners
			default:
				require.Zero(b, s.DropsIn[r]+s.DropsOut[r], "dropped of %v", drop.Reason(r))
			}
		}
	}
	b.ReportMetric(float64(full)/float64(b.N), "full/op")
}

// busyTime is how long the process's threads that are pinned to a core have run on it: the worker. It turns a few times before it sleeps.
func busyTime(b *testing.B, cpu int) (busy time.Duration) {
	b.Helper()
	tasks, err := filepath.Glob("/proc/self/task/*")
	require.NoError(b, err)
	for _, task := range tasks {
		status, _ := os.ReadFile(task + "/status") // a thread may end meanwhile
		schedstat, _ := os.ReadFile(task + "/schedstat")
		if !strings.Contains(string(status), fmt.Sprintf("Cpus_allowed_list:\t%d\n", cpu)) || len(schedstat) == 0 {
			continue
		}
		ns, err := strconv.ParseInt(strings.Fields(string(schedstat))[0], 10, 64)
		require.NoError(b, err)
		busy += time.Duration(ns)
	}
	return busy
}

// udpFrame is a UDP datagram without checksum, with a good IPv4 header.
func udpFrame(dst, src packet.MAC, from, to netip.Addr, size int) []byte {
	f := make([]byte, size)
	copy(f, dst[:])
	copy(f[6:], src[:])
	binary.BigEndian.PutUint16(f[12:], 0x0800)
	packet.PutIPv4(f[14:34], packet.AddrFrom(from), packet.AddrFrom(to), packet.ProtoUDP, 0, size-34)
	binary.BigEndian.PutUint16(f[34:], 4000)
	binary.BigEndian.PutUint16(f[36:], 4001)
	binary.BigEndian.PutUint16(f[38:], uint16(size-34))
	return f
}

// received counts the frames that arrived at eth0 of a namespace.
func received(b *testing.B, netns string) (packets uint64) {
	b.Helper()
	require.NoError(b, kernel.InNetNS("/run/netns/"+netns, func() error {
		data, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(line); f[0] == "eth0:" {
				packets, err = strconv.ParseUint(f[2], 10, 64)
			}
		}
		return err
	}))
	return packets
}
