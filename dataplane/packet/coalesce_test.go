package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/overplane/overplane/dataplane/drop"
)

// coalesced is one packet that left.
type coalesced struct {
	handles []uint32
	frame   []byte // whole
	head    int    // bytes of it in the first buffer
	o       Offload
	out     uint32
}

// coalesceAll sends a batch through c the way a worker does. It returns nil if a frame was malformed.
func coalesceAll(t require.TestingT, c *Coalescer, frames [][]byte, out []uint32, accept []Accept) []coalesced {
	c.Reset()
	added := 0
	for i, f := range frames {
		var p Packet
		Parse(&p, f, len(f))
		if p.Reason == drop.None {
			require.True(t, c.Add(&p, f, out[i], accept[i], uint32(i)))
			added++
		}
	}
	var sent []coalesced
	var tr Train
	for c.Next(&tr) {
		x := coalesced{handles: []uint32{tr.Handle}, out: tr.Out, frame: frames[tr.Handle]}
		if tr.Segments > 1 {
			head := bytes.Clone(frames[tr.Handle])
			x.o = c.Finish(&tr, head)
			x.frame, x.head = head, len(head)
		}
		for {
			h, off, n, ok := c.NextSegment(&tr)
			if !ok {
				break
			}
			x.handles = append(x.handles, h)
			x.frame = append(x.frame, frames[h][off:off+n]...)
		}
		require.Len(t, x.handles, tr.Segments)
		added -= tr.Segments
		sent = append(sent, x)
	}
	require.Zero(t, added, "every packet leaves once")
	return sent
}

// requireTrain checks that a train is a good GSO frame, and that cutting it gives the packets it was made of.
func requireTrain(t require.TestingT, x coalesced, frames [][]byte) {
	require.LessOrEqual(t, len(x.handles), maxTrain)
	var p Packet
	head, rest := x.frame[:x.head:x.head], x.frame[x.head:]
	Parse(&p, head, len(x.frame))
	require.Equal(t, drop.None, p.Reason)
	require.Equal(t, uint32(len(x.frame)), uint32(p.L3)+p.Length)
	o := x.o
	require.Equal(t, drop.None, CheckOffload(&p, head, rest, &o))
	require.Equal(t, x.o, o, "in normal form")

	whole := bytes.Clone(x.frame)
	FinishChecksum(&p, whole, nil)
	require.True(t, goldenL4Good(whole))

	segments, _ := segmentAll(t, x.frame, x.head, x.o, false)
	require.Len(t, segments, len(x.handles))
	for i, s := range segments {
		want := bytes.Clone(frames[x.handles[i]])
		var q Packet
		Parse(&q, want, len(want))
		want = want[:uint32(q.L3)+q.Length] // without padding
		first := binary.BigEndian.Uint16(x.frame[p.L3+4:])
		if h := want[q.L3:q.L4]; i > 0 && q.Kind == KindIPv4 && first == binary.BigEndian.Uint16(h[4:]) {
			// One identification for all (they have DF) became counted ones.
			require.NotZero(t, q.Flags&FlagDF)
			binary.BigEndian.PutUint16(h[4:], first+uint16(i))
			h[10], h[11] = 0, 0
			binary.BigEndian.PutUint16(h[10:], ^slowSum(h))
		}
		oneZero(&q, want)
		oneZero(&q, s)
		require.Equal(t, want, s, "segment %d", i)
	}
}

// oneZero replaces, in checksum fields, the one zero of ones' complement by the other: they are equal.
func oneZero(p *Packet, frame []byte) {
	fields := []int{}
	if p.Kind == KindIPv4 {
		fields = append(fields, int(p.L3)+10)
	}
	if p.Proto == ProtoTCP {
		fields = append(fields, int(p.L4)+16)
	}
	for _, at := range fields {
		if frame[at] == 0xff && frame[at+1] == 0xff {
			frame[at], frame[at+1] = 0, 0
		}
	}
}

func requireModel(t require.TestingT, c *Coalescer, batch []arrival) {
	var frames [][]byte
	var out []uint32
	var accept []Accept
	for _, a := range batch {
		frames, out, accept = append(frames, a.frame()), append(out, a.out), append(accept, a.accept)
	}
	victim := c.victim
	sent := coalesceAll(t, c, frames, out, accept)
	var got, want [][]uint32
	for _, m := range modelCoalesce(batch) {
		var h []uint32
		for _, i := range m.members {
			h = append(h, uint32(i))
		}
		want = append(want, h)
	}
	for _, x := range sent {
		got = append(got, x.handles)
	}
	if c.victim == victim { // else more flows fell into one set than it has room for, and a train ended early, which the model knows nothing of
		require.Equal(t, want, got)
	}
	for _, x := range sent {
		require.Equal(t, batch[x.handles[0]].out, x.out)
		if len(x.handles) > 1 {
			requireTrain(t, x, frames)
		}
	}
}

