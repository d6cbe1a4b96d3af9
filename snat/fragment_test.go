package snat

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// pieces cuts the flow's datagram, with payload of n bytes, into fragments of at most size bytes of data.
func pieces(f flow, n, size int, id uint32) (out []flow) {
	whole := f
	whole.payload = make([]byte, n)
	for i := range whole.payload {
		whole.payload[i] = byte(i * 7)
	}
	head := 8
	if f.proto == tcp {
		head = 20
	}
	for at := 0; at < n+head; at += size {
		p := f
		p.id, p.df = id, false
		p.fragAt = at
		end := min(n, at+size-head)
		if at == 0 {
			p.payload = whole.payload[:end]
		} else {
			p.payload = whole.payload[at-head : end]
		}
		p.more = end < n
		out = append(out, p)
	}
	return out
}

// fragments carries frames through tracking and translation, and returns those that left, by handle, in their order.
type carrier struct {
	w    *world
	held map[uint64][]byte
	next uint64
	sent []result
	died []drop.Reason
}

// carry takes one fragment on its way; pod is NoPod for packets from outside.
func (c *carrier) carry(pod int, frame []byte) FragmentAction {
	w := c.w
	frame = append([]byte(nil), frame...)
	p := w.parse(frame)
	var fv FragmentView
	w.tr.Fragment(&p, pod, &fv)
	c.next++
	action := w.tr.TrackFragment(&p, &fv, c.next)
	switch action {
	case FragmentRefuse:
		c.died = append(c.died, fv.Reason)
		return action
	case FragmentHold:
		c.held[c.next] = frame
		return action
	}
	var v View
	if pod == NoPod {
		w.tr.Inbound(&p, frame, &v)
	} else {
		w.tr.Outbound(&p, frame, pod, &v)
	}
	if v.Action == Create {
		w.tr.Create(&p, &v)
	}
	if v.Action == Translate {
		if pod == NoPod {
			w.tr.TranslateIn(&p, frame, &v, Offload{})
		} else {
			w.tr.TranslateOut(&p, frame, &v, Offload{})
		}
		w.parse(frame)
		c.sent = append(c.sent, result{v.Action, 0, frame, p, v})
	} else {
		c.died = append(c.died, v.Reason)
	}
	for p.Flags&packet.FlagFirst != 0 {
		h, ok := w.tr.ReleaseFragment(&fv)
		if !ok {
			break
		}
		held := c.held[h]
		require.NotNil(w.t, held)
		delete(c.held, h)
		require.Equal(w.t, FragmentPass, c.carry(pod, held))
	}
	return action
}

func newCarrier(w *world) *carrier { return &carrier{w: w, held: map[uint64][]byte{}} }

// datagram puts together what left, and checks it: one identification, the right sum.
func (c *carrier) datagram(t *testing.T, n int) (src, dst packet.Addr) {
	t.Helper()
	var whole []byte
	var first packet.Packet
	for _, r := range c.sent {
		q := c.w.parse(r.frame)
		if q.FragmentOffset == 0 {
			first = q
		}
		data := r.frame[q.L4 : int(q.L3)+int(q.Length)]
		for len(whole) < int(q.FragmentOffset)+len(data) {
			whole = append(whole, 0)
		}
		copy(whole[q.FragmentOffset:], data)
	}
	require.Len(t, whole, n)
	for _, r := range c.sent {
		q := c.w.parse(r.frame)
		require.Equal(t, first.FragmentID, q.FragmentID)
		require.Equal(t, first.Src, q.Src)
		require.Equal(t, first.Dst, q.Dst)
	}
	sum := packet.PseudoHeader(first.Src, first.Dst, first.Proto, uint32(n))
	if first.Proto == packet.ProtoICMP {
		sum = 0
	}
	require.Zero(t, packet.Checksum(whole, sum), "the datagram's checksum over all its fragments")
	return first.Src, first.Dst
}

// fixSum gives the first piece the checksum of the whole datagram.
func datagramFrames(f flow, n, size int, id uint32) (frames [][]byte) {
	whole := f
	whole.payload = make([]byte, n)
	for i := range whole.payload {
		whole.payload[i] = byte(i * 7)
	}
	w := whole.frame()
	var q packet.Packet
	packet.Parse(&q, w, len(w))
	for i, p := range pieces(f, n, size, id) {
		b := p.frame()
		if i == 0 {
			var p0 packet.Packet
			packet.Parse(&p0, b, len(b))
			copy(b[p0.L4:p0.Payload], w[q.L4:q.Payload])
		}
		frames = append(frames, b)
	}
	return frames
}

