package agent

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
)

func contains(s, sub string) bool { return strings.Contains(s, sub) }

// render writes a snapshot as people would: the golden files' form.
func render(b Built) string {
	var out strings.Builder
	s := b.Snapshot
	fmt.Fprintf(&out, "node %v %v  nosnat %v\n", netipText(s.Node4), netipText(s.Node6), s.NoSNAT)
	for i, p := range s.Ports {
		fmt.Fprintf(&out, "port %d kind %d name %q mac %s addr %s %s\n", i, p.Kind, p.Name, formatMAC(p.MAC), netipText(p.Addr4), netipText(p.Addr6))
	}
	for _, p := range s.FIB.Pools() {
		fmt.Fprintf(&out, "pool %s /%d\n", p.CIDR, p.BlockBits)
	}
	s.FIB.Walk(func(p netip.Prefix, e fib.Entry) bool {
		fmt.Fprintf(&out, "%-26s %s", p, e.Kind())
		if e.Kind() != fib.Unreachable {
			a := s.FIB.Adjacency(e.Adjacency())
			fmt.Fprintf(&out, " dst %s src %s port %d mtu %d", formatMAC(a.Dst), formatMAC(a.Src), a.Port, a.MTU)
		}
		out.WriteByte('\n')
		return true
	})
	for _, p := range b.Problems {
		fmt.Fprintf(&out, "problem: %s\n", p)
	}
	return out.String()
}

func netipText(a packet.Addr) string {
	if a == (packet.Addr{}) {
		return "-"
	}
	return a.Netip().String()
}

func testInput(t testing.TB, s *controlv1.NodeState) Input {
	t.Helper()
	var d *desired
	if s != nil {
		var err error
		d, err = parseDesired(s)
		require.NoError(t, err)
	}
	f := newFakePlatform().facts
	return Input{Node: "n1", Facts: f, state: d, UplinkMTU: 1500, PodMTU: 1500, HostName: "ovp0", Pods: []PodPort{
		{Slot: 3, Name: "default/a", MAC: packet.MAC{10, 1, 1, 1, 1, 1}, Addr4: netip.MustParseAddr("10.244.1.7"), Addr6: netip.MustParseAddr("fd12:3456:789a:0:1::7")},
		{Slot: 2, Name: "default/b", MAC: packet.MAC{10, 1, 1, 1, 1, 2}, Addr4: netip.MustParseAddr("10.244.1.8")},
	}}
}

func TestBuildGolden(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Input, *controlv1.NodeState)
	}{
		{"direct", func(*Input, *controlv1.NodeState) {}},
		{"routed", func(in *Input, _ *controlv1.NodeState) {
			in.Routed = true
			in.Facts.GatewayMAC6 = packet.MAC{2, 0, 0, 0, 0, 0xfd}
		}},
		{"no-state", func(in *Input, _ *controlv1.NodeState) { in.state = nil }},
		{"off-link-member", func(_ *Input, s *controlv1.NodeState) {
			s.Members[1].Ipv4, s.Members[1].Ipv6 = "10.250.0.2", "fd00:250::2"
		}},
		{"member-without-mac", func(_ *Input, s *controlv1.NodeState) { s.Members[2].Mac = "" }},
		{"own-entry-wrong", func(_ *Input, s *controlv1.NodeState) {
			s.Members[0].Mac, s.Members[0].Ipv4 = "02:00:00:00:00:99", "10.240.0.99"
		}},
		{"external-snat", func(_ *Input, s *controlv1.NodeState) { s.Snat = &controlv1.SnatRules{Disabled: true} }},
		{"gateway-unresolved", func(in *Input, _ *controlv1.NodeState) {
			in.Routed = true
			in.Facts.GatewayMAC4 = packet.MAC{}
			in.Facts.Gateway6 = netip.Addr{}
		}},
		{"no-gateway", func(in *Input, _ *controlv1.NodeState) {
			in.Facts.Gateway4, in.Facts.Gateway6 = netip.Addr{}, netip.Addr{}
		}},
		{"jumbo-uplink-small-pods", func(in *Input, _ *controlv1.NodeState) { in.UplinkMTU, in.PodMTU = 9000, 1400 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			state := threeNodes()
			in := testInput(t, state)
			c.change(&in, state)
			if in.state != nil {
				in.state, _ = parseDesired(state)
			}
			got := render(Build(in))
			golden := filepath.Join("testdata", "build-"+c.name+".golden")
			if os.Getenv("UPDATE_GOLDEN") != "" {
				require.NoError(t, os.MkdirAll("testdata", 0o755))
				require.NoError(t, os.WriteFile(golden, []byte(got), 0o644))
			}
			want, err := os.ReadFile(golden)
			require.NoError(t, err, "UPDATE_GOLDEN=1 makes it")
			require.Equal(t, string(want), got)
		})
	}
}

