package packet

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/test/captures"
)

func TestOffloadIsPortsOffload(t *testing.T) {
	want := port.Offload{Flags: 1, GSO: 2, HeaderLen: 3, SegmentSize: 4, ChecksumStart: 5, ChecksumOffset: 6}
	require.Equal(t, want, port.Offload(Offload{1, 2, 3, 4, 5, 6}), "and it compiles")
	require.Equal(t, []uint8{port.NeedsChecksum, port.DataValid, port.GSONone, port.GSOTCP4, port.GSOTCP6, port.GSOUDP, port.GSOECN},
		[]uint8{needsChecksum, dataValid, gsoNone, gsoTCP4, gsoTCP6, gsoUDP, gsoECN})
	require.Equal(t, port.MaxChain, maxTrain)
}

func TestCheckOffload(t *testing.T) {
	tcp4 := gsoSpec{ttl: 64, host: 1, seq: 1, flags: tcpACK, options: tcpTimestamps, payload: testPayload(4000, 1)}
	tcp6, udp4 := tcp4, tcp4
	tcp6.v6 = true
	udp4.udp = true
	udp6 := udp4
	udp6.v6 = true
	small := func(g gsoSpec, n int) gsoSpec {
		g.payload = g.payload[:n]
		return g
	}
	big := func(g gsoSpec) gsoSpec {
		g.payload = testPayload(60000, 1)
		return g
	}
	set := func(g gsoSpec, size int, edit func(*Offload)) Offload {
		o := g.offload(size)
		edit(&o)
		return o
	}
	keep := func(*Offload) {}
	plain := func(g gsoSpec, edit func(*Offload)) Offload {
		return set(g, 0, func(o *Offload) { o.GSO = gsoNone; edit(o) })
	}
	// A first fragment shows its L4 header, but its checksum is that of the whole datagram.
	fragment4 := ip4{proto: ProtoUDP, frag: ipv4MF}.frame(testUDP(100, make([]byte, 16)))
	fragment6 := ip6{next: ProtoFragment}.frame(concat(testFragment(ProtoUDP, 0, true, 9), testUDP(100, make([]byte, 16))))
	at := func(start, offset uint16) Offload {
		return Offload{Flags: needsChecksum, ChecksumStart: start, ChecksumOffset: offset}
	}
	echo6 := ip6{next: ProtoICMPv6}.frame(testICMP(128, 0, 0, 1, 0, 1))
	sctp := ip4{proto: ProtoSCTP}.frame(make([]byte, 40))
	tests := []struct {
		name   string
		frame  []byte
		o      Offload
		reason drop.Reason
		want   Offload
	}{
		{"nothing", tcp4.build(false), Offload{}, drop.None, Offload{}},
		{"nothing, with stale fields", tcp4.build(false), Offload{HeaderLen: 9, SegmentSize: 8, ChecksumStart: 7}, drop.None, Offload{}},
		{"data valid is not passed on", tcp4.build(false), Offload{Flags: dataValid}, drop.None, Offload{}},
		{"unfinished TCP", tcp4.build(true), plain(tcp4, keep), drop.None, plain(tcp4, keep)},
		{"unfinished and data valid", tcp4.build(true), plain(tcp4, func(o *Offload) { o.Flags |= dataValid }), drop.None, plain(tcp4, keep)},
		{"unfinished UDP over IPv6", udp6.build(true), plain(udp6, keep), drop.None, plain(udp6, keep)},
		{"header length zero", tcp6.build(true), plain(tcp6, func(o *Offload) { o.HeaderLen = 0 }), drop.None, plain(tcp6, keep)},
		{"unfinished ICMPv6", echo6, at(54, 2), drop.None, Offload{Flags: needsChecksum, HeaderLen: 62, ChecksumStart: 54, ChecksumOffset: 2}},
		{"Ethernet padding", append(small(tcp4, 0).build(true), 0, 0, 0), plain(tcp4, keep), drop.None, plain(tcp4, keep)},
		{"GSO TCP over IPv4", tcp4.build(true), tcp4.offload(1448), drop.None, tcp4.offload(1448)},
		{"GSO TCP over IPv6", tcp6.build(true), tcp6.offload(1428), drop.None, tcp6.offload(1428)},
		{"GSO UDP over IPv4", udp4.build(true), udp4.offload(1472), drop.None, udp4.offload(1472)},
		{"GSO UDP over IPv6", udp6.build(true), udp6.offload(1452), drop.None, udp6.offload(1452)},
		{"GSO with ECN", tcp4.build(true), set(tcp4, 1448, func(o *Offload) { o.GSO |= gsoECN }), drop.None, set(tcp4, 1448, func(o *Offload) { o.GSO |= gsoECN })},
		{"hostile header length", tcp4.build(true), set(tcp4, 1448, func(o *Offload) { o.HeaderLen = 0xffff }), drop.None, tcp4.offload(1448)},
		{"one segment is no GSO frame", small(tcp4, 1448).build(true), tcp4.offload(1448), drop.None, plain(tcp4, keep)},
		{"no payload is no GSO frame", small(udp4, 0).build(true), udp4.offload(1448), drop.None, plain(udp4, keep)},

		{"unknown flag", tcp4.build(true), plain(tcp4, func(o *Offload) { o.Flags |= 4 }), drop.OffloadBad, Offload{}},
		{"ARP", testARP(1, MAC{2}, testAddr("10.0.0.1"), testAddr("10.0.0.2")), at(14, 0), drop.OffloadBad, Offload{}},

		{"start one off", tcp4.build(true), plain(tcp4, func(o *Offload) { o.ChecksumStart++ }), drop.OffloadBadChecksum, Offload{}},
		{"start in the IP header", tcp4.build(true), plain(tcp4, func(o *Offload) { o.ChecksumStart = 14; o.ChecksumOffset = 10 }), drop.OffloadBadChecksum, Offload{}},
		{"start behind the frame", tcp4.build(true), plain(tcp4, func(o *Offload) { o.ChecksumStart = 0xffff; o.ChecksumOffset = 0xffff }), drop.OffloadBadChecksum, Offload{}},
		{"UDP's offset in TCP", tcp4.build(true), plain(tcp4, func(o *Offload) { o.ChecksumOffset = 6 }), drop.OffloadBadChecksum, Offload{}},
		{"TCP's offset in UDP", udp4.build(true), plain(udp4, func(o *Offload) { o.ChecksumOffset = 16 }), drop.OffloadBadChecksum, Offload{}},
		{"inside UDP's payload, over its end", udp4.build(true), plain(udp4, func(o *Offload) { o.ChecksumStart = o.HeaderLen; o.ChecksumOffset = 3999 }), drop.OffloadBadChecksum, Offload{}},
		{"in UDP's own header", udp4.build(true), plain(udp4, func(o *Offload) { o.ChecksumStart += 2 }), drop.OffloadBadChecksum, Offload{}},
		{"first fragment, IPv4", fragment4, at(34, 6), drop.OffloadBadChecksum, Offload{}},
		{"first fragment, IPv6", fragment6, at(62, 6), drop.OffloadBadChecksum, Offload{}},
		{"first fragment, in its payload", fragment4, at(42, 6), drop.OffloadBadChecksum, Offload{}},
		{"SCTP", sctp, at(34, 8), drop.OffloadBadChecksum, Offload{}},
		{"surplus behind UDP's length", ip4{proto: ProtoUDP}.frame(append(testUDP(0, make([]byte, 16)), 1, 2)), at(34, 6), drop.OffloadBadChecksum, Offload{}},
		{"ICMP", ip4{proto: ProtoICMP}.frame(testICMP(8, 0, 0, 1, 0, 1)), at(34, 2), drop.OffloadBadChecksum, Offload{}},
		{"GSO with a checksum inside a tunnel", udp4.build(true), set(udp4, 1000, func(o *Offload) { o.ChecksumStart = o.HeaderLen }), drop.OffloadBadChecksum, Offload{}},

		{"GSO with a finished checksum", tcp4.build(false), set(tcp4, 1448, func(o *Offload) { o.Flags = 0 }), drop.OffloadBadGSO, Offload{}},
		{"ECN without a type", tcp4.build(true), set(tcp4, 1448, func(o *Offload) { o.GSO = gsoECN }), drop.OffloadBadGSO, Offload{}},
		{"UFO", udp4.build(true), set(udp4, 1448, func(o *Offload) { o.GSO = 3 }), drop.OffloadBadGSO, Offload{}},
		{"TCP4 of an IPv6 packet", tcp6.build(true), set(tcp6, 1448, func(o *Offload) { o.GSO = gsoTCP4 }), drop.OffloadBadGSO, Offload{}},
		{"TCP6 of an IPv4 packet", tcp4.build(true), set(tcp4, 1448, func(o *Offload) { o.GSO = gsoTCP6 }), drop.OffloadBadGSO, Offload{}},
		{"TCP of UDP", udp4.build(true), set(udp4, 1448, func(o *Offload) { o.GSO = gsoTCP4 }), drop.OffloadBadGSO, Offload{}},
		{"UDP of TCP", tcp4.build(true), set(tcp4, 1448, func(o *Offload) { o.GSO = gsoUDP }), drop.OffloadBadGSO, Offload{}},
		{"UDP with ECN", udp4.build(true), set(udp4, 1448, func(o *Offload) { o.GSO |= gsoECN }), drop.OffloadBadGSO, Offload{}},
		{"segment size zero", tcp4.build(true), tcp4.offload(0), drop.OffloadBadGSO, Offload{}},
		{"segment size below TCP's least", tcp4.build(true), tcp4.offload(MinTCPSegmentSize - 1), drop.OffloadBadGSO, Offload{}},
		{"too many TCP segments", big(tcp4).build(true), tcp4.offload(60000/MaxTCPSegments - 1), drop.OffloadBadGSO, Offload{}},
		{"most TCP segments", big(tcp4).build(true), tcp4.offload(60000/MaxTCPSegments + 1), drop.None, tcp4.offload(60000/MaxTCPSegments + 1)},
		{"most UDP segments", udp4.build(true), udp4.offload(32), drop.None, udp4.offload(32)},       // 4000 bytes: 125
		{"too many UDP segments", udp4.build(true), udp4.offload(31), drop.OffloadBadGSO, Offload{}}, // 130
		{"bytes behind a GSO packet", append(tcp4.build(true), 1), tcp4.offload(1448), drop.OffloadBadGSO, Offload{}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, buffers := range []int{1, 2} {
				var p Packet
				Parse(&p, test.frame, len(test.frame))
				require.Equal(t, drop.None, p.Reason)
				head, rest := test.frame, []byte(nil)
				if n := int(p.Payload); buffers == 2 && n > 0 {
					head, rest = head[:n:n], head[n:]
				}
				before := bytes.Clone(test.frame)
				o := test.o
				require.Equal(t, test.reason, CheckOffload(&p, head, rest, &o))
				require.Equal(t, before, test.frame, "nothing is written")
				if test.reason == drop.None {
					require.Equal(t, test.want, o)
				}
			}
		})
	}
}

