package xdp

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

// podPair is a pod's veth pair as the daemon makes it, less addresses: eth0 in the pod, the host's end in the node with the program on it.
type podPair struct {
	node, netns, host string
	program           *VethProgram
	mac               [6]byte
	index             int // of eth0
}

func newPodPair(t testing.TB, node, host string, queues, mtu int) *podPair {
	t.Helper()
	p := &podPair{node: node, netns: newNetns(t), host: host}
	q := strconv.Itoa(queues)
	run(t, "ip", "-n", node, "link", "add", host, "numrxqueues", q, "numtxqueues", q, "mtu", strconv.Itoa(mtu), "type", "veth",
		"peer", "name", "eth0", "numrxqueues", q, "numtxqueues", q, "netns", p.netns, "mtu", strconv.Itoa(mtu))
	for _, end := range []struct{ netns, name string }{{node, host}, {p.netns, "eth0"}} {
		run(t, "ip", "netns", "exec", end.netns, "sysctl", "-qw", "net.ipv6.conf."+end.name+".disable_ipv6=1")
	}
	in(t, node, func() {
		var err error
		p.program, err = NewVethProgram(queues)
		require.NoError(t, err)
		_, index := mac(t, host)
		l, err := link.AttachXDP(link.XDPOptions{Program: p.program.prog, Interface: index, Flags: link.XDPDriverMode})
		require.NoError(t, err)
		t.Cleanup(func() { _, _ = l.Close(), p.program.Close() })
	})
	run(t, "ip", "-n", node, "link", "set", host, "up")
	run(t, "ip", "-n", p.netns, "link", "set", "eth0", "up")
	in(t, p.netns, func() { p.mac, p.index = mac(t, "eth0") })
	return p
}

func (p *podPair) open(t testing.TB, cfg VethConfig) *VethPort {
	t.Helper()
	cfg.Interface, cfg.Program = p.host, p.program
	var out *VethPort
	in(t, p.node, func() {
		var err error
		out, err = OpenVeth(cfg)
		require.NoError(t, err)
	})
	t.Cleanup(func() { require.NoError(t, out.Close()) })
	return out
}

// pollVeth receives for up to two seconds, until a packet is there.
func pollVeth(q *VethQueue) []port.Frame {
	frames := make([]port.Frame, 128)
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		if n := q.Receive(frames); n > 0 {
			return frames[:n]
		}
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(q.FD()), Events: unix.POLLIN}}, 20)
	}
	return nil
}

// bytesOf puts a packet together.
func bytesOf(pool *port.Pool, frames []port.Frame) (b []byte) {
	for i := range frames {
		b = append(b, pool.Bytes(&frames[i])...)
	}
	return b
}

func TestVethCarriesFramesBothWays(t *testing.T) {
	for _, mtu := range []int{1280, 1500, 1778, 1779, 3506, 9000} {
		t.Run(fmt.Sprintf("mtu=%d", mtu), func(t *testing.T) {
			node := newNetns(t)
			pod := newPodPair(t, node, "veth0", 1, mtu)
			pool := newPool(t, 512, 2048, 4)
			p := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64})
			require.Equal(t, mtu+14, p.Caps().MaxFrame)
			require.False(t, p.Dead())
			q := p.queues[0]
			raw := newRawSocket(t, pod.netns, "eth0")
			chunks, large := pool.Available()
			sizes := []int{60, 61, 64, 128, mtu / 2, mtu + 13, mtu + 14}
			// More than the rings hold, so that every chunk comes round.
			for i := range 200 {
				size := max(60, sizes[i%len(sizes)])
				want := ipFrame(pod.mac, [6]byte{2}, remote4, pod4, size, uint32(i))
				raw.send(t, want)
				got := pollVeth(q)
				require.NotEmpty(t, got, "frame %d of %d bytes", i, size)
				require.Equal(t, len(got), port.PacketFrames(got))
				require.Equal(t, want, bytesOf(pool, got))
				require.Zero(t, got[0].Offload)

				// And back as it came: a chain where it is longer than a chunk of the pool.
				copy(pool.Bytes(&got[0]), pod.mac[:])
				copy(want, pod.mac[:])
				n, status := q.Transmit(got)
				require.Equal(t, port.TxOK, status)
				require.Equal(t, len(got), n)
				q.Flush()
				require.Equal(t, want, raw.receive(t, 2000), "frame %d of %d bytes", i, size)
			}
			free, freeLarge := pool.Available()
			require.Equal(t, []int{chunks, large}, []int{free, freeLarge}, "frames leaked")
			require.Eventually(t, func() bool { return !q.Flush() }, time.Second, time.Millisecond)
			require.Len(t, q.txFree, vethTxChunks, "chunks to transmit from leaked")

			// A frame in a large buffer, and one that is too long.
			f, _ := pool.AllocLarge()
			f.Len = uint32(mtu + 14)
			want := ipFrame([6]byte{2}, pod.mac, remote4, pod4, mtu+14, 7)
			copy(pool.Bytes(&f), want)
			n, _ := q.Transmit([]port.Frame{f})
			require.Equal(t, 1, n)
			q.Flush()
			require.Equal(t, want, raw.receive(t, 2000))
			f, _ = pool.AllocLarge()
			f.Len = uint32(mtu + 15)
			_, status := q.Transmit([]port.Frame{f})
			require.Equal(t, port.TxRejected, status)
		})
	}
}

