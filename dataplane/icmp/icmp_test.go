package icmp

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

var (
	router4 = packet.AddrFrom(netip.MustParseAddr("10.240.0.11"))
	router6 = packet.AddrFrom(netip.MustParseAddr("fd00:240::11"))
)

// frame serialises layers with lengths and checksums made right.
func frame(t testing.TB, ls ...gopacket.SerializableLayer) []byte {
	b := gopacket.NewSerializeBuffer()
	require.NoError(t, gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ls...))
	return bytes.Clone(b.Bytes())
}

func ethernet(etherType layers.EthernetType) *layers.Ethernet {
	return &layers.Ethernet{SrcMAC: []byte{2, 0, 0, 0, 0, 1}, DstMAC: []byte{2, 0, 0, 0, 0, 2}, EthernetType: etherType}
}

func ipv4(proto layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Protocol: proto, SrcIP: []byte{10, 244, 1, 2}, DstIP: []byte{10, 244, 2, 3}}
}

func ipv6(next layers.IPProtocol) *layers.IPv6 {
	return &layers.IPv6{Version: 6, HopLimit: 64, NextHeader: next,
		SrcIP: netip.MustParseAddr("fd12::1").AsSlice(), DstIP: netip.MustParseAddr("fd12::2").AsSlice()}
}

func udp4(t testing.TB, change func(*layers.IPv4), payload int) []byte {
	ip, udp := ipv4(layers.IPProtocolUDP), &layers.UDP{SrcPort: 4000, DstPort: 53}
	if change != nil {
		change(ip)
	}
	require.NoError(t, udp.SetNetworkLayerForChecksum(ip))
	return frame(t, ethernet(layers.EthernetTypeIPv4), ip, udp, pattern(payload))
}

func udp6(t testing.TB, change func(*layers.IPv6), payload int) []byte {
	ip, udp := ipv6(layers.IPProtocolUDP), &layers.UDP{SrcPort: 4000, DstPort: 53}
	if change != nil {
		change(ip)
	}
	require.NoError(t, udp.SetNetworkLayerForChecksum(ip))
	return frame(t, ethernet(layers.EthernetTypeIPv6), ip, udp, pattern(payload))
}

func icmp4(t testing.TB, typ, code uint8) []byte {
	return frame(t, ethernet(layers.EthernetTypeIPv4), ipv4(layers.IPProtocolICMPv4), &layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(typ, code)}, pattern(40))
}

func icmp6(t testing.TB, typ, code uint8) []byte {
	ip, m := ipv6(layers.IPProtocolICMPv6), &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(typ, code)}
	require.NoError(t, m.SetNetworkLayerForChecksum(ip))
	return frame(t, ethernet(layers.EthernetTypeIPv6), ip, m, pattern(40))
}

func pattern(n int) gopacket.Payload {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 29)
	}
	return b
}

func parse(b []byte) packet.Packet {
	var p packet.Packet
	packet.Parse(&p, b, len(b))
	return p
}

func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// check verifies a built error against what the RFCs ask, with its checksums summed anew.
func check(t *testing.T, b []byte, kind Error, mtu int, p *packet.Packet, about []byte) {
	e := parse(b)
	require.Equal(t, drop.None.String(), e.Reason.String())
	require.Equal(t, len(b), int(e.Length)+14)
	require.Equal(t, p.Kind, e.Kind)
	require.Equal(t, p.Src, e.Dst)
	require.Equal(t, uint8(64), e.TTL)
	want := map[Error][2][2]uint8{ // IPv4 and IPv6, type and code
		TimeExceeded: {{11, 0}, {3, 0}}, NetUnreachable: {{3, 0}, {1, 0}}, HostUnreachable: {{3, 1}, {1, 3}},
		AdminProhibited: {{3, 13}, {1, 1}}, PacketTooBig: {{3, 4}, {2, 0}},
	}[kind]
	m := b[e.L4:]
	quoted, room := about[p.L3:min(len(about), int(p.L3)+int(p.Length))], 576-28
	if p.Kind == packet.KindIPv4 {
		require.Equal(t, router4, e.Src)
		require.Equal(t, want[0], [2]uint8{e.ICMPType, e.ICMPCode})
		require.Zero(t, checksum(m))
		if kind == PacketTooBig {
			require.Equal(t, mtu, int(binary.BigEndian.Uint16(m[6:])))
			require.Zero(t, binary.BigEndian.Uint16(m[4:]))
		} else {
			require.Zero(t, binary.BigEndian.Uint32(m[4:]), "unused, and no length of RFC 4884")
		}
	} else {
		room = 1280 - 48
		require.Equal(t, router6, e.Src)
		require.Equal(t, want[1], [2]uint8{e.ICMPType, e.ICMPCode})
		pseudo := append(append([]byte{}, b[22:54]...), 0, 0, byte(len(m)>>8), byte(len(m)), 0, 0, 0, 58)
		require.Zero(t, checksum(append(pseudo, m...)))
		if kind == PacketTooBig {
			require.Equal(t, mtu, int(binary.BigEndian.Uint32(m[4:])))
		} else {
			require.Zero(t, binary.BigEndian.Uint32(m[4:]))
		}
	}
	require.Equal(t, quoted[:min(room, len(quoted))], m[8:])
}

