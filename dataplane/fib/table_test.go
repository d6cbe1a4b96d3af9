package fib

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
)

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func lookup(t *Table, a netip.Addr) Entry { return t.Lookup(packet.AddrFrom(a)) }

// newBuilder returns a builder with adjacencies 0 to n-1.
func newBuilder(t testing.TB, n int) *Builder {
	b := NewBuilder()
	for i := range n {
		got, err := b.AddAdjacency(Adjacency{Port: uint16(i)})
		require.NoError(t, err)
		require.EqualValues(t, i, got)
	}
	return b
}

// cluster is a table as a node has it: one pool a family, own blocks with pods, remote blocks, members, services, default routes.
func cluster(t testing.TB) *Table {
	b := newBuilder(t, 8)
	require.NoError(t, b.AddPool(pfx("10.244.0.0/16"), 24))
	require.NoError(t, b.AddPool(pfx("fd12:3456:789a::/64"), 80))
	for _, r := range []struct {
		prefix string
		e      Entry
	}{
		{"0.0.0.0/0", MakeEntry(Outside, 0)},
		{"::/0", MakeEntry(Outside, 0)},
		{"10.0.0.0/8", MakeEntry(Host, 1)}, // covers the pool
		{"fd00::/8", MakeEntry(Host, 1)},
		{"10.240.0.12/32", MakeEntry(Member, 2)},
		{"fd00:240::12/128", MakeEntry(Member, 2)},
		{"10.244.2.0/24", MakeEntry(Node, 2)},
		{"fd12:3456:789a:0:2::/80", MakeEntry(Node, 2)},
		{"10.244.1.2/32", MakeEntry(Pod, 3)},
		{"10.244.1.9/32", MakeEntry(Pod, 4)},
		{"fd12:3456:789a:0:1::2/128", MakeEntry(Pod, 3)},
		{"fd12:3456:789a:0:1::9/128", MakeEntry(Pod, 4)},
	} {
		require.NoError(t, b.Add(pfx(r.prefix), r.e), r.prefix)
	}
	return b.Build()
}

func TestLookupOfACluster(t *testing.T) {
	table := cluster(t)
	for _, tc := range []struct {
		dst  string
		want Entry
	}{
		{"10.244.1.2", MakeEntry(Pod, 3)},
		{"10.244.1.9", MakeEntry(Pod, 4)},
		{"10.244.1.3", 0},   // own block, no pod
		{"10.244.1.250", 0}, // own block, beyond the pods' array
		{"10.244.2.0", MakeEntry(Node, 2)},
		{"10.244.2.255", MakeEntry(Node, 2)},
		{"10.244.3.1", 0}, // a block nobody owns is not the default route's, nor 10.0.0.0/8's
		{"10.244.255.255", 0},
		{"10.243.255.255", MakeEntry(Host, 1)},
		{"10.245.0.0", MakeEntry(Host, 1)},
		{"10.240.0.12", MakeEntry(Member, 2)},
		{"10.240.0.13", MakeEntry(Host, 1)},
		{"198.51.100.10", MakeEntry(Outside, 0)},
		{"255.255.255.255", MakeEntry(Outside, 0)},
		{"0.0.0.0", MakeEntry(Outside, 0)},
		{"fd12:3456:789a:0:1::2", MakeEntry(Pod, 3)},
		{"fd12:3456:789a:0:1::9", MakeEntry(Pod, 4)},
		{"fd12:3456:789a:0:1::3", 0},
		{"fd12:3456:789a:0:1:1::2", 0}, // same low bits as a pod, other host bits set
		{"fd12:3456:789a:0:1::1:2", 0},
		{"fd12:3456:789a:0:2:ffff:ffff:ffff", MakeEntry(Node, 2)},
		{"fd12:3456:789a:0:3::1", 0},
		{"fd12:3456:789a:1::", MakeEntry(Host, 1)},
		{"fd12:3456:7899:ffff:ffff:ffff:ffff:ffff", MakeEntry(Host, 1)},
		{"fd00:240::12", MakeEntry(Member, 2)},
		{"2001:db8:100::10", MakeEntry(Outside, 0)},
	} {
		require.Equal(t, tc.want, lookup(table, netip.MustParseAddr(tc.dst)), tc.dst)
	}
}