// An unfinished checksum inside a tunnel: the packet comes out of CheckOffload complete.
func TestCheckOffloadFinishesInsideTunnels(t *testing.T) {
	inner := gsoSpec{ttl: 64, host: 1, seq: 1, flags: tcpSYN, payload: testPayload(301, 1)}
	innerUDP := inner
	innerUDP.udp = true
	vxlan := func(inner []byte) []byte {
		return ip4{proto: ProtoUDP}.frame(testUDP(0, concat([]byte{8, 0, 0, 0, 0, 0, 5, 0}, inner)))
	}
	gre := func(inner []byte) []byte {
		return ip6{next: 47}.frame(concat([]byte{0, 0, 0x65, 0x58}, inner))
	}
	ipip := func(inner []byte) []byte { return ip4{proto: 4}.frame(inner[14:]) }
	greSum := func(finished bool) []byte {
		b := concat([]byte{0x80, 0, 8, 0, 0, 0, 0, 0}, testPayload(99, 2))
		if finished {
			sum := ^slowSum(b)
			b[4], b[5] = uint8(sum>>8), uint8(sum)
		}
		return ip4{proto: 47}.frame(b)
	}
	tests := []struct {
		name          string
		frame, want   []byte
		start, offset int
	}{
		{"VXLAN, TCP", vxlan(inner.build(true)), vxlan(inner.build(false)), 14 + 20 + 8 + 8 + 34, 16},
		{"VXLAN, UDP", vxlan(innerUDP.build(true)), vxlan(innerUDP.build(false)), 14 + 20 + 8 + 8 + 34, 6},
		{"GRE, TCP", gre(inner.build(true)), gre(inner.build(false)), 14 + 40 + 4 + 34, 16},
		{"IP in IP, TCP", ipip(inner.build(true)), ipip(inner.build(false)), 14 + 20 + 20, 16},
		{"GRE's own", greSum(false), greSum(true), 34, 4},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for split := test.start; split <= len(test.frame); split++ {
				frame := bytes.Clone(test.frame)
				var p Packet
				head, rest := frame[:split:split], frame[split:]
				Parse(&p, head, len(frame))
				require.Equal(t, drop.None, p.Reason)
				o := Offload{Flags: needsChecksum, ChecksumStart: uint16(test.start), ChecksumOffset: uint16(test.offset)}
				if split == test.start+test.offset+1 {
					require.Equal(t, drop.OffloadBadChecksum, CheckOffload(&p, head, rest, &o), "astride two buffers")
					continue
				}
				require.Equal(t, drop.None, CheckOffload(&p, head, rest, &o))
				require.Zero(t, o)
				require.Equal(t, test.want, frame)
			}
		})
	}
}

