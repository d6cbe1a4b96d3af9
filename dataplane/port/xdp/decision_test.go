package xdp

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// model decides what becomes of a frame, the slow and obvious way. It returns the counter's name.
type model struct {
	cidrs   []netip.Prefix
	members map[[6]byte]bool
	uplink  [6]byte
	gateway [6]byte
	routed  bool
	outside bool

	translation Translation
	flows       []Flow
}

// extensions walks an IPv6 packet's extension headers, at most four. more: it ends too early.
func extensions(ip []byte) (proto byte, l4 []byte, more bool) {
	proto, l4 = ip[6], ip[40:]
	for range 4 {
		if proto != 0 && proto != 60 && proto != 51 {
			break
		}
		if len(l4) < 8 {
			return proto, nil, true
		}
		size := (int(l4[1]) + 1) * 8
		if proto == 51 {
			size = (int(l4[1]) + 2) * 4
		}
		if len(ip)-len(l4)+size > 40+256 {
			return 0, nil, false
		}
		proto = l4[0]
		l4 = l4[min(size, len(l4)):]
	}
	return proto, l4, false
}

// otherwise decides on a frame without pod addresses. It says "asked" for what may be ours or the host's.
func (m *model) otherwise(frame []byte) string {
	t, ip := &m.translation, frame[14:]
	proto, l4 := byte(0), []byte(nil)
	if binary.BigEndian.Uint16(frame[12:]) == 0x0800 {
		size := int(ip[0]&15) * 4
		switch {
		case netip.AddrFrom4([4]byte(ip[16:])) != t.Node4 || size < 20:
			return "passed"
		case binary.BigEndian.Uint16(ip[6:])&0x3fff != 0:
			return "asked"
		}
		if proto = ip[9]; size <= len(ip) {
			l4 = ip[size:]
		}
	} else {
		if netip.AddrFrom16([16]byte(ip[24:])) != t.Node6 {
			return "passed"
		}
		var more bool
		if proto, l4, more = extensions(ip); more {
			return "passed"
		}
		if proto == 44 {
			return "asked"
		}
	}
	if len(l4) < 8 {
		return "passed"
	}
	f := Flow{Proto: proto}
	if f.Remote = netip.AddrFrom4([4]byte(ip[12:])); binary.BigEndian.Uint16(frame[12:]) == 0x86dd {
		f.Remote = netip.AddrFrom16([16]byte(ip[8:]))
	}
	if proto == 132 {
		f.RemotePort, f.NodePort = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	}
	if slices.Contains([]byte{47, 50, 132}, proto) && slices.Contains(m.flows, f) {
		return "redirected"
	}
	inRange := func(p uint16) bool { return p >= t.First && p <= t.Last }
	port, id := binary.BigEndian.Uint16(l4[2:]), binary.BigEndian.Uint16(l4[4:])
	switch {
	case proto == 6 && inRange(port) && !slices.Contains(t.HostTCP, port), proto == 17 && inRange(port) && !slices.Contains(t.HostUDP, port):
		return "redirected"
	case proto == 1 && slices.Contains([]byte{3, 4, 11, 12}, l4[0]), proto == 58 && l4[0] >= 1 && l4[0] <= 4,
		proto == 1 && l4[0] == 0 && inRange(id), proto == 58 && l4[0] == 129 && inRange(id):
		return "asked"
	}
	return "passed"
}

func (m *model) decide(frame []byte) string {
	if [6]byte(frame) != m.uplink {
		return "passed_other_mac"
	}
	var src, dst netip.Addr
	switch etherType := binary.BigEndian.Uint16(frame[12:]); {
	case etherType == 0x0800 && len(frame) >= 34:
		src, dst = netip.AddrFrom4([4]byte(frame[26:])), netip.AddrFrom4([4]byte(frame[30:]))
	case etherType == 0x86dd && len(frame) >= 54:
		src, dst = netip.AddrFrom16([16]byte(frame[22:])), netip.AddrFrom16([16]byte(frame[38:]))
	default:
		return "passed"
	}
	srcIsPod, dstIsPod := false, false
	for _, c := range m.cidrs {
		srcIsPod = srcIsPod || c.Contains(src)
		dstIsPod = dstIsPod || c.Contains(dst)
	}
	switch from := [6]byte(frame[6:]); {
	case !srcIsPod && !dstIsPod:
		return m.otherwise(frame)
	case m.outside && !srcIsPod && from == m.gateway:
	case m.routed && (from != m.gateway || !srcIsPod), !m.routed && !m.members[from]:
		return "dropped_not_member"
	}
	return "redirected"
}

