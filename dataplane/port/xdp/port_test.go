package xdp

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port"
)

var (
	_ port.Port    = (*Port)(nil)
	_ port.Queue   = (*Queue)(nil)
	_ port.Flusher = (*Queue)(nil)
)

// TestTrafficVeth sends and receives packets of all sizes over a veth, in every MTU and number of queues, and counts the frames afterwards.
func TestTrafficVeth(t *testing.T) {
	for _, c := range []struct{ queues, workers, mtu, chunkSize, packets int }{
		{1, 1, 1500, 2048, 10000},
		{2, 1, 1500, 2048, 10000},
		{2, 2, 1500, 4096, 10000},
		{1, 1, 3498, 4096, 2000},
		{1, 1, 3498, 2048, 2000},
		{2, 2, 9000, 2048, 2000},
		{1, 1, 9000, 4096, 2000},
	} {
		t.Run(fmt.Sprintf("queues=%d/workers=%d/mtu=%d/chunk=%d", c.queues, c.workers, c.mtu, c.chunkSize), func(t *testing.T) {
			v := newVeth(t, c.queues, c.mtu)
			s := openSteered(t, v, steeredConfig{workers: c.workers, chunkSize: c.chunkSize})
			require.Equal(t, c.queues, s.NumQueues())
			require.Equal(t, "xdp-copy", s.Granted(), "veth has no zero-copy")
			require.False(t, s.ZeroCopy())
			require.ErrorContains(t, s.WhyNotMore(), "zero-copy")
			big := c.mtu+14 > c.chunkSize-256
			require.Equal(t, port.Caps{Chains: big, MaxFrame: c.mtu + 14, Polled: true}, s.Caps())
			raw := newRawSocket(t, v.far, "far0")

			t.Run("receive", func(t *testing.T) { receiveAll(t, v, s, raw, c.mtu, c.packets) })
			t.Run("transmit", func(t *testing.T) { transmitAll(t, v, s, raw, c.mtu, c.packets) })
			s.requireNoLeak(t)
			for _, q := range s.queues {
				st, err := q.Stats()
				require.NoError(t, err)
				require.Zero(t, st, "the kernel dropped nothing")
				require.Zero(t, q.TxErrors())
			}
		})
	}
}

// length spreads packet sizes over all that the MTU allows, with the edges among them.
func length(i, mtu int) int {
	switch i % 16 {
	case 0:
		return 60
	case 1:
		return mtu + 14
	}
	return 60 + i*131%(mtu+14-60)
}

func receiveAll(t *testing.T, v *veth, s *steered, raw *rawSocket, mtu, packets int) {
	before := s.counters(t)
	const burst = 64
	for i := 0; i < packets; i += burst {
		want := map[uint32][]byte{}
		for k := i; k < min(i+burst, packets); k++ {
			src, dst := remote4, pod4
			if k%3 == 0 {
				src, dst = remote6, pod6
			}
			b := ipFrame(v.farMAC, v.nearMAC, src, dst, length(k, mtu), uint32(k))
			want[uint32(k)] = b
			raw.send(t, b)
		}
		done := s.poll(func(p []byte, _ int) bool {
			require.Equal(t, want[seqOf(p)], p)
			delete(want, seqOf(p))
			return len(want) == 0
		}, 5000)
		require.True(t, done, "%d packets of %d missing; %v", len(want), i, s.counters(t))
	}
	require.Equal(t, uint64(packets), s.counters(t)["redirected"]-before["redirected"])
}

func transmitAll(t *testing.T, v *veth, s *steered, raw *rawSocket, mtu, packets int) {
	const burst = 64
	for i := 0; i < packets; i += burst {
		want := map[uint32][]byte{}
		for k := i; k < min(i+burst, packets); k++ {
			b := ipFrame(v.nearMAC, v.farMAC, pod4, remote4, length(k, mtu), uint32(k))
			want[uint32(k)] = b
			s.transmit(t, k%s.NumQueues(), b)
		}
		for _, q := range s.queues {
			q.Flush()
		}
		for len(want) > 0 {
			p := raw.receive(t, 2000)
			require.NotNil(t, p, "%d packets of %d missing", len(want), i)
			if len(p) < 60 || p[12] != 8 || p[23] != 253 {
				continue
			}
			require.Equal(t, want[seqOf(p)], p)
			delete(want, seqOf(p))
		}
	}
}

// TestLinkDown takes the link down and up under traffic: nothing blocks, nothing leaks, and traffic goes on by itself.
func TestLinkDown(t *testing.T) {
	v := newVeth(t, 1, 1500)
	s := openSteered(t, v, steeredConfig{})
	raw := newRawSocket(t, v.far, "far0")
	q := s.queues[0]
	receiveAll(t, v, s, raw, 1500, 100)
	run(t, "ip", "-n", v.near, "link", "set", "up0", "down")

	frame := ipFrame(v.nearMAC, v.farMAC, pod4, remote4, 100, 1)
	statuses := map[port.TxStatus]int{}
	for range 100 {
		f := s.put(t, 0, frame)
		n, status := q.Transmit(f)
		statuses[status]++
		q.pool.FreeAll(f[n:])
		q.Flush()
	}
	require.Equal(t, map[port.TxStatus]int{port.TxOK: 1, port.TxDown: 99}, statuses, "the first packet finds out")

	run(t, "ip", "-n", v.near, "link", "set", "up0", "up")
	for raw.receive(t, 100) != nil {
	}
	require.Eventually(t, func() bool {
		q.Flush()
		f := s.put(t, 0, frame)
		n, status := q.Transmit(f)
		q.pool.FreeAll(f[n:])
		q.Flush()
		return status == port.TxOK && raw.receive(t, 100) != nil
	}, 10*time.Second, 10*time.Millisecond)
	for raw.receive(t, 100) != nil {
	}
	receiveAll(t, v, s, raw, 1500, 100)
	transmitAll(t, v, s, raw, 1500, 100)
	s.requireNoLeak(t)
}

