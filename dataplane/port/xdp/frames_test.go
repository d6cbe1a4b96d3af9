package xdp

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port"
)

var (
	podCIDR4 = netip.MustParsePrefix("10.244.0.0/16")
	podCIDR6 = netip.MustParsePrefix("fd12:3456:789a::/64")
	pod4     = netip.MustParseAddr("10.244.1.5")
	remote4  = netip.MustParseAddr("10.244.2.7")
	pod6     = netip.MustParseAddr("fd12:3456:789a:0:1::5")
	remote6  = netip.MustParseAddr("fd12:3456:789a:0:2::7")
	other4   = netip.MustParseAddr("192.0.2.1")
	other6   = netip.MustParseAddr("2001:db8::1")
)

// ipFrame is an Ethernet frame of length bytes with an IP header of src's family; seq and a pattern that depends on it are the payload.
func ipFrame(srcMAC, dstMAC [6]byte, src, dst netip.Addr, length int, seq uint32) []byte {
	b := make([]byte, length)
	copy(b, dstMAC[:])
	copy(b[6:], srcMAC[:])
	h := 34
	if src.Is4() {
		binary.BigEndian.PutUint16(b[12:], 0x0800)
		b[14], b[22], b[23] = 0x45, 64, 253
		binary.BigEndian.PutUint16(b[16:], uint16(length-14))
		s, d := src.As4(), dst.As4()
		copy(b[26:], s[:])
		copy(b[30:], d[:])
		sum := uint32(0)
		for i := 14; i < 34; i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(b[24:], ^uint16(sum&0xffff+sum>>16))
	} else {
		h = 54
		binary.BigEndian.PutUint16(b[12:], 0x86dd)
		b[14], b[20], b[21] = 0x60, 253, 64
		binary.BigEndian.PutUint16(b[18:], uint16(length-54))
		s, d := src.As16(), dst.As16()
		copy(b[22:], s[:])
		copy(b[38:], d[:])
	}
	binary.BigEndian.PutUint32(b[h:], seq)
	for i := h + 4; i < length; i++ {
		b[i] = byte(uint32(i)*7 + seq)
	}
	return b
}

func seqOf(frame []byte) uint32 {
	if frame[12] == 0x86 {
		return binary.BigEndian.Uint32(frame[54:])
	}
	return binary.BigEndian.Uint32(frame[34:])
}

// steered is a port under test with its steering and pools.
type steered struct {
	*Port
	steering *Steering
	pools    []*port.Pool
}

type steeredConfig struct {
	workers, chunks, chunkSize, large, ring int
	pinDir                                  string
	mtu                                     int
}

// openSteered attaches and opens up0 with the pod CIDRs and the far end as the only member, all workers beating.
func openSteered(t testing.TB, v *veth, c steeredConfig) *steered {
	t.Helper()
	s := &steered{}
	if c.workers == 0 {
		c.workers = 1
	}
	if c.chunks == 0 {
		c.chunks = 8192
	}
	if c.chunkSize == 0 {
		c.chunkSize = 2048
	}
	for range c.workers {
		s.pools = append(s.pools, newPool(t, c.chunks, c.chunkSize, c.large))
	}
	budget := 128
	if c.ring != 0 {
		budget = min(budget, c.ring)
	}
	in(t, v.near, func() {
		var err error
		s.steering, err = AttachSteering(SteeringConfig{Interface: "up0", PinDir: c.pinDir, Workers: c.workers, HeartbeatLimit: time.Hour})
		require.NoError(t, err)
		s.Port, err = Open(Config{Interface: "up0", Pools: s.pools, RingSize: c.ring, MTU: c.mtu, TxBudget: budget, Steering: s.steering})
		require.NoError(t, err)
	})
	t.Cleanup(func() {
		require.NoError(t, s.Port.Close())
		require.NoError(t, s.steering.Close())
	})
	require.NoError(t, s.steering.SetPodCIDRs([]netip.Prefix{podCIDR4, podCIDR6}))
	require.NoError(t, s.steering.SetMembers([][6]byte{v.farMAC}))
	for w := range c.workers {
		Beat(s.steering.Heartbeat(w))
	}
	s.poll(func([]byte, int) bool { return false }, 1) // the first poll gives the kernel memory
	return s
}

// poll receives on all queues until f, which is called with every packet, returns true or the milliseconds are over.
func (s *steered) poll(f func(packet []byte, queue int) bool, ms int) bool {
	frames := make([]port.Frame, 2*port.MaxChain)
	deadline := time.Now().Add(time.Duration(ms) * time.Millisecond)
	for {
		for i, q := range s.queues {
			n := q.Receive(frames)
			done := false
			for k := 0; k < n; {
				size := port.PacketFrames(frames[k:n])
				var packet []byte
				for j := range size {
					packet = append(packet, q.pool.Bytes(&frames[k+j])...)
				}
				done = f(packet, i) || done
				k += size
			}
			q.pool.FreeAll(frames[:n])
			q.Flush()
			if done {
				return true
			}
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// put makes a packet of the bytes in chunks of queue's pool, as a chain if it needs several.
func (s *steered) put(t testing.TB, queue int, packet []byte) []port.Frame {
	t.Helper()
	pool := s.queues[queue].pool
	var out []port.Frame
	for len(packet) > 0 {
		f, ok := pool.Alloc()
		require.True(t, ok, "the pool is empty")
		n := copy(pool.Buffer(&f), packet)
		f.Len = uint32(n)
		packet = packet[n:]
		if len(packet) > 0 {
			f.Flags = port.More
		}
		out = append(out, f)
	}
	return out
}

// transmit sends one packet and polls until the queue took it.
func (s *steered) transmit(t testing.TB, queue int, packet []byte) {
	t.Helper()
	frames := s.put(t, queue, packet)
	q := s.queues[queue]
	for {
		n, status := q.Transmit(frames)
		if frames = frames[n:]; len(frames) == 0 {
			return
		}
		require.Equal(t, port.TxFull, status)
		q.Flush()
	}
}

// requireNoLeak waits until everything that was transmitted came back, and checks that each chunk is either in the pool or waits for frames.
func (s *steered) requireNoLeak(t testing.TB) {
	t.Helper()
	require.Eventually(t, func() bool {
		tx := 0
		for _, q := range s.queues {
			q.Flush()
			q.reclaim()
			_, n := q.Outstanding()
			tx += n
		}
		return tx == 0
	}, 5*time.Second, time.Millisecond, "frames are not completed")
	for w, pool := range s.pools {
		chunks, large := pool.Available()
		for i := w; i < len(s.queues); i += len(s.pools) {
			rx, tx := s.queues[i].Outstanding()
			chunks += rx + tx
		}
		require.Equal(t, pool.Config().Chunks, chunks, "chunks of pool %d", w)
		require.Equal(t, pool.Config().LargeBuffers, large, "large buffers of pool %d", w)
	}
}

func (s *steered) counters(t testing.TB) map[string]uint64 {
	t.Helper()
	c, err := s.steering.Counters()
	require.NoError(t, err)
	return c
}

func newPools(pools ...*port.Pool) []*port.Pool { return pools }
