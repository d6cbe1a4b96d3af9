package dataplane

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
	"github.com/overplane/overplane/test/captures"
)

// model is what Decide should say, said slowly: a list of prefixes, netip, and one rule after the other.
type model struct {
	snap   *Snapshot
	t      *snat.Translator // nil: nothing is translated
	routes []modelRoute     // longest prefix first
}

type modelRoute struct {
	prefix netip.Prefix
	entry  fib.Entry
}

func newModel(s *Snapshot) *model {
	m := &model{snap: s}
	s.FIB.Walk(func(p netip.Prefix, e fib.Entry) bool {
		m.routes = append(m.routes, modelRoute{p, e})
		return true
	})
	for _, p := range []string{"10.244.0.0/16", "fd12:3456:789a::/64"} { // pod space that nobody owns
		m.routes = append(m.routes, modelRoute{netip.MustParsePrefix(p), fib.MakeEntry(fib.Unreachable, 0)})
	}
	slices.SortStableFunc(m.routes, func(a, b modelRoute) int { return b.prefix.Bits() - a.prefix.Bits() })
	return m
}

func (m *model) lookup(a netip.Addr) fib.Entry {
	for _, r := range m.routes {
		if r.prefix.Contains(a) {
			return r.entry
		}
	}
	return fib.MakeEntry(fib.Unreachable, 0)
}

// local judges what does not leave its link.
func (m *model) local(in *PortInfo, b []byte, p *packet.Packet) Decision {
	s, dst := m.snap, p.Dst.Netip()
	died := func(r drop.Reason, e icmp.Error) Decision { return Decision{Reason: r, Error: e} }
	toUs := packet.MAC(b[0:6]) == gatewayMAC
	if in.Kind == PortUplink {
		toUs = packet.MAC(b[0:6]) == uplinkMAC
	}
	discovery := p.Kind == packet.KindARP || p.Flags&packet.FlagND != 0
	group := p.Kind != packet.KindARP && (dst.IsMulticast() || dst == netip.MustParseAddr("255.255.255.255"))
	switch {
	case in.Kind == PortUplink:
		return died(drop.EthNotForUs, icmp.None)
	case discovery:
		return Decision{Action: Answer}
	case group:
		return died(drop.IPMulticast, icmp.None)
	case !toUs:
		return died(drop.EthNotForUs, icmp.None)
	case (dst == s.Gateway4.Netip() || dst == s.Gateway6.Netip()) && p.Flags&packet.FlagL4 != 0 && (p.Proto == 1 && p.ICMPType == 8 || p.Proto == 58 && p.ICMPType == 128):
		return Decision{Action: Answer}
	}
	return died(drop.LinkLocal, icmp.None)
}

// verdict judges a frame that is a well-formed IP packet; total is its length with what continues it.
func (m *model) verdict(in *PortInfo, b []byte, p *packet.Packet, largest int) Decision {
	s := m.snap
	src, dst := p.Src.Netip(), p.Dst.Netip()
	died := func(r drop.Reason, e icmp.Error) Decision { return Decision{Reason: r, Error: e} }
	toUs := packet.MAC(b[0:6]) == gatewayMAC
	if in.Kind == PortUplink {
		toUs = packet.MAC(b[0:6]) == uplinkMAC
	}
	discovery := p.Kind == packet.KindARP || p.Flags&packet.FlagND != 0
	group := p.Kind != packet.KindARP && (dst.IsMulticast() || dst == netip.MustParseAddr("255.255.255.255"))
	local := func() Decision { return m.local(in, b, p) }
	if discovery || group || !toUs {
		return local()
	}
	if in.Kind == PortUplink && m.t != nil && (dst == s.Node4.Netip() || dst == s.Node6.Netip()) {
		d, done := m.inbound(b, *p)
		if done {
			return d
		}
		if d.Translation == TranslateIn {
			return m.onwards(in, b, p, largest, d, m.inside(b, *p))
		}
	}
	switch in.Kind {
	case PortPod:
		if src != in.Addr4.Netip() && src != in.Addr6.Netip() {
			if src.IsLinkLocalUnicast() {
				return local()
			}
			return died(drop.SourceNotPods, icmp.None)
		}
	case PortHost:
		service := m.t != nil && !src.IsLinkLocalUnicast() && (m.lookup(src).Kind() == fib.Pod || m.lookup(dst).Kind() == fib.Pod)
		if m.lookup(src).Kind() != fib.Host && !service {
			if src.IsLinkLocalUnicast() {
				return local()
			}
			return died(drop.SourceNotHosts, icmp.None)
		}
	case PortUplink:
		e := m.lookup(src)
		sees := e.Kind() == fib.Outside && (s.NoSNAT || s.SNAT != nil && !s.SNAT.Translate(p.Src))
		if k := e.Kind(); k != fib.Node && k != fib.Member && !sees || s.FIB.Adjacency(e.Adjacency()).Dst != packet.MAC(b[6:12]) {
			if src.IsLinkLocalUnicast() {
				return local()
			}
			return died(drop.SourceNotMember, icmp.None)
		}
	}
	return m.onwards(in, b, p, largest, Decision{}, dst)
}

