package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/test/captures"
)

// parseDirty parses into a Packet full of garbage, as a reused one may be.
func parseDirty(head []byte, total int) Packet {
	p := Packet{
		Src: Addr{^uint64(0), ^uint64(0)}, Dst: Addr{^uint64(0), ^uint64(0)}, EthDst: MAC{1, 2, 3, 4, 5, 6}, EthSrc: MAC{1, 2, 3, 4, 5, 6},
		Reason: 0xff, Kind: 0xff, Proto: 0xff, TTL: 0xff, L3: 0xffff, L4: 0xffff, Payload: 0xffff, Flags: 0xffff, Length: 0xffffffff,
		SrcPort: 0xffff, DstPort: 0xffff, TCPFlags: 0xff, ICMPType: 0xff, ICMPCode: 0xff, FragmentOffset: 0xffff, FragmentID: 0xffffffff, FragmentHeader: 0xffff,
	}
	Parse(&p, head, total)
	return p
}

func TestParse(t *testing.T) {
	for _, c := range parseCases() {
		t.Run(c.name, func(t *testing.T) {
			head := c.frame
			if c.cut != 0 {
				head = head[:c.cut]
			}
			p := parseDirty(head, len(c.frame))
			require.Equal(t, c.reason.String(), p.Reason.String())
			g := goldenParse(head, len(c.frame))
			require.Equal(t, c.reason.String(), g.Reason.String(), "the golden model")
			if c.reason != drop.None {
				return
			}
			require.Equal(t, g, p)
			if c.want != nil {
				want := p
				c.want(&want)
				require.Equal(t, want, p)
			}
		})
	}
}

func TestParseFieldsOfPlainPackets(t *testing.T) {
	frame := ip4{proto: ProtoTCP, frag: ipv4DF, ttl: 9}.frame(testTCP(7, 0x18, make([]byte, 8), []byte("abc")))
	require.Equal(t, Packet{
		Src: testSrc4, Dst: testDst4, EthDst: testDstMAC, EthSrc: testSrcMAC, Kind: KindIPv4, Proto: ProtoTCP, TTL: 9,
		L3: 14, L4: 34, Payload: 62, Flags: FlagDF | FlagL4, Length: 51, SrcPort: 40000, DstPort: 443, TCPFlags: 0x18,
	}, parseDirty(frame, len(frame)))
	frame = testEthernet(EtherTypeVLAN, testVLAN(EtherTypeIPv6, ip6{next: ProtoUDP}.packet(testUDP(0, []byte("abc")))))
	require.Equal(t, Packet{
		Src: testSrc6, Dst: testDst6, EthDst: testDstMAC, EthSrc: testSrcMAC, Kind: KindIPv6, Proto: ProtoUDP, TTL: 64,
		L3: 18, L4: 58, Payload: 66, Flags: FlagDF | FlagL4, Length: 51, SrcPort: 5353, DstPort: 53,
	}, parseDirty(frame, len(frame)))
}

// Every reason that is about the packet itself, and that Parse may give, is given by one of the cases.
func TestParseCasesCoverReasons(t *testing.T) {
	elsewhere := map[drop.Reason]bool{ // checked by others
		drop.EthNotForUs: true, drop.IPMulticast: true, drop.OffloadBad: true, drop.OffloadBadGSO: true, drop.OffloadBadChecksum: true,
		drop.FrameTooLong: true, drop.NDBad: true,
	}
	seen := map[drop.Reason]bool{}
	for _, c := range parseCases() {
		seen[c.reason] = true
	}
	for r := drop.None; r <= drop.NDBad; r++ {
		require.NotEqual(t, elsewhere[r], seen[r], r.String())
	}
}

// Every way to cut a frame short gives the golden model's answer.
func TestParseTruncations(t *testing.T) {
	for _, c := range parseCases() {
		if len(c.frame) > 3000 {
			continue
		}
		for n := range min(len(c.frame), 300) {
			p, g := parseDirty(c.frame[:n], n), goldenParse(c.frame[:n], n)
			require.Equal(t, g.Reason.String(), p.Reason.String(), "%s cut to %d", c.name, n)
			p, g = parseDirty(c.frame[:n], len(c.frame)), goldenParse(c.frame[:n], len(c.frame))
			require.Equal(t, g.Reason.String(), p.Reason.String(), "%s with %d bytes in the first buffer", c.name, n)
		}
	}
}

