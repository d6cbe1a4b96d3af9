package packet

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/overplane/overplane/dataplane/drop"
)

// segmentAll cuts a frame the way a worker does: parse, check, cut. split is where the frame's first buffer ends.
func segmentAll(t require.TestingT, frame []byte, split int, o Offload, unfinished bool) (segments [][]byte, each Offload) {
	var p Packet
	head, rest := frame[:split:split], frame[split:]
	Parse(&p, head, len(frame))
	require.Equal(t, drop.None, p.Reason)
	require.Equal(t, drop.None, CheckOffload(&p, head, rest, &o))
	require.NotEqual(t, gsoNone, o.GSO)
	var s Segmenter
	s.Init(&p, head, rest, &o, unfinished)
	dst := make([]byte, s.Size())
	for {
		n := s.Next(dst)
		if n == 0 {
			break
		}
		segments = append(segments, append([]byte{}, dst[:n]...))
	}
	require.Len(t, segments, s.Segments())
	require.Zero(t, s.Next(dst), "the end is the end")
	return segments, s.Offload()
}

func requireSegments(t require.TestingT, g gsoSpec, size, split int) {
	frame := g.build(true)
	for _, unfinished := range []bool{false, true} {
		got, o := segmentAll(t, frame, split, g.offload(size), unfinished)
		want := g.segments(size)
		require.Len(t, got, len(want))
		for i := range want {
			require.Equal(t, want[i].build(unfinished), got[i], "segment %d of %d, unfinished %v", i, len(want), unfinished)
		}
		if unfinished {
			require.Equal(t, Offload{Flags: needsChecksum, HeaderLen: uint16(g.headerLen()), ChecksumStart: g.offload(size).ChecksumStart, ChecksumOffset: g.offload(size).ChecksumOffset}, o)
		} else {
			require.Zero(t, o)
		}
	}
}

func TestSegmentAgainstGoldenModel(t *testing.T) {
	base := gsoSpec{ttl: 64, host: 1, srcPort: 40000, seq: 0xfffffc00, ack: 77, window: 501, id: 0xfffe, df: true, flags: tcpACK}
	payload := testPayload(65000, 1)
	tests := []struct {
		name string
		edit func(*gsoSpec)
		n    int
		size int
	}{
		{"full size", func(*gsoSpec) {}, 64000, 1448},
		{"two segments, the last of one byte", func(*gsoSpec) {}, 1449, 1448},
		{"exact multiple", func(*gsoSpec) {}, 2896, 1448},
		{"odd segment size", func(*gsoSpec) {}, 5000, 333},
		{"jumbo segments", func(*gsoSpec) {}, 64000, 8948},
		{"smallest segments", func(*gsoSpec) {}, MinTCPSegmentSize * MaxTCPSegments, MinTCPSegmentSize},
		{"TCP options", func(g *gsoSpec) { g.options = tcpTimestamps }, 10000, 1436},
		{"FIN and PSH only on the last, CWR only on the first", func(g *gsoSpec) { g.flags |= tcpFIN | tcpPSH | tcpCWR }, 10000, 1448},
		{"IPv4 options", func(g *gsoSpec) { g.extra = []byte{1, 1, 1, 0} }, 10000, 1440},
		{"VLAN tag", func(g *gsoSpec) { g.vlan = true }, 10000, 1448},
		{"without DF", func(g *gsoSpec) { g.df = false }, 10000, 1448},
		{"IPv6", func(g *gsoSpec) { g.v6 = true }, 64000, 1428},
		{"IPv6 destination options", func(g *gsoSpec) { g.v6, g.extra = true, []byte{0, 1, 4, 0, 0, 0, 0} }, 10000, 1420},
		{"UDP", func(g *gsoSpec) { g.udp = true }, 64000, 1472},
		{"UDP, most segments", func(g *gsoSpec) { g.udp = true }, MaxUDPSegments * 3, 3},
		{"UDP over IPv6", func(g *gsoSpec) { g.udp, g.v6 = true, true }, 50000, 1452},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			g := base
			test.edit(&g)
			g.payload = payload[:test.n]
			h := g.headerLen()
			total := h + test.n
			for _, split := range []int{h, h + 1, min(h+1448, total), total - 1, total} {
				requireSegments(t, g, test.size, split)
			}
		})
	}
}

func TestSegmentProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := drawSpec(t, true)
		g.flags = rapid.Uint8().Draw(t, "flags")
		size := rapid.IntRange(MinTCPSegmentSize, 200).Draw(t, "size")
		g.payload = testPayload(rapid.IntRange(size+1, 20*size).Draw(t, "payload"), 7)
		split := rapid.IntRange(g.headerLen(), g.headerLen()+len(g.payload)).Draw(t, "split")
		requireSegments(t, g, size, split)
	})
}

// A sum the sender got wrong is wrong in every segment, too: segmentation repairs nothing.
func TestSegmentKeepsWrongPseudoHeader(t *testing.T) {
	g := gsoSpec{ttl: 64, host: 1, seq: 1, flags: tcpACK, payload: testPayload(3000, 2)}
	frame := g.build(true)
	frame[g.headerLen()-3] ^= 0x40
	segments, _ := segmentAll(t, frame, len(frame), g.offload(1448), false)
	require.Len(t, segments, 3)
	for i, s := range segments {
		require.False(t, goldenL4Good(s), "segment %d", i)
	}
}

// RFC 768: a computed checksum of zero is sent as all ones, since zero stands for none.
func TestSegmentUDPZeroChecksum(t *testing.T) {
	g := gsoSpec{udp: true, ttl: 64, host: 1, payload: []byte{1, 2, 0, 0, 3, 4, 0, 0}}
	for i := 0; i < len(g.payload); i += 4 {
		s := g
		s.payload = bytes.Clone(g.payload[i : i+4])
		b := s.build(false)
		copy(g.payload[i+2:], b[len(b)-6:][:2]) // the checksum so far, which makes the sum all ones
	}
	segments, _ := segmentAll(t, g.build(true), g.headerLen(), g.offload(4), false)
	require.Len(t, segments, 2)
	for _, s := range segments {
		require.Equal(t, []byte{0xff, 0xff}, s[len(s)-6:][:2])
		require.True(t, goldenL4Good(s))
	}
}

// goldenL4Good verifies the L4 checksum of a frame that Parse accepts with the golden routine.
func goldenL4Good(frame []byte) bool {
	var p Packet
	Parse(&p, frame, len(frame))
	if p.Reason != drop.None {
		return false
	}
	src, dst := p.Src.Netip().AsSlice(), p.Dst.Netip().AsSlice()
	l4 := frame[p.L4 : uint32(p.L3)+p.Length]
	pseudo := append(append([]byte{}, src...), dst...)
	pseudo = append(pseudo, 0, 0, uint8(len(l4)>>8), uint8(len(l4)), 0, 0, 0, p.Proto)
	return slowSum(pseudo, l4) == 0xffff
}

func TestSegmentAllocatesNothing(t *testing.T) {
	g := gsoSpec{ttl: 64, host: 1, seq: 1, flags: tcpACK, payload: testPayload(60000, 3)}
	frame := g.build(true)
	dst := make([]byte, 2048)
	offload := g.offload(1448)
	require.Zero(t, testing.AllocsPerRun(50, func() {
		var p Packet
		Parse(&p, frame, len(frame))
		o := offload
		if CheckOffload(&p, frame, nil, &o) != drop.None {
			panic("refused")
		}
		var s Segmenter
		s.Init(&p, frame, nil, &o, false)
		for s.Next(dst) != 0 {
		}
	}))
}

// setPseudo writes into an unfinished checksum field what an honest sender leaves there.
func setPseudo(p *Packet, frame []byte, offset uint16) {
	at := p.L4 + offset
	src, dst := p.Src.Netip().AsSlice(), p.Dst.Netip().AsSlice()
	l4 := uint32(p.L3) + p.Length - uint32(p.L4)
	sum := slowSum(src, dst, []byte{0, 0, uint8(l4 >> 8), uint8(l4), 0, 0, 0, p.Proto})
	frame[at], frame[at+1] = uint8(sum>>8), uint8(sum)
}

