package xdp

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// fakeKernel is the other side of a queue's rings, over plain memory. It "loops back": what is transmitted is received again, in the
// memory that the FILL ring gives.
type fakeKernel struct {
	mem                      []byte
	fill, completion         ring
	rx, tx                   ring
	fillAddrs, compAddrs     []uint64
	rxDescs, txDescs         []unix.XDPDesc
	packets, noFill, invalid int
}

// newFake makes a queue over plain memory, with all ring indices starting at start.
func newFake(t testing.TB, size int, start uint32, chunks, chunkSize int, maxSegments int) (*Queue, *fakeKernel) {
	t.Helper()
	pc := port.PoolConfig{Chunks: chunks, ChunkSize: chunkSize, LargeBuffers: 2}
	pool, err := port.NewPool(make([]byte, pc.Size()), pc)
	require.NoError(t, err)
	s := &socket{fd: -1, zeroCopy: true, sg: maxSegments > 1}
	k := &fakeKernel{mem: pool.Memory()}
	both := func(user, kernel *ring) {
		*user = ring{producer: new(uint32), consumer: new(uint32), flags: new(uint32), mask: uint32(size - 1), own: start, peer: start}
		*user.producer, *user.consumer = start, start
		*kernel = *user
	}
	both(&s.fill.ring, &k.fill)
	both(&s.completion.ring, &k.completion)
	both(&s.rx.ring, &k.rx)
	both(&s.tx.ring, &k.tx)
	s.fill.addrs, s.completion.addrs = make([]uint64, size), make([]uint64, size)
	s.rx.descs, s.tx.descs = make([]unix.XDPDesc, size), make([]unix.XDPDesc, size)
	k.fillAddrs, k.compAddrs, k.rxDescs, k.txDescs = s.fill.addrs, s.completion.addrs, s.rx.descs, s.tx.descs
	cfg := &Config{Pools: []*port.Pool{pool}, RingSize: size, MTU: 9000, Steering: &Steering{}}
	q := newQueue(cfg, s, 0, 1)
	q.maxSegments = maxSegments
	return q, k
}

// step moves what is in the TX ring to the RX ring, as far as there is memory and room, and completes it.
func (k *fakeKernel) step() {
	for {
		tx := atomic.LoadUint32(k.tx.producer)
		if tx == k.tx.own || k.rx.own-atomic.LoadUint32(k.rx.consumer) > k.rx.mask ||
			k.completion.own-atomic.LoadUint32(k.completion.consumer) > k.completion.mask {
			return
		}
		d := k.txDescs[k.tx.own&k.tx.mask]
		if d.Addr+uint64(d.Len) > uint64(len(k.mem)) || d.Len == 0 {
			k.invalid++
		}
		if atomic.LoadUint32(k.fill.producer) == k.fill.own {
			k.noFill++
			return
		}
		to := k.fillAddrs[k.fill.own&k.fill.mask] + port.Headroom
		k.fill.own++
		atomic.StoreUint32(k.fill.consumer, k.fill.own)
		copy(k.mem[to:], k.mem[d.Addr:d.Addr+uint64(d.Len)])
		k.rxDescs[k.rx.own&k.rx.mask] = unix.XDPDesc{Addr: to, Len: d.Len, Options: d.Options}
		k.rx.own++
		k.tx.own++
		atomic.StoreUint32(k.tx.consumer, k.tx.own)
		k.compAddrs[k.completion.own&k.completion.mask] = d.Addr
		k.completion.own++
		atomic.StoreUint32(k.completion.producer, k.completion.own)
		if d.Options&unix.XDP_PKT_CONTD == 0 {
			// Packets appear whole, as in xsk_flush.
			atomic.StoreUint32(k.rx.producer, k.rx.own)
			k.packets++
		}
	}
}

