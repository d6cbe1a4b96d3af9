package packet

import (
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
)

// Every header checksum an IPv4 packet may have, and all TTLs: after the decrement the header is what summing anew makes it.
func TestDecrementTTLAllChecksums(t *testing.T) {
	frame := ip4{proto: ProtoUDP}.frame(testUDP(0, nil))
	h := frame[14:34]
	var p Packet
	for id := range 1 << 16 {
		binary.BigEndian.PutUint16(h[4:], uint16(id))
		h[8] = byte(id>>8)%254 + 2
		h[10], h[11] = 0, 0
		binary.BigEndian.PutUint16(h[10:], goldenChecksum(h))
		Parse(&p, frame, len(frame))
		if p.Reason != drop.None {
			t.Fatal(p.Reason)
		}
		ttl := h[8]
		DecrementTTL(&p, frame)
		if h[8] != ttl-1 || p.TTL != ttl-1 || goldenChecksum(h) != 0 {
			t.Fatalf("id %#x: % x", id, h)
		}
		got := binary.BigEndian.Uint16(h[10:])
		h[10], h[11] = 0, 0
		if want := goldenChecksum(h); got != want {
			t.Fatalf("id %#x: checksum %#x, summed anew %#x", id, got, want)
		}
	}
}

func TestDecrementHopLimit(t *testing.T) {
	for _, vlan := range []bool{false, true} {
		packet := ip6{next: ProtoUDP}.packet(testUDP(0, nil))
		frame := testEthernet(EtherTypeIPv6, packet)
		if vlan {
			frame = testEthernet(EtherTypeVLAN, testVLAN(EtherTypeIPv6, packet))
		}
		var p Packet
		Parse(&p, frame, len(frame))
		want := append([]byte(nil), frame...)
		want[int(p.L3)+7] = 63
		DecrementTTL(&p, frame)
		require.Equal(t, want, frame)
		require.Equal(t, uint8(63), p.TTL)
	}
}

func TestSetEthernet(t *testing.T) {
	dst, src := MAC{2, 1, 2, 3, 4, 5}, MAC{2, 9, 8, 7, 6, 5}
	packets := map[uint16][]byte{
		EtherTypeIPv4: ip4{proto: ProtoTCP}.packet(testTCP(5, 2, nil, []byte("payload"))),
		EtherTypeIPv6: ip6{next: ProtoFragment}.packet(concat(testFragment(ProtoUDP, 0, true, 9), testUDP(3000, make([]byte, 16)))),
	}
	for etherType, packet := range packets {
		want := testEthernet(etherType, packet)
		copy(want[0:], dst[:])
		copy(want[6:], src[:])
		var wantPacket Packet
		Parse(&wantPacket, want, len(want))
		for _, vlan := range []int{0, VLANTagLen} {
			t.Run(fmt.Sprintf("%#x/tag=%d", etherType, vlan), func(t *testing.T) {
				frame := testEthernet(etherType, packet)
				if vlan != 0 {
					frame = testEthernet(EtherTypeVLAN, testVLAN(etherType, packet))
				}
				var p Packet
				Parse(&p, frame, len(frame))
				start := SetEthernet(frame, &p, dst, src)
				require.Equal(t, vlan, start)
				require.Equal(t, want, frame[start:])
				p.EthDst, p.EthSrc = dst, src // what the frame had is remembered
				require.Equal(t, wantPacket, p)
			})
		}
	}
}

func TestRewriteAllocatesNothing(t *testing.T) {
	frame := ip4{proto: ProtoUDP}.frame(testUDP(0, nil))
	var p Packet
	require.Zero(t, testing.AllocsPerRun(100, func() {
		Parse(&p, frame, len(frame))
		DecrementTTL(&p, frame)
		SetEthernet(frame, &p, testSrcMAC, testDstMAC)
		DecrementTTL(&p, frame)
		frame[14+8], frame[14+10] = frame[14+8]+2, frame[14+10]-2
	}))
}

func BenchmarkRewrite(b *testing.B) {
	for name, frame := range map[string][]byte{
		"family=4": ip4{proto: ProtoUDP}.frame(testUDP(0, nil)),
		"family=6": ip6{next: ProtoUDP}.frame(testUDP(0, nil)),
	} {
		b.Run(name, func(b *testing.B) {
			var p Packet
			Parse(&p, frame, len(frame))
			b.ReportAllocs()
			for b.Loop() {
				DecrementTTL(&p, frame)
				SetEthernet(frame, &p, testSrcMAC, testDstMAC)
			}
		})
	}
}