func TestBuild(t *testing.T) {
	for name, about := range map[string][]byte{
		"udp4":        udp4(t, nil, 32),
		"udp4 long":   udp4(t, nil, 1400),
		"udp4 padded": append(udp4(t, nil, 1), make([]byte, 17)...),
		"udp4 options": udp4(t, func(ip *layers.IPv4) {
			ip.Options = []layers.IPv4Option{{OptionType: 148, OptionLength: 4, OptionData: []byte{0, 0}}}
		}, 100),
		"udp4 first":    udp4(t, func(ip *layers.IPv4) { ip.Flags = layers.IPv4MoreFragments }, 1000),
		"icmp echo":     icmp4(t, 8, 0),
		"icmp reply":    icmp4(t, 0, 0),
		"udp6":          udp6(t, nil, 32),
		"udp6 long":     udp6(t, nil, 1400),
		"icmpv6 echo":   icmp6(t, 128, 0),
		"udp4 tagged":   append(append(udp4(t, nil, 32)[:12:12], 0x81, 0, 0, 5), udp4(t, nil, 32)[12:]...),
		"udp4 1 MTU 4":  udp4(t, nil, 548-28),
		"udp4 one more": udp4(t, nil, 549-28),
	} {
		for kind := TimeExceeded; kind < NumErrors; kind++ {
			t.Run(name+"/"+kind.String(), func(t *testing.T) {
				p := parse(about)
				require.Equal(t, drop.None.String(), p.Reason.String())
				src := router4
				if p.Kind == packet.KindIPv6 {
					src = router6
				}
				dst := bytes.Repeat([]byte{0xa5}, MaxFrame)
				n, ok := Build(dst, kind, 1400, src, &p, about)
				require.True(t, ok)
				require.Equal(t, bytes.Repeat([]byte{0xa5}, 12), dst[:12], "the Ethernet addresses are the caller's")
				require.Equal(t, bytes.Repeat([]byte{0xa5}, MaxFrame-n), dst[n:])
				check(t, dst[:n], kind, 1400, &p, about)
				_, ok = Build(dst[:n-1], kind, 1400, src, &p, about)
				require.False(t, ok, "no room")

				// The head of a chain: what it holds is quoted, with the lengths of the whole.
				p = packet.Packet{}
				head := about[:54]
				packet.Parse(&p, head, len(about))
				if p.Reason == drop.None {
					n, ok = Build(dst, kind, 1400, src, &p, head)
					require.True(t, ok)
					check(t, dst[:n], kind, 1400, &p, head)
				}
			})
		}
	}
}

func TestBuildReadsAsError(t *testing.T) {
	about := udp4(t, nil, 100)
	p := parse(about)
	dst := make([]byte, MaxFrame)
	n, ok := Build(dst, PacketTooBig, 1400, router4, &p, about)
	require.True(t, ok)
	pk := gopacket.NewPacket(dst[:n], layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, pk.ErrorLayer())
	ip := pk.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	require.Equal(t, uint8(0xc0), ip.TOS)
	require.Equal(t, layers.IPv4DontFragment, ip.Flags)
	m := pk.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	require.Equal(t, layers.CreateICMPv4TypeCode(3, 4), m.TypeCode)
	require.Equal(t, uint16(1400), m.Seq)
}

