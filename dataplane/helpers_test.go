package dataplane

import (
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"

	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

func errorName(e int) string { return icmp.Error(e).String() }

func headerLen(family string) int {
	if family == "ipv4" {
		return 20
	}
	return 40
}

func tcpSegment(t testing.TB, src, dst string, from, to packet.MAC, seq int, payload []byte) []byte {
	return ip{src: src, dst: dst, ttl: 64, ethSrc: from, ethDst: to, proto: layers.IPProtocolTCP, df: true,
		l4: []gopacket.SerializableLayer{&layers.TCP{SrcPort: 1000, DstPort: 2000, Seq: uint32(seq), Ack: 1, ACK: true, Window: 1000}}, payload: payload}.bytes(t)
}

// gsoFrame is what a TAP delivers for a large TCP write: one frame, its checksum field holding the pseudo-header sum.
func gsoFrame(t testing.TB, src, dst string, from, to packet.MAC, payload, mss int) ([]byte, port.Offload) {
	b := tcpSegment(t, src, dst, from, to, 1, make([]byte, payload))
	o := port.Offload{Flags: port.NeedsChecksum, GSO: port.GSOTCP4, SegmentSize: uint16(mss), ChecksumStart: 34, ChecksumOffset: 16}
	if !addr(src).Is4() {
		o.GSO, o.ChecksumStart = port.GSOTCP6, 54
	}
	o.HeaderLen = o.ChecksumStart + 20
	sum := packet.Fold(packet.PseudoHeader(addr(src), addr(dst), 6, uint32(payload+20)))
	b[o.ChecksumStart+16], b[o.ChecksumStart+17] = byte(sum>>8), byte(sum)
	return b, o
}

// sink is a queue that gives the same frames again on every Receive, and frees what it is told to transmit. It allocates nothing.
type sink struct {
	pool    *port.Pool
	frames  [][]byte
	offload port.Offload // of the last frame
}

type sinkPort struct {
	port.Port
	q *sink
}

func (p *sinkPort) Queue(int) port.Queue { return p.q }

func (q *sink) Receive(frames []port.Frame) int {
	n := 0
	for i, b := range q.frames {
		f, _ := q.pool.Alloc()
		k := copy(q.pool.Buffer(&f), b)
		f.Len = uint32(k)
		if i == len(q.frames)-1 {
			f.Offload = q.offload
		}
		if k < len(b) {
			f.Flags = port.More
			tail, _ := q.pool.AllocLarge()
			tail.Len = uint32(copy(q.pool.Buffer(&tail), b[k:]))
			frames[n] = f
			n++
			f = tail
		}
		frames[n] = f
		n++
	}
	return n
}

func (q *sink) Transmit(frames []port.Frame) (int, port.TxStatus) {
	q.pool.FreeAll(frames)
	return len(frames), port.TxOK
}

func (q *sink) FD() int { return -1 }