// view is what the translator says, asked with a copy of the packet.
func (m *model) view(b []byte, p packet.Packet, in *PortInfo) (v snat.View) {
	if in == nil {
		m.t.Inbound(&p, b, &v)
	} else {
		m.t.Outbound(&p, b, in.Pod, &v)
	}
	return v
}

// inside is the address behind an external port.
func (m *model) inside(b []byte, p packet.Packet) netip.Addr {
	v := m.view(b, p, nil)
	return v.Addr.Netip()
}

// inbound judges what is for the node's address. done: that is all.
func (m *model) inbound(b []byte, p packet.Packet) (d Decision, done bool) {
	cluster := m.lookup(p.Src.Netip()).Kind() == fib.Node
	if cluster && m.t.MayBePinned(&p, b) {
		return d, false
	}
	if p.Flags&packet.FlagFragment != 0 && !cluster {
		var f snat.FragmentView
		switch m.t.Fragment(&p, snat.NoPod, &f); f.Action {
		case snat.FragmentHold:
			return Decision{Action: Wait, Translation: TrackFragment, Fragmented: true}, true
		case snat.FragmentRefuse:
			return Decision{Action: Return}, true
		}
		d.Fragmented = true
	}
	switch v := m.view(b, p, nil); {
	case v.Action == snat.Translate:
		d.Translation = TranslateIn
		return d, false
	case v.Action == snat.Refuse:
		d.Reason = v.Reason
		return d, true
	case cluster:
		return d, false
	}
	d.Action = Return
	if d.Fragmented {
		d.Translation = TrackFragment
	}
	return d, true
}

// outbound judges what leaves the cluster.
func (m *model) outbound(in *PortInfo, b []byte, p packet.Packet) (d Decision, done bool) {
	if p.Flags&packet.FlagFragment != 0 {
		var f snat.FragmentView
		switch m.t.Fragment(&p, in.Pod, &f); f.Action {
		case snat.FragmentHold:
			return Decision{Action: Wait, Translation: TrackFragment, Fragmented: true}, true
		case snat.FragmentRefuse:
			return Decision{Reason: f.Reason}, true
		}
		d.Fragmented = true
	}
	v := m.view(b, p, in)
	if v.Action == snat.Refuse {
		d.Reason = v.Reason
		if v.Unreachable {
			d.Error = icmp.AdminProhibited
		}
		return d, true
	}
	d.Translation = TranslateOut
	return d, false
}