func TestVethRefusesWhatAFXDPCannotCarry(t *testing.T) {
	pod := newPodPair(t, newNetns(t), "veth0", 1, 1500)
	pool := newPool(t, 256, 2048, 0)
	q := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64}).queues[0]
	for name, f := range map[string]port.Frame{
		"empty":                      {Len: 0},
		"shorter than a header":      {Len: 13},
		"GSO":                        {Len: 100, Offload: port.Offload{Flags: port.NeedsChecksum, GSO: port.GSOTCP4, ChecksumStart: 34, ChecksumOffset: 16}},
		"checksum outside the frame": {Len: 50, Offload: port.Offload{Flags: port.NeedsChecksum, ChecksumStart: 34, ChecksumOffset: 16}},
	} {
		t.Run(name, func(t *testing.T) {
			g, _ := pool.Alloc()
			f.Off = g.Off
			n, status := q.Transmit([]port.Frame{f})
			require.Zero(t, n)
			require.Equal(t, port.TxRejected, status)
			pool.Free(g)
		})
	}
}

// A datagram whose checksum field holds the pseudo-header's sum only is good with metadata that says so, and bad without.
func TestVethLeavesChecksumsToTheKernel(t *testing.T) {
	pod := newPodPair(t, newNetns(t), "veth0", 1, 1500)
	pool := newPool(t, 256, 2048, 0)
	p := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64})
	if !p.Caps().Checksum {
		t.Skip("needs TX metadata (Linux 6.11)")
	}
	q := p.queues[0]
	run(t, "ip", "-n", pod.netns, "addr", "add", pod4.String()+"/32", "dev", "eth0")
	run(t, "ip", "-n", pod.netns, "route", "add", "default", "dev", "eth0")
	var conn *net.UDPConn
	in(t, pod.netns, func() {
		var err error
		conn, err = net.ListenUDP("udp4", &net.UDPAddr{})
		require.NoError(t, err)
	})
	defer conn.Close()
	port16 := uint16(conn.LocalAddr().(*net.UDPAddr).Port)
	send := func(payload string, o port.Offload) {
		f, _ := pool.Alloc()
		frame := ipFrame([6]byte{2}, pod.mac, remote4, pod4, 42+len(payload), 0)
		frame[23] = packet.ProtoUDP
		udp := frame[34:]
		binary.BigEndian.PutUint16(udp, 4000)
		binary.BigEndian.PutUint16(udp[2:], port16)
		binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
		copy(udp[8:], payload)
		binary.BigEndian.PutUint16(udp[6:], packet.Fold(packet.PseudoHeader(packet.AddrFrom(remote4), packet.AddrFrom(pod4), packet.ProtoUDP, uint32(len(udp)))))
		setIPv4Checksum(frame[14:34])
		f.Len, f.Offload = uint32(len(frame)), o
		copy(pool.Bytes(&f), frame)
		n, status := q.Transmit([]port.Frame{f})
		require.Equal(t, port.TxOK, status)
		require.Equal(t, 1, n)
		q.Flush()
	}
	unfinished := port.Offload{Flags: port.NeedsChecksum, ChecksumStart: 34, ChecksumOffset: 6}
	send("bad", port.Offload{})
	for i := range 300 { // chunks come round with and without metadata
		want := "good " + strconv.Itoa(i)
		send(want, unfinished)
		send("bad again", port.Offload{})
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(2*time.Second)))
		b := make([]byte, 100)
		n, err := conn.Read(b)
		require.NoError(t, err)
		require.Equal(t, want, string(b[:n]))
	}
}

