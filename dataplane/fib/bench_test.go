package fib

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/gaissmai/bart"

	"github.com/overplane/overplane/dataplane/packet"
)

// The cluster that the benchmarks look up in: 5,000 remote blocks in one pool a family, this node's block with 250 pods, 5,000
// members, a service range and a default route.
const (
	benchBlocks  = 5000
	benchPods    = 250
	benchMembers = 5000
)

type benchRoute struct {
	prefix netip.Prefix
	entry  Entry
}

// benchCluster returns one family's pool and routes. Blocks are scattered over the pool, as after some years of joining and leaving.
func benchCluster(six bool) (pool netip.Prefix, block int, routes []benchRoute) {
	rng := rand.New(rand.NewPCG(1, 2))
	pool, block = pfx("10.0.0.0/8"), 24
	member, service, def := pfx("172.16.0.0/12"), pfx("192.168.0.0/20"), pfx("0.0.0.0/0")
	if six {
		pool, block = pfx("fd12:3456:789a::/64"), 80
		member, service, def = pfx("fd00:240::/64"), pfx("fd00:5e::/108"), pfx("::/0")
	}
	nth := func(p netip.Prefix, low uint64) netip.Addr {
		a := packet.AddrFrom(p.Addr())
		a.Lo |= low
		return a.Netip()
	}
	shift := hostBits(pool, block)
	add := func(a netip.Addr, length int, k Kind, adj int) {
		routes = append(routes, benchRoute{netip.PrefixFrom(a, length), MakeEntry(k, uint32(adj))})
	}
	numbers := rng.Perm(1 << MaxBlockBits)
	own := uint64(numbers[0]) << shift
	for i := range benchBlocks {
		add(nth(pool, uint64(numbers[i+1])<<shift), block, Node, i)
	}
	for i := range benchPods {
		add(nth(pool, own|uint64(i+2)), pool.Addr().BitLen(), Pod, benchMembers+i)
	}
	for i := range benchMembers {
		add(nth(member, uint64(i+11)), pool.Addr().BitLen(), Member, i)
	}
	add(service.Addr(), service.Bits(), Host, benchMembers+benchPods)
	add(def.Addr(), def.Bits(), Outside, benchMembers+benchPods+1)
	return pool, block, routes
}

func hostBits(pool netip.Prefix, block int) int { return pool.Addr().BitLen() - block }

func benchBuild(tb testing.TB, six ...bool) *Table {
	b := newBuilder(tb, benchMembers+benchPods+2)
	for _, s := range six {
		pool, block, routes := benchCluster(s)
		if err := b.AddPool(pool, block); err != nil {
			tb.Fatal(err)
		}
		for _, r := range routes {
			if err := b.Add(r.prefix, r.entry); err != nil {
				tb.Fatal(err)
			}
		}
	}
	return b.Build()
}

// benchAddrs are the destinations: random hosts of random routes of one kind, in random order.
func benchAddrs(six bool, kind Kind) []packet.Addr {
	_, _, routes := benchCluster(six)
	rng := rand.New(rand.NewPCG(3, 4))
	var of []benchRoute
	for _, r := range routes {
		if r.entry.Kind() == kind {
			of = append(of, r)
		}
	}
	addrs := make([]packet.Addr, 1<<13)
	for i := range addrs {
		r := of[rng.IntN(len(of))]
		a := packet.AddrFrom(r.prefix.Addr())
		if kind == Outside {
			a = packet.AddrFrom(netip.AddrFrom4([4]byte{byte(200 + rng.IntN(20)), byte(rng.Uint32()), byte(rng.Uint32()), 1}))
			if six {
				a = packet.Addr{Hi: 0x2001_0db8_0000_0000 | uint64(rng.Uint32()), Lo: rng.Uint64()}
			}
		} else if host := hostBits(r.prefix, r.prefix.Bits()); host > 0 {
			a.Lo |= rng.Uint64() >> (64 - host)
		}
		addrs[i] = a
	}
	return addrs
}

// impl is a table under comparison. lookupAll looks all addresses up and returns something that depends on each; being one indirect
// call for thousands of lookups it costs the lookups nothing.
type impl struct {
	name      string
	lookupAll func([]packet.Addr) Entry
}

func benchImpls(tb testing.TB, six bool) []impl {
	table := benchBuild(tb, six)
	_, _, routes := benchCluster(six)
	fast, plain := new(bart.Fast[Entry]), new(bart.Table[Entry])
	for _, r := range routes {
		fast.Insert(r.prefix, r.entry)
		plain.Insert(r.prefix, r.entry)
	}
	flat4 := func(as []packet.Addr) (sum Entry) {
		for i := range as {
			sum += table.Lookup4(as[i].V4())
		}
		return sum
	}
	flat6 := func(as []packet.Addr) (sum Entry) {
		for i := range as {
			sum += table.Lookup6(as[i].Hi, as[i].Lo)
		}
		return sum
	}
	// bart takes a netip.Addr: making one of what stands in the header is part of the price.
	bart4 := func(find func(netip.Addr) (Entry, bool)) func([]packet.Addr) Entry {
		return func(as []packet.Addr) (sum Entry) {
			for i := range as {
				e, _ := find(addr4(as[i].V4()))
				sum += e
			}
			return sum
		}
	}
	bart6 := func(find func(netip.Addr) (Entry, bool)) func([]packet.Addr) Entry {
		return func(as []packet.Addr) (sum Entry) {
			for i := range as {
				e, _ := find(addr6(as[i].Hi, as[i].Lo))
				sum += e
			}
			return sum
		}
	}
	if six {
		return []impl{{"flat", flat6}, {"bart-fast", bart6(fast.Lookup)}, {"bart-table", bart6(plain.Lookup)}}
	}
	return []impl{{"flat", flat4}, {"bart-fast", bart4(fast.Lookup)}, {"bart-table", bart4(plain.Lookup)}}
}

