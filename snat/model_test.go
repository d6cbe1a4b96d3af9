package snat

import (
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// model is translation as plain code over a map: slow and obvious.
type model struct {
	eim      bool
	filter   Filtering
	sessions map[modelKey]*modelSession
	gone     map[int]bool // pods
	host     map[uint16]bool
}

type modelKey struct {
	proto             uint8
	pod               int
	port, rport, far_ uint16
}

type modelSession struct {
	ext     uint16
	expires int64 // ticks
	// TCP
	synOut, synIn, open, finOut, finIn, rst bool
	phase                                   string
}

func ticks(at int64) int64 { return (at + 1<<tickShift - 1) >> tickShift }

func (m *model) live(k modelKey, now int64) *modelSession {
	if s := m.sessions[k]; s != nil && s.expires > now>>tickShift {
		return s
	}
	return nil
}

// byExt finds the session that a packet from outside belongs to.
func (m *model) byExt(proto uint8, ext uint16, far_, rport uint16, now int64) (modelKey, *modelSession) {
	for k := range m.sessions {
		if s := m.live(k, now); s != nil && k.proto == proto && s.ext == ext && k.far_ == far_ && k.rport == rport {
			return k, s
		}
	}
	return modelKey{}, nil
}

// see is what a packet does to a session's time.
func (s *modelSession) see(proto uint8, flags uint8, out bool, now int64) {
	in := func(seconds int64) int64 { return ticks(now + seconds*second) }
	if proto == udp || proto == packet.ProtoICMP {
		if out {
			s.expires = in(map[uint8]int64{udp: 300, packet.ProtoICMP: 60}[proto])
		}
		return
	}
	has := func(f uint8) bool { return flags&f != 0 }
	if has(tcpRST) {
		s.rst, s.phase = true, "reset"
		s.expires = min(s.expires, in(240))
		return
	}
	if has(tcpSYN) && !has(tcpACK) && (s.rst || s.finOut && s.finIn) {
		*s = modelSession{ext: s.ext, expires: s.expires, phase: s.phase}
	}
	s.rst = false
	if has(tcpSYN) {
		s.synOut = s.synOut || out || has(tcpACK)
		s.synIn = s.synIn || !out || has(tcpACK)
	} else if s.synOut && s.synIn {
		s.open = true
	}
	if has(tcpFIN) {
		s.finOut, s.finIn = s.finOut || out, s.finIn || !out
	}
	was := s.phase
	switch {
	case s.finOut && s.finIn:
		s.phase = "closing"
		if was != "closing" {
			s.expires = in(240)
		}
	case s.open:
		s.phase, s.expires = "established", in(7440)
	case has(tcpSYN) || was != "opening":
		s.phase, s.expires = "opening", in(240)
	}
}

func checkModel(t *rapid.T, tt testing.TB) {
	fam := rapid.IntRange(0, 1).Draw(t, "family")
	cfg := Config{Sessions4: 512, Sessions6: 512, HalfOpen: 512}
	m := &model{sessions: map[modelKey]*modelSession{}, gone: map[int]bool{}, host: map[uint16]bool{}}
	if m.eim = rapid.Bool().Draw(t, "eim"); m.eim {
		cfg.Mapping = EndpointIndependent
	}
	cfg.Choice = Choice(rapid.IntRange(0, 2).Draw(t, "choice"))
	cfg.Filtering = Filtering(rapid.IntRange(0, 2).Draw(t, "filtering"))
	m.filter = cfg.Filtering
	a, err := NewAllocator(AllocatorConfig{First: 10000, Last: 10031, MaxPods: 3})
	require.NoError(t, err)
	tr, err := New(cfg, a)
	require.NoError(t, err)
	defer tr.Close()
	w := &world{family: &families[fam], t: tt, a: a, tr: tr, now: rapid.Int64Range(1, 1<<50).Draw(t, "start")}
	tr.Expire(w.now, 1)
	tr.SetNodeAddresses(packet.AddrFrom(families[0].node), packet.AddrFrom(families[1].node))
	for pod := range 3 {
		w.addPod(pod)
	}
	protos := []uint8{tcp, udp, packet.ProtoICMP}
	flagSets := []uint8{tcpSYN, tcpSYN | tcpACK, tcpACK, tcpACK, tcpFIN | tcpACK, tcpRST}
	for range rapid.IntRange(1, 120).Draw(t, "steps") {
		proto := rapid.SampledFrom(protos).Draw(t, "proto")
		far_ := rapid.IntRange(0, 2).Draw(t, "far")
		rport := uint16(rapid.IntRange(80, 81).Draw(t, "rport"))
		if proto == packet.ProtoICMP {
			rport = 0
		}
		flags := rapid.SampledFrom(flagSets).Draw(t, "flags")
		pod := rapid.IntRange(0, 2).Draw(t, "pod")
		switch rapid.IntRange(0, 9).Draw(t, "what") {
		case 0, 1, 2, 3:
			m.out(t, w, modelKey{proto, pod, uint16(rapid.IntRange(10010, 10016).Draw(t, "port")), rport, uint16(far_)}, flags)
		case 4, 5, 6, 7:
			m.in(t, w, proto, uint16(rapid.IntRange(9999, 10032).Draw(t, "ext")), far_, rport, flags)
		case 8:
			w.now += rapid.SampledFrom([]int64{1, 1 << tickShift, 30 * second, 61 * second, 241 * second, 301 * second, 7441 * second}).Draw(t, "time")
			tr.Expire(w.now, rapid.SampledFrom([]int{0, 3, 1 << 20}).Draw(t, "budget"))
		case 9:
			if rapid.IntRange(0, 9).Draw(t, "rare") == 0 {
				for tr.Expire(w.now, 1<<20) {
				}
				tr.RemovePod(pod)
				for tr.Expire(w.now, 1<<20) {
				}
				for k := range m.sessions {
					if k.pod == pod {
						delete(m.sessions, k)
					}
				}
				m.gone[pod] = true
			}
		}
	}
	// In the end everything is over and nothing is left.
	w.now += 8000 * second
	for tr.Expire(w.now, 1<<20) {
	}
	require.Zero(t, tr.v4.used+tr.v6.used)
	for _, tb := range []*table{tr.v4, tr.v6} {
		for i := range tb.outIdx {
			require.Zero(t, tb.outIdx[i])
			require.Zero(t, tb.inIdx[i])
		}
		require.Zero(t, tb.half.used)
		require.Zero(t, tb.share.used)
	}
}

func (m *model) out(t *rapid.T, w *world, k modelKey, flags uint8) {
	f := flow{src: w.pod(k.pod), dst: w.far(int(k.far_)), proto: k.proto, sport: k.port, dport: k.rport, payload: []byte("0123456789"), df: true}
	if k.proto == tcp {
		f.tcp = flags
	}
	g, r := w.out(k.pod, f)
	s := m.live(k, w.now)
	// The mapping's port while any session of the inside endpoint lives; one that is over may linger until Expire comes by.
	mapped, ext := false, uint16(0)
	for o := range m.sessions {
		if l := m.live(o, w.now); l != nil && o.proto == k.proto && o.pod == k.pod && o.port == k.port {
			mapped, ext = true, l.ext
		}
	}
	if s == nil {
		switch {
		case m.gone[k.pod]:
			require.Equal(t, drop.NATNoSession, r.Reason)
			return
		case k.proto == tcp && flags&(tcpSYN|tcpRST|tcpFIN) != tcpSYN, k.proto == tcp && flags&tcpACK != 0 && !m.eim:
			require.Equal(t, drop.NATNoSYN, r.Reason)
			return
		case k.proto == tcp && flags&tcpACK != 0 && r.Reason == drop.NATNoSYN:
			require.False(t, mapped)
			return
		}
	}
	if r.Reason == drop.NATNoPort {
		require.Nil(t, s)
		require.False(t, m.eim && mapped)
		return
	}
	require.Equal(t, Translate, r.Action, "%v", r.Reason)
	require.Equal(t, w.node, g.src)
	require.Equal(t, f.dst, g.dst)
	require.Equal(t, f.payload, r.frame[len(r.frame)-10:])
	require.True(t, w.a.InRange(g.sport))
	class, _ := ClassOf(k.proto)
	_, owner, _ := w.a.Owner(class, g.sport)
	require.Equal(t, k.pod, owner)
	if s == nil {
		if m.eim && mapped {
			require.Equal(t, ext, g.sport)
		}
		for o := range m.sessions {
			if l := m.live(o, w.now); l != nil && o.proto == k.proto && l.ext == g.sport {
				require.False(t, o.far_ == k.far_ && o.rport == k.rport, "a port twice towards one destination")
				require.True(t, !m.eim || o.pod == k.pod && o.port == k.port, "a port of two endpoints")
			}
		}
		s = &modelSession{ext: g.sport, phase: "opening", expires: ticks(w.now + 240*second)}
		m.sessions[k] = s
	}
	require.Equal(t, s.ext, g.sport)
	s.see(k.proto, flags, true, w.now)
	m.requireTimes(t, w)
}

func (m *model) in(t *rapid.T, w *world, proto uint8, ext uint16, far_ int, rport uint16, flags uint8) {
	f := flow{src: w.far(far_), dst: w.node, proto: proto, sport: rport, dport: ext, payload: []byte("0123456789"), reply: true}
	if proto == packet.ProtoICMP {
		f.sport = ext
	}
	if proto == tcp {
		f.tcp = flags
	}
	g, r := w.in(f)
	k, s := m.byExt(proto, ext, uint16(far_), rport, w.now)
	if s != nil {
		require.Equal(t, Translate, r.Action, "%v", r.Reason)
		require.Equal(t, w.pod(k.pod), g.dst)
		require.Equal(t, k.port, g.dport)
		require.Equal(t, f.src, g.src)
		s.see(proto, flags, false, w.now)
		m.requireTimes(t, w)
		return
	}
	if proto != packet.ProtoICMP && (ext < 10000 || ext > 10031) {
		require.Equal(t, NotOurs, r.Action)
		return
	}
	if r.Action == Translate { // only by an endpoint-independent mapping whose filter admits it
		require.True(t, m.eim)
		require.NotEqual(t, FilterAddressAndPort, m.filter)
		require.True(t, proto != tcp || flags == tcpSYN)
		return
	}
	for o := range m.sessions { // a live mapping that admits all admits this one
		if l := m.live(o, w.now); l != nil && m.eim && o.proto == proto && l.ext == ext && (proto != tcp || flags == tcpSYN) {
			require.NotEqual(t, FilterNone, m.filter)
			require.False(t, m.filter == FilterAddress && proto != packet.ProtoICMP && o.far_ == uint16(far_))
		}
	}
	if proto == packet.ProtoICMP && r.Action == NotOurs {
		return
	}
	require.Equal(t, Refuse, r.Action)
	require.Contains(t, []drop.Reason{drop.NATNoSession, drop.NATFiltered}, r.Reason)
}

// requireTimes compares all sessions, their times and states.
func (m *model) requireTimes(t *rapid.T, w *world) {
	n := 0
	for k := range m.sessions {
		if m.live(k, w.now) != nil {
			n++
		}
	}
	list := w.sessions()
	require.Len(t, list, n)
	for _, s := range list {
		found := false
		for k := range m.sessions {
			proto := k.proto
			if proto == packet.ProtoICMP && w.node.Is6() {
				proto = packet.ProtoICMPv6
			}
			if l := m.live(k, w.now); l != nil && proto == s.Proto && k.pod == s.Pod && k.port == s.InsidePort && k.rport == s.RemotePort &&
				w.far(int(k.far_)) == s.Remote.Netip() {
				require.Equal(t, l.expires-w.now>>tickShift, int64(s.Left>>tickShift))
				if k.proto == tcp {
					require.Equal(t, l.phase, s.State)
				}
				found = true
			}
		}
		require.True(t, found)
	}
}

func TestAgainstGoldenModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) { checkModel(rt, t) })
}