func setIPv4Checksum(h []byte) {
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], packet.Checksum(h, 0))
}

func TestVethQueuesGoToTheirWorkers(t *testing.T) {
	pod := newPodPair(t, newNetns(t), "veth0", 2, 1500)
	pools := newPools(newPool(t, 256, 2048, 0), newPool(t, 256, 2048, 0))
	p := pod.open(t, VethConfig{Pools: pools, RingSize: 64})
	require.Equal(t, 2, p.NumQueues())
	raw := newRawSocket(t, pod.netns, "eth0")
	for i, q := range p.queues {
		require.Same(t, pools[i], q.pool)
		f, _ := q.pool.Alloc()
		f.Len = 64
		want := ipFrame([6]byte{2}, pod.mac, remote4, pod4, 64, uint32(i))
		copy(q.pool.Bytes(&f), want)
		_, status := q.Transmit([]port.Frame{f})
		require.Equal(t, port.TxOK, status)
		q.Flush()
		require.Equal(t, want, raw.receive(t, 2000))
	}
	// Whatever queue the pod's end chooses, somebody receives it.
	seen := 0
	for i := range 64 {
		raw.send(t, ipFrame(pod.mac, [6]byte{2}, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), pod4, 64, 0))
	}
	require.Eventually(t, func() bool {
		for _, q := range p.queues {
			frames := make([]port.Frame, 128)
			n := q.Receive(frames)
			q.pool.FreeAll(frames[:n])
			seen += n
		}
		return seen == 64
	}, 2*time.Second, time.Millisecond, "%d of 64 arrived", seen)
}

// What a pod sends while nobody drives its port does not get to the node's own stack.
func TestVethDropsWithoutASocket(t *testing.T) {
	node := newNetns(t)
	pod := newPodPair(t, node, "veth0", 1, 1500)
	pool := newPool(t, 256, 2048, 0)
	raw := newRawSocket(t, pod.netns, "eth0")
	stack := newRawSocket(t, node, "veth0")
	frame := ipFrame(pod.mac, [6]byte{2}, remote4, pod4, 64, 1)
	send := func() {
		raw.send(t, frame)
		require.Nil(t, stack.receive(t, 100), "the node's stack was given a frame of the pod")
	}
	send()
	p := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64})
	raw.send(t, frame)
	require.NotEmpty(t, pollVeth(p.queues[0]))
	require.NoError(t, p.Close())
	send()
	// Opened again at once: the kernel releases the queue in its own time.
	p = pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64})
	raw.send(t, frame)
	require.NotEmpty(t, pollVeth(p.queues[0]))
}

func TestVethWaitsForFreeFrames(t *testing.T) {
	pod := newPodPair(t, newNetns(t), "veth0", 1, 1500)
	pool := newPool(t, 8, 2048, 0)
	q := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64}).queues[0]
	raw := newRawSocket(t, pod.netns, "eth0")
	var taken []port.Frame
	for f, ok := pool.Alloc(); ok; f, ok = pool.Alloc() {
		taken = append(taken, f)
	}
	frame := ipFrame(pod.mac, [6]byte{2}, remote4, pod4, 64, 1)
	raw.send(t, frame)
	time.Sleep(20 * time.Millisecond)
	require.Zero(t, q.Receive(make([]port.Frame, 128)))
	pool.FreeAll(taken)
	got := pollVeth(q)
	require.Len(t, got, 1)
	require.Equal(t, frame, bytesOf(pool, got))
}