// evict is more memory than a core's caches hold, gone through between cold batches.
var evict = make([]uint64, 64<<20/8)

var benchSink Entry

// BenchmarkLookup measures lookups of random destinations of one kind, in ns/lookup. Warm: 8,192 destinations over and over. Cold: 32, a
// small batch, after the caches were filled with something else; reading the clock around the batch is in it.
func BenchmarkLookup(b *testing.B) {
	kinds := []Kind{Node, Pod, Member, Outside}
	for _, family := range []int{4, 6} {
		for _, im := range benchImpls(b, family == 6) {
			for _, kind := range kinds {
				addrs := benchAddrs(family == 6, kind)
				name := fmt.Sprintf("impl=%s/family=%d/blocks=%d/pods=%d/members=%d/kind=%v", im.name, family, benchBlocks, benchPods, benchMembers, kind)
				b.Run(name+"/cache=warm", func(b *testing.B) {
					b.ReportAllocs()
					benchSink += im.lookupAll(addrs)
					for n := b.N; n > 0; n -= len(addrs) {
						benchSink += im.lookupAll(addrs[:min(n, len(addrs))])
					}
					b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N), "ns/lookup")
				})
				b.Run(name+"/cache=cold", func(b *testing.B) {
					const batch = 32
					var spent time.Duration
					at, n := 0, 0
					for b.Loop() {
						var sum uint64
						for i := 0; i < len(evict); i += 8 {
							evict[i]++
							sum += evict[i]
						}
						as := addrs[at%len(addrs):][:batch]
						at += batch
						for i := range as { // the headers are warm when the lookups come
							sum += as[i].Lo + as[i].Hi
						}
						benchSink += Entry(sum)
						start := time.Now()
						benchSink += im.lookupAll(as)
						spent += time.Since(start)
						n += batch
					}
					b.ReportMetric(0, "ns/op") // would be the eviction's
					b.ReportMetric(float64(spent.Nanoseconds())/float64(n), "ns/lookup")
				})
			}
		}
	}
}

// BenchmarkBuild measures making the whole table anew, from the first Add on.
func BenchmarkBuild(b *testing.B) {
	for _, six := range [][]bool{{false}, {true}, {false, true}} {
		family := map[bool]string{false: "4", true: "6"}[six[0]]
		if len(six) > 1 {
			family = "both"
		}
		build := func(b *testing.B, grow bool) {
			b.ReportAllocs()
			pools, lengths, all := []netip.Prefix{}, []int{}, [][]benchRoute{}
			for _, s := range six {
				pool, length, routes := benchCluster(s)
				pools, lengths, all = append(pools, pool), append(lengths, length), append(all, routes)
			}
			for b.Loop() {
				nb := NewBuilder()
				if grow {
					nb.Grow(len(pools)*len(all[0]), benchMembers+benchPods+2)
				}
				for i := range uint32(benchMembers + benchPods + 2) {
					a := Adjacency{Port: 1, MTU: 1500}
					binary.BigEndian.PutUint32(a.Dst[:], i)
					if _, err := nb.AddAdjacency(a); err != nil {
						b.Fatal(err)
					}
				}
				for i := range pools {
					if err := nb.AddPool(pools[i], lengths[i]); err != nil {
						b.Fatal(err)
					}
					for _, r := range all[i] {
						if err := nb.Add(r.prefix, r.entry); err != nil {
							b.Fatal(err)
						}
					}
				}
				benchSink += nb.Build().Lookup4(1)
			}
		}
		name := fmt.Sprintf("family=%s/blocks=%d/pods=%d/members=%d", family, benchBlocks, benchPods, benchMembers)
		b.Run(name+"/grow=no", func(b *testing.B) { build(b, false) })
		b.Run(name+"/grow=yes", func(b *testing.B) { build(b, true) })
	}
}

// TestImplsAgree: the benchmark compares tables that say the same.
func TestImplsAgree(t *testing.T) {
	for _, six := range []bool{false, true} {
		impls := benchImpls(t, six)
		for _, kind := range []Kind{Pod, Node, Member, Outside} {
			for _, a := range benchAddrs(six, kind)[:500] {
				want := impls[0].lookupAll([]packet.Addr{a})
				if want.Kind() != kind {
					t.Fatalf("%v is %v, want %v", a.Netip(), want, kind)
				}
				for _, im := range impls[1:] {
					if got := im.lookupAll([]packet.Addr{a}); got != want {
						t.Fatalf("%v: %s says %v, flat %v", a.Netip(), im.name, got, want)
					}
				}
			}
		}
	}
}