func TestFinishChecksum(t *testing.T) {
	base := gsoSpec{ttl: 64, host: 1, seq: 1, flags: tcpACK, options: tcpTimestamps, payload: testPayload(1001, 1)}
	for _, v6 := range []bool{false, true} {
		for _, udp := range []bool{false, true} {
			g := base
			g.v6, g.udp = v6, udp
			for split := g.headerLen(); split <= g.headerLen()+len(g.payload); split++ {
				frame := append(g.build(true), 0xaa, 0xbb) // padding counts for nothing
				var p Packet
				Parse(&p, frame[:split], len(frame))
				FinishChecksum(&p, frame[:split], frame[split:])
				require.Equal(t, append(g.build(false), 0xaa, 0xbb), frame)
			}
		}
	}
}

// RFC 768: a computed checksum of zero is sent as all ones, since zero stands for none.
func TestFinishChecksumUDPZero(t *testing.T) {
	g := gsoSpec{udp: true, ttl: 64, host: 1, payload: []byte{0, 0}}
	frame := g.build(false)
	at := g.headerLen()
	copy(frame[at:], frame[at-2:at]) // the payload takes the checksum's value: it makes the sum all ones
	frame[at-2], frame[at-1] = 0, 0
	pseudo := slowSum(g.pseudo(10))
	frame[at-2], frame[at-1] = uint8(pseudo>>8), uint8(pseudo)
	var p Packet
	Parse(&p, frame, len(frame))
	FinishChecksum(&p, frame, nil)
	require.Equal(t, []byte{0xff, 0xff}, frame[at-2:at])
	require.True(t, goldenL4Good(frame))
}