// VPP's frag_in_order and frag_out_of_order.
func TestRFC4787_REQ14_Fragments(t *testing.T) {
	for name, order := range map[string][]int{"frag_in_order": {0, 1, 2, 3}, "frag_out_of_order": {3, 1, 2, 0}, "first in the middle": {2, 0, 1, 3},
		"duplicates": {1, 0, 0, 1, 2, 3}} {
		t.Run(name, func(t *testing.T) {
			forFamilies(t, Config{}, func(t *testing.T, w *world) {
				for _, proto := range []uint8{udp, tcp, packet.ProtoICMP} {
					head := map[uint8]int{udp: 8, tcp: 20, packet.ProtoICMP: 8}[proto]
					n := 4*96 - head
					f := w.to(0, proto, 4000, 0, 53)
					out := datagramFrames(f, n, 96, 77)
					require.Len(t, out, 4)
					c := newCarrier(w)
					for _, i := range order {
						require.NotEqual(t, FragmentRefuse, c.carry(0, out[i]))
					}
					require.Empty(t, c.died)
					require.Empty(t, c.held)
					require.Len(t, c.sent, len(order))
					src, _ := c.datagram(t, 4*96)
					require.Equal(t, w.node, src.Netip())

					ext := uint16(0)
					for _, s := range w.sessions() {
						if s.Proto == c.sent[0].p.Proto {
							ext = s.ExternalPort
						}
					}
					g := w.to(0, proto, 4000, 0, 53)
					g.src, g.sport = w.node, ext
					b := newCarrier(w)
					back := g.back()
					in := datagramFrames(back, n, 96, 99)
					for _, i := range order {
						require.NotEqual(t, FragmentRefuse, b.carry(NoPod, in[i]))
					}
					require.Empty(t, b.died)
					_, dst := b.datagram(t, 4*96)
					require.Equal(t, w.pod(0), dst.Netip())
				}
			})
		})
	}
}

func TestRFC4787_REQ14_FragmentFlood(t *testing.T) {
	forFamilies(t, Config{FragmentedDatagrams: 512, HeldFragments: 64}, func(t *testing.T, w *world) {
		g := w.mustOut(0, w.to(0, udp, 4000, 0, 53))
		flood := newCarrier(w)
		for i := range 5000 { // from outside, many sources, never a first one
			f := flow{src: w.far(i % 100), dst: w.node, proto: udp, fragAt: 800, id: uint32(i), payload: make([]byte, 16)}
			flood.carry(NoPod, f.frame())
		}
		for i := range 5000 { // and from a pod, first ones only
			f := w.to(1, udp, uint16(i), i, 53)
			f.more, f.id, f.payload = true, uint32(i), make([]byte, 16)
			flood.carry(1, f.frame())
		}
		require.Contains(t, flood.died, drop.NATFragmentLimit)
		st := w.tr.Stats()
		require.Less(t, st.Fragmented, 512)
		require.Less(t, st.Held, 64)
		// Another pod's datagrams pass in any order, and whole packets do not notice.
		c := newCarrier(w)
		out := datagramFrames(w.to(0, udp, 4000, 0, 53), 88, 32, 7)
		for _, i := range []int{0, 2, 1} {
			require.Equal(t, FragmentPass, c.carry(0, out[i]))
		}
		c.datagram(t, 96)
		w.reaches(g.back(), 0, 4000)
		// What waited in vain comes back.
		w.pass(3)
		n := 0
		for {
			h, ok := w.tr.ExpiredFragment()
			if !ok {
				break
			}
			require.NotNil(t, flood.held[h])
			delete(flood.held, h)
			n++
		}
		require.Positive(t, n)
		require.Empty(t, flood.held)
		require.Zero(t, w.tr.Stats().Held)
		w.pass(16)
		require.Zero(t, w.tr.Stats().Fragmented)
	})
}

func TestFragmentsConflict(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		c := newCarrier(w)
		f := w.to(0, udp, 4000, 0, 53)
		f.more, f.id, f.payload = true, 9, make([]byte, 16)
		require.Equal(t, FragmentPass, c.carry(0, f.frame()))
		require.Equal(t, FragmentPass, c.carry(0, f.frame()))
		f.dport = 54
		require.Equal(t, FragmentRefuse, c.carry(0, f.frame()))
		require.Equal(t, []drop.Reason{drop.NATFragmentConflict}, c.died)
	})
}

// Also if both first fragments come in one batch, which is decided on before it is executed.
func TestFragmentsConflictWithinABatch(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		f := w.to(0, udp, 4000, 0, 53)
		f.more, f.id, f.payload = true, 9, make([]byte, 16)
		g := f
		g.dport = 54
		ps := []packet.Packet{w.parse(f.frame()), w.parse(f.frame()), w.parse(g.frame())}
		fv := make([]FragmentView, len(ps))
		for i := range ps {
			w.tr.Fragment(&ps[i], 0, &fv[i])
			require.Equal(t, FragmentPass, fv[i].Action)
		}
		require.Equal(t, FragmentPass, w.tr.TrackFragment(&ps[0], &fv[0], 0))
		require.Equal(t, FragmentPass, w.tr.TrackFragment(&ps[1], &fv[1], 0))
		require.Equal(t, FragmentRefuse, w.tr.TrackFragment(&ps[2], &fv[2], 0))
		require.Equal(t, drop.NATFragmentConflict, fv[2].Reason)
	})
}

