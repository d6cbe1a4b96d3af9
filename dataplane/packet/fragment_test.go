package packet

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
)

// fragmentAll fragments the frame, whose payload is split at split bytes, and returns the fragments.
func fragmentAll(t *testing.T, frame []byte, split, mtu int) [][]byte {
	var p Packet
	Parse(&p, frame, len(frame))
	require.Equal(t, drop.None.String(), p.Reason.String())
	split = min(max(split, int(p.L4)), len(frame))
	var f Fragmenter
	require.True(t, f.Init(&p, frame[:split], frame[split:], mtu))
	var all [][]byte
	for more := true; more; {
		dst := bytes.Repeat([]byte{0xa5}, int(p.L3)+mtu+4)
		var n int
		n, more = f.Next(dst[:int(p.L3)+mtu])
		require.NotZero(t, n)
		require.Equal(t, []byte{0xa5, 0xa5, 0xa5, 0xa5}, dst[int(p.L3)+mtu:])
		all = append(all, dst[:n])
		require.Less(t, len(all), 8200)
	}
	n, more := f.Next(make([]byte, 70000))
	require.Zero(t, n)
	require.False(t, more)
	return all
}

// copiedOptions is what fragments after the first carry: option by option, those with the copied bit, padded with zeroes.
func copiedOptions(o []byte) (kept []byte) {
	for i := 0; i < len(o) && o[i] != 0; {
		n := 1
		if o[i] != 1 {
			n = int(o[i+1])
			if o[i] >= 128 {
				kept = append(kept, o[i:i+n]...)
			}
		}
		i += n
	}
	return append(kept, make([]byte, -len(kept)&3)...)
}

// reassemble checks that the fragments, in order, are those of the original, each no longer than mtu, and returns their data.
func reassemble(t *testing.T, original []byte, fragments [][]byte, mtu int) []byte {
	var whole Packet
	Parse(&whole, original, len(original))
	wantFlags := whole.Flags &^ (FlagL4 | FlagFragment | FlagFirst | FlagMore | FlagOptions)
	options := original[whole.L3+20 : whole.L4]
	var data []byte
	for i, b := range fragments {
		var p Packet
		Parse(&p, b, len(b))
		require.Equal(t, drop.None.String(), p.Reason.String(), "fragment %d", i)
		h := b[p.L3:p.L4]
		flags := binary.BigEndian.Uint16(h[6:])
		require.Equal(t, original[:whole.L3], b[:p.L3], "Ethernet")
		require.Equal(t, len(b), int(p.L3)+int(p.Length), "length")
		require.LessOrEqual(t, int(p.Length), mtu)
		require.Equal(t, [4]any{whole.Src, whole.Dst, whole.Proto, whole.TTL}, [4]any{p.Src, p.Dst, p.Proto, p.TTL})
		require.Equal(t, original[whole.L3+4:whole.L3+6], h[4:6], "identification")
		require.Equal(t, wantFlags&FlagDF != 0, flags&ipv4DF != 0)
		require.Equal(t, int(whole.FragmentOffset)+len(data), int(flags&ipv4OffsetMask)*8)
		require.Equal(t, i < len(fragments)-1 || whole.Flags&FlagMore != 0, flags&ipv4MF != 0)
		if i == 0 {
			require.Equal(t, options, h[20:])
		} else {
			require.Equal(t, append([]byte{}, copiedOptions(options)...), append([]byte{}, h[20:]...), "options")
		}
		if i < len(fragments)-1 {
			require.Greater(t, int(p.Length)+8, mtu, "a fragment that could have held more")
		}
		data = append(data, b[p.L4:]...)
	}
	return data
}

func TestFragmenter(t *testing.T) {
	payload := make([]byte, 4000)
	for i := range payload {
		payload[i] = byte(i * 31)
	}
	datagram := testUDP(0, payload)
	options := []byte{7, 7, 4, 0, 0, 0, 0, 1, 148, 4, 0, 0, 1, 130, 3, 9} // record route, nop, router alert (copied), nop, security (copied)
	frames := map[string][]byte{
		"plain":          ip4{proto: ProtoUDP, id: 77}.frame(datagram),
		"df":             ip4{proto: ProtoUDP, id: 77, frag: ipv4DF}.frame(datagram),
		"options":        ip4{proto: ProtoUDP, id: 77, options: options}.frame(datagram),
		"first fragment": ip4{proto: ProtoUDP, id: 77, frag: ipv4MF}.frame(testUDP(9000, payload)),
		"middle":         ip4{proto: ProtoUDP, id: 77, frag: ipv4MF | 300}.frame(payload),
		"last":           ip4{proto: ProtoUDP, id: 77, frag: 300, options: []byte{1, 1, 1, 0}}.frame(payload[:3999]),
		"vlan":           testEthernet(EtherTypeVLAN, testVLAN(EtherTypeIPv4, ip4{proto: ProtoUDP, id: 77}.packet(datagram))),
		"padded":         append(ip4{proto: ProtoUDP}.frame(datagram), 1, 2, 3),
	}
	for name, frame := range frames {
		for _, mtu := range []int{68, 69, 576, 1500, 4008, 9000} {
			for _, split := range []int{0, 100, 2048, len(frame)} {
				t.Run(fmt.Sprintf("%s/mtu=%d/split=%d", name, mtu, split), func(t *testing.T) {
					var p Packet
					Parse(&p, frame, len(frame))
					all := fragmentAll(t, frame, split, mtu)
					require.Equal(t, frame[p.L4:uint32(p.L3)+p.Length], reassemble(t, frame, all, mtu))
				})
			}
		}
	}
}

