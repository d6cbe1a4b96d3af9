package dataplane

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/overplane/overplane/dataplane/packet"
)

// BenchmarkReference is the least a router can do, as a measure of the machine at the moment: a loop without ports, counters, source checks, ICMP or
// reasons that parses an IPv4 header, verifies its checksum, looks up one of 5,000 blocks in a flat array, counts the hop, rewrites Ethernet and notes the frame in a list.
// BenchmarkPoll's figures mean most as multiples of it, taken in the same run.
func BenchmarkReference(b *testing.B) {
	const frames, chunk, blocks = 8192, 2048, 5000
	memory := make([]byte, frames*chunk)
	var slots [8192]uint32
	var headers [blocks][12]byte
	random := rand.New(rand.NewPCG(1, 2))
	order := random.Perm(frames)
	reset := func() {
		for i := range frames {
			h := memory[i*chunk+256+14:][:20]
			*(*[20]byte)(h) = [20]byte{0: 0x45, 3: 46, 8: 250, 9: 17, 12: 10, 15: 2, 16: 10}
			dst := 10<<24 | random.Uint32N(blocks)<<8 | 7
			binary.BigEndian.PutUint32(h[16:], dst)
			binary.BigEndian.PutUint16(h[10:], packet.Checksum(h, 0))
			slots[dst>>8&8191] = random.Uint32N(blocks)
		}
	}
	reset()
	var out [256]uint32
	n, bad := 0, 0
	b.ResetTimer()
	for i := range b.N {
		if i%(frames*200) == frames*200-1 {
			b.StopTimer()
			reset()
			b.StartTimer()
		}
		off := order[i&(frames-1)] * chunk
		f := memory[off+256 : off+256+64]
		h := f[14:34]
		if h[0] != 0x45 || packet.Fold(packet.Sum(h, 0)) != 0xffff || h[8] <= 1 {
			bad++
			continue
		}
		*(*[12]byte)(f) = headers[slots[binary.BigEndian.Uint32(h[16:])>>8&8191]]
		h[8]--
		sum := uint32(binary.BigEndian.Uint16(h[10:])) + 0x100
		binary.BigEndian.PutUint16(h[10:], uint16(sum+sum>>16))
		out[n&255] = uint32(off)
		n++
	}
	if bad > 0 {
		b.Fatalf("%d of %d frames were bad", bad, b.N)
	}
}
