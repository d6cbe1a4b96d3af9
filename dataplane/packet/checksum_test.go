package packet

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
)

// goldenChecksum is RFC 1071 to the letter: 16 bits at a time, the carry added back each time.
func goldenChecksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		word := uint32(b[i]) << 8
		if i+1 < len(b) {
			word |= uint32(b[i+1])
		}
		sum += word
		if sum > 0xffff {
			sum -= 0xffff
		}
	}
	return ^uint16(sum)
}

func goldenPseudoHeader(src, dst netip.Addr, proto uint8, length int) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	if src.Is4() {
		return append(b, 0, proto, byte(length>>8), byte(length))
	}
	b = binary.BigEndian.AppendUint32(b, uint32(length))
	return append(b, 0, 0, 0, proto)
}

func TestChecksumAgainstRFC1071Example(t *testing.T) {
	// RFC 1071 section 3.
	b := []byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}
	require.Equal(t, uint16(0xddf2), Fold(Sum(b, 0)))
	require.Equal(t, uint16(0x220d), Checksum(b, 0))
}

func TestChecksumAllLengths(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 400)
	for n := range buf {
		for range 4 {
			for i := range buf {
				buf[i] = byte(r.Uint32())
			}
			require.Equal(t, goldenChecksum(buf[:n]), Checksum(buf[:n], 0), "%d bytes: %x", n, buf[:n])
		}
		ones := buf[:n]
		for i := range ones {
			ones[i] = 0xff // the most carries
		}
		require.Equal(t, goldenChecksum(ones), Checksum(ones, 0), "%d bytes of 0xff", n)
	}
}

func TestSumContinuesAcrossSlices(t *testing.T) {
	b := make([]byte, 301)
	for i := range b {
		b[i] = byte(i*7 + 3)
	}
	for cut := 0; cut <= len(b); cut += 2 {
		require.Equal(t, goldenChecksum(b), Checksum(b[cut:], Sum(b[:cut], 0)), "cut at %d", cut)
	}
}

func TestPseudoHeader(t *testing.T) {
	for _, pair := range [][2]string{
		{"10.0.0.1", "255.255.255.254"}, {"1.2.3.4", "192.0.2.255"},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}, {"fd00::1", "2001:db8::ff"},
	} {
		src, dst := netip.MustParseAddr(pair[0]), netip.MustParseAddr(pair[1])
		for _, length := range []int{0, 8, 1480, 65535} {
			got := ^Fold(PseudoHeader(AddrFrom(src), AddrFrom(dst), ProtoUDP, uint32(length)))
			require.Equal(t, goldenChecksum(goldenPseudoHeader(src, dst, ProtoUDP, length)), got, "%v length %d", pair, length)
		}
	}
}

func FuzzChecksum(f *testing.F) {
	f.Add([]byte{}, uint16(0), uint16(0), uint8(0))
	f.Add([]byte{0xff, 0xff, 0xff}, uint16(1), uint16(0xffff), uint8(1))
	f.Add(make([]byte, 1500), uint16(0x1234), uint16(0), uint8(77))
	f.Fuzz(func(t *testing.T, b []byte, word, other uint16, at uint8) {
		require.Equal(t, goldenChecksum(b), Checksum(b, 0))
		// A word replaced: the update gives what summing anew gives. The zero word in front keeps the sum from being all zero,
		// for which the two forms of zero would differ (RFC 1624 section 3).
		b = append([]byte{0x45, 0}, b...)
		i := int(at) % (len(b) / 2) * 2
		if i == 0 {
			i = len(b) / 2 * 2
			b = append(b, 0, 0, 0, 0)
		}
		binary.BigEndian.PutUint16(b[i:], word)
		before := Checksum(b, 0)
		binary.BigEndian.PutUint16(b[i:], other)
		require.Equal(t, goldenChecksum(b), UpdateChecksum16(before, word, other))
	})
}