// onwards judges a packet whose source is allowed and that goes to dst.
func (m *model) onwards(in *PortInfo, b []byte, p *packet.Packet, largest int, d Decision, dst netip.Addr) Decision {
	s := m.snap
	died := func(r drop.Reason, e icmp.Error) Decision {
		d.Action, d.Reason, d.Error = Drop, r, e
		return d
	}
	e := m.lookup(dst)
	if m.t != nil && in.Kind != PortHost && d.Translation == NoTranslation {
		if p := *p; p.Flags&packet.FlagFragment != 0 && m.t.MayBePinned(&p, b) {
			pod := snat.NoPod
			if in.Kind == PortPod {
				pod = in.Pod
			}
			var f snat.FragmentView
			switch m.t.Fragment(&p, pod, &f); f.Action {
			case snat.FragmentHold:
				return Decision{Action: Wait, Translation: TrackFragment, Fragmented: true}
			case snat.FragmentRefuse:
				return Decision{Reason: f.Reason}
			}
			d.Fragmented, d.Translation = true, TrackFragment
		}
		var v snat.View
		if m.t.Pinned(p, b, &v); v.Action == snat.ToHost {
			d.Translation = TranslateOut
			if in.Kind == PortUplink && m.lookup(p.Src.Netip()).Kind() == fib.Member {
				d.Action = Return
				return d
			}
			e = m.lookup(s.Node4.Netip())
			if p.Kind == packet.KindIPv6 {
				e = m.lookup(s.Node6.Netip())
			}
		}
	}
	k := e.Kind()
	if m.t != nil && in.Kind == PortPod && d.Translation != TranslateOut {
		switch {
		case k == fib.Host && (dst == s.Node4.Netip() || dst == s.Node6.Netip()) && p.Flags&packet.FlagFragment == 0:
			external := (p.Proto == 6 || p.Proto == 17) && p.DstPort >= 10000 && p.DstPort < 30000
			v := m.view(b, *p, in)
			switch {
			case external && v.Action == snat.Refuse:
				return died(v.Reason, icmp.None)
			case external, (p.Proto == 1 || p.Proto == 58) && v.IsError() && v.Action == snat.Translate:
				return Decision{Translation: TranslateHairpin}
			}
		case k == fib.Outside && !dst.IsLinkLocalUnicast() && !s.NoSNAT, k == fib.Member && !s.NoSNAT && s.SNAT == nil:
			var done bool
			if d, done = m.outbound(in, b, *p); done {
				return d
			}
		}
	}
	switch {
	case k == fib.Unreachable:
		return died(drop.Unreachable, icmp.HostUnreachable)
	case k == fib.Node && in.Kind == PortUplink:
		return died(drop.HairpinUplink, icmp.None)
	case k == fib.Host && in.Kind == PortHost, k == fib.Member && in.Kind != PortPod && (in.Kind != PortHost || m.lookup(p.Src.Netip()).Kind() != fib.Pod):
		return died(drop.DestinationNotOurs, icmp.None)
	case k == fib.Outside && dst.IsLinkLocalUnicast():
		return m.local(in, b, p)
	case k == fib.Outside && in.Kind != PortPod:
		return died(drop.DestinationNotOurs, icmp.None)
	case k == fib.Outside && !s.NoSNAT && m.t == nil:
		return died(drop.OutsideNoSNAT, icmp.AdminProhibited)
	}
	v := d
	v.Action, v.Adjacency = Forward, e.Adjacency()
	if in.Kind != PortHost && k != fib.Host {
		if p.TTL <= 1 {
			d = v
			d.Adjacency, d.Decrement = 0, false
			return died(drop.HopLimitExceeded, icmp.TimeExceeded)
		}
		v.Decrement = true
	}
	if mtu := s.FIB.Adjacency(e.Adjacency()).MTU; largest > int(mtu) {
		if p.Kind == packet.KindIPv6 || binary.BigEndian.Uint16(b[p.L3+6:])&0x4000 != 0 || largest != int(p.Length) {
			v.Action, v.Reason, v.Error, v.MTU = Drop, drop.TooBig, icmp.PacketTooBig, mtu
			return v
		}
		v.Action = Fragment
	}
	from := p.Src.Netip()
	own := from == s.Node4.Netip() || from == s.Node6.Netip()
	ported := (p.Proto == 6 || p.Proto == 17) && p.SrcPort >= 10000 && p.SrcPort < 30000
	if in.Kind == PortHost && m.t != nil && (p.Flags&packet.FlagFragment == 0 || p.Flags&packet.FlagFirst != 0) && (own && ported || !own && m.lookup(from).Kind() != fib.Host) {
		v.Translation = MakePin
	}
	return v
}

// pairs calls add with a small and a large UDP packet between all kinds of addresses, from all kinds of senders.
func pairs(t testing.TB, add func([]byte)) {
	for _, f := range families {
		for _, src := range []string{f.podA, f.podB, f.remotePod, f.self, f.outside, "169.254.7.7", "fe80::7"} {
			for _, dst := range []string{f.podA, f.podB, f.remotePod, f.self, f.node2, f.unused, f.outside, "169.254.1.1", "fe80::1", "224.0.0.1", "ff02::1"} {
				if addr(src).Is4() != addr(dst).Is4() {
					continue
				}
				for _, to := range []packet.MAC{gatewayMAC, uplinkMAC} {
					for _, from := range []packet.MAC{podMACs[0], node2MAC, routerMAC} {
						add(udp(src, dst, from, to, 30).bytes(t))
						add(udp(src, dst, from, to, 1600).bytes(t))
					}
				}
			}
		}
	}
}