func TestZeroTableIsUnreachable(t *testing.T) {
	for name, table := range map[string]*Table{"zero": {}, "built": NewBuilder().Build()} {
		require.Equal(t, Entry(0), table.Lookup4(1), name)
		require.Equal(t, Entry(0), table.Lookup6(1, 2), name)
		require.Zero(t, table.Len(), name)
	}
	require.Equal(t, Unreachable, Entry(0).Kind())
}

func TestEntryRoundTrip(t *testing.T) {
	for k := Unreachable; k < numKinds; k++ {
		for _, i := range []uint32{0, 1, 4096, MaxAdjacencies - 1} {
			e := MakeEntry(k, i)
			require.Equal(t, k, e.Kind())
			require.Equal(t, i, e.Adjacency())
			require.Less(t, e, detailMark, "an entry must not look like a mark")
		}
	}
	require.EqualValues(t, 16, reflect.TypeFor[Adjacency]().Size(), "four adjacencies share a cache line")
	require.EqualValues(t, 24, reflect.TypeFor[route]().Size(), "the package comment's memory account says so")
}

// TestSlotExpansion covers the shapes of routes inside a pool that are neither a block nor a pod.
func TestSlotExpansion(t *testing.T) {
	for _, tc := range []struct {
		name   string
		pool   string
		block  int
		routes []string // route i has adjacency i
		want   map[string]Entry
	}{{
		name: "shorter than a block, with an exception", pool: "10.244.0.0/16", block: 24,
		routes: []string{"10.244.16.0/20", "10.244.17.0/24"},
		want: map[string]Entry{
			"10.244.15.255": 0, "10.244.16.0": MakeEntry(Node, 0), "10.244.17.1": MakeEntry(Node, 1),
			"10.244.18.1": MakeEntry(Node, 0), "10.244.31.255": MakeEntry(Node, 0), "10.244.32.0": 0,
		},
	}, {
		name: "the pool itself", pool: "10.244.0.0/16", block: 24,
		routes: []string{"10.244.0.0/16", "0.0.0.0/0"},
		want:   map[string]Entry{"10.244.9.9": MakeEntry(Node, 0), "10.245.0.0": MakeEntry(Node, 1)},
	}, {
		name: "longer than a block without pods", pool: "10.244.0.0/16", block: 24,
		routes: []string{"10.244.3.0/24", "10.244.3.128/25", "10.244.4.64/26", "0.0.0.0/0"},
		want: map[string]Entry{
			"10.244.3.127": MakeEntry(Node, 0), "10.244.3.128": MakeEntry(Node, 1),
			"10.244.4.63": 0, "10.244.4.64": MakeEntry(Node, 2), "10.244.4.128": 0, "10.244.5.0": 0,
		},
	}, {
		name: "a block is the whole pool", pool: "10.244.0.0/16", block: 16,
		routes: []string{"10.244.0.0/16", "10.244.255.0/24"},
		want:   map[string]Entry{"10.244.254.1": MakeEntry(Node, 0), "10.244.255.1": MakeEntry(Node, 1)},
	}, {
		name: "blocks of one address", pool: "192.0.2.0/28", block: 32,
		routes: []string{"192.0.2.7/32"},
		want:   map[string]Entry{"192.0.2.7": MakeEntry(Node, 0), "192.0.2.6": 0, "192.0.2.8": 0},
	}, {
		name: "block number in the upper word", pool: "fd00:1::/32", block: 48,
		routes: []string{"fd00:1:ffff::/48", "fd00:1:2::/47", "fd00:1:4:8000::/49"},
		want: map[string]Entry{
			"fd00:1:ffff::1": MakeEntry(Node, 0), "fd00:1:3:ffff::": MakeEntry(Node, 1), "fd00:1:2::": MakeEntry(Node, 1),
			"fd00:1:4::": 0, "fd00:1:4:8000::1": MakeEntry(Node, 2), "fd00:2::": 0,
		},
	}, {
		name: "block number across both words", pool: "fd00:0:0:100::/56", block: 72,
		routes: []string{"fd00:0:0:1ff:ff00::/72", "fd00:0:0:101::/64", "fd00::101:100:0:0:0/72"},
		want: map[string]Entry{
			"fd00:0:0:1ff:ff00::1": MakeEntry(Node, 0), "fd00:0:0:1ff:fe00::1": 0,
			"fd00:0:0:101::1": MakeEntry(Node, 1), "fd00:0:0:101:100::": MakeEntry(Node, 2), "fd00:0:0:200::": 0,
		},
	}} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBuilder(t, len(tc.routes))
			require.NoError(t, b.AddPool(pfx(tc.pool), tc.block))
			for i, r := range tc.routes {
				require.NoError(t, b.Add(pfx(r), MakeEntry(Node, uint32(i))))
			}
			table := b.Build()
			for dst, want := range tc.want {
				require.Equal(t, want, lookup(table, netip.MustParseAddr(dst)), dst)
			}
		})
	}
}

