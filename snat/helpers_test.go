package snat

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

const (
	tcp, udp, sctp = packet.ProtoTCP, packet.ProtoUDP, packet.ProtoSCTP
	second         = int64(time.Second)
)

// flow is a packet to be: the fields of its headers.
type flow struct {
	src, dst     netip.Addr
	proto        uint8 // packet.ProtoICMP stands for echo of either family
	sport, dport uint16
	tcp          uint8 // flags
	reply        bool  // echo reply
	payload      []byte
	df           bool
	id           uint32
	fragAt       int // bytes; with more: a fragment
	more         bool
	noSum        bool // UDP without a checksum
}

// frame builds the packet with right checksums. A fragment's payload is what lies at its offset: for the first one, the L4 header comes in front.
func (f flow) frame() []byte {
	v6 := f.src.Is6()
	var l4 []byte
	proto := f.proto
	if f.fragAt == 0 {
		switch proto {
		case tcp:
			l4 = make([]byte, 20)
			l4[12], l4[13] = 5<<4, f.tcp
			binary.BigEndian.PutUint32(l4[4:], 0x01020304)
			binary.BigEndian.PutUint16(l4[14:], 1024)
		case udp:
			l4 = make([]byte, 8)
			binary.BigEndian.PutUint16(l4[4:], uint16(8+len(f.payload)))
		case sctp:
			l4 = make([]byte, 12)
		case packet.ProtoICMP:
			l4 = []byte{8, 0, 0, 0, 0, 0, 0, 1}
			if v6 {
				l4[0] = 128
			}
			if f.reply {
				l4[0] -= 8 // 8 -> 0
				if v6 {
					l4[0] = 129
				}
			}
			binary.BigEndian.PutUint16(l4[4:], f.sport)
		}
		if proto == tcp || proto == udp || proto == sctp {
			binary.BigEndian.PutUint16(l4[0:], f.sport)
			binary.BigEndian.PutUint16(l4[2:], f.dport)
		}
	}
	if proto == packet.ProtoICMP && v6 {
		proto = packet.ProtoICMPv6
	}
	l4 = append(l4, f.payload...)
	fragment := f.more || f.fragAt > 0
	if f.fragAt == 0 {
		sum := packet.PseudoHeader(packet.AddrFrom(f.src), packet.AddrFrom(f.dst), proto, uint32(len(l4)))
		switch proto {
		case tcp:
			binary.BigEndian.PutUint16(l4[16:], packet.Checksum(l4, sum))
		case udp:
			if !f.noSum {
				binary.BigEndian.PutUint16(l4[6:], orOnes(packet.Checksum(l4, sum)))
			}
		case packet.ProtoICMP:
			binary.BigEndian.PutUint16(l4[2:], packet.Checksum(l4, 0))
		case packet.ProtoICMPv6:
			binary.BigEndian.PutUint16(l4[2:], packet.Checksum(l4, sum))
		}
	}
	b := make([]byte, 12, 14+48+len(l4))
	if v6 {
		b = binary.BigEndian.AppendUint16(b, packet.EtherTypeIPv6)
		h := make([]byte, 40)
		packet.PutIPv6(h, packet.AddrFrom(f.src), packet.AddrFrom(f.dst), proto, 64, len(l4))
		if fragment {
			h[6] = packet.ProtoFragment
			binary.BigEndian.PutUint16(h[4:], uint16(len(l4)+8))
			x := make([]byte, 8)
			x[0] = proto
			off := uint16(f.fragAt)
			if f.more {
				off |= 1
			}
			binary.BigEndian.PutUint16(x[2:], off)
			binary.BigEndian.PutUint32(x[4:], f.id)
			h = append(h, x...)
		}
		return append(append(b, h...), l4...)
	}
	b = binary.BigEndian.AppendUint16(b, packet.EtherTypeIPv4)
	h := make([]byte, 20)
	packet.PutIPv4(h, packet.AddrFrom(f.src), packet.AddrFrom(f.dst), proto, 0, len(l4))
	var word uint16
	if f.df {
		word = 0x4000
	}
	if fragment {
		word = uint16(f.fragAt / 8)
		if f.more {
			word |= 0x2000
		}
	}
	binary.BigEndian.PutUint16(h[4:], uint16(f.id))
	binary.BigEndian.PutUint16(h[6:], word)
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:], packet.Checksum(h, 0))
	return append(append(b, h...), l4...)
}

func orOnes(c uint16) uint16 {
	if c == 0 {
		return 0xffff
	}
	return c
}

// back is the reply to what the far side saw.
func (f flow) back() flow {
	f.src, f.dst, f.sport, f.dport, f.reply = f.dst, f.src, f.dport, f.sport, !f.reply
	if f.proto == packet.ProtoICMP {
		f.sport, f.dport = f.dport, f.sport
	}
	if f.tcp == tcpSYN {
		f.tcp = tcpSYN | tcpACK
	}
	return f
}