// TestRingsLoopback sends numbered packets, single and in chains, through the rings and back while the other side runs concurrently, across
// the wrap-around of all indices.
func TestRingsLoopback(t *testing.T) {
	const packets = 20000
	for _, start := range []uint32{0, 1<<32 - 1000, 1<<31 - 1000} {
		t.Run(fmt.Sprintf("start=%#x", start), func(t *testing.T) {
			q, k := newFake(t, 256, start, 1024, 2048, 8)
			stop, stopped := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(stopped)
				for {
					select {
					case <-stop:
						return
					default:
						k.step()
						runtime.Gosched()
					}
				}
			}()

			frames := make([]port.Frame, 128)
			var sent, received uint32
			deadline := time.Now().Add(30 * time.Second)
			for received < packets {
				require.True(t, time.Now().Before(deadline), "sent %d, received %d", sent, received)
				for sent < packets && sent-received < 100 {
					n := int(sent%4) + 1
					var chain []port.Frame
					for i := range n {
						f, ok := q.pool.Alloc()
						if !ok {
							break
						}
						f.Len = 64
						b := q.pool.Bytes(&f)
						b[0], b[1], b[2], b[3], b[4] = byte(sent), byte(sent>>8), byte(sent>>16), byte(i), byte(n)
						if i < n-1 {
							f.Flags = port.More
						}
						chain = append(chain, f)
					}
					if len(chain) < n {
						q.pool.FreeAll(chain)
						break
					}
					taken, status := q.Transmit(chain)
					if status == port.TxFull {
						require.Zero(t, taken)
						q.pool.FreeAll(chain)
						break
					}
					require.Equal(t, n, taken)
					sent++
				}
				q.Flush()
				got := q.Receive(frames)
				for i := 0; i < got; {
					n := port.PacketFrames(frames[i:got])
					require.Equal(t, int(received%4)+1, n)
					for j := range n {
						b := q.pool.Bytes(&frames[i+j])
						require.Equal(t, []byte{byte(received), byte(received >> 8), byte(received >> 16), byte(j), byte(n)}, b[:5])
					}
					received++
					i += n
				}
				q.pool.FreeAll(frames[:got])
				if got == 0 {
					runtime.Gosched()
				}
			}
			close(stop)
			<-stopped
			k.step()
			q.Receive(frames)
			require.Zero(t, k.invalid)
			rx, tx := q.Outstanding()
			free, _ := q.pool.Available()
			require.Zero(t, tx)
			require.Equal(t, 1024, free+rx)
			q.Recover()
			requireWhole(t, q.pool)
		})
	}
}

// TestRingsFull checks what a full ring answers, and that nothing is published before Flush.
func TestRingsFull(t *testing.T) {
	q, k := newFake(t, 64, 1<<32-5, 256, 2048, 1)
	alloc := func() []port.Frame {
		f, ok := q.pool.Alloc()
		require.True(t, ok)
		f.Len = 60
		return []port.Frame{f}
	}
	for range 64 {
		n, status := q.Transmit(alloc())
		require.Equal(t, 1, n)
		require.Equal(t, port.TxOK, status)
	}
	require.Zero(t, atomic.LoadUint32(q.tx.producer)-k.tx.own, "published before Flush")
	extra := alloc()
	n, status := q.Transmit(extra)
	require.Zero(t, n)
	require.Equal(t, port.TxFull, status)
	require.Equal(t, uint32(64), atomic.LoadUint32(q.tx.producer)-k.tx.own, "a full ring is shown to the kernel")
	frames := make([]port.Frame, 64)
	require.Zero(t, q.Receive(frames)) // gives memory
	k.step()
	require.Equal(t, 64, k.packets)
	n, status = q.Transmit(extra)
	require.Equal(t, 1, n)
	require.Equal(t, port.TxOK, status)
}

// TestReceiveKeepsChainsWhole gives the caller little room.
func TestReceiveKeepsChainsWhole(t *testing.T) {
	q, k := newFake(t, 256, 0, 512, 2048, 17)
	frames := make([]port.Frame, port.MaxChain)
	q.Receive(frames)
	push := func(n int) {
		for i := range n {
			addr := k.fillAddrs[k.fill.own&k.fill.mask]
			k.fill.own++
			atomic.StoreUint32(k.fill.consumer, k.fill.own)
			d := unix.XDPDesc{Addr: addr + port.Headroom, Len: 100}
			if i < n-1 {
				d.Options = unix.XDP_PKT_CONTD
			}
			k.rxDescs[k.rx.own&k.rx.mask] = d
			k.rx.own++
		}
		atomic.StoreUint32(k.rx.producer, k.rx.own)
	}
	push(40)
	push(40)
	require.Equal(t, 40, q.Receive(frames), "the second does not fit")
	require.Equal(t, 40, port.PacketFrames(frames[:40]))
	q.pool.FreeAll(frames[:40])
	require.Equal(t, 40, q.Receive(frames))
	q.pool.FreeAll(frames[:40])

	push(100) // no caller has room for it
	push(1)
	got := 0
	for range 4 {
		n := q.Receive(frames)
		got += n
		q.pool.FreeAll(frames[:n])
	}
	require.Equal(t, 1, got, "the long one is dropped, the one behind it is not")
	rx, tx := q.Outstanding()
	free, _ := q.pool.Available()
	require.Equal(t, 512, free+rx+tx)
	q.Recover()
	requireWhole(t, q.pool)
}