func TestFragmenterRefuses(t *testing.T) {
	var f Fragmenter
	var p Packet
	v4 := ip4{proto: ProtoUDP}.frame(testUDP(0, make([]byte, 100)))
	Parse(&p, v4, len(v4))
	require.False(t, f.Init(&p, v4, nil, 27), "no room for 8 bytes")
	require.False(t, f.Init(&p, v4[:100], nil, 1500), "payload missing")
	empty := ip4{proto: 253}.frame(nil)
	var q Packet
	Parse(&q, empty, len(empty))
	require.False(t, f.Init(&q, empty, nil, 1500), "nothing to cut")
	require.True(t, f.Init(&p, v4, nil, 28))
	n, more := f.Next(make([]byte, 41))
	require.Zero(t, n, "dst too short")
	require.False(t, more)

	v6 := ip6{next: ProtoUDP}.frame(testUDP(0, make([]byte, 100)))
	Parse(&p, v6, len(v6))
	require.False(t, f.Init(&p, v6, nil, 1500), "IPv6 is never fragmented on the way")
}

func FuzzFragment(f *testing.F) {
	f.Add([]byte("some payload that is a little longer than a fragment"), []byte{}, uint16(28), uint16(10), uint16(0))
	f.Add(bytes.Repeat([]byte("x"), 3001), []byte{1, 7, 4, 0, 0x94, 4, 0, 0}, uint16(576), uint16(1000), uint16(99))
	f.Add(bytes.Repeat([]byte("y"), 3000), []byte{0x82, 3, 0}, uint16(100), uint16(1000), uint16(ipv4MF|300))
	f.Fuzz(func(t *testing.T, payload, options []byte, mtu, split, frag uint16) {
		options = options[:min(len(options), 40)]
		options = append(options[:len(options):len(options)], make([]byte, -len(options)&3)...)
		if len(payload) == 0 || len(payload) > 60000 {
			return
		}
		frame := ip4{proto: 253, id: frag ^ mtu, options: options, frag: frag &^ 0x8000}.frame(payload)
		var p Packet
		Parse(&p, frame, len(frame))
		if p.Reason != drop.None {
			return
		}
		m := max(int(mtu)%2000, int(p.L4-p.L3)+8)
		all := fragmentAll(t, frame, int(split), m)
		require.True(t, bytes.Equal(payload, reassemble(t, frame, all, m)))
		// Fragments of fragments are fragments of the whole.
		smaller := max(m/2, int(p.L4-p.L3)+8)
		var data []byte
		for _, fragment := range all {
			data = append(data, reassemble(t, fragment, fragmentAll(t, fragment, int(split)/2, smaller), smaller)...)
		}
		require.True(t, bytes.Equal(payload, data))
	})
}

func TestFragmenterAllocatesNothing(t *testing.T) {
	frame := ip4{proto: ProtoUDP}.frame(testUDP(0, make([]byte, 8000)))
	dst := make([]byte, 1514)
	var p Packet
	var f Fragmenter
	require.Zero(t, testing.AllocsPerRun(10, func() {
		Parse(&p, frame, len(frame))
		f.Init(&p, frame, nil, 1500)
		for more := true; more; {
			_, more = f.Next(dst)
		}
	}))
}

func BenchmarkFragment(b *testing.B) {
	for _, size := range []int{2000, 9000, 65000} {
		b.Run(fmt.Sprintf("bytes=%d/mtu=1500", size), func(b *testing.B) {
			frame := ip4{proto: ProtoUDP}.frame(testUDP(0, make([]byte, size-28)))
			dst := make([]byte, 1514)
			var p Packet
			var f Fragmenter
			Parse(&p, frame, len(frame))
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				f.Init(&p, frame, nil, 1500)
				for more := true; more; {
					_, more = f.Next(dst)
				}
			}
		})
	}
}
