package tap

import (
	"fmt"
	"testing"

	"github.com/overplane/overplane/dataplane/port"
)

// BenchmarkQueue measures one call of the driver, the kernel's part included.
func BenchmarkQueue(b *testing.B) {
	needRoot(b)
	pool := newPool(b, 256, 16)
	a, _ := createIn(b, Config{Name: "tapa", Pools: []*port.Pool{pool}}, "10.99.0.1/24")
	q := a.Queue(0)
	frames := make([]port.Frame, port.MaxChain)
	b.Run("transmit/frame=64", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			f, _ := pool.Alloc()
			f.Len = 64
			copy(pool.Bytes(&f), []byte{2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 2, 8, 0}) // another host's: the stack drops it early
			frames[0] = f
			if n, _ := q.Transmit(frames[:1]); n == 0 {
				pool.Free(f)
			}
		}
	})
	b.Run("receive/empty", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			pool.FreeAll(frames[:q.Receive(frames)])
		}
	})
}

// BenchmarkTCP sends through two devices and one goroutine between them; one operation is 64 MiB, connection included.
func BenchmarkTCP(b *testing.B) {
	for family, dst := range map[int]string{4: "10.99.0.2", 6: "fd99::2"} {
		b.Run(fmt.Sprintf("family=%d", family), func(b *testing.B) {
			_, nsA, nsB := pair(b, 1, false)
			const size = 64 << 20
			b.SetBytes(size)
			for b.Loop() {
				transfer(b, nsA, nsB, dst, size)
			}
		})
	}
}