// continueFlow makes a the packet that follows it in its flow, with n bytes of payload.
func continueFlow(a *arrival, n int, step uint16) {
	if !a.udp {
		a.seq += uint32(len(a.payload))
	}
	a.id += step
	a.payload = testPayload(n, a.seq+uint32(a.id))
}

func TestCoalesceAgainstGoldenModel(t *testing.T) {
	var c Coalescer
	rapid.Check(t, func(t *rapid.T) {
		flows := make([]arrival, rapid.IntRange(1, 3).Draw(t, "flows"))
		steps := make([]uint16, len(flows))
		sizes := make([]int, len(flows))
		for i := range flows {
			flows[i] = arrival{gsoSpec: drawSpec(t, false), accept: acceptAll, out: uint32(i)}
			flows[i].host = uint8(i + 1)
			steps[i] = rapid.SampledFrom([]uint16{1, 1, 0, 2}).Draw(t, "step")
			sizes[i] = rapid.IntRange(1, 100).Draw(t, "size")
		}
		var batch []arrival
		for range rapid.IntRange(1, 100).Draw(t, "packets") {
			k := rapid.IntRange(0, len(flows)-1).Draw(t, "flow")
			f := &flows[k]
			continueFlow(f, sizes[k], steps[k])
			a := *f
			switch rapid.IntRange(0, 60).Draw(t, "mutation") {
			case 0:
				continueFlow(&a, rapid.IntRange(0, sizes[k]+1).Draw(t, "n"), 0)
				a.seq, a.id = f.seq, f.id
				f.payload = a.payload
			case 1:
				a.flags |= rapid.SampledFrom([]uint8{tcpPSH, tcpFIN, tcpSYN, tcpRST, tcpURG, tcpCWR, 0x40}).Draw(t, "flag")
			case 2:
				a.badSum = true
			case 3:
				a.noSum = a.udp
			case 4:
				a.padding = 3
			case 5:
				a.seq++
			case 6:
				a.ack++
				f.ack++
			case 7:
				a.window++
			case 8:
				a.tos ^= 1
			case 9:
				a.ttl--
			case 10:
				a.id++
			case 11:
				a.df = !a.df
			case 12:
				a.out++
			case 13:
				a.accept = 0
			case 14:
				a.extra = []byte{1, 1, 1, 0}
				if a.v6 {
					a.extra = []byte{0, 1, 4, 0, 0, 0, 0}
				}
			case 15:
				if len(a.options) > 0 {
					a.options = append(bytes.Clone(a.options[:11]), a.options[11]+1)
				}
			case 16:
				a.srcPort++
			case 17:
				if a.options == nil && !a.udp {
					a.options = tcpTimestamps
				} else {
					a.options = nil
				}
			}
			batch = append(batch, a)
		}
		requireModel(t, &c, batch)
	})
}

func TestCoalesceLongTrains(t *testing.T) {
	var c Coalescer
	base := gsoSpec{ttl: 64, host: 1, srcPort: 4000, seq: 0xffffff00, id: 0xfff0, df: true, flags: tcpACK, options: tcpTimestamps}
	for _, test := range []struct {
		name    string
		v6, udp bool
		n, size int
		lengths []int // of the trains
	}{
		{"IPv4 ends at 65,535 bytes", false, false, 100, 1448, []int{45, 45, 10}},
		{"IPv6 ends at 65,535 bytes", true, false, 100, 1428, []int{45, 45, 10}},
		{"UDP", false, true, 100, 1472, []int{44, 44, 12}},
		{"UDP over IPv6", true, true, 100, 1452, []int{45, 45, 10}},
		{"64 segments", false, false, 200, 100, []int{64, 64, 64, 8}},
		{"jumbo", false, false, 20, 8948, []int{7, 7, 6}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := arrival{gsoSpec: base, accept: acceptAll}
			a.v6, a.udp = test.v6, test.udp
			var batch []arrival
			for range test.n {
				continueFlow(&a, test.size, 1)
				batch = append(batch, a)
			}
			requireModel(t, &c, batch)
			var lengths []int
			for _, m := range modelCoalesce(batch) {
				lengths = append(lengths, len(m.members))
			}
			require.Equal(t, test.lengths, lengths)
		})
	}
}