// family is one of the two, with addresses.
type family struct {
	name     string
	node     netip.Addr
	node2    netip.Addr
	podBase  netip.Addr
	farBase  netip.Addr
	icmp     uint8
	unreach  byte // type of destination unreachable
	exceeded byte
}

var families = []family{
	{"IPv4", netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("10.244.0.0"), netip.MustParseAddr("198.51.100.0"), packet.ProtoICMP, 3, 11},
	{"IPv6", netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2"), netip.MustParseAddr("fd12:3456:789a::"), netip.MustParseAddr("2001:db8:100::"), packet.ProtoICMPv6, 1, 3},
}

func plus(a netip.Addr, n int) netip.Addr {
	b := a.As16()
	low := binary.BigEndian.Uint64(b[8:]) + uint64(n)
	binary.BigEndian.PutUint64(b[8:], low)
	return netip.AddrFrom16(b).Unmap()
}

func (f *family) pod(i int) netip.Addr { return plus(f.podBase, i+2) }
func (f *family) far(i int) netip.Addr { return plus(f.farBase, i+10) }

// forFamilies runs a test with a world of its own for each family.
func forFamilies(t *testing.T, cfg Config, test func(t *testing.T, w *world)) {
	forFamiliesOn(t, AllocatorConfig{}, cfg, test)
}

func forFamiliesOn(t *testing.T, ac AllocatorConfig, cfg Config, test func(t *testing.T, w *world)) {
	for i := range families {
		t.Run(families[i].name, func(t *testing.T) {
			w := newWorld(t, ac, cfg)
			w.family = &families[i]
			test(t, w)
		})
	}
}

// world is a translator with its allocator, a clock, and pods 0 to 3.
type world struct {
	*family
	t   testing.TB
	a   *Allocator
	tr  *Translator
	now int64
}

func newWorld(t testing.TB, ac AllocatorConfig, cfg Config) *world {
	a, err := NewAllocator(ac)
	require.NoError(t, err)
	if cfg.Sessions4 == 0 {
		cfg.Sessions4, cfg.Sessions6 = 4096, 4096
	}
	tr, err := New(cfg, a)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, tr.Close()) })
	w := &world{t: t, a: a, tr: tr, now: 1000 * second, family: &families[0]}
	tr.Expire(w.now, 1000)
	tr.SetNodeAddresses(packet.AddrFrom(families[0].node), packet.AddrFrom(families[1].node))
	for i := range min(4, a.cfg.MaxPods) {
		w.addPod(i)
	}
	return w
}

func (w *world) addPod(i int) {
	require.NoError(w.t, w.tr.AddPod(i, packet.AddrFrom(families[0].pod(i)), packet.AddrFrom(families[1].pod(i))))
}

// pass lets time pass and the translator do its work.
func (w *world) pass(seconds float64) {
	w.now += int64(seconds * float64(second))
	for w.tr.Expire(w.now, 1<<20) {
	}
}

// result is what became of a packet.
type result struct {
	Action Action
	Reason drop.Reason
	frame  []byte
	p      packet.Packet // of the frame as it left
	v      View
}

// parse, outFrame, inFrame and check run for millions of packets: they compare by themselves and leave to require what is wrong, whose
// reflection would take most of the tests' time, above all under the race detector.
func (w *world) parse(frame []byte) (p packet.Packet) {
	packet.Parse(&p, frame, len(frame))
	if p.Reason != drop.None {
		require.Equal(w.t, drop.None, p.Reason, "%x", frame)
	}
	return p
}

// unwritten requires that a view has written nothing.
func (w *world) unwritten(before, frame []byte) {
	if !bytes.Equal(before, frame) {
		require.Equal(w.t, before, frame, "a view writes nothing")
	}
}

// outFrame takes a frame from a pod through translation, hairpin included.
func (w *world) outFrame(pod int, frame []byte) result {
	frame = append([]byte(nil), frame...)
	p := w.parse(frame)
	right := packet.VerifyL4(&p, frame, nil)
	var v View
	before := append([]byte(nil), frame...)
	w.tr.Outbound(&p, frame, pod, &v)
	w.unwritten(before, frame)
	if v.Action == Create {
		w.tr.Create(&p, &v)
	}
	if v.Action == Refuse {
		require.NotEqual(w.t, drop.None, v.Reason)
		return result{v.Action, v.Reason, frame, p, v}
	}
	w.tr.TranslateOut(&p, frame, &v, Offload{})
	w.check(&p, frame, right)
	if v.Action == Translate && v.Hairpin {
		return w.inFrame(frame)
	}
	return result{v.Action, drop.None, frame, p, v}
}

// inFrame takes a frame from outside through translation.
func (w *world) inFrame(frame []byte) result {
	frame = append([]byte(nil), frame...)
	p := w.parse(frame)
	right := packet.VerifyL4(&p, frame, nil)
	var v View
	before := append([]byte(nil), frame...)
	w.tr.Inbound(&p, frame, &v)
	w.unwritten(before, frame)
	if v.Action == Translate {
		w.tr.TranslateIn(&p, frame, &v, Offload{})
		w.check(&p, frame, right)
	}
	return result{v.Action, v.Reason, frame, p, v}
}