func FuzzAgainstGoldenModel(f *testing.F) {
	f.Fuzz(func(t *testing.T, b []byte) { rapid.MakeFuzz(func(rt *rapid.T) { checkModel(rt, t) })(t, b) })
}

// FuzzHostile throws arbitrary frames at a translator with a few sessions: nothing may panic, what is refused is left as it was, and the sessions
// that others have still work.
func FuzzHostile(f *testing.F) {
	for i := range families {
		w := &world{t: f, family: &families[i]}
		for _, proto := range []uint8{tcp, udp, packet.ProtoICMP, sctp, protoGRE, packet.ProtoESP} {
			fl := w.to(0, proto, 4000, 0, 80)
			f.Add(fl.frame(), false)
			g := fl
			g.src, g.sport = w.node, 10000
			f.Add(g.back().frame(), true)
			f.Add(w.quote(w.far(7), w.node, w.unreach, 1, 0, g.frame(), 0), true)
			f.Add(w.quote(w.far(7), w.node, w.unreach, 1, 0, g.frame(), 28), true)
			f.Add(w.quote(w.pod(0), w.far(0), w.unreach, 1, 0, fl.back().frame(), 0), false)
			fl.more, fl.id, fl.payload = true, 1, make([]byte, 16)
			f.Add(fl.frame(), false)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte, inbound bool) {
		if len(frame) > 2000 {
			return
		}
		for _, cfg := range []Config{{Sessions4: 64, Sessions6: 64}, {Sessions4: 64, Sessions6: 64, Mapping: EndpointIndependent, Filtering: FilterAddress}} {
			w := newWorld(t, AllocatorConfig{First: 10000, Last: 10003, MaxPods: 4}, cfg)
			var good []flow
			for i := range families {
				w.family = &families[i]
				good = append(good, w.mustOut(1, w.to(1, udp, 4000, 1, 53)))
				w.out(0, w.to(0, tcp, 4000, 0, 80))
				w.out(0, w.to(0, protoGRE, 0, 0, 0))
			}
			b := append([]byte(nil), frame...)
			var p packet.Packet
			packet.Parse(&p, b, len(b))
			if p.Reason != drop.None || p.Kind == packet.KindARP {
				return
			}
			var v View
			OwnerOut(&p, b, 3)
			w.a.OwnerIn(&p, b)
			pod := 0
			if inbound {
				pod = NoPod
			}
			if p.Flags&packet.FlagFragment != 0 {
				var fv FragmentView
				w.tr.Fragment(&p, pod, &fv)
				if w.tr.TrackFragment(&p, &fv, 1) != FragmentPass {
					return
				}
			}
			if inbound {
				w.tr.Inbound(&p, b, &v)
			} else {
				p.Src = packet.AddrFrom(families[0].pod(0)) // sources are checked before
				if p.Kind == packet.KindIPv6 {
					p.Src = packet.AddrFrom(families[1].pod(0))
				}
				w.tr.Outbound(&p, b, 0, &v)
			}
			if v.Action == Create {
				w.tr.Create(&p, &v)
			}
			switch v.Action {
			case Translate:
				if inbound {
					w.tr.TranslateIn(&p, b, &v, Offload{})
				} else {
					w.tr.TranslateOut(&p, b, &v, Offload{})
				}
			case Refuse:
				require.NotEqual(t, drop.None, v.Reason)
				require.Equal(t, frame, b)
			default:
				require.Equal(t, frame, b)
			}
			for i, g := range good {
				w.family = &families[i]
				w.reaches(g.back(), 1, 4000)
			}
		}
	})
}