// RFC 1122 section 3.2.2, RFC 1812 section 4.3.2.7, RFC 4443 section 2.4(e).
func TestBuildRefuses(t *testing.T) {
	v6 := func(a string) []byte { return netip.MustParseAddr(a).AsSlice() }
	groupMAC := func(b []byte) []byte { b[0] |= 1; return b }
	everything := []Error{TimeExceeded, NetUnreachable, HostUnreachable, AdminProhibited, PacketTooBig}
	for name, c := range map[string]struct {
		about []byte
		kinds []Error // the errors that may be sent all the same
	}{
		"unicast4, for comparison": {udp4(t, nil, 32), everything},
		"unicast6, for comparison": {udp6(t, nil, 32), everything},
		"icmp unreachable":         {icmp4(t, 3, 1), nil},
		"icmp quench":              {icmp4(t, 4, 0), nil},
		"icmp redirect":            {icmp4(t, 5, 1), nil},
		"icmp time exceeded":       {icmp4(t, 11, 0), nil},
		"icmp parameter problem":   {icmp4(t, 12, 0), nil},
		"icmp of unknown type":     {icmp4(t, 99, 0), nil},
		"icmp timestamp":           {icmp4(t, 13, 0), everything},
		"icmpv6 unreachable":       {icmp6(t, 1, 4), nil},
		"icmpv6 too big":           {icmp6(t, 2, 0), nil},
		"icmpv6 unknown error":     {icmp6(t, 127, 0), nil},
		"icmpv6 redirect":          {icmp6(t, 137, 0), nil},
		"icmpv6 unknown query":     {icmp6(t, 200, 0), everything},
		"later fragment4": {frame(t, ethernet(layers.EthernetTypeIPv4),
			func() *layers.IPv4 { ip := ipv4(layers.IPProtocolUDP); ip.FragOffset = 100; return ip }(), pattern(40)), nil},
		"later fragment6": {frame(t, ethernet(layers.EthernetTypeIPv6), ipv6(layers.IPProtocolIPv6Fragment),
			gopacket.Payload(append([]byte{17, 0, 0x10, 0, 0, 0, 0, 1}, pattern(40)...))), nil},
		"group4":           {udp4(t, func(ip *layers.IPv4) { ip.DstIP = []byte{239, 1, 1, 1} }, 9), nil},
		"broadcast4":       {udp4(t, func(ip *layers.IPv4) { ip.DstIP = []byte{255, 255, 255, 255} }, 9), nil},
		"group6":           {udp6(t, func(ip *layers.IPv6) { ip.DstIP = v6("ff0e::1") }, 9), []Error{PacketTooBig}},
		"ethernet group4":  {groupMAC(udp4(t, nil, 9)), nil},
		"ethernet group6":  {groupMAC(udp6(t, nil, 9)), []Error{PacketTooBig}},
		"source class E":   {udp4(t, func(ip *layers.IPv4) { ip.SrcIP = []byte{250, 1, 1, 1} }, 9), nil},
		"source loopback":  {udp4(t, func(ip *layers.IPv4) { ip.SrcIP = []byte{127, 1, 1, 1} }, 9), nil},
		"source group4":    {udp4(t, func(ip *layers.IPv4) { ip.SrcIP = []byte{224, 1, 1, 1} }, 9), nil},
		"source nowhere6":  {udp6(t, func(ip *layers.IPv6) { ip.SrcIP = v6("::") }, 9), nil},
		"source group6":    {udp6(t, func(ip *layers.IPv6) { ip.SrcIP = v6("ff02::1") }, 9), nil},
		"truncated":        {udp4(t, nil, 9)[:40], nil},
		"no IP":            {frame(t, ethernet(layers.EthernetTypeLLC), pattern(40)), nil},
		"not even a frame": {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			p := parse(c.about)
			src := router4
			if p.Kind == packet.KindIPv6 {
				src = router6
			}
			for kind := None; kind <= NumErrors; kind++ {
				dst := make([]byte, MaxFrame)
				n, ok := Build(dst, kind, 1400, src, &p, c.about)
				want := bytes.IndexByte(errorBytes(c.kinds), byte(kind)) >= 0
				require.Equal(t, want, ok, kind.String())
				if !ok {
					require.Zero(t, n)
					require.Equal(t, make([]byte, MaxFrame), dst, "untouched")
				}
			}
		})
	}
	for _, about := range [][]byte{udp4(t, nil, 32), udp6(t, nil, 32)} {
		p := parse(about)
		src := router6
		if p.Kind == packet.KindIPv6 {
			src = router4
		}
		_, ok := Build(make([]byte, MaxFrame), TimeExceeded, 0, src, &p, about)
		require.False(t, ok, "source of the other family")
		_, ok = Build(make([]byte, MaxFrame), TimeExceeded, 0, packet.Addr{}, &p, about)
		require.False(t, ok, "no source")
	}
}