// TestPodsBeyondTheArray: pods whose host part does not fit the array are found all the same.
func TestPodsBeyondTheArray(t *testing.T) {
	b := newBuilder(t, 4)
	require.NoError(t, b.AddPool(pfx("fd12::/64"), 80))
	require.NoError(t, b.AddPool(pfx("10.0.0.0/8"), 16))
	require.NoError(t, b.Add(pfx("::/0"), MakeEntry(Outside, 0)))
	require.NoError(t, b.Add(pfx("0.0.0.0/0"), MakeEntry(Outside, 0)))
	require.NoError(t, b.Add(pfx("fd12::1:0:0:5/128"), MakeEntry(Pod, 1)))
	require.NoError(t, b.Add(pfx("fd12::1:dead:0:5/128"), MakeEntry(Pod, 2)))
	require.NoError(t, b.Add(pfx("10.1.0.5/32"), MakeEntry(Pod, 1)))
	require.NoError(t, b.Add(pfx("10.1.16.0/32"), MakeEntry(Pod, 2)))
	require.NoError(t, b.Add(pfx("10.1.0.0/30"), MakeEntry(Host, 3)))
	// Prefixes that start in the array and end beyond it.
	require.NoError(t, b.Add(pfx("10.2.0.9/32"), MakeEntry(Pod, 1)))
	require.NoError(t, b.Add(pfx("10.2.0.0/24"), MakeEntry(Host, 3)))
	require.NoError(t, b.Add(pfx("fd12::2:0:0:9/128"), MakeEntry(Pod, 1)))
	require.NoError(t, b.Add(pfx("fd12::2:0:0:0/82"), MakeEntry(Host, 3)))
	table := b.Build()
	for dst, want := range map[string]Entry{
		"fd12::1:0:0:5": MakeEntry(Pod, 1), "fd12::1:dead:0:5": MakeEntry(Pod, 2), "fd12::1:dead:0:6": 0, "fd12::1:0:0:6": 0,
		"10.2.0.9": MakeEntry(Pod, 1), "10.2.0.100": MakeEntry(Host, 3), "10.2.1.0": 0,
		"fd12::2:0:0:9": MakeEntry(Pod, 1), "fd12::2:0:0:100": MakeEntry(Host, 3), "fd12::2:1:0:0": MakeEntry(Host, 3), "fd12::2:8000:0:0": 0,
		"10.1.0.5": MakeEntry(Pod, 1), "10.1.16.0": MakeEntry(Pod, 2), "10.1.16.1": 0, "10.1.0.3": MakeEntry(Host, 3), "10.1.0.4": 0,
	} {
		require.Equal(t, want, lookup(table, netip.MustParseAddr(dst)), dst)
	}
}