// FuzzSegment cuts arbitrary frames with metadata that fits them in kind, and compares with what the parser finds in the segments.
func FuzzSegment(f *testing.F) {
	for _, g := range []gsoSpec{
		{ttl: 64, host: 1, seq: 1, flags: tcpACK | tcpPSH, options: tcpTimestamps},
		{ttl: 64, host: 1, v6: true, seq: 1, flags: tcpACK | tcpFIN | tcpCWR, vlan: true},
		{ttl: 64, host: 1, udp: true, extra: []byte{1, 1, 1, 0}},
		{ttl: 64, host: 1, udp: true, v6: true, extra: []byte{0, 1, 4, 0, 0, 0, 0}},
	} {
		g.payload = testPayload(301, 4)
		f.Add(g.build(true), uint16(100), uint16(200))
	}
	f.Fuzz(func(t *testing.T, frame []byte, size, split uint16) {
		var p Packet
		at := min(int(split), len(frame))
		head, rest := frame[:at:at], frame[at:]
		Parse(&p, head, len(frame))
		offset, ok := checksumOffset(&p)
		if p.Reason != drop.None || !ok {
			return
		}
		o := Offload{Flags: needsChecksum, GSO: gsoUDP, SegmentSize: size, ChecksumStart: p.L4, ChecksumOffset: offset}
		if p.Proto == ProtoTCP && p.Kind == KindIPv4 {
			o.GSO = gsoTCP4
		} else if p.Proto == ProtoTCP {
			o.GSO = gsoTCP6
		}
		if CheckOffload(&p, head, rest, &o) != drop.None {
			return
		}
		setPseudo(&p, frame, offset)
		requireCutRight(t, &p, head, rest, &o)
	})
}

// requireCutRight finishes or cuts a frame whose offload was accepted, and checks what comes out by parsing it.
func requireCutRight(t *testing.T, p *Packet, head, rest []byte, o *Offload) {
	if o.GSO == gsoNone {
		FinishChecksum(p, head, rest)
		require.True(t, goldenL4Good(append(append([]byte{}, head...), rest...)))
		return
	}
	var s Segmenter
	s.Init(p, head, rest, o, false)
	dst := make([]byte, s.Size())
	payload := append(append([]byte{}, head[p.Payload:]...), rest...)
	bound := MaxUDPSegments
	if p.Proto == ProtoTCP {
		bound = MaxTCPSegments
	}
	require.LessOrEqual(t, s.Segments(), bound)
	require.GreaterOrEqual(t, s.Segments(), 2)
	for i := range s.Segments() {
		n := s.Next(dst)
		var q Packet
		Parse(&q, dst[:n], n)
		require.Equal(t, drop.None, q.Reason)
		require.Equal(t, uint32(n), uint32(q.L3)+q.Length)
		require.True(t, goldenL4Good(dst[:n]), "segment %d", i)
		require.Equal(t, [...]any{p.Src, p.Dst, p.SrcPort, p.DstPort, p.L3, p.L4, p.Payload, p.TTL},
			[...]any{q.Src, q.Dst, q.SrcPort, q.DstPort, q.L3, q.L4, q.Payload, q.TTL})
		body := dst[q.Payload:n]
		require.Equal(t, payload[:len(body)], body)
		payload = payload[len(body):]
	}
	require.Empty(t, payload)
}

// BenchmarkSegment cuts a frame of a 65,535-byte IP packet into a pool of 2 KiB frames, checksums completed.
func BenchmarkSegment(b *testing.B) {
	for _, family := range []int{4, 6} {
		for _, proto := range []string{"tcp", "udp"} {
			g := gsoSpec{v6: family == 6, udp: proto == "udp", ttl: 64, host: 1, seq: 1, flags: tcpACK}
			if !g.udp {
				g.options = tcpTimestamps
			}
			g.payload = testPayload(65535+14-g.headerLen(), 5)
			size := 1514 - g.headerLen()
			b.Run(fmt.Sprintf("proto=%s/family=%d/bytes=65535/mss=%d", proto, family, size), func(b *testing.B) {
				frame := g.build(true)
				pool := make([]byte, 64*2048)
				b.ReportAllocs()
				b.SetBytes(int64(len(frame)))
				segments, offload := 0, g.offload(size)
				for b.Loop() {
					var p Packet
					Parse(&p, frame, len(frame))
					o := offload
					if CheckOffload(&p, frame, nil, &o) != drop.None {
						b.Fatal("refused")
					}
					var s Segmenter
					s.Init(&p, frame, nil, &o, false)
					for i := 0; s.Next(pool[i&63*2048:][:2048]) != 0; i++ {
						segments++
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(segments), "ns/segment")
			})
		}
	}
}