// A fragment belongs to an unknown flow: nothing may overtake it.
func TestCoalesceFragmentEndsTrains(t *testing.T) {
	a := arrival{gsoSpec: gsoSpec{ttl: 64, host: 1, srcPort: 4000, df: true, flags: tcpACK}}
	var frames [][]byte
	for i := range 5 {
		continueFlow(&a, 100, 1)
		if i == 2 {
			frames = append(frames, ip4{proto: ProtoTCP, frag: 100}.frame(make([]byte, 100)))
		}
		frames = append(frames, a.frame())
	}
	var c Coalescer
	all := []Accept{acceptAll, acceptAll, acceptAll, acceptAll, acceptAll, acceptAll}
	sent := coalesceAll(t, &c, frames, make([]uint32, 6), all)
	require.Len(t, sent, 3)
	require.Equal(t, []uint32{0, 1}, sent[0].handles)
	require.Equal(t, []uint32{2}, sent[1].handles)
	require.Equal(t, []uint32{3, 4, 5}, sent[2].handles)
}

// More flows than fit the table: trains are shorter, everything else holds.
func TestCoalesceManyFlows(t *testing.T) {
	flows := make([]arrival, 80)
	var frames [][]byte
	for round := range 3 {
		for i := range flows {
			if round == 0 {
				flows[i] = arrival{gsoSpec: gsoSpec{ttl: 64, host: 1, srcPort: uint16(i), df: true, flags: tcpACK}}
			}
			continueFlow(&flows[i], 100, 1)
			frames = append(frames, flows[i].frame())
		}
	}
	var c Coalescer
	out, accept := make([]uint32, len(frames)), bytes.Repeat([]byte{byte(acceptAll)}, len(frames))
	var all []Accept
	for _, a := range accept {
		all = append(all, Accept(a))
	}
	last := map[uint32]uint32{}
	for _, x := range coalesceAll(t, &c, frames, out, all) {
		for _, h := range x.handles {
			flow := h % 80
			require.True(t, h < 80 || last[flow] == h-80, "packet %d in the order of its flow", h)
			last[flow] = h
		}
		if len(x.handles) > 1 {
			requireTrain(t, x, frames)
		}
	}
}

func TestCoalesceFull(t *testing.T) {
	var c Coalescer
	frame := arrival{gsoSpec: gsoSpec{ttl: 64, host: 1, flags: tcpACK}}.frame()
	var p Packet
	Parse(&p, frame, len(frame))
	for range 2 {
		for i := range MaxCoalesce {
			require.True(t, c.Add(&p, frame, 0, acceptAll, uint32(i)))
		}
		require.False(t, c.Add(&p, frame, 0, acceptAll, 0))
		var tr Train
		for i := range MaxCoalesce {
			require.True(t, c.Next(&tr))
			require.Equal(t, uint32(i), tr.Handle)
		}
		require.False(t, c.Next(&tr))
		c.Reset()
	}
}

// FuzzCoalesce makes a batch of a few flows' packets out of the input's instructions, eight bytes for a packet, of which two may
// overwrite any byte of it.
func FuzzCoalesce(f *testing.F) {
	f.Add(bytes.Repeat([]byte{0, 100, 0, 0, 0, 0, 0, 0}, 20))
	f.Add(bytes.Repeat([]byte{1, 50, 0, 0, 0, 0, 0, 0, 2, 60, 0, 0, 0, 0, 0, 0}, 20))
	f.Add(bytes.Repeat([]byte{3, 50, 0, 0, 0, 0, 0, 0, 0, 60, 47, 8, 0, 0, 0, 0}, 20))
	f.Fuzz(func(t *testing.T, program []byte) {
		flows := [4]arrival{}
		for i := range flows {
			flows[i].gsoSpec = gsoSpec{v6: i&1 != 0, udp: i&2 != 0, df: true, ttl: 9, host: 1, srcPort: 7, seq: 1, flags: tcpACK}
		}
		var frames [][]byte
		var out []uint32
		var accept []Accept
		for ; len(program) >= 8 && len(frames) < MaxCoalesce; program = program[8:] {
			f := &flows[program[0]&3]
			continueFlow(f, int(program[1]), uint16(1-program[0]>>7))
			b := f.frame()
			at := int(binary.BigEndian.Uint16(program[2:])) % len(b)
			b[at] ^= program[4]
			if program[5] != 0 {
				at = int(binary.BigEndian.Uint16(program[6:])) % len(b)
				b[at] ^= program[5]
			}
			var p Packet
			if Parse(&p, b, len(b)); p.Reason != drop.None {
				continue
			}
			frames, out, accept = append(frames, b), append(out, uint32(program[0]>>6&1)), append(accept, Accept(program[0]>>3&7^7))
		}
		var c Coalescer
		last := map[string]uint32{}
		for _, x := range coalesceAll(t, &c, frames, out, accept) {
			for _, h := range x.handles {
				require.Equal(t, x.out, out[h])
				var p Packet
				Parse(&p, frames[h], len(frames[h]))
				flow := fmt.Sprint(p.Src, p.Dst, p.SrcPort, p.DstPort, p.Proto)
				require.LessOrEqual(t, last[flow], h+1, "order of the flow")
				last[flow] = h + 1
			}
			if len(x.handles) > 1 {
				requireTrain(t, x, frames)
			}
		}
	})
}