var xdpAction = map[string]uint32{
	"redirected": 4, "passed": 2, "passed_other_mac": 2,
	"dropped_not_member": 1, "dropped_no_socket": 1, "dropped_stale": 1,
}

// TestDecisionAgainstModel runs the program in the kernel on random frames.
func TestDecisionAgainstModel(t *testing.T) {
	v := newVeth(t, 1, 1500)
	s := openSteered(t, v, steeredConfig{})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))

	asked, ours, flows, extended := 0, 0, 0, 0
	for round := range 40 {
		if round == 20 { // the variant for kernels and drivers without multi-buffer
			in(t, v.near, func() { require.NoError(t, s.steering.attachVariant(v.nearIndex, false, false)) })
		}
		m := randomModel(rng, v.nearMAC)
		require.NoError(t, s.steering.SetPodCIDRs(m.cidrs))
		var members [][6]byte
		for mac := range m.members {
			members = append(members, mac)
		}
		require.NoError(t, s.steering.SetMembers(members))
		require.NoError(t, s.steering.SetGatewayMAC(m.gateway))
		require.NoError(t, s.steering.SetTranslation(m.translation))
		setFlows(t, s.steering, m.flows)
		require.NoError(t, s.steering.change(func(c *bpf.SteerSteerConfig) error {
			if c.Flags &^= flagRouted; m.routed {
				c.Flags |= flagRouted
			}
			return nil
		}))
		require.NoError(t, s.steering.SetOutside(m.outside))
		before := s.counters(t)
		want := map[string]uint64{}
		for range 500 {
			frame := m.randomFrame(rng)
			verdict := m.decide(frame)
			asked += map[bool]int{true: 1}[verdict == "asked"]
			if verdict == "asked" {
				verdict = "redirected"
			}
			if verdict == "redirected" && binary.BigEndian.Uint16(frame[12:]) == 0x86dd && m.otherwise(frame) != "passed" {
				proto, _, _ := extensions(frame[14:])
				flows += map[bool]int{true: 1}[proto == 132 || proto == 47 || proto == 50]
				extended += map[bool]int{true: 1}[proto != frame[20]]
			}
			ours += map[bool]int{true: 1}[verdict == "redirected" && m.otherwise(frame) == "redirected"]
			want[verdict]++
			action, err := s.steering.prog.Run(&ebpf.RunOptions{Data: frame})
			require.NoError(t, err)
			require.Equal(t, xdpAction[verdict], action, "round %d, want %s: %+v\nframe %x", round, verdict, m, frame)
		}
		for name, n := range s.counters(t) {
			require.Equal(t, want[name], n-before[name], "counter %s", name)
		}
	}
	require.Greater(t, asked, 50)
	require.Greater(t, ours, 50)
	require.Greater(t, flows, 20)
	require.Greater(t, extended, 20)
}

// setFlows makes the flows those.
func setFlows(t *testing.T, s *Steering, flows []Flow) {
	t.Helper()
	old, err := s.Flows()
	require.NoError(t, err)
	for _, f := range old {
		require.NoError(t, s.RemoveFlow(f))
	}
	for _, f := range flows {
		require.NoError(t, s.AddFlow(f))
	}
	got, err := s.Flows()
	require.NoError(t, err)
	for _, f := range flows {
		require.Contains(t, got, f)
	}
	require.NoError(t, s.RemoveFlow(Flow{Proto: 132, Remote: netip.MustParseAddr("192.0.2.1")}), "one that is not there")
}

func randomMAC(rng *rand.Rand) (mac [6]byte) {
	binary.BigEndian.PutUint32(mac[:], rng.Uint32()&^0x01000000)
	mac[5] = byte(rng.Uint32())
	return mac
}