func FuzzParse(f *testing.F) {
	captures.Each(func(b []byte) { f.Add(b, uint16(0), false) })
	for _, c := range parseCases() {
		if len(c.frame) > 4000 {
			continue
		}
		f.Add(c.frame, uint16(c.cut), false)
		if c.reason == drop.None {
			f.Add(c.frame, uint16(c.cut), true)
		}
	}
	f.Fuzz(func(t *testing.T, frame []byte, cut uint16, repair bool) {
		head := frame
		if cut != 0 && int(cut) < len(frame) {
			head = frame[:cut]
		}
		if repair {
			repairIPv4Checksum(frame) // lets the fuzzer past the checksum
		}
		before := bytes.Clone(frame)
		p := parseDirty(head, len(frame))
		require.True(t, bytes.Equal(before, frame), "Parse wrote to the frame")

		g := goldenParse(head, len(frame))
		require.Equal(t, g.Reason.String(), p.Reason.String())
		require.Equal(t, g.Kind, p.Kind)
		var any Packet
		parseAny(&any, head, len(frame))
		require.Equal(t, any, p, "the short way and the long way disagree")
		if p.Reason != drop.None {
			return
		}
		require.Equal(t, g, p)
		checkOffsets(t, &p, head, len(frame))
		if len(head) == len(frame) {
			compareGopacket(t, frame, &p)
		}
		VerifyL4(&p, head, [][]byte{frame[len(head):]})
	})
}

// repairIPv4Checksum makes the header checksum of a frame right, if there is a header.
func repairIPv4Checksum(frame []byte) {
	for _, at := range []int{14, 18} {
		if len(frame) < at+20 || binary.BigEndian.Uint16(frame[at-2:]) != EtherTypeIPv4 {
			continue
		}
		n := int(frame[at]&15) * 4
		if n < 20 || len(frame) < at+n {
			continue
		}
		h := frame[at : at+n]
		h[10], h[11] = 0, 0
		binary.BigEndian.PutUint16(h[10:], goldenChecksum(h))
	}
}

func checkOffsets(t *testing.T, p *Packet, head []byte, total int) {
	require.NotEqual(t, KindOther, p.Kind)
	require.Contains(t, []uint16{14, 18}, p.L3)
	require.LessOrEqual(t, int(p.L3)+int(p.Length), total)
	if p.Kind == KindARP {
		return
	}
	require.GreaterOrEqual(t, p.L4, p.L3+20)
	require.LessOrEqual(t, int(p.L4), len(head))
	require.LessOrEqual(t, p.L4-p.L3, uint16(p.Length))
	if p.Flags&FlagL4 != 0 {
		require.Greater(t, p.Payload, p.L4)
		require.LessOrEqual(t, int(p.Payload), len(head))
		require.LessOrEqual(t, int(p.Payload-p.L3), int(p.Length))
	}
}

// compareGopacket compares with an independent implementation, where that one can read the packet at all.
func compareGopacket(t *testing.T, frame []byte, p *Packet) {
	pk := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.DecodeOptions{NoCopy: true})
	if net := pk.NetworkLayer(); net != nil && p.Kind != KindARP {
		src, dst := net.NetworkFlow().Endpoints()
		require.Equal(t, fmt.Sprint(src), p.Src.Netip().String())
		require.Equal(t, fmt.Sprint(dst), p.Dst.Netip().String())
		switch ip := net.(type) {
		case *layers.IPv4:
			require.Equal(t, ip.TTL, p.TTL)
			require.Equal(t, uint32(ip.Length), p.Length)
			require.Equal(t, uint8(ip.Protocol), p.Proto)
		case *layers.IPv6:
			require.Equal(t, ip.HopLimit, p.TTL)
			require.Equal(t, uint32(ip.Length)+40, p.Length)
		}
	}
	if p.Flags&(FlagL4|FlagFragment) != FlagL4 {
		return
	}
	switch l4 := pk.TransportLayer().(type) {
	case *layers.TCP:
		if p.Proto == ProtoTCP {
			require.Equal(t, [2]uint16{uint16(l4.SrcPort), uint16(l4.DstPort)}, [2]uint16{p.SrcPort, p.DstPort})
			require.Equal(t, l4.SYN, p.TCPFlags&2 != 0)
			require.Equal(t, len(l4.Contents), int(p.Payload-p.L4))
		}
	case *layers.UDP:
		if p.Proto == ProtoUDP {
			require.Equal(t, [2]uint16{uint16(l4.SrcPort), uint16(l4.DstPort)}, [2]uint16{p.SrcPort, p.DstPort})
		}
	case *layers.SCTP:
		if p.Proto == ProtoSCTP {
			require.Equal(t, [2]uint16{uint16(l4.SrcPort), uint16(l4.DstPort)}, [2]uint16{p.SrcPort, p.DstPort})
		}
	}
}

