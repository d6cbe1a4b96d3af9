package packet

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"github.com/overplane/overplane/dataplane/drop"
)

// golden is the parser as one would write it from the RFCs without a thought for speed: a cursor over the bytes, every failure a panic
// with the reason. It shares no code with Parse.
type golden struct {
	head []byte
	end  int // where the IP packet ends, counted from the start of the frame
	p    Packet
}

func goldenParse(head []byte, total int) (p Packet) {
	g := &golden{head: head}
	defer func() {
		if r := recover(); r != nil {
			g.p.Reason = r.(drop.Reason)
		}
		p = g.p
	}()
	g.frame(total)
	return
}

func (g *golden) take(at, n int, short drop.Reason) []byte {
	if at+n > len(g.head) {
		panic(short)
	}
	return g.head[at : at+n]
}

func be(b []byte) int {
	v := 0
	for _, x := range b {
		v = v<<8 | int(x)
	}
	return v
}

func (g *golden) frame(total int) {
	eth := g.take(0, 14, drop.EthTruncated)
	copy(g.p.EthDst[:], eth)
	copy(g.p.EthSrc[:], eth[6:])
	etherType, at := be(eth[12:14]), 14
	if etherType == 0x8100 {
		etherType, at = be(g.takeTag(16)), 18
	}
	g.p.L3 = uint16(at)
	switch etherType {
	case 0x8100, 0x88a8:
		panic(drop.VLANStacked)
	case 0x0806:
		g.p.Kind = KindARP
		g.arp(at)
	case 0x0800:
		g.p.Kind = KindIPv4
		g.ipv4(at, total)
	case 0x86dd:
		g.p.Kind = KindIPv6
		g.ipv6(at, total)
	default:
		panic(drop.EthUnknownType)
	}
}

func (g *golden) takeTag(at int) []byte {
	g.p.L3 = 14
	return g.take(at, 2, drop.EthTruncated)
}

func (g *golden) arp(at int) {
	a := g.take(at, 28, drop.ARPBad)
	if !bytes.Equal(a[:6], []byte{0, 1, 8, 0, 6, 4}) {
		panic(drop.ARPBad)
	}
	g.p.Length = 28
	g.p.Src, g.p.Dst = AddrFrom(netip.AddrFrom4([4]byte(a[14:18]))), AddrFrom(netip.AddrFrom4([4]byte(a[24:28])))
}

func (g *golden) ipv4(at, total int) {
	h := g.take(at, 20, drop.IPTruncated)
	ihl, length := int(h[0]&0xf), be(h[2:4])
	switch {
	case h[0]>>4 != 4:
		panic(drop.IPBadVersion)
	case ihl < 5:
		panic(drop.IPBadHeaderLength)
	case length < ihl*4, at+length > total:
		panic(drop.IPBadLength)
	}
	h = g.take(at, ihl*4, drop.IPTruncated)
	if goldenChecksum(h) != 0 {
		panic(drop.IPBadChecksum)
	}
	g.end = at + length
	g.p.Length, g.p.TTL, g.p.Proto, g.p.L4 = uint32(length), h[8], h[9], uint16(at+ihl*4)

	if ihl > 5 {
		g.p.Flags |= FlagOptions
	}
	for i := 20; i < len(h) && h[i] != 0; {
		if h[i] == 1 {
			i++
			continue
		}
		if i+1 >= len(h) || h[i+1] < 2 || i+int(h[i+1]) > len(h) {
			panic(drop.IPBadOptions)
		}
		if name := h[i] & 0x1f; h[i]>>5 == 4 && (name == 3 || name == 9) { // copied, class 0, loose (3) or strict (9) source route
			panic(drop.IPSourceRoute)
		}
		i += int(h[i+1])
	}

	src, dst := netip.AddrFrom4([4]byte(h[12:16])), netip.AddrFrom4([4]byte(h[16:20]))
	g.p.Src, g.p.Dst = AddrFrom(src), AddrFrom(dst)
	thisNet, broadcast := netip.MustParsePrefix("0.0.0.0/8"), netip.MustParseAddr("255.255.255.255")
	if thisNet.Contains(src) || src.IsLoopback() || src.IsMulticast() || src == broadcast {
		panic(drop.IPBadSource)
	}
	if thisNet.Contains(dst) || dst.IsLoopback() {
		panic(drop.IPBadDestination)
	}
	if dst.IsMulticast() || dst == broadcast {
		g.p.Flags |= FlagMulticast
	}

	if h[6]&0x40 != 0 {
		g.p.Flags |= FlagDF
	}
	more, offset := h[6]&0x20 != 0, be(h[6:8])%8192*8
	if !more && offset == 0 {
		g.l4()
		return
	}
	g.p.FragmentID = uint32(be(h[4:6]))
	g.fragment(offset, length-ihl*4, more)
	if offset+length > 65535 {
		panic(drop.FragmentBad)
	}
	if offset == 8 || offset == 16 {
		if g.p.Proto == ProtoTCP {
			panic(drop.FragmentBad)
		}
	}
	if offset == 0 {
		g.firstFragment()
	}
}

func (g *golden) fragment(offset, data int, more bool) {
	g.p.Flags |= FlagFragment
	g.p.FragmentOffset = uint16(offset)
	if offset == 0 {
		g.p.Flags |= FlagFirst
	}
	if more {
		g.p.Flags |= FlagMore
		if data%8 != 0 {
			panic(drop.FragmentBad)
		}
	}
	if data == 0 {
		panic(drop.FragmentBad)
	}
}

