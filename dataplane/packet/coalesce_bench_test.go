package packet

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
)

// benchBatch is the segments of a 64 KiB train, parsed.
func benchBatch(b testing.TB, v6, udp bool) (packets []Packet, frames [][]byte, size int) {
	g := gsoSpec{v6: v6, udp: udp, df: true, ttl: 64, host: 1, srcPort: 40000, seq: 1, id: 1, flags: tcpACK}
	if !udp {
		g.options = tcpTimestamps
	}
	size = 1514 - g.headerLen()
	g.payload = testPayload((65535+14-g.headerLen())/size*size, 5)
	for _, s := range g.segments(size) {
		frames = append(frames, s.build(false))
	}
	packets = make([]Packet, len(frames))
	for i := range frames {
		Parse(&packets[i], frames[i], len(frames[i]))
		require.Equal(b, drop.None, packets[i].Reason)
	}
	return packets, frames, size
}

// coalesceBatch is what a worker does with a batch, but for the sending. It returns how many trains and packets left.
func coalesceBatch(c *Coalescer, packets []Packet, frames [][]byte, accept Accept) (trains, segments int) {
	c.Reset()
	for i := range packets {
		c.Add(&packets[i], frames[i], 0, accept, uint32(i))
	}
	var t Train
	for c.Next(&t) {
		trains++
		segments++
		if t.Segments > 1 {
			c.Finish(&t, frames[t.Handle])
		}
		for _, _, _, ok := c.NextSegment(&t); ok; _, _, _, ok = c.NextSegment(&t) {
			segments++
		}
	}
	return trains, segments
}

// restoreHead undoes Finish, for the next turn of a benchmark.
func restoreHead(frame, original []byte) { copy(frame[:100], original) }

func TestCoalesceAllocatesNothing(t *testing.T) {
	var c Coalescer
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			packets, frames, _ := benchBatch(t, v6, udp)
			original := append([]byte{}, frames[0]...)
			require.Zero(t, testing.AllocsPerRun(20, func() {
				restoreHead(frames[0], original)
				if trains, segments := coalesceBatch(&c, packets, frames, acceptAll); trains != 1 || segments != len(frames) {
					panic("no single train")
				}
			}))
		}
	}
}

// BenchmarkCoalesce makes the segments of a 64 KiB frame one train again, every checksum verified.
func BenchmarkCoalesce(b *testing.B) {
	for _, family := range []int{4, 6} {
		for _, proto := range []string{"tcp", "udp"} {
			packets, frames, size := benchBatch(b, family == 6, proto == "udp")
			original := append([]byte{}, frames[0]...)
			b.Run(fmt.Sprintf("proto=%s/family=%d/bytes=65535/mss=%d", proto, family, size), func(b *testing.B) {
				var c Coalescer
				b.ReportAllocs()
				for b.Loop() {
					restoreHead(frames[0], original)
					if trains, _ := coalesceBatch(&c, packets, frames, acceptAll); trains != 1 {
						b.Fatal("no single train")
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(frames)), "ns/segment")
			})
		}
	}
}

// BenchmarkCoalescePass sends batches of 64 packets that cannot be merged: what the stage costs those it does not help. open is the
// number of trains of other flows that are open meanwhile.
func BenchmarkCoalescePass(b *testing.B) {
	for _, kind := range []string{"udp64", "ack", "single"} {
		for _, open := range []int{0, 4} {
			b.Run(fmt.Sprintf("kind=%s/open=%d", kind, open), func(b *testing.B) {
				var packets []Packet
				var frames [][]byte
				for i := range 64 {
					g := gsoSpec{udp: kind == "udp64", df: true, ttl: 64, host: 9, srcPort: uint16(i), flags: tcpACK}
					if i < open {
						g.udp = false
					}
					if i < open || kind != "ack" {
						g.payload = testPayload(22, 1)
					}
					f := g.build(false)
					var p Packet
					Parse(&p, f, len(f))
					packets, frames = append(packets, p), append(frames, f)
				}
				var c Coalescer
				b.ReportAllocs()
				for b.Loop() {
					if trains, _ := coalesceBatch(&c, packets, frames, AcceptTCP4|AcceptTCP6); trains != 64 {
						b.Fatal("merged")
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*64), "ns/packet")
			})
		}
	}
}