// TestManyPools looks at the first and last addresses of as many pools as there can be, and at their neighbours.
func TestManyPools(t *testing.T) {
	b := newBuilder(t, 2*MaxPools+1)
	require.NoError(t, b.Add(pfx("0.0.0.0/0"), MakeEntry(Outside, 2*MaxPools)))
	require.NoError(t, b.Add(pfx("::/0"), MakeEntry(Outside, 2*MaxPools)))
	var pools []netip.Prefix
	for i := range MaxPools {
		p4 := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(200 - 20*i), 0, 0}), 16)
		p6 := netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, byte(200 - 20*i)}), 64)
		require.NoError(t, b.AddPool(p4, 24))
		require.NoError(t, b.AddPool(p6, 80))
		for j, p := range []netip.Prefix{p4, p6} {
			require.NoError(t, b.Add(p, MakeEntry(Node, uint32(2*i+j))))
			pools = append(pools, p)
		}
	}
	table := b.Build()
	require.Len(t, table.Pools(), 2*MaxPools)
	for i, p := range pools {
		first, last := p.Addr(), lastAddr(p)
		require.Equal(t, MakeEntry(Node, uint32(i)), lookup(table, first))
		require.Equal(t, MakeEntry(Node, uint32(i)), lookup(table, last))
		require.Equal(t, MakeEntry(Outside, 2*MaxPools), lookup(table, first.Prev()))
		require.Equal(t, MakeEntry(Outside, 2*MaxPools), lookup(table, last.Next()))
	}
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func TestWalkAndLen(t *testing.T) {
	table := cluster(t)
	var got []netip.Prefix
	table.Walk(func(p netip.Prefix, e Entry) bool {
		got = append(got, p)
		if e.Kind() != Unreachable && p.IsSingleIP() {
			require.Equal(t, e, lookup(table, p.Addr()), p)
		}
		return true
	})
	require.Equal(t, table.Len(), len(got))
	require.True(t, slices.IsSortedFunc(got, netip.Prefix.Compare), "%v", got)
	require.Equal(t, pfx("0.0.0.0/0"), got[0])
	require.Contains(t, got, pfx("fd12:3456:789a:0:1::2/128"))

	n := 0
	table.Walk(func(netip.Prefix, Entry) bool { n++; return n < 3 })
	require.Equal(t, 3, n, "false ends the walk")
	require.Equal(t, []Pool{{pfx("10.244.0.0/16"), 24}, {pfx("fd12:3456:789a::/64"), 80}}, table.Pools())
}

// TestWalkTellsIPv4FromMapped: an IPv6 prefix that covers the mapped range is still an IPv6 prefix.
func TestWalkTellsIPv4FromMapped(t *testing.T) {
	b := newBuilder(t, 1)
	for _, p := range []string{"::/95", "1.0.0.0/8"} {
		require.NoError(t, b.Add(pfx(p), MakeEntry(Host, 0)))
	}
	var got []string
	b.Build().Walk(func(p netip.Prefix, _ Entry) bool { got = append(got, p.String()); return true })
	require.Equal(t, []string{"1.0.0.0/8", "::/95"}, got)
}

func TestAdjacenciesAreShared(t *testing.T) {
	b := NewBuilder()
	x := Adjacency{Dst: packet.MAC{2, 0, 0, 0, 0, 1}, Port: 3, MTU: 1500}
	y := x
	y.MTU = 9000
	i, err := b.AddAdjacency(x)
	require.NoError(t, err)
	j, err := b.AddAdjacency(y)
	require.NoError(t, err)
	k, err := b.AddAdjacency(x)
	require.NoError(t, err)
	require.Equal(t, i, k)
	require.NotEqual(t, i, j)
	table := b.Build()
	require.Equal(t, 2, table.NumAdjacencies())
	require.Equal(t, x, *table.Adjacency(i))
	require.Equal(t, y, *table.Adjacency(j))
}