func randomModel(rng *rand.Rand, uplink [6]byte) *model {
	m := &model{uplink: uplink, gateway: randomMAC(rng), members: map[[6]byte]bool{}, routed: rng.IntN(2) == 0, outside: rng.IntN(2) == 0}
	if rng.IntN(4) > 0 {
		var a [16]byte
		for i := range a {
			a[i] = byte(rng.Uint32())
		}
		m.translation = Translation{Node4: netip.AddrFrom4([4]byte(a[:])), Node6: netip.AddrFrom16(a), First: uint16(rng.Uint32()), Last: 65535}
		m.translation.Last -= uint16(rng.IntN(int(65535-m.translation.First) + 1))
		for range rng.IntN(50) {
			m.translation.HostTCP = append(m.translation.HostTCP, m.translation.First+uint16(rng.IntN(20)))
			m.translation.HostUDP = append(m.translation.HostUDP, m.translation.First+uint16(rng.IntN(20)))
		}
		for i := range 12 {
			f := Flow{Proto: []uint8{47, 50, 132}[i%3], Remote: netip.AddrFrom4([4]byte{198, 51, 100, byte(rng.IntN(4))})}
			if i%2 == 0 {
				f.Remote = netip.AddrFrom16([16]byte{0x20, 1, 15: byte(rng.IntN(4))})
			}
			if f.Proto == 132 {
				f.RemotePort, f.NodePort = m.translation.First+uint16(rng.IntN(4)), m.translation.First+uint16(rng.IntN(4))
			}
			m.flows = append(m.flows, f)
		}
	}
	for range rng.IntN(5) {
		m.members[randomMAC(rng)] = true
	}
	for range rng.IntN(MaxPodCIDRs + 1) {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], rng.Uint32())
		m.cidrs = append(m.cidrs, netip.PrefixFrom(netip.AddrFrom4(b), rng.IntN(33)))
	}
	for range rng.IntN(MaxPodCIDRs + 1) {
		var b [16]byte
		binary.BigEndian.PutUint64(b[:], rng.Uint64())
		binary.BigEndian.PutUint64(b[8:], rng.Uint64())
		m.cidrs = append(m.cidrs, netip.PrefixFrom(netip.AddrFrom16(b), rng.IntN(129)))
	}
	if len(m.cidrs) > 0 && rng.IntN(4) > 0 { // /0 and the like make all frames alike
		kept := m.cidrs[:0]
		for _, c := range m.cidrs {
			if c.Bits() >= 8 {
				kept = append(kept, c)
			}
		}
		m.cidrs = kept
	}
	return m
}