func errorBytes(kinds []Error) []byte {
	var b []byte
	for _, k := range kinds {
		b = append(b, byte(k))
	}
	return b
}

func TestErrorNames(t *testing.T) {
	want := []string{"none", "time_exceeded", "net_unreachable", "host_unreachable", "admin_prohibited", "packet_too_big", "invalid"}
	for i, name := range want {
		require.Equal(t, name, Error(i).String())
	}
}

func FuzzICMP(f *testing.F) {
	for _, b := range [][]byte{
		udp4(f, nil, 32), udp6(f, nil, 32), udp4(f, nil, 1400), udp6(f, nil, 1400), icmp4(f, 8, 0), icmp6(f, 128, 0), icmp4(f, 3, 0),
	} {
		f.Add(b, uint8(TimeExceeded), uint32(0))
		f.Add(b, uint8(PacketTooBig), uint32(1280))
	}
	f.Fuzz(func(t *testing.T, about []byte, k uint8, mtu uint32) {
		if len(about) >= 34 && about[12] == 8 && about[13] == 0 { // make the header checksum right
			if h := about[14:]; len(h) >= int(h[0]&15)*4 && h[0]&15 >= 5 {
				h = h[:h[0]&15*4]
				h[10], h[11] = 0, 0
				binary.BigEndian.PutUint16(h[10:], checksum(h))
			}
		}
		p := parse(about)
		src := router4
		if p.Kind == packet.KindIPv6 {
			src = router6
		}
		before := bytes.Clone(about)
		dst := make([]byte, MaxFrame)
		kind, m := Error(k)%NumErrors, int(mtu&0xffff)
		n, ok := Build(dst, kind, m, src, &p, about)
		require.True(t, bytes.Equal(before, about))
		if ok {
			check(t, dst[:n], kind, m, &p, about)
			// No error about the error.
			e := parse(dst[:n])
			_, ok = Build(make([]byte, MaxFrame), kind, m, src, &e, dst[:n])
			require.False(t, ok)
		}
	})
}

func TestBuildAllocatesNothing(t *testing.T) {
	dst := make([]byte, MaxFrame)
	frames := [][]byte{udp4(t, nil, 1400), udp6(t, nil, 1400)}
	var p packet.Packet
	require.Zero(t, testing.AllocsPerRun(10, func() {
		for i, b := range frames {
			packet.Parse(&p, b, len(b))
			Build(dst, TimeExceeded, 0, [2]packet.Addr{router4, router6}[i], &p, b)
		}
	}))
}

func BenchmarkBuild(b *testing.B) {
	for name, about := range map[string][]byte{"family=4/frame=64": udp4(b, nil, 22), "family=4/frame=1514": udp4(b, nil, 1472), "family=6/frame=1514": udp6(b, nil, 1452)} {
		b.Run(name, func(b *testing.B) {
			p := parse(about)
			src := router4
			if p.Kind == packet.KindIPv6 {
				src = router6
			}
			dst := make([]byte, MaxFrame)
			b.ReportAllocs()
			for b.Loop() {
				if _, ok := Build(dst, TimeExceeded, 0, src, &p, about); !ok {
					b.Fatal("refused")
				}
			}
		})
	}
}
