package dataplane

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/test/captures"
)

// model is what Decide should say, said slowly: a list of prefixes, netip, and one rule after the other.
type model struct {
	snap   *Snapshot
	routes []modelRoute // longest prefix first
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

// verdict judges a frame that is a well-formed IP packet; total is its length with what continues it.
func (m *model) verdict(in *PortInfo, b []byte, p *packet.Packet, largest int) Verdict {
	s := m.snap
	src, dst := p.Src.Netip(), p.Dst.Netip()
	died := func(r drop.Reason, e icmp.Error) Verdict { return Verdict{Reason: r, Error: e} }
	toUs := packet.MAC(b[0:6]) == gatewayMAC
	if in.Kind == PortUplink {
		toUs = packet.MAC(b[0:6]) == uplinkMAC
	}
	discovery := p.Kind == packet.KindARP || p.Flags&packet.FlagND != 0
	group := p.Kind != packet.KindARP && (dst.IsMulticast() || dst == netip.MustParseAddr("255.255.255.255"))
	local := func() Verdict {
		switch {
		case in.Kind == PortUplink:
			return died(drop.EthNotForUs, icmp.None)
		case discovery:
			return Verdict{Action: Answer}
		case group:
			return died(drop.IPMulticast, icmp.None)
		case !toUs:
			return died(drop.EthNotForUs, icmp.None)
		case (dst == s.Gateway4.Netip() || dst == s.Gateway6.Netip()) && p.Flags&packet.FlagL4 != 0 && (p.Proto == 1 && p.ICMPType == 8 || p.Proto == 58 && p.ICMPType == 128):
			return Verdict{Action: Answer}
		}
		return died(drop.LinkLocal, icmp.None)
	}
	if discovery || group || !toUs {
		return local()
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
		if m.lookup(src).Kind() != fib.Host {
			if src.IsLinkLocalUnicast() {
				return local()
			}
			return died(drop.SourceNotHosts, icmp.None)
		}
	case PortUplink:
		e := m.lookup(src)
		if k := e.Kind(); k != fib.Node && k != fib.Member || s.FIB.Adjacency(e.Adjacency()).Dst != packet.MAC(b[6:12]) {
			if src.IsLinkLocalUnicast() {
				return local()
			}
			return died(drop.SourceNotMember, icmp.None)
		}
	}
	e := m.lookup(dst)
	k := e.Kind()
	switch {
	case k == fib.Unreachable:
		return died(drop.Unreachable, icmp.HostUnreachable)
	case k == fib.Node && in.Kind == PortUplink:
		return died(drop.HairpinUplink, icmp.None)
	case k == fib.Host && in.Kind == PortHost, k == fib.Member && in.Kind != PortPod:
		return died(drop.DestinationNotOurs, icmp.None)
	case k == fib.Outside && dst.IsLinkLocalUnicast():
		return local()
	case k == fib.Outside && in.Kind != PortPod:
		return died(drop.DestinationNotOurs, icmp.None)
	case k == fib.Outside && !s.NoSNAT:
		return died(drop.OutsideNoSNAT, icmp.AdminProhibited)
	}
	v := Verdict{Action: Forward, Adjacency: e.Adjacency()}
	if in.Kind != PortHost && k != fib.Host {
		if p.TTL <= 1 {
			return died(drop.HopLimitExceeded, icmp.TimeExceeded)
		}
		v.Decrement = true
	}
	if mtu := s.FIB.Adjacency(e.Adjacency()).MTU; largest > int(mtu) {
		if p.Kind == packet.KindIPv6 || binary.BigEndian.Uint16(b[p.L3+6:])&0x4000 != 0 || largest != int(p.Length) {
			return Verdict{Reason: drop.TooBig, Error: icmp.PacketTooBig, MTU: mtu, Adjacency: v.Adjacency, Decrement: v.Decrement}
		}
		v.Action = Fragment
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
					for _, from := range []packet.MAC{podMACs[0], node2MAC} {
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
	Decide(m.snap, in, &p, size, &got)
	want := Verdict{Reason: p.Reason}
	if p.Reason == drop.None {
		want = m.verdict(in, b, &p, int(size))
	}
	require.Equal(t, want, got, "in %s: %+v", in.Name, p)
}

func TestDecideMatchesModel(t *testing.T) {
	n := newNode(t)
	for _, noSNAT := range []bool{false, true} {
		s := n.snapshot()
		s.NoSNAT = noSNAT
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
	// Nothing is unfinished, and yet there are leftovers in the metadata.
	f.Add(uint8(0), uint8(0), uint8(0), uint16(0), uint16(0), uint16(39), fromPod(0, "10.244.2.7", 30).bytes(f), uint16(0))
	gso, o := gsoFrame(f, "10.244.1.2", "10.244.2.7", podMACs[0], gatewayMAC, 4000, 1400)
	f.Add(uint8(0), o.Flags, o.GSO, o.SegmentSize, o.ChecksumStart, o.ChecksumOffset, gso, uint16(0))
	f.Add(uint8(0), o.Flags, o.GSO, o.SegmentSize, o.ChecksumStart, o.ChecksumOffset, gso[:200], uint16(30000))
	f.Fuzz(func(t *testing.T, slot, flags, gso uint8, size, start, offset uint16, b []byte, grow uint16) {
		n := newNode(t)
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
		n.poll()
		for _, s := range n.uplink.Sent(0) {
			var p packet.Packet
			packet.Parse(&p, s.Bytes, len(s.Bytes))
			require.Equal(t, drop.None, p.Reason, "sent to the wire: %+v", p)
			require.LessOrEqual(t, int(p.Length), uplinkMTU)
			require.Zero(t, s.Offload)
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
		Decide(n.snap, &n.snap.Ports[in], &p, min(p.Length, 1500), &v)
		verdicts[[]string{"drop", "forward", "fragment", "answer"}[v.Action]+" "+v.Reason.String()]++
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