// randomFrame is often close to the model's borders.
func (m *model) randomFrame(rng *rand.Rand) []byte {
	b := make([]byte, 14+rng.IntN(80)+rng.IntN(2)*rng.IntN(300))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	if rng.IntN(8) > 0 {
		copy(b, m.uplink[:])
		if rng.IntN(16) == 0 {
			b[rng.IntN(6)] ^= 1 << rng.IntN(8)
		}
	}
	switch rng.IntN(4) {
	case 0:
	case 1:
		copy(b[6:], m.gateway[:])
	default:
		for mac := range m.members {
			copy(b[6:], mac[:])
			break
		}
	}
	if rng.IntN(32) == 0 {
		b[6+rng.IntN(6)] ^= 1 << rng.IntN(8)
	}
	etherTypes := []uint16{0x0800, 0x0800, 0x0800, 0x86dd, 0x86dd, 0x86dd, 0x0806, 0x8100}
	binary.BigEndian.PutUint16(b[12:], etherTypes[rng.IntN(len(etherTypes))])
	for _, at := range []struct{ v4, v6 int }{{26, 22}, {30, 38}} {
		if len(m.cidrs) == 0 || rng.IntN(3) == 0 {
			continue
		}
		c := m.cidrs[rng.IntN(len(m.cidrs))]
		a := c.Addr().AsSlice()
		for bit := c.Bits(); bit < len(a)*8; bit++ { // any host part
			a[bit/8] ^= byte(rng.IntN(2)) << (7 - bit%8)
		}
		if c.Bits() > 0 && rng.IntN(4) == 0 { // just outside
			bit := c.Bits() - 1
			a[bit/8] ^= 1 << (7 - bit%8)
		}
		off := at.v6
		if c.Addr().Is4() {
			off = at.v4
		}
		if off < len(b) {
			copy(b[off:], a)
		}
	}
	if m.translation.Node4.IsValid() && len(b) >= 62 && rng.IntN(2) == 0 { // for the node, and near a border
		at := 34
		if binary.BigEndian.Uint16(b[12:]) == 0x0800 {
			copy(b[30:], m.translation.Node4.AsSlice())
			copy(b[26:], []byte{198, 51, 100, byte(rng.IntN(4))})
			b[23] = []byte{1, 6, 17, 58, 132, 47, 50}[rng.IntN(7)]
			if b[14] = 0x45 + byte(rng.IntN(3)); rng.IntN(8) == 0 {
				b[14] = byte(rng.Uint32())
			}
			at = 14 + int(b[14]&15)*4
			if rng.IntN(4) > 0 {
				b[20], b[21] = b[20]&0xc0, 0
			}
		} else {
			copy(b[38:], m.translation.Node6.AsSlice())
			copy(b[22:], []byte{0x20, 1, 15: byte(rng.IntN(4))})
			b[20] = []byte{1, 6, 17, 44, 58, 132, 47, 50}[rng.IntN(8)]
			at = 54
			next := 20 // where the next header's number goes
			for range rng.IntN(6) {
				b[next], b[at] = []byte{0, 60, 51, 43}[rng.IntN(4)&(rng.IntN(8)|2)], b[next]
				next = at
				if b[at+1] = byte(rng.IntN(3)); rng.IntN(16) == 0 {
					b[at+1] = byte(rng.Uint32())
				}
				size := (int(b[at+1]) + 1) * 8
				if at += size; at+10 > len(b) {
					break
				}
			}
		}
		if at+8 <= len(b) {
			b[at] = []byte{0, 1, 3, 4, 5, 8, 11, 128, 129}[rng.IntN(9)]
			port := m.translation.First + uint16(rng.IntN(24)) - 2
			if rng.IntN(2) == 0 {
				port = m.translation.First + uint16(rng.IntN(4))
				binary.BigEndian.PutUint16(b[at:], m.translation.First+uint16(rng.IntN(4)))
			}
			binary.BigEndian.PutUint16(b[at+2:], port)
			binary.BigEndian.PutUint16(b[at+4:], port)
		}
	}
	return b
}

// TestCounterNames compares the names with the enumeration in C.
func TestCounterNames(t *testing.T) {
	src, err := os.ReadFile("bpf/steer.h")
	require.NoError(t, err)
	body := regexp.MustCompile(`(?s)enum steer_counter \{(.*?)\n\}`).FindSubmatch(src)
	require.NotNil(t, body)
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^\tSTEER_(\w+),`).FindAllSubmatch(body[1], -1) {
		names = append(names, strings.ToLower(string(m[1])))
	}
	require.Equal(t, append(counterNames[:], "counters"), names)
	spec, err := bpf.LoadSteer()
	require.NoError(t, err)
	require.Equal(t, uint32(len(counterNames)), spec.Maps[bpf.SteerMapCounters].MaxEntries)
	require.Equal(t, uint32(2*MaxMembers), spec.Maps[bpf.SteerMapMembers].MaxEntries)
	require.Equal(t, uint32(MaxQueues), spec.Maps[bpf.SteerMapXsks].MaxEntries)
	require.Equal(t, uint32(MaxWorkers*heartbeatStride), spec.Maps[bpf.SteerMapHeartbeats].MaxEntries)
}

func TestSetPrefixes(t *testing.T) {
	p := netip.MustParsePrefix
	many := func(n int) (out []netip.Prefix) {
		for range n {
			out = append(out, p("10.0.0.0/8"))
		}
		return out
	}
	for _, c := range []struct {
		name  string
		cidrs []netip.Prefix
		err   string
	}{
		{"none", nil, ""},
		{"eight of both", append(many(8), p("fd00::/8"), p("fd00::/8")), ""},
		{"nine", many(9), "at most 8 of a family"},
		{"mapped", []netip.Prefix{p("::ffff:10.0.0.0/104")}, "want an IPv4 or IPv6 prefix"},
		{"invalid", []netip.Prefix{{}}, "want an IPv4 or IPv6 prefix"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var cfg bpf.SteerSteerConfig
			err := setPrefixes(&cfg, c.cidrs)
			if c.err != "" {
				require.ErrorContains(t, err, c.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, len(c.cidrs), int(cfg.Prefixes4+cfg.Prefixes6))
		})
	}
}