func TestParseAllocatesNothing(t *testing.T) {
	cases := parseCases()
	var p Packet
	require.Zero(t, testing.AllocsPerRun(10, func() {
		for i := range cases {
			Parse(&p, cases[i].frame, len(cases[i].frame))
		}
	}))
}

// The compiler's own word that the hot functions inline and that Parse's short way has no bounds checks left.
func TestHotFunctionsInlineWithoutBoundsChecks(t *testing.T) {
	if testing.Short() {
		t.Skip("runs the compiler")
	}
	out, err := exec.Command("go", "build", "-gcflags=-m -d=ssa/check_bce", ".").CombinedOutput()
	if err != nil {
		t.Skipf("the compiler does not run here: %v: %s", err, out)
	}
	text := string(out)
	for _, name := range []string{"Fold", "PseudoHeader", "UpdateChecksum16", "DecrementTTL", "SetEthernet", "unusual4", "unusual6", "Addr.Is4", "Addr.V4", "AddrFrom4"} {
		require.Regexp(t, `can inline (\(\*?\w+\)\.)?`+name+`\n`, text)
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "./parse.go:") || strings.HasPrefix(line, "./checksum.go:") {
			require.NotContains(t, line, "InBounds", "a bounds check in the hot path")
		}
	}
}

func benchmarkFrames() map[string][]byte {
	fill := func(frame []byte, n int) []byte { return append(frame, make([]byte, max(n-len(frame), 0))...) }
	return map[string][]byte{
		"family=4/proto=udp/frame=64":          fill(ip4{proto: ProtoUDP}.frame(testUDP(0, make([]byte, 18))), 64),
		"family=4/proto=tcp/frame=64":          fill(ip4{proto: ProtoTCP}.frame(testTCP(5, 0x10, nil, nil)), 64),
		"family=4/proto=tcp/frame=1514":        ip4{proto: ProtoTCP}.frame(testTCP(8, 0x10, make([]byte, 12), make([]byte, 1448))),
		"family=6/proto=udp/frame=64":          fill(ip6{next: ProtoUDP}.frame(testUDP(0, nil)), 64),
		"family=6/proto=tcp/frame=1514":        ip6{next: ProtoTCP}.frame(testTCP(8, 0x10, make([]byte, 12), make([]byte, 1428))),
		"family=4/proto=icmp/frame=98":         ip4{proto: ProtoICMP}.frame(testICMP(8, 0, make([]byte, 60)...)),
		"family=4/proto=udp/frame=64/vlan=1":   fill(testEthernet(EtherTypeVLAN, testVLAN(EtherTypeIPv4, ip4{proto: ProtoUDP}.packet(testUDP(0, nil)))), 64),
		"family=6/proto=udp/frame=78/header=1": ip6{next: ProtoDestination}.frame(concat(testExtension(ProtoUDP, 0, nil), testUDP(0, []byte("12345678")))),
	}
}

func BenchmarkParse(b *testing.B) {
	for name, frame := range benchmarkFrames() {
		b.Run(name, func(b *testing.B) {
			var p Packet
			b.ReportAllocs()
			for b.Loop() {
				Parse(&p, frame, len(frame))
			}
			if p.Reason != drop.None {
				b.Fatal(p.Reason)
			}
		})
	}
}
