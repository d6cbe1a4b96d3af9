package fib

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// drawTable draws pools and routes that crowd around them, and returns the table, the model, and addresses worth asking for: the edges of
// every prefix and their neighbours.
func drawTable(t *rapid.T, six bool) (*Table, *model, []netip.Addr) {
	size := 32
	if six {
		size = 128
	}
	// Few distinct bytes, so that prefixes nest and collide.
	drawAddr := func(label string) netip.Addr {
		b := make([]byte, size/8)
		for i := range b {
			b[i] = rapid.SampledFrom([]byte{0, 0, 0, 1, 2, 0x80, 0xff}).Draw(t, label)
		}
		if six {
			b[0] = 0xfd
		} else {
			b[0] = 10
		}
		a, _ := netip.AddrFromSlice(b)
		return a
	}

	b := NewBuilder()
	m := &model{routes: map[netip.Prefix]Entry{}}
	var asked []netip.Addr
	ask := func(p netip.Prefix) {
		first, last := p.Addr(), lastAddr(p)
		for _, a := range []netip.Addr{first, first.Prev(), first.Next(), last, last.Prev(), last.Next()} {
			if a.IsValid() {
				asked = append(asked, a)
			}
		}
	}
	var starts []Pool
	for range rapid.IntRange(0, 10).Draw(t, "pools") {
		p := netip.PrefixFrom(drawAddr("pool"), rapid.IntRange(1, size).Draw(t, "poolBits")).Masked()
		block := rapid.IntRange(p.Bits(), min(p.Bits()+12, size)).Draw(t, "blockBits")
		if err := b.AddPool(p, block); err != nil {
			continue // overlaps another, or is one too many
		}
		starts = append(starts, Pool{p, block})
		m.pools = append(m.pools, p)
		ask(p)
	}
	for i := range rapid.IntRange(1, 40).Draw(t, "routes") {
		a := drawAddr("route")
		length := rapid.IntRange(0, size).Draw(t, "routeBits")
		if len(starts) > 0 && rapid.Bool().Draw(t, "inPool") {
			// Take the pool's bits, and a length that means something to it.
			p := rapid.SampledFrom(starts).Draw(t, "which")
			a = graft(p.CIDR, a)
			length = rapid.SampledFrom([]int{p.BlockBits, size, size, p.CIDR.Bits(), length, rapid.IntRange(p.BlockBits, size).Draw(t, "longer")}).Draw(t, "inPoolBits")
			if rapid.Bool().Draw(t, "lowHost") {
				a = graft(netip.PrefixFrom(a, p.BlockBits), lowAddr(six, rapid.IntRange(0, 300).Draw(t, "host")))
			}
		}
		if len(asked) > 0 && rapid.Bool().Draw(t, "near") {
			a = rapid.SampledFrom(asked).Draw(t, "nearTo")
		}
		prefix := netip.PrefixFrom(a, length).Masked()
		adj, err := b.AddAdjacency(Adjacency{Port: uint16(i)})
		if err != nil {
			t.Fatal(err)
		}
		e := MakeEntry(Kind(rapid.IntRange(int(Unreachable), int(Outside)).Draw(t, "kind")), adj)
		if length == size && rapid.Bool().Draw(t, "pod") {
			e = MakeEntry(Pod, adj)
		}
		if err := b.Add(prefix, e); err != nil {
			if _, twice := m.routes[prefix]; !twice {
				t.Fatalf("Add(%v): %v", prefix, err)
			}
			continue
		}
		if e.Kind() == Unreachable {
			e = 0
		}
		m.routes[prefix] = e
		ask(prefix)
	}
	for range 20 {
		asked = append(asked, drawAddr("asked"))
	}
	return b.Build(), m, asked
}

// graft returns a with its first bits replaced by p's.
func graft(p netip.Prefix, a netip.Addr) netip.Addr {
	from, to := p.Addr().AsSlice(), a.AsSlice()
	for i := range p.Bits() {
		bit := byte(0x80 >> (i % 8))
		to[i/8] = to[i/8]&^bit | from[i/8]&bit
	}
	r, _ := netip.AddrFromSlice(to)
	return r
}

// lowAddr is the address with the given low bits and no others.
func lowAddr(six bool, low int) netip.Addr {
	if six {
		return addr6(0, uint64(low))
	}
	return addr4(uint32(low))
}

func checkAgainstModel(t *rapid.T) {
	table, m, asked := drawTable(t, rapid.Bool().Draw(t, "six"))
	for _, a := range asked {
		if got, want := lookup(table, a), m.lookup(a); got != want {
			t.Fatalf("%v: got %v, the model says %v\npools %v\nroutes %v", a, got, want, table.Pools(), m.routes)
		}
	}
	if table.Len() != len(m.routes) {
		t.Fatalf("Len %d, want %d", table.Len(), len(m.routes))
	}
	last, n := netip.Prefix{}, 0
	table.Walk(func(p netip.Prefix, e Entry) bool {
		if want, ok := m.routes[p]; !ok || want != e {
			t.Fatalf("Walk: %v %v, want %v", p, e, want)
		}
		if n++; n > 1 && last.Compare(p) >= 0 {
			t.Fatalf("Walk: %v before %v", last, p)
		}
		last = p
		return true
	})
	if n != len(m.routes) {
		t.Fatalf("Walk: %d routes, want %d", n, len(m.routes))
	}
}

func TestAgainstModel(t *testing.T) { rapid.Check(t, checkAgainstModel) }

// FuzzTable drives the same comparison from the fuzzer's bytes.
func FuzzTable(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10"))
	f.Fuzz(rapid.MakeFuzz(checkAgainstModel))
}

// TestModelKnowsPools checks the golden model itself on cases that can be read off.
func TestModelKnowsPools(t *testing.T) {
	m := &model{
		routes: map[netip.Prefix]Entry{pfx("0.0.0.0/0"): MakeEntry(Outside, 1), pfx("10.244.1.0/24"): MakeEntry(Node, 2)},
		pools:  []netip.Prefix{pfx("10.244.0.0/16")},
	}
	require.Equal(t, MakeEntry(Outside, 1), m.lookup(netip.MustParseAddr("1.1.1.1")))
	require.Equal(t, MakeEntry(Node, 2), m.lookup(netip.MustParseAddr("10.244.1.1")))
	require.Equal(t, Entry(0), m.lookup(netip.MustParseAddr("10.244.2.1")))
}