func TestBuildIsIndependentOfOrder(t *testing.T) {
	state := threeNodes()
	want := render(Build(testInput(t, state)))
	slices.Reverse(state.Members)
	slices.Reverse(state.Routes)
	slices.Reverse(state.Pools)
	in := testInput(t, state)
	slices.Reverse(in.Pods)
	require.Equal(t, want, render(Build(in)))
}

func TestBuildSurvivesCollisions(t *testing.T) {
	state := threeNodes()
	state.Members[1].Ipv4 = "10.240.0.11" // this node's own
	state.Members[0].Ipv4 = ""
	b := Build(testInput(t, state))
	require.Len(t, b.Problems, 1)
	require.Contains(t, b.Problems[0], "10.240.0.11/32")
	require.Equal(t, fib.Host, b.Snapshot.FIB.Lookup(packet.AddrFrom(netip.MustParseAddr("10.240.0.11"))).Kind(), "own addresses win")
}

func TestOwnBlocksAndUnusedPoolSpaceAreUnreachable(t *testing.T) {
	b := Build(testInput(t, threeNodes()))
	for addr, want := range map[string]fib.Kind{
		"10.244.1.7": fib.Pod, "10.244.1.9": fib.Unreachable, "10.244.200.1": fib.Unreachable, "10.244.2.1": fib.Node, "8.8.8.8": fib.Outside,
		"10.240.0.11": fib.Host, "10.240.0.12": fib.Member, "10.240.0.13": fib.Member, "10.96.0.1": fib.Host, "fd12:3456:789a:0:1::7": fib.Pod,
		"fd12:3456:789a:0:1::8": fib.Unreachable, "fd12:3456:789a:0:3::1": fib.Node, "2001:db8::1": fib.Outside, "fd00:240::13": fib.Member,
	} {
		require.Equal(t, want, b.Snapshot.FIB.Lookup(packet.AddrFrom(netip.MustParseAddr(addr))).Kind(), addr)
	}
}

func TestMTUIsClampedToSixteenBits(t *testing.T) {
	in := testInput(t, threeNodes())
	in.UplinkMTU = 65536 // a loopback's
	b := Build(in)
	e := b.Snapshot.FIB.Lookup(packet.AddrFrom(netip.MustParseAddr("10.244.2.1")))
	require.EqualValues(t, 65535, b.Snapshot.FIB.Adjacency(e.Adjacency()).MTU)
}

func TestPodAddressPolicy(t *testing.T) {
	d, err := parseDesired(threeNodes())
	require.NoError(t, err)
	for _, c := range []struct{ a4, a6, err string }{
		{"10.244.1.2", "fd12:3456:789a:0:1::2", ""},
		{"10.244.1.254", "", ""},
		{"", "fd12:3456:789a:0:1::ff", ""},
		{"", "", "needs an IPv4 or an IPv6 address"},
		{"10.244.1.0", "", "the subnet's own"},
		{"10.244.1.255", "", "broadcast"},
		{"", "fd12:3456:789a:0:1::", "the subnet's own"},
		{"10.244.2.1", "", "none of this node's blocks"},
		{"", "fd12:3456:789a:0:1:1::1", "does not fit 32 bits"},
		{"10.244.1.2", "fd12:3456:789a:0:1::3", "must have the same index"},
		{"10.244.1.2", "fd12:3456:789a:0:2::2", "none of this node's blocks"},
	} {
		a4, _ := netip.ParseAddr(c.a4)
		a6, _ := netip.ParseAddr(c.a6)
		err := d.checkPodAddresses(a4, a6)
		if c.err == "" {
			require.NoError(t, err, "%+v", c)
		} else {
			require.ErrorContains(t, err, c.err, "%+v", c)
		}
	}
	require.ErrorContains(t, (*desired)(nil).checkPodAddresses(netip.MustParseAddr("10.0.0.1"), netip.Addr{}), "owns no block")
}