func TestVerifyL4(t *testing.T) {
	payload := make([]byte, 301)
	for i := range payload {
		payload[i] = byte(i * 13)
	}
	frames := map[string][]byte{
		"tcp4":              ip4{proto: ProtoTCP}.frame(testTCP(6, 0x10, []byte{2, 4, 5, 180}, payload)),
		"udp4":              ip4{proto: ProtoUDP}.frame(testUDP(0, payload)),
		"icmp":              ip4{proto: ProtoICMP}.frame(testICMP(8, 0, payload...)),
		"tcp6":              ip6{next: ProtoTCP}.frame(testTCP(5, 0x10, nil, payload)),
		"udp6":              ip6{next: ProtoUDP}.frame(testUDP(0, payload)),
		"icmpv6":            ip6{next: ProtoICMPv6}.frame(testICMP(128, 0, payload...)),
		"tcp4 with options": ip4{proto: ProtoTCP, options: []byte{1, 1, 1, 0}}.frame(testTCP(5, 0x10, nil, payload)),
	}
	for name, frame := range frames {
		t.Run(name, func(t *testing.T) {
			frame := finishL4(frame)
			var p Packet
			Parse(&p, frame, len(frame))
			padded := append(append([]byte(nil), frame...), 1, 2, 3) // Ethernet padding is not summed
			require.True(t, VerifyL4(&p, padded, nil))
			for cut := int(p.Payload); cut < len(frame); cut += 7 {
				require.True(t, VerifyL4(&p, frame[:cut], [][]byte{frame[cut:]}), "cut at %d", cut)
				half := (len(frame) + cut) / 2
				require.True(t, VerifyL4(&p, frame[:cut], [][]byte{frame[cut:half], nil, frame[half:]}), "cut at %d and %d", cut, half)
			}
			require.False(t, VerifyL4(&p, frame[:len(frame)-1], nil), "payload missing")
			for i := int(p.L4); i < len(frame); i++ {
				frame[i] ^= 0x40
				require.False(t, VerifyL4(&p, frame, nil) && !(p.Proto == ProtoUDP && i-int(p.L4) == 4), "byte %d changed", i)
				frame[i] ^= 0x40
			}
		})
	}
}

func TestVerifyL4NothingToVerify(t *testing.T) {
	routing := testExtension(ProtoUDP, 0, nil)
	routing[2], routing[3] = 4, 1
	done := append([]byte(nil), routing...)
	done[3] = 0
	for name, c := range map[string]struct {
		frame []byte
		want  bool
	}{
		"udp4 without checksum":        {ip4{proto: ProtoUDP}.frame(testUDP(0, []byte("x"))), true},
		"udp6 without checksum":        {ip6{next: ProtoUDP}.frame(testUDP(0, []byte("x"))), false},
		"sctp":                         {ip4{proto: ProtoSCTP}.frame(make([]byte, 20)), true},
		"unknown protocol":             {ip4{proto: 253}.frame(make([]byte, 20)), true},
		"first fragment":               {ip4{proto: ProtoTCP, frag: ipv4MF}.frame(testTCP(5, 0, nil, make([]byte, 20))), true},
		"routing header, segments":     {ip6{next: ProtoRouting}.frame(concat(routing, testUDP(0, []byte("x")))), true},
		"routing header, at its end":   {ip6{next: ProtoRouting}.frame(concat(done, testUDP(0, []byte("x")))), false},
		"tcp4 with a zero checksum":    {ip4{proto: ProtoTCP}.frame(testTCP(5, 0, nil, nil)), false},
		"destination options, udp bad": {ip6{next: ProtoDestination}.frame(concat(testExtension(ProtoUDP, 0, nil), testUDP(0, []byte("x")))), false},
	} {
		var p Packet
		Parse(&p, c.frame, len(c.frame))
		require.Zero(t, p.Reason, name)
		require.Equal(t, c.want, VerifyL4(&p, c.frame, nil), name)
	}
}

func BenchmarkSum(b *testing.B) {
	for _, n := range []int{20, 64, 1500, 9000, 65000} {
		b.Run(fmt.Sprintf("bytes=%d", n), func(b *testing.B) {
			buf := make([]byte, n)
			b.SetBytes(int64(n))
			var s uint64
			for b.Loop() {
				s += Sum(buf, s)
			}
		})
	}
}