// decideMatches compares Decide with the model on one frame; extra, if not 0, pretends a GSO frame whose segments have this size.
func decideMatches(t testing.TB, m *model, slot int, extra uint16, b []byte) {
	in := &m.snap.Ports[slot%len(m.snap.Ports)]
	var p packet.Packet
	packet.Parse(&p, b, len(b))
	size := p.Length
	if extra != 0 && p.Reason == drop.None {
		size = uint32(extra)
	}
	var got Verdict
	whole := p
	Decide(m.snap, m.t, in, &p, b, size, &got)
	want := Decision{Reason: p.Reason}
	if p.Reason == drop.None {
		want = m.verdict(in, b, &whole, int(size))
	}
	require.Equal(t, want, got.Decision, "in %s: %+v", in.Name, p)
}

func TestDecideMatchesModel(t *testing.T) {
	n := newNode(t)
	for i, noSNAT := range []bool{false, true, false} {
		s := n.snapshot()
		if s.NoSNAT = noSNAT; i == 2 {
			s.SNAT = snat.NewRules(snat.RulesConfig{NoMasquerade: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8::/32")}})
		}
		m := newModel(s)
		each := func(b []byte) {
			for slot := range s.Ports {
				decideMatches(t, m, slot, 0, b)
				decideMatches(t, m, slot, 1501, b)
			}
		}
		pairs(t, each)
		captures.Each(each)
	}
}

// Sessions, and packets that belong to them or nearly do.
func TestDecideMatchesModelWithSessions(t *testing.T) {
	n := newNode(t, withSNAT)
	s := n.snap
	m := newModel(s)
	m.t = n.translator
	var frames [][]byte
	add := func(b []byte) { frames = append(frames, b) }
	pairs(t, add)
	captures.Each(add)
	for _, f := range families {
		n.inject(n.pods[0], fromPod(0, f.outside, 30).bytes(t))
		external := parse(t, n.sent(n.uplink).Bytes).SrcPort
		for _, dst := range []uint16{external, external ^ 1, 9999, 30000} {
			for _, ttl := range []uint8{1, 64} {
				for _, size := range []int{10, 1600} {
					p := fromOutside(f.outside, f.self, layers.IPProtocolUDP, &layers.UDP{SrcPort: 2000, DstPort: layers.UDPPort(dst)}, size)
					p.ttl = ttl
					add(p.bytes(t))
					p.ethSrc, p.ethDst, p.src = podMACs[1], gatewayMAC, f.podB
					add(p.bytes(t))
				}
			}
		}
	}
	out := fromPod(0, families[0].outside, 1300)
	out.df = false
	frames = append(frames, cut(t, out.bytes(t), 576)...)
	back := fromOutside(families[0].outside, families[0].self, layers.IPProtocolUDP, &layers.UDP{SrcPort: 2000, DstPort: 12345}, 1300)
	frames = append(frames, cut(t, back.bytes(t), 576)...)
	seen := map[Translation]int{}
	for _, b := range frames {
		for slot := range s.Ports {
			var p packet.Packet
			packet.Parse(&p, b, len(b))
			var v Verdict
			Decide(s, n.translator, &s.Ports[slot], &p, b, p.Length, &v)
			if v.Reason == drop.None {
				seen[v.Translation]++
			}
			decideMatches(t, m, slot, 0, b)
			decideMatches(t, m, slot, 1501, b)
		}
	}
	for _, tr := range []Translation{NoTranslation, TranslateOut, TranslateIn, TranslateHairpin, TrackFragment} {
		require.Positive(t, seen[tr], "translation %d", tr)
	}
}

// FuzzDecide compares Decide with the model on whatever Parse accepts.
func FuzzDecide(f *testing.F) {
	m := newModel(newNode(f).snap)
	captures.Each(func(b []byte) { f.Add(uint8(FirstPodSlot), uint16(0), b) })
	for _, p := range []ip{fromPod(0, "10.244.2.7", 30), fromPod(0, "fd12:3456:789a:0:2::7", 30), fromNode2("10.244.2.7", "10.244.1.2", 30)} {
		for slot := range m.snap.Ports {
			f.Add(uint8(slot), uint16(0), p.bytes(f))
		}
	}
	f.Fuzz(func(t *testing.T, slot uint8, extra uint16, b []byte) { decideMatches(t, m, int(slot), extra, b) })
}

// FuzzPoll lets frames and metadata of any kind loose on a node and counts afterwards: no frame leaks, every packet is accounted for, and what
// is sent to the wire is whole.
func FuzzPoll(f *testing.F) {
	captures.Each(func(b []byte) {
		for _, slot := range []uint8{0, 2} {
			f.Add(slot, uint8(0), uint8(0), uint16(0), uint16(0), uint16(0), b, uint16(0))
		}
	})
	f.Add(uint8(2), uint8(0), uint8(0), uint16(0), uint16(0), uint16(0), fromNode2("10.244.2.7", "10.244.1.2", 30).bytes(f), uint16(0))
	f.Add(uint8(2), uint8(0), uint8(0), uint16(0), uint16(0), uint16(0), fromOutside("198.51.100.10", "10.240.0.11", layers.IPProtocolUDP, &layers.UDP{SrcPort: 2000, DstPort: 12345}, 10).bytes(f), uint16(0))
	f.Add(uint8(0), uint8(0), uint8(0), uint16(0), uint16(0), uint16(0), fromPod(0, "198.51.100.10", 30).bytes(f), uint16(0))
	// Nothing is unfinished, and yet there are leftovers in the metadata.
	f.Add(uint8(0), uint8(0), uint8(0), uint16(0), uint16(0), uint16(39), fromPod(0, "10.244.2.7", 30).bytes(f), uint16(0))
	gso, o := gsoFrame(f, "10.244.1.2", "10.244.2.7", podMACs[0], gatewayMAC, 4000, 1400)
	f.Add(uint8(0), o.Flags, o.GSO, o.SegmentSize, o.ChecksumStart, o.ChecksumOffset, gso, uint16(0))
	f.Add(uint8(0), o.Flags, o.GSO, o.SegmentSize, o.ChecksumStart, o.ChecksumOffset, gso[:200], uint16(30000))
	f.Fuzz(func(t *testing.T, slot, flags, gso uint8, size, start, offset uint16, b []byte, grow uint16) {
		n := newNode(t, withSNAT)
		if grow > 0 {
			b = append(slices.Clone(b), make([]byte, int(grow))...)
		}
		if len(b) > 60000 || len(b) == 0 {
			return
		}
		in := append(slices.Clone(n.pods), n.uplink, n.host)[int(slot)%4]
		o := port.Offload{Flags: flags, GSO: gso, SegmentSize: size, ChecksumStart: start, ChecksumOffset: offset}
		if in == n.uplink {
			o = port.Offload{} // the wire has no metadata
		}
		require.NoError(t, in.Inject(0, b, o))
		for n.w.Poll() > 0 {
		}
		n.w.clock.base += 20e9 // a fragment that waits for its first waits no longer
		n.poll()
		for _, s := range n.uplink.Sent(0) {
			var p packet.Packet
			packet.Parse(&p, s.Bytes, len(s.Bytes))
			require.Equal(t, drop.None, p.Reason, "sent to the wire: %+v", p)
			require.LessOrEqual(t, int(p.Length), uplinkMTU)
			require.Zero(t, s.Offload.Flags|s.Offload.GSO) // other fields mean nothing without them
		}
	})
}

// Frames captured in the lab at pod n1-p1 and on the wire of n1 take here the way they took there.
func TestCapturedTrafficIsForwarded(t *testing.T) {
	n := newNode(t)
	verdicts := map[string]int{}
	captures.Each(func(b []byte) {
		in := -1
		switch packet.MAC(b[6:12]) {
		case podMACs[0]:
			in = FirstPodSlot
		case node2MAC:
			in = UplinkSlot
		}
		if in < 0 {
			return // sent by the node itself, or not the cluster's
		}
		var p packet.Packet
		packet.Parse(&p, b, len(b))
		var v Verdict
		Decide(n.snap, nil, &n.snap.Ports[in], &p, b, min(p.Length, 1500), &v)
		verdicts[[]string{"drop", "forward", "fragment", "answer", "return", "wait"}[v.Action]+" "+v.Reason.String()]++
	})
	t.Log(verdicts)
	require.Greater(t, verdicts["forward none"], 60)
	require.Positive(t, verdicts["answer none"])
	require.Positive(t, verdicts["drop hop_limit_exceeded"])
	require.Positive(t, verdicts["drop outside_no_snat"])
	require.Positive(t, verdicts["drop unreachable"])
	require.Zero(t, verdicts["drop source_not_pods"])
	require.Zero(t, verdicts["drop source_not_member"])
}