func TestSlotsAreGivenOutLowestFirstAndOnlyWhenFree(t *testing.T) {
	var s slotTable
	for want := dataplane.FirstPodSlot; want < dataplane.FirstPodSlot+3; want++ {
		got, err := s.take()
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	s.free(dataplane.FirstPodSlot + 1)
	got, err := s.take()
	require.NoError(t, err)
	require.Equal(t, dataplane.FirstPodSlot+1, got)
}

// bigCluster is a state of many nodes as one of them sees it, with pods on it.
func bigCluster(nodes, pods int) (*controlv1.NodeState, []PodPort) {
	s := &controlv1.NodeState{
		Node:      "n0",
		Pools:     []*controlv1.Pool{{Cidr: "10.0.0.0/8", BlockPrefixLength: 24}, {Cidr: "fd12:3456:789a::/64", BlockPrefixLength: 80}},
		OwnBlocks: []*controlv1.OwnBlock{{Cidr: "10.0.0.0/24"}, {Cidr: "fd12:3456:789a:0::/80"}},
	}
	for i := range nodes {
		name := fmt.Sprintf("n%d", i)
		s.Members = append(s.Members, &controlv1.Member{
			Name: name, Ipv4: fmt.Sprintf("172.16.%d.%d", i>>8, i&255), Ipv6: fmt.Sprintf("fd00:240::%x", i+1), Mac: fmt.Sprintf("02:00:00:00:%02x:%02x", i>>8, i&255),
		})
		if i > 0 {
			to := &controlv1.Route_Node{Node: name}
			s.Routes = append(s.Routes, &controlv1.Route{Prefix: fmt.Sprintf("10.%d.%d.0/24", i>>8, i&255), Target: to},
				&controlv1.Route{Prefix: fmt.Sprintf("fd12:3456:789a:0:%x::/80", i), Target: to})
		}
	}
	var out []PodPort
	for i := range pods {
		out = append(out, PodPort{
			Slot: i + 2, Name: fmt.Sprintf("p%d", i), MAC: packet.MAC{10, 0, 0, 0, byte(i >> 8), byte(i)},
			Addr4: netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}), Addr6: netip.MustParseAddr(fmt.Sprintf("fd12:3456:789a::%x", i+1)),
		})
	}
	return s, out
}

func BenchmarkBuild(b *testing.B) {
	for _, nodes := range []int{100, 5000} {
		b.Run(fmt.Sprintf("nodes=%d/pods=250", nodes), func(b *testing.B) {
			state, pods := bigCluster(nodes, 250)
			d, err := parseDesired(state)
			require.NoError(b, err)
			in := Input{Node: "n0", Facts: newFakePlatform().facts, state: d, UplinkMTU: 1500, PodMTU: 1500, Pods: pods}
			in.Facts.MAC = packet.MAC{2}
			in.Facts.Addresses = []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("fd00:240::1/64")}
			require.Empty(b, Build(in).Problems)
			b.ReportAllocs()
			for b.Loop() {
				Build(in)
			}
		})
	}
}

func BenchmarkParseDesired(b *testing.B) {
	state, _ := bigCluster(5000, 0)
	b.Run("nodes=5000", func(b *testing.B) {
		for b.Loop() {
			if _, err := parseDesired(state); err != nil {
				b.Fatal(err)
			}
		}
	})
}