func TestVethOfADeletedDeviceIsDead(t *testing.T) {
	node := newNetns(t)
	pod := newPodPair(t, node, "veth0", 1, 1500)
	pool := newPool(t, 256, 2048, 0)
	p := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64})
	require.False(t, p.Dead())
	run(t, "ip", "-n", node, "link", "del", "veth0")
	require.Eventually(t, p.Dead, 2*time.Second, time.Millisecond)
	require.True(t, p.Dead(), "it stays so")
	f, _ := pool.Alloc()
	f.Len = 64
	_, _ = p.queues[0].Transmit([]port.Frame{f})
	p.queues[0].Flush()
	f, _ = pool.Alloc()
	f.Len = 64
	n, status := p.queues[0].Transmit([]port.Frame{f})
	require.Zero(t, n)
	require.Equal(t, port.TxDown, status)
}

// A pod whose interface is down, and more than fits at once: nothing blocks, nothing is lost track of.
func TestVethTakesNoMoreThanItHas(t *testing.T) {
	pod := newPodPair(t, newNetns(t), "veth0", 1, 1500)
	pool := newPool(t, 4*vethTxChunks, 2048, 0)
	q := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64}).queues[0]
	frames := make([]port.Frame, 3*vethTxChunks)
	want := ipFrame([6]byte{2}, pod.mac, remote4, pod4, 64, 1)
	for _, up := range []string{"up", "down", "up"} {
		run(t, "ip", "-n", pod.netns, "link", "set", "eth0", up)
		for i := range frames {
			f, ok := pool.Alloc()
			require.True(t, ok)
			f.Len = uint32(copy(pool.Buffer(&f), want))
			frames[i] = f
		}
		n, status := q.Transmit(frames)
		require.Contains(t, []port.TxStatus{port.TxOK, port.TxFull, port.TxDown}, status)
		if up == "up" {
			require.Equal(t, port.TxOK, status, "the queue makes room as it goes")
		}
		pool.FreeAll(frames[n:])
		require.Eventually(t, func() bool { return !q.Flush() }, time.Second, time.Millisecond)
		require.Len(t, q.txFree, vethTxChunks)
	}
}

func TestVethConfigNamesItsMistakes(t *testing.T) {
	for want, change := range map[string]func(*VethConfig){
		"rings of 100 entries":  func(c *VethConfig) { c.RingSize = 100 },
		"transmit budget 16":    func(c *VethConfig) { c.TxBudget = 16 },
		"no frame memory":       func(c *VethConfig) { c.Pools = nil },
		"no program":            func(c *VethConfig) { c.Program = nil },
		"xdp.frags":             func(c *VethConfig) { c.MTU = 9000 },
		"want 68 to 3506":       func(c *VethConfig) { c.MTU = 3507 },
		"4 receive but 2 trans": nil,
	} {
		t.Run(want, func(t *testing.T) {
			c := VethConfig{Interface: "veth0", Pools: make([]*port.Pool, 1), RingSize: 64, MTU: 1500, Program: &VethProgram{}}
			rx := 2
			if change == nil {
				rx = 4
			} else {
				change(&c)
			}
			require.ErrorContains(t, c.check(rx, 2), want)
		})
	}
}

func TestVethDoesNotAllocate(t *testing.T) {
	pod := newPodPair(t, newNetns(t), "veth0", 1, 1500)
	pool := newPool(t, 256, 2048, 0)
	q := pod.open(t, VethConfig{Pools: newPools(pool), RingSize: 64}).queues[0]
	raw := newRawSocket(t, pod.netns, "eth0")
	frame := ipFrame(pod.mac, [6]byte{2}, remote4, pod4, 64, 1)
	frames := make([]port.Frame, 128)
	seen := 0
	poll := func() {
		for range 8 {
			_, _ = unix.Write(raw.fd, frame)
		}
		n := q.Receive(frames)
		seen += n
		if taken, _ := q.Transmit(frames[:n]); taken < n {
			pool.FreeAll(frames[taken:n])
		}
		q.Flush()
	}
	poll()
	require.Zero(t, testing.AllocsPerRun(100, poll))
	require.Greater(t, seen, 100)
}