// TestBuilderErrors: every refusal names what it refuses and, where two things clash, both.
func TestBuilderErrors(t *testing.T) {
	newB := func() *Builder {
		b := newBuilder(t, 2)
		require.NoError(t, b.AddPool(pfx("10.244.0.0/16"), 24))
		require.NoError(t, b.Add(pfx("10.244.1.0/24"), MakeEntry(Node, 1)))
		return b
	}
	for _, tc := range []struct {
		name string
		do   func(*Builder) error
		want []string
	}{
		{"pool overlaps", func(b *Builder) error { return b.AddPool(pfx("10.244.128.0/17"), 24) }, []string{"10.244.0.0/16", "10.244.128.0/17", "overlap"}},
		{"pool covers", func(b *Builder) error { return b.AddPool(pfx("10.0.0.0/8"), 24) }, []string{"10.244.0.0/16", "10.0.0.0/8", "overlap"}},
		{"pool twice", func(b *Builder) error { return b.AddPool(pfx("10.244.0.0/16"), 24) }, []string{"10.244.0.0/16", "overlap"}},
		{"pool with host bits", func(b *Builder) error { return b.AddPool(pfx("10.9.9.9/16"), 24) }, []string{"10.9.9.9/16", "10.9.0.0/16"}},
		{"pool of everything", func(b *Builder) error { return b.AddPool(pfx("::/0"), 16) }, []string{"::/0", "all addresses"}},
		{"block larger than pool", func(b *Builder) error { return b.AddPool(pfx("10.9.0.0/16"), 15) }, []string{"10.9.0.0/16", "15", "16 to 32"}},
		{"too many blocks", func(b *Builder) error { return b.AddPool(pfx("fd00::/48"), 80) }, []string{"fd00::/48", "80", "48 to 64"}},
		{"block longer than an address", func(b *Builder) error { return b.AddPool(pfx("10.9.0.0/24"), 33) }, []string{"33", "24 to 32"}},
		{"mapped pool", func(b *Builder) error { return b.AddPool(pfx("::ffff:10.0.0.0/104"), 112) }, []string{"::ffff:10.0.0.0/104", "mapped"}},
		{"zero prefix", func(b *Builder) error { return b.Add(netip.Prefix{}, 0) }, []string{"not valid"}},
		{"route with host bits", func(b *Builder) error { return b.Add(pfx("10.244.2.1/24"), MakeEntry(Node, 0)) }, []string{"10.244.2.1/24", "10.244.2.0/24"}},
		{"route twice", func(b *Builder) error { return b.Add(pfx("10.244.1.0/24"), MakeEntry(Host, 0)) },
			[]string{"10.244.1.0/24", "node via adjacency 1", "host via adjacency 0"}},
		{"unknown kind", func(b *Builder) error { return b.Add(pfx("10.1.0.0/24"), MakeEntry(numKinds, 0)) }, []string{"10.1.0.0/24", "kind"}},
		{"unknown adjacency", func(b *Builder) error { return b.Add(pfx("10.1.0.0/24"), MakeEntry(Node, 2)) }, []string{"10.1.0.0/24", "adjacency 2"}},
		{"ninth pool", func(b *Builder) error {
			for i := range MaxPools {
				if err := b.AddPool(netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i)}), 16), 24); err != nil {
					require.Equal(t, MaxPools-1, i, "it is the ninth pool that is too many")
					return err
				}
			}
			return nil
		}, []string{"11.7.0.0/16", "8 pools"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newB()
			err := tc.do(b)
			require.Error(t, err)
			for _, w := range tc.want {
				require.Contains(t, err.Error(), w)
			}
			require.True(t, strings.HasPrefix(err.Error(), "fib: "), err)
			require.Equal(t, 1, b.Build().Len(), "a refused call changes nothing")
		})
	}
}