// TestInterfaceDeleted deletes the interface under an open port.
func TestInterfaceDeleted(t *testing.T) {
	v := newVeth(t, 1, 1500)
	s := openSteered(t, v, steeredConfig{})
	run(t, "ip", "-n", v.near, "link", "del", "up0")
	q := s.queues[0]
	f := s.put(t, 0, ipFrame(v.nearMAC, v.farMAC, pod4, remote4, 100, 1))
	n, status := q.Transmit(f)
	require.Equal(t, 1, n)
	require.Equal(t, port.TxOK, status)
	q.Flush()
	f = s.put(t, 0, ipFrame(v.nearMAC, v.farMAC, pod4, remote4, 100, 1))
	n, status = q.Transmit(f)
	require.Zero(t, n)
	require.Equal(t, port.TxDown, status)
	q.pool.FreeAll(f)

	require.NoError(t, s.Port.Close())
	rx, tx := q.Outstanding()
	require.NotZero(t, rx)
	require.NotZero(t, tx)
	q.Recover()
	requireWhole(t, q.pool)
	q.Recover()
	requireWhole(t, q.pool)
}

// requireWhole takes every chunk out of the pool once, and puts them back.
func requireWhole(t testing.TB, pool *port.Pool) {
	t.Helper()
	var all []port.Frame
	seen := map[uint32]bool{}
	for {
		f, ok := pool.Alloc()
		if !ok {
			break
		}
		require.False(t, seen[f.Off], "chunk %#x is in the pool twice", f.Off)
		seen[f.Off] = true
		all = append(all, f)
	}
	require.Len(t, all, pool.Config().Chunks)
	pool.FreeAll(all)
}

// TestTransmitRejects lists what the sockets do not take, and that it leaves the caller its frames.
func TestTransmitRejects(t *testing.T) {
	v := newVeth(t, 1, 1500)
	s := openSteered(t, v, steeredConfig{large: 4})
	q := s.queues[0]
	whole := ipFrame(v.nearMAC, v.farMAC, pod4, remote4, 1514, 1)
	for _, c := range []struct {
		name string
		make func() []port.Frame
	}{
		{"shorter than an Ethernet header", func() []port.Frame { return s.put(t, 0, whole[:13]) }},
		{"longer than the MTU", func() []port.Frame { return s.put(t, 0, append(whole, 1)) }},
		{"empty", func() []port.Frame { f := s.put(t, 0, whole); f[0].Len = 0; return f }},
		{"unfinished checksum", func() []port.Frame {
			f := s.put(t, 0, whole)
			f[0].Offload.Flags = port.NeedsChecksum
			return f
		}},
		{"GSO", func() []port.Frame { f := s.put(t, 0, whole); f[0].Offload.GSO = port.GSOTCP4; return f }},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.make()
			n, status := q.Transmit(f)
			require.Zero(t, n)
			require.Equal(t, port.TxRejected, status)
			q.pool.FreeAll(f)
		})
	}
	s.requireNoLeak(t)
}

// TestTransmitCopies sends packets that the kernel cannot take as they are: large buffers, and more buffers than it allows.
func TestTransmitCopies(t *testing.T) {
	for _, mtu := range []int{1500, 9000} {
		t.Run(fmt.Sprintf("mtu=%d", mtu), func(t *testing.T) {
			v := newVeth(t, 1, mtu)
			s := openSteered(t, v, steeredConfig{large: 4})
			raw := newRawSocket(t, v.far, "far0")
			pool := s.pools[0]
			for seq := range uint32(200) {
				want := ipFrame(v.nearMAC, v.farMAC, pod4, remote4, mtu+14-int(seq), seq)
				var frames []port.Frame
				if seq%2 == 0 { // headers in a chunk, payload in a large buffer
					head, ok := pool.Alloc()
					require.True(t, ok)
					head.Len, head.Flags = uint32(copy(pool.Buffer(&head)[:54], want)), port.More
					large, ok := pool.AllocLarge()
					require.True(t, ok)
					large.Len = uint32(copy(pool.Buffer(&large), want[54:]))
					frames = []port.Frame{head, large}
				} else { // forty pieces, some of them empty
					for i, left := 0, want; i < 40; i++ {
						f, ok := pool.Alloc()
						require.True(t, ok)
						n := len(want) / 30
						if i%8 == 7 {
							n = 0
						}
						if i == 39 {
							n = len(left)
						}
						n = min(n, len(left))
						f.Len, f.Flags = uint32(copy(pool.Buffer(&f), left[:n])), port.More
						left = left[n:]
						frames = append(frames, f)
					}
					frames[39].Flags = 0
				}
				n, status := s.queues[0].Transmit(frames)
				require.Equal(t, port.TxOK, status)
				require.Equal(t, len(frames), n)
				s.queues[0].Flush()
				require.Equal(t, want, raw.receive(t, 2000))
			}
			s.requireNoLeak(t)
		})
	}
}