// FuzzCheckOffload: whatever the metadata says, what passes can be finished or cut, and comes out right.
func FuzzCheckOffload(f *testing.F) {
	captures.Each(func(b []byte) {
		f.Add(b, uint16(100), uint8(1), uint8(0), uint16(54), uint16(100), uint16(34), uint16(16))
	})
	for _, g := range []gsoSpec{
		{ttl: 64, host: 1, seq: 1, flags: tcpACK, options: tcpTimestamps},
		{ttl: 64, host: 1, seq: 1, flags: tcpACK, v6: true, extra: []byte{0, 1, 4, 0, 0, 0, 0}},
		{ttl: 64, host: 1, udp: true, vlan: true},
		{ttl: 64, host: 1, udp: true, v6: true},
	} {
		g.payload = testPayload(400, 4)
		for _, size := range []int{100, 400, 1} {
			o := g.offload(size)
			f.Add(g.build(true), uint16(100), o.Flags, o.GSO, o.HeaderLen, o.SegmentSize, o.ChecksumStart, o.ChecksumOffset)
		}
		o := g.offload(0)
		f.Add(g.build(true), uint16(1000), needsChecksum|dataValid, gsoNone, uint16(0), uint16(0), o.ChecksumStart+20, uint16(6))
	}
	f.Fuzz(func(t *testing.T, frame []byte, split uint16, flags, gso uint8, headerLen, size, start, offset uint16) {
		at := min(int(split), len(frame))
		head, rest := frame[:at:at], frame[at:]
		var p Packet
		Parse(&p, head, len(frame))
		if p.Reason != drop.None {
			return
		}
		before := bytes.Clone(frame)
		o := Offload{flags, gso, headerLen, size, start, offset}
		reason := CheckOffload(&p, head, rest, &o)
		if o == (Offload{}) && reason == drop.None {
			changed := 0
			for i := range frame {
				if frame[i] != before[i] {
					changed++
					require.GreaterOrEqual(t, i, int(p.L4), "only a tunnel's inside is written")
				}
			}
			require.LessOrEqual(t, changed, 2)
			return
		}
		require.Equal(t, before, frame)
		if reason != drop.None {
			require.Contains(t, []drop.Reason{drop.OffloadBad, drop.OffloadBadGSO, drop.OffloadBadChecksum}, reason)
			return
		}
		again := o
		require.Equal(t, drop.None, CheckOffload(&p, head, rest, &again))
		require.Equal(t, o, again, "the normal form is stable")
		field, ok := checksumOffset(&p)
		require.True(t, ok)
		require.Equal(t, Offload{Flags: needsChecksum, GSO: o.GSO, HeaderLen: p.Payload, SegmentSize: o.SegmentSize, ChecksumStart: p.L4, ChecksumOffset: field}, o)
		if p.Length+uint32(p.L3) != uint32(len(frame)) {
			require.Equal(t, gsoNone, o.GSO)
		}
		setPseudo(&p, frame, field)
		requireCutRight(t, &p, head, rest, &o)
	})
}