// TestBuilderGoesOn: a table does not change when its builder does.
func TestBuilderGoesOn(t *testing.T) {
	b := newBuilder(t, 1)
	require.NoError(t, b.AddPool(pfx("10.244.0.0/16"), 24))
	before := b.Build()
	require.NoError(t, b.Add(pfx("10.244.1.0/24"), MakeEntry(Node, 0)))
	require.NoError(t, b.Add(pfx("0.0.0.0/0"), MakeEntry(Outside, 0)))
	after := b.Build()
	a := netip.MustParseAddr("10.244.1.1")
	require.Equal(t, Entry(0), lookup(before, a))
	require.Equal(t, MakeEntry(Node, 0), lookup(after, a))
	require.Equal(t, Unreachable, lookup(before, netip.MustParseAddr("1.1.1.1")).Kind())
}

// TestGrowKeepsWhatIsThere: making room changes no answer, whenever it is made.
func TestGrowKeepsWhatIsThere(t *testing.T) {
	b := NewBuilder()
	b.Grow(10, 10)
	i, err := b.AddAdjacency(Adjacency{Port: 7})
	require.NoError(t, err)
	require.NoError(t, b.Add(pfx("10.0.0.0/8"), MakeEntry(Host, i)))
	b.Grow(100, 100)
	again, err := b.AddAdjacency(Adjacency{Port: 7})
	require.NoError(t, err)
	require.Equal(t, i, again)
	require.Error(t, b.Add(pfx("10.0.0.0/8"), MakeEntry(Host, i)))
	require.Equal(t, MakeEntry(Host, i), b.Build().Lookup4(10<<24))
}

func TestLookupAllocatesNothing(t *testing.T) {
	table := cluster(t)
	var sink Entry
	for _, dst := range []string{"10.244.1.2", "10.244.2.1", "10.240.0.12", "1.1.1.1", "fd12:3456:789a:0:1::2", "fd12:3456:789a:0:2::2", "fd00:240::12", "2001:db8::1"} {
		a := packet.AddrFrom(netip.MustParseAddr(dst))
		require.Zero(t, testing.AllocsPerRun(100, func() { sink += table.Lookup(a) }), dst)
	}
	_ = sink
}

// TestConcurrentReaders gives the race detector something to find should a lookup ever write.
func TestConcurrentReaders(t *testing.T) {
	table := cluster(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range uint32(1000) {
				table.Lookup4(0x0af40000 + i)
				table.Lookup6(0xfd123456789a0000, uint64(i)<<48)
				table.Lookup4(i << 20)
			}
			table.Walk(func(netip.Prefix, Entry) bool { return true })
		})
	}
	wg.Wait()
}

// Prefixes shorter and longer than what is looked up in front of the trie, and as long.
func TestPrefixesAroundTheFront(t *testing.T) {
	for _, family := range []struct {
		routes  []string // adjacency i
		lookups map[string]int
	}{
		{[]string{"0.0.0.0/0", "8.0.0.0/7", "9.0.0.0/8", "9.9.0.0/16", "9.9.128.0/17", "9.9.9.9/32"}, map[string]int{
			"255.255.255.255": 0, "8.255.255.255": 1, "9.8.255.255": 2, "9.10.0.0": 2, "9.9.0.0": 3, "9.9.127.255": 3, "9.9.128.0": 4, "9.9.9.9": 5, "9.9.9.8": 3, "10.0.0.0": 0}},
		{[]string{"::/0", "2000::/3", "2001::/16", "2001:db8::/32"}, map[string]int{
			"::": 0, "1fff::": 0, "2000::": 1, "2002::": 1, "2001::": 2, "2001:db7:ffff::": 2, "2001:db8::": 3, "4000::": 0}},
	} {
		b := newBuilder(t, 6)
		for i, r := range family.routes {
			require.NoError(t, b.Add(pfx(r), MakeEntry(Outside, uint32(i))))
		}
		table := b.Build()
		for a, want := range family.lookups {
			require.Equal(t, MakeEntry(Outside, uint32(want)), lookup(table, netip.MustParseAddr(a)), a)
		}
	}
}