// A batch is decided on before it is executed: the view of a later fragment does not know the first one yet.
func TestFragmentsOfOneBatch(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		frames := datagramFrames(w.to(0, udp, 4000, 0, 53), 88, 32, 7)
		ps, fv := make([]packet.Packet, 3), make([]FragmentView, 3)
		for i, b := range frames {
			ps[i] = w.parse(b)
			w.tr.Fragment(&ps[i], 0, &fv[i])
		}
		require.Equal(t, FragmentHold, fv[1].Action)
		for i := range frames {
			require.Equal(t, FragmentPass, w.tr.TrackFragment(&ps[i], &fv[i], 1))
			require.Equal(t, uint16(4000), ps[i].SrcPort)
			require.Equal(t, ps[0].FragmentID, ps[i].FragmentID)
		}
	})
}

// VPP's reass_hairpinning.
func TestFragmentsHairpin(t *testing.T) {
	forFamilies(t, with(eim, func(c *Config) { c.Filtering = FilterNone }), func(t *testing.T, w *world) {
		b := w.mustOut(1, w.to(1, udp, 5000, 0, 53))
		f := w.to(0, udp, 4000, 0, 0)
		f.dst, f.dport = w.node, b.sport
		out, in := newCarrier(w), newCarrier(w)
		for _, i := range []int{2, 0, 1} {
			out.carry(0, datagramFrames(f, 88, 32, 7)[i])
		}
		for _, r := range out.sent {
			require.True(t, r.v.Hairpin)
			in.carry(NoPod, r.frame)
		}
		src, dst := in.datagram(t, 96)
		require.Equal(t, w.node, src.Netip())
		require.Equal(t, w.pod(1), dst.Netip())
	})
}

// VPP-1536: a fragment that is not the first, without any session, must not hurt.
func TestFragmentsWithoutSession(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		c := newCarrier(w)
		f := flow{src: w.far(0), dst: w.node, proto: tcp, fragAt: 64, id: 5, payload: make([]byte, 16)}
		require.Equal(t, FragmentHold, c.carry(NoPod, f.frame()))
		f = flow{src: w.far(0), dst: w.node, proto: tcp, sport: 80, dport: 15000, more: true, id: 5, payload: make([]byte, 12)}
		c.carry(NoPod, f.frame())
		require.Equal(t, []drop.Reason{drop.NATNoSession, drop.NATNoSession}, c.died)
		require.Empty(t, c.held)
	})
}

func TestFragmentHash(t *testing.T) {
	w := newWorld(t, AllocatorConfig{}, Config{})
	for _, fam := range families {
		w.family = &fam
		hashes := map[uint32]bool{}
		for id := range uint32(100) {
			var all []uint32
			for _, f := range pieces(w.to(0, udp, 4000, 0, 53), 88, 32, id) {
				p := w.parse(f.frame())
				all = append(all, FragmentHash(&p))
			}
			require.Equal(t, all[0], all[1])
			require.Equal(t, all[0], all[2])
			hashes[all[0]%4] = true
		}
		require.Len(t, hashes, 4)
	}
}

// A fragment that comes after the first one, but before those that wait have been released, waits behind them.
func TestFragmentsKeepTheirOrder(t *testing.T) {
	forFamilies(t, Config{}, func(t *testing.T, w *world) {
		frames := datagramFrames(w.to(0, udp, 4000, 0, 53), 120, 32, 7)
		require.Len(t, frames, 4)
		track := func(i int) (p packet.Packet, fv FragmentView, a FragmentAction) {
			p = w.parse(frames[i])
			w.tr.Fragment(&p, 0, &fv)
			return p, fv, w.tr.TrackFragment(&p, &fv, uint64(i))
		}
		_, _, a := track(2)
		require.Equal(t, FragmentHold, a)
		_, fv, a := track(0)
		require.Equal(t, FragmentPass, a)
		_, _, a = track(1)
		require.Equal(t, FragmentHold, a)
		for _, want := range []uint64{2, 1} {
			h, ok := w.tr.ReleaseFragment(&fv)
			require.True(t, ok)
			require.Equal(t, want, h)
			_, _, a = track(int(h))
			require.Equal(t, FragmentPass, a)
		}
		_, ok := w.tr.ReleaseFragment(&fv)
		require.False(t, ok)
		_, _, a = track(3)
		require.Equal(t, FragmentPass, a)
	})
}
