package fib

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// chooser answers with a number from 0 to n-1, 1 <= n <= 256. rapid and the fuzzer each have theirs.
type chooser func(n int) int

// makeTable makes a table out of choices: pools, routes that crowd in and around them, and addresses worth asking for: the edges
// of every prefix and their neighbours. It also returns the model of the same.
func makeTable(choose chooser) (*Table, *model, []netip.Addr, error) {
	size := 32
	if choose(2) == 1 {
		size = 128
	}
	between := func(lo, hi int) int { return lo + choose(hi-lo+1) }
	// Few distinct bytes, so that prefixes nest and collide.
	someAddr := func() netip.Addr {
		b := make([]byte, size/8)
		b[0] = 10
		if size == 128 {
			b[0] = 0xfd
		}
		for i := 1; i < len(b); i++ {
			b[i] = [...]byte{0, 0, 0, 1, 2, 0x80, 0xff}[choose(7)]
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

	var pools []Pool
	for range choose(11) {
		p := netip.PrefixFrom(someAddr(), between(1, size)).Masked()
		block := between(p.Bits(), min(p.Bits()+12, size))
		if b.AddPool(p, block) != nil {
			continue // overlaps another, or is one too many
		}
		pools = append(pools, Pool{p, block})
		m.pools = append(m.pools, p)
		ask(p)
	}

	for i := range between(1, 40) {
		a, length := someAddr(), between(0, size)
		if len(pools) > 0 && choose(2) == 1 {
			// Take the pool's bits, and a length that means something to it.
			p := pools[choose(len(pools))]
			a = graft(p.CIDR, a)
			length = [...]int{p.BlockBits, size, size, p.CIDR.Bits(), length, between(p.BlockBits, size)}[choose(6)]
			if choose(2) == 1 {
				a = graft(netip.PrefixFrom(a, p.BlockBits), lowAddr(size, choose(256)))
			}
		}
		if len(asked) > 0 && choose(2) == 1 {
			a = asked[choose(min(len(asked), 256))]
		}
		prefix := netip.PrefixFrom(a, length).Masked()
		if prefix.Addr().Is4In6() && length >= 96 {
			continue // refused, as TestBuilderErrors says
		}
		adj, err := b.AddAdjacency(Adjacency{Port: uint16(i)})
		if err != nil {
			return nil, nil, nil, err
		}
		e := MakeEntry(Kind(choose(int(numKinds))), adj)
		if length == size && choose(2) == 1 {
			e = MakeEntry(Pod, adj)
		}
		if err := b.Add(prefix, e); err != nil {
			if _, twice := m.routes[prefix]; !twice {
				return nil, nil, nil, err
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
		asked = append(asked, someAddr())
	}
	return b.Build(), m, asked, nil
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
func lowAddr(size, low int) netip.Addr {
	if size == 128 {
		return addr6(0, uint64(low))
	}
	return addr4(uint32(low))
}

// checkAgainstModel makes a table and says where it and the model disagree.
func checkAgainstModel(choose chooser) error {
	table, m, asked, err := makeTable(choose)
	if err != nil {
		return err
	}
	for _, a := range asked {
		if a.Is4In6() {
			continue // packet.Addr has no such IPv6 address, it is the IPv4 one; packets with it are malformed
		}
		if got, want := lookup(table, a), m.lookup(a); got != want {
			return fmt.Errorf("%v: got %v, the model says %v\npools %v\nroutes %v", a, got, want, table.Pools(), m.routes)
		}
	}
	if table.Len() != len(m.routes) {
		return fmt.Errorf("Len %d, want %d", table.Len(), len(m.routes))
	}
	last, n := netip.Prefix{}, 0
	table.Walk(func(p netip.Prefix, e Entry) bool {
		if want, ok := m.routes[p]; !ok || want != e {
			err = fmt.Errorf("Walk: %v %v, want %v", p, e, want)
		}
		if n++; n > 1 && last.Compare(p) >= 0 {
			err = fmt.Errorf("Walk: %v before %v", last, p)
		}
		last = p
		return true
	})
	if err == nil && n != len(m.routes) {
		err = fmt.Errorf("Walk: %d routes, want %d", n, len(m.routes))
	}
	return err
}

func TestAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		err := checkAgainstModel(func(n int) int { return rapid.IntRange(0, n-1).Draw(t, "choice") })
		if err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzTable takes each choice from a byte of the input; beyond its end every choice is the first.
func FuzzTable(f *testing.F) {
	for seed := range byte(4) {
		data := make([]byte, 1024)
		_, _ = rand.NewChaCha8([32]byte{seed}).Read(data)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		err := checkAgainstModel(func(n int) int {
			if len(data) == 0 {
				return 0
			}
			c := int(data[0]) % n
			data = data[1:]
			return c
		})
		if err != nil {
			t.Fatal(err)
		}
	})
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