func (g *golden) firstFragment() {
	defer func() {
		if r := recover(); r == drop.L4Truncated || r == drop.L4BadHeaderLength {
			panic(drop.FragmentBad)
		} else if r != nil {
			panic(r)
		}
	}()
	g.l4()
}

func (g *golden) ipv6(at, total int) {
	h := g.take(at, 40, drop.IPTruncated)
	payload := be(h[4:6])
	if h[0]>>4 != 6 {
		panic(drop.IPBadVersion)
	}
	if payload == 0 && h[6] != 59 || at+40+payload > total {
		panic(drop.IPBadLength)
	}
	g.end = at + 40 + payload
	src, dst := netip.AddrFrom16([16]byte(h[8:24])), netip.AddrFrom16([16]byte(h[24:40]))
	g.p.Length, g.p.TTL, g.p.Flags = uint32(40+payload), h[7], FlagDF
	g.p.Src, g.p.Dst = AddrFrom(src), AddrFrom(dst)
	if dst.IsMulticast() {
		g.p.Flags |= FlagMulticast
	}
	g.p.Proto, g.p.L4 = h[6], uint16(at+40)
	for count, done := 0, false; !done; count++ {
		done = g.extension(count)
	}

	if src.IsMulticast() || src.IsLoopback() || src.Is4In6() {
		panic(drop.IPBadSource)
	}
	if dst.IsUnspecified() || dst.IsLoopback() || dst.Is4In6() {
		panic(drop.IPBadDestination)
	}
	if g.p.Flags&FlagFragment == 0 {
		g.l4()
	} else if g.p.Flags&FlagFirst != 0 {
		g.firstFragment()
	}
	if src.IsUnspecified() {
		withoutAddress := map[uint8]bool{131: true, 132: true, 133: true, 135: true, 143: true}
		if !dst.IsMulticast() || g.p.Proto != 58 || g.p.Flags&FlagFragment != 0 || !withoutAddress[g.p.ICMPType] {
			panic(drop.IPBadSource)
		}
	}
}

// extension steps over one extension header. It says whether there was none, or nothing more can be seen.
func (g *golden) extension(count int) (done bool) {
	at := int(g.p.L4)
	kind := g.p.Proto
	if kind != 0 && kind != 43 && kind != 44 && kind != 51 && kind != 60 {
		return true
	}
	g.p.Flags |= FlagOptions
	if count == 8 {
		panic(drop.IP6TooManyHeaders)
	}
	if kind == 0 && count != 0 {
		panic(drop.IP6BadExtension)
	}
	fits := func(n int) []byte {
		first := g.p.Flags&FlagFirst != 0
		switch {
		case at+n > g.end && first, at+n > len(g.head) && first:
			panic(drop.FragmentBad)
		case at+n > g.end:
			panic(drop.IP6BadExtension)
		}
		return g.take(at, n, drop.IPTruncated)
	}
	x := fits(8)
	size := 8 * (1 + int(x[1]))
	switch kind {
	case 43:
		if x[2] == 0 {
			panic(drop.IP6RoutingHeader)
		}
	case 51:
		size = 4 * (2 + int(x[1]))
	case 44:
		if g.p.FragmentHeader != 0 {
			panic(drop.IP6BadExtension)
		}
		g.p.FragmentHeader, g.p.FragmentID = uint16(at), uint32(be(x[4:8]))
		size = 8
	}
	fits(size)
	g.p.Proto = x[0]
	g.p.L4 = uint16(at + size)
	if kind == 44 {
		offset, more := be(x[2:4])/8*8, x[3]&1 == 1
		if offset != 0 || more {
			g.fragment(offset, g.end-at-8, more)
			// Payload length of the whole: extension headers in front, and everything up to this fragment's end.
			if (at-int(g.p.L3)-40)+offset+(g.end-at-8) > 65535 {
				panic(drop.FragmentBad)
			}
		}
		return offset != 0
	}
	return false
}

func (g *golden) l4() {
	at := int(g.p.L4)
	take := func(n int) []byte {
		if at+n > g.end {
			panic(drop.L4Truncated)
		}
		return g.take(at, n, drop.L4Truncated)
	}
	ports := func(h []byte) {
		g.p.SrcPort, g.p.DstPort = binary.BigEndian.Uint16(h), binary.BigEndian.Uint16(h[2:])
	}
	payload := 8
	switch {
	case g.p.Proto == 6:
		h := take(20)
		payload = int(h[12]>>4) * 4
		if payload < 20 || at+payload > g.end {
			panic(drop.L4BadHeaderLength)
		}
		take(payload)
		ports(h)
		g.p.TCPFlags = h[13]
	case g.p.Proto == 17:
		h := take(8)
		if n := be(h[4:6]); n < 8 || g.p.Flags&FlagFragment == 0 && at+n > g.end {
			panic(drop.L4BadHeaderLength)
		}
		ports(h)
	case g.p.Proto == 1 && g.p.Kind == KindIPv4:
		h := take(8)
		g.p.ICMPType, g.p.ICMPCode = h[0], h[1]
		if h[0] == 0 || h[0] == 8 {
			ports([]byte{h[4], h[5], h[4], h[5]})
		}
	case g.p.Proto == 58 && g.p.Kind == KindIPv6:
		h := take(8)
		g.p.ICMPType, g.p.ICMPCode = h[0], h[1]
		if h[0] == 128 || h[0] == 129 {
			ports([]byte{h[4], h[5], h[4], h[5]})
		}
		if h[0] >= 133 && h[0] <= 137 {
			g.p.Flags |= FlagND
		}
	case g.p.Proto == 132:
		payload = 12
		ports(take(12))
	default:
		return
	}
	g.p.Payload = uint16(at + payload)
	g.p.Flags |= FlagL4
}