// TestRecover ends in the middle of everything: frames in all four rings, and some in the caller's hands.
func TestRecover(t *testing.T) {
	q, k := newFake(t, 64, 7, 256, 2048, 8)
	frames := make([]port.Frame, port.MaxChain)
	q.Receive(frames)
	send := func(n int) {
		for range n {
			f, ok := q.pool.Alloc()
			require.True(t, ok)
			f.Len = 60
			_, status := q.Transmit([]port.Frame{f})
			require.Equal(t, port.TxOK, status)
		}
	}
	send(20)
	q.Flush()
	k.step() // 20 received and completed, which nobody looked at
	send(10)
	q.Flush() // published, not sent
	send(5)   // not published
	mine, ok := q.pool.Alloc()
	require.True(t, ok)
	q.Recover()
	q.pool.Free(mine)
	requireWhole(t, q.pool)
}

// TestQueueDoesNotAllocate counts the heap allocations of one poll.
func TestQueueDoesNotAllocate(t *testing.T) {
	q, k := newFake(t, 256, 0, 1024, 2048, 8)
	frames := make([]port.Frame, 128)
	poll := func() {
		n := q.Receive(frames)
		taken, _ := q.Transmit(frames[:n])
		q.pool.FreeAll(frames[taken:n])
		q.Flush()
		k.step()
	}
	for range 32 {
		f, _ := q.pool.Alloc()
		f.Len = 64
		_, _ = q.Transmit([]port.Frame{f})
	}
	for range 8 {
		poll()
	}
	before := k.packets
	require.Zero(t, testing.AllocsPerRun(100, poll))
	require.Greater(t, k.packets, before+1000)
}

// FuzzTransmit sends packets of arbitrary pieces and compares what arrives with what was sent.
func FuzzTransmit(f *testing.F) {
	f.Add(uint64(1), 3)
	f.Add(uint64(7), 40)
	f.Fuzz(func(t *testing.T, seed uint64, pieces int) {
		if pieces < 1 || pieces > port.MaxChain {
			return
		}
		rng := rand.New(rand.NewPCG(seed, 0))
		q, k := newFake(t, 256, uint32(seed), 512, 2048, 8)
		q.Receive(make([]port.Frame, port.MaxChain))
		var frames []port.Frame
		var want []byte
		for i := range pieces {
			var p port.Frame
			var ok bool
			if rng.IntN(8) == 0 {
				p, ok = q.pool.AllocLarge()
			}
			if !ok {
				p, ok = q.pool.Alloc()
			}
			require.True(t, ok)
			p.Len = uint32(rng.IntN(min(q.pool.MaxLen(&p), 4000) + 1))
			if i < pieces-1 {
				p.Flags = port.More
			}
			for j, b := 0, q.pool.Bytes(&p); j < len(b); j++ {
				b[j] = byte(rng.Uint32())
			}
			want = append(want, q.pool.Bytes(&p)...)
			frames = append(frames, p)
		}
		n, status := q.Transmit(frames)
		q.Flush()
		k.step()
		got := make([]port.Frame, port.MaxChain)
		m := q.Receive(got)
		if len(want) < ethernetHeader || len(want) > q.maxFrame {
			require.Equal(t, port.TxRejected, status)
			require.Zero(t, n)
			require.Zero(t, m)
			q.pool.FreeAll(frames)
		} else {
			require.Equal(t, port.TxOK, status)
			require.Equal(t, pieces, n)
			var b []byte
			for i := range got[:m] {
				b = append(b, q.pool.Bytes(&got[i])...)
			}
			require.Equal(t, want, b)
			q.pool.FreeAll(got[:m])
		}
		require.Zero(t, k.invalid)
		q.Receive(got)
		rx, tx := q.Outstanding()
		free, large := q.pool.Available()
		require.Equal(t, 512, free+rx+tx)
		require.Equal(t, 2, large)
		q.Recover()
		requireWhole(t, q.pool)
	})
}