// check: what was rewritten parses to what p says, and its checksums are as right as they were.
func (w *world) check(p *packet.Packet, frame []byte, right bool) {
	q := w.parse(frame)
	if now := packet.VerifyL4(&q, frame, nil); now != right {
		require.Equal(w.t, right, now, "L4 checksum: %x", frame)
	}
	if p.Flags&packet.FlagFragment == 0 && q != *p {
		require.Equal(w.t, q, *p, "the Packet follows the frame")
	}
}

// out sends a flow from a pod and returns what the far side sees.
func (w *world) out(pod int, f flow) (flow, result) {
	r := w.outFrame(pod, f.frame())
	f.src, f.dst, f.sport, f.dport = r.p.Src.Netip(), r.p.Dst.Netip(), r.p.SrcPort, r.p.DstPort
	return f, r
}

// mustOut is out for flows that must get through.
func (w *world) mustOut(pod int, f flow) flow {
	g, r := w.out(pod, f)
	if r.Action != Translate {
		w.t.Helper()
		require.Equal(w.t, Translate, r.Action, "%v: %v", r.Action, r.Reason)
	}
	return g
}

// in sends a flow from outside and returns what the pod sees.
func (w *world) in(f flow) (flow, result) {
	r := w.inFrame(f.frame())
	f.src, f.dst, f.sport, f.dport = r.p.Src.Netip(), r.p.Dst.Netip(), r.p.SrcPort, r.p.DstPort
	return f, r
}

// reaches requires that a packet from outside gets to the pod's address and port.
func (w *world) reaches(f flow, pod int, port uint16) {
	w.t.Helper()
	g, r := w.in(f)
	require.Equal(w.t, Translate, r.Action, "%v", r.Reason)
	require.Equal(w.t, w.pod(pod), g.dst)
	require.Equal(w.t, int32(pod), r.v.Pod)
	require.Equal(w.t, port, g.dport)
	require.Equal(w.t, f.src, g.src)
}

// refused requires that a packet from outside dies of the reason.
func (w *world) refused(f flow, reason drop.Reason) {
	w.t.Helper()
	_, r := w.in(f)
	require.Equal(w.t, Refuse, r.Action)
	require.Equal(w.t, reason, r.Reason)
}

// to is a flow from a pod to a far host.
func (w *world) to(pod int, proto uint8, sport uint16, far int, dport uint16) flow {
	f := flow{src: w.pod(pod), dst: w.far(far), proto: proto, sport: sport, dport: dport, payload: []byte("payload!"), df: true}
	if proto == tcp {
		f.tcp = tcpSYN
	}
	return f
}

func (f flow) flags(tcp uint8) flow { f.tcp = tcp; return f }

// connect opens a TCP connection and returns what the far side sees.
func (w *world) connect(pod int, sport uint16, far int, dport uint16) flow {
	w.t.Helper()
	f := w.to(pod, tcp, sport, far, dport)
	g := w.mustOut(pod, f)
	w.reaches(g.back(), pod, sport)
	w.mustOut(pod, f.flags(tcpACK))
	return g.flags(tcpACK)
}

// sessions lists everything.
func (w *world) sessions() []Session {
	list, c := w.tr.Snapshot(nil, Cursor{}, 1<<30)
	require.True(w.t, c.Done)
	return list
}

// quote makes an ICMP error from src to dst about a packet: its first n bytes, all if 0.
func (w *world) quote(src, dst netip.Addr, typ, code byte, word uint32, about []byte, n int) []byte {
	q := about[14:]
	if n > 0 {
		q = q[:n]
	}
	m := make([]byte, 8, 8+len(q))
	m[0], m[1] = typ, code
	binary.BigEndian.PutUint32(m[4:], word)
	m = append(m, q...)
	b := make([]byte, 12)
	if w.node.Is6() {
		b = binary.BigEndian.AppendUint16(b, packet.EtherTypeIPv6)
		h := make([]byte, 40)
		packet.PutIPv6(h, packet.AddrFrom(src), packet.AddrFrom(dst), packet.ProtoICMPv6, 64, len(m))
		b = append(b, h...)
		binary.BigEndian.PutUint16(m[2:], packet.Checksum(m, packet.PseudoHeader(packet.AddrFrom(src), packet.AddrFrom(dst), packet.ProtoICMPv6, uint32(len(m)))))
	} else {
		b = binary.BigEndian.AppendUint16(b, packet.EtherTypeIPv4)
		h := make([]byte, 20)
		packet.PutIPv4(h, packet.AddrFrom(src), packet.AddrFrom(dst), packet.ProtoICMP, 0, len(m))
		b = append(b, h...)
		binary.BigEndian.PutUint16(m[2:], packet.Checksum(m, 0))
	}
	return append(b, m...)
}

// quotation is the offset of the quoted packet in an error's frame.
func (w *world) quotation() int {
	if w.node.Is6() {
		return 14 + 40 + 8
	}
	return 14 + 20 + 8
}