// Every header byte must be equal in all segments but those that say what differs by nature.
func TestCoalesceComparesEveryHeaderByte(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			g := gsoSpec{v6: v6, udp: udp, df: true, ttl: 64, host: 1, srcPort: 4000, flags: tcpACK, payload: testPayload(50, 1)}
			if !udp {
				g.options = tcpTimestamps
			}
			a := g.build(false)
			var p Packet
			Parse(&p, a, len(a))
			free := map[int]bool{}
			for _, i := range map[bool][]int{false: {2, 3, 4, 5, 10, 11}, true: {4, 5}}[v6] {
				free[int(p.L3)+i] = true // lengths; identification and checksum
			}
			for _, i := range map[bool][]int{false: {4, 5, 6, 7, 13, 16, 17}, true: {4, 5, 6, 7}}[udp] {
				free[int(p.L4)+i] = true // sequence number, flags, checksum; length, checksum
			}
			for i := range int(p.Payload) {
				b := bytes.Clone(a)
				b[i] ^= 1
				require.Equal(t, free[i], sameHeaders(&p, a, b), "v6 %v, udp %v, byte %d", v6, udp, i)
			}
		}
	}
}

// A packet that is not plain data stands alone, and nothing of its flow overtakes it; so do several alike.
func TestCoalesceLeavesAlone(t *testing.T) {
	for _, test := range []struct {
		name string
		udp  bool
		edit func(l4 []byte)
	}{
		{"surplus behind UDP's length", true, func(l4 []byte) { l4[5] -= 2 }},
		{"reserved bits", false, func(l4 []byte) { l4[12] |= 2 }},
		{"accurate ECN", false, func(l4 []byte) { l4[12] |= 1 }},
		{"ECE", false, func(l4 []byte) { l4[13] |= 0x40 }},
		{"CWR", false, func(l4 []byte) { l4[13] |= tcpCWR }},
		{"URG", false, func(l4 []byte) { l4[13] |= tcpURG }},
		{"no ACK", false, func(l4 []byte) { l4[13] = 0 }},
	} {
		t.Run(test.name, func(t *testing.T) {
			for want, all := range map[string]bool{"[[0 1] [2] [3 4]]": false, "[[0] [1] [2] [3] [4]]": true} {
				a := arrival{gsoSpec: gsoSpec{udp: test.udp, df: true, ttl: 64, host: 1, srcPort: 4000, flags: tcpACK}}
				var frames [][]byte
				for i := range 5 {
					continueFlow(&a, 100, 1)
					b := a.frame()
					if i == 2 || all {
						l4 := b[34:]
						test.edit(l4)
						field, n := 16, len(l4)
						if test.udp {
							field, n = 6, int(binary.BigEndian.Uint16(l4[4:6]))
						}
						l4[field], l4[field+1] = 0, 0
						binary.BigEndian.PutUint16(l4[field:], ^slowSum(a.pseudo(n), l4[:n]))
					}
					frames = append(frames, b)
				}
				var c Coalescer
				accept := []Accept{acceptAll, acceptAll, acceptAll, acceptAll, acceptAll}
				var got [][]uint32
				for _, x := range coalesceAll(t, &c, frames, make([]uint32, 5), accept) {
					got = append(got, x.handles)
				}
				require.Equal(t, want, fmt.Sprint(got))
			}
		})
	}
}
