package ipam

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func p(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// good are ranges without a problem.
func good() Ranges {
	return Ranges{
		Families: []Family{IPv4, IPv6},
		Pods:     []PodRange{{p("10.244.0.0/16"), 24}, {p("fd12:3456:789a::/64"), 80}},
		Services: []netip.Prefix{p("10.0.0.0/16"), p("fd12:3456:789a:1::/108")},
		DNS:      []netip.Addr{netip.MustParseAddr("10.0.0.10"), netip.MustParseAddr("fd12:3456:789a:1::10")},
		Nodes:    []netip.Prefix{p("10.240.0.0/16"), p("fd00:240::/64")}, Connected: []netip.Prefix{p("10.16.0.0/12")},
	}
}

func TestRangesOfTheDefaultsAreRight(t *testing.T) {
	r := good()
	warnings, err := r.Validate()
	require.NoError(t, err)
	require.Empty(t, warnings)
}

func TestEveryPairOfOverlappingRangesIsNamed(t *testing.T) {
	kinds := []string{"pod", "service", "node", "connected"}
	set := func(r *Ranges, kind string, c netip.Prefix) {
		switch kind {
		case "pod":
			r.Pods = append(r.Pods, PodRange{c, 24})
		case "service":
			r.Services = append(r.Services, c)
		case "node":
			r.Nodes = append(r.Nodes, c)
		case "connected":
			r.Connected = append(r.Connected, c)
		}
	}
	for _, a := range kinds {
		for _, b := range kinds {
			for _, pair := range [][2]string{{"10.50.0.0/16", "10.50.0.0/16"}, {"10.50.0.0/16", "10.50.128.0/18"}, {"10.50.128.0/18", "10.50.0.0/16"}} {
				r := Ranges{Families: []Family{IPv4}}
				set(&r, a, p(pair[0]))
				set(&r, b, p(pair[1]))
				if len(r.Pods) == 0 {
					r.Pods = []PodRange{{p("10.244.0.0/16"), 24}}
				}
				_, err := r.Validate()
				if a == "connected" && b == "connected" {
					require.NoError(t, err, "peered networks may overlap each other")
					continue
				}
				require.Error(t, err, "%s %s, %s %s", a, pair[0], b, pair[1])
				text := err.Error()
				ab := fmt.Sprintf("%s range %s overlaps %s range %s", a, pair[0], b, pair[1])
				ba := fmt.Sprintf("%s range %s overlaps %s range %s", b, pair[1], a, pair[0])
				require.True(t, strings.Contains(text, ab) || strings.Contains(text, ba), "%q names neither pair", text)
				require.Contains(t, text, "must not overlap one another")
			}
		}
	}
}

func TestRangeRules(t *testing.T) {
	tests := []struct {
		name   string
		change func(*Ranges)
		want   string // part of the error; empty: of no error
	}{
		{"pod touches a reserved range", func(r *Ranges) { r.Pods[0].CIDR = p("172.30.0.0/15") }, "pod range 172.30.0.0/15 overlaps reserved range 172.31.0.0/16"},
		{"service touches a reserved range", func(r *Ranges) { r.Services[0] = p("192.0.2.0/25"); r.DNS = nil }, "service range 192.0.2.0/25 overlaps reserved range 192.0.2.0/24"},
		{"reserved ranges are configurable", func(r *Ranges) { r.Pods[0].CIDR = p("172.30.0.0/16"); r.Reserved = []netip.Prefix{} }, ""},
		{"service as large as a /12", func(r *Ranges) { r.Services[0] = p("10.64.0.0/12"); r.DNS = nil }, "want it smaller than a /12"},
		{"service of a /13", func(r *Ranges) { r.Services[0] = p("10.64.0.0/13"); r.DNS = nil }, ""},
		{"IPv6 service larger than a /108", func(r *Ranges) { r.Services[1] = p("fd12:3456:789a:1::/107"); r.DNS = nil }, "no larger than a /108"},
		{"DNS outside the service range", func(r *Ranges) { r.DNS[0] = netip.MustParseAddr("10.1.0.10") }, "10.1.0.10 is not in service range 10.0.0.0/16"},
		{"DNS is the first address", func(r *Ranges) { r.DNS[0] = netip.MustParseAddr("10.0.0.0") }, "10.0.0.0 is the first of service range 10.0.0.0/16"},
		{"one service range for two families", func(r *Ranges) { r.Services = r.Services[:1]; r.DNS = nil }, "there are 1 for the families [IPv4 IPv6]"},
		{"services in the other order", func(r *Ranges) { r.Services[0], r.Services[1] = r.Services[1], r.Services[0]; r.DNS = nil }, "families' order"},
		{"pods in the other order", func(r *Ranges) { r.Pods[0], r.Pods[1] = r.Pods[1], r.Pods[0] }, "families' order"},
		{"more pools of one family", func(r *Ranges) { r.Pods = append(r.Pods, PodRange{p("10.245.0.0/16"), 25}) }, "holds 126 pods, but max pods is 250"},
		{"pods fit", func(r *Ranges) { r.MaxPods = 110; r.Pods = append(r.Pods, PodRange{p("10.245.0.0/16"), 25}) }, ""},
		{"too many pods", func(r *Ranges) { r.MaxPods = 251 }, "max pods 251: want 10 to 250"},
		{"too few pods", func(r *Ranges) { r.MaxPods = 9 }, "max pods 9"},
		{"blocks too fine", func(r *Ranges) { r.Pods[1].BlockBits = 81 }, "blocks of /81: want /64 to /80"},
		{"block larger than the pool", func(r *Ranges) { r.Pods[0].BlockBits = 15 }, "blocks of /15"},
		{"not canonical", func(r *Ranges) { r.Pods[0].CIDR = p("10.244.1.0/16") }, "want 10.244.0.0/16"},
		{"loopback", func(r *Ranges) { r.Pods[0].CIDR = p("127.1.0.0/16") }, "loopback"},
		{"multicast", func(r *Ranges) { r.Services[0] = p("224.0.0.0/16"); r.DNS = nil }, "multicast"},
		{"more nodes than blocks", func(r *Ranges) { r.NodeCount = 257 }, "the IPv4 pod ranges fit 256 nodes, but 257 are expected"},
		{"several pools fit", func(r *Ranges) { r.NodeCount = 257; r.Pods = append(r.Pods, PodRange{p("10.245.0.0/16"), 24}) }, ""},
		{"subnet too small", func(r *Ranges) { r.NodeCount = 252; r.Nodes[0] = p("10.240.0.0/24") }, "hold 251 nodes"},
		{"nine pools", func(r *Ranges) {
			for i := range 8 {
				r.Pods = append(r.Pods, PodRange{p(fmt.Sprintf("10.%d.0.0/16", 100+i)), 24})
			}
		}, "more than 8 of IPv4"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := good()
			tt.change(&r)
			_, err := r.Validate()
			if tt.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tt.want)
		})
	}
	r := good()
	r.Nodes[0] = p("172.31.0.0/16")
	r.NodeCount = 205
	warnings, err := r.Validate()
	require.NoError(t, err)
	require.Len(t, warnings, 2)
	require.Contains(t, warnings[0]+warnings[1], "node range 172.31.0.0/16 overlaps reserved range 172.31.0.0/16")
	require.Contains(t, warnings[0]+warnings[1], "little room to grow")
}

func TestBlocksOfAPool(t *testing.T) {
	for _, tt := range []struct {
		pool  string
		bits  int
		i     int
		block string
	}{
		{"10.244.0.0/16", 24, 0, "10.244.0.0/24"}, {"10.244.0.0/16", 24, 255, "10.244.255.0/24"}, {"10.224.0.0/11", 24, 8191, "10.255.255.0/24"},
		{"10.244.0.0/22", 25, 5, "10.244.2.128/25"}, {"fd12:3456:789a::/64", 80, 65535, "fd12:3456:789a:0:ffff::/80"}, {"10.1.2.0/24", 24, 0, "10.1.2.0/24"},
	} {
		pool := &Pool{CIDR: p(tt.pool), BlockBits: tt.bits}
		require.Equal(t, p(tt.block), pool.Block(tt.i))
		require.Equal(t, tt.i, pool.index(p(tt.block)))
		require.Less(t, tt.i, pool.Blocks())
	}
}

func TestRecordsThatCannotBeReadChangeNothing(t *testing.T) {
	tb := NewTable()
	for key, value := range map[string]string{
		"pools/10.244.0.0_16":   `{"cidr": "10.245.0.0/16", "block_bits": 24}`, // says that it is another
		"pools/10.246.0.0_16":   `{"cidr": "10.246.0.0/16", "block_bits": 40}`,
		"nodes/n1":              `{"name": 5}`,
		"blocks/10.244.1.0_24":  `not JSON`,
		"routes/10.244.1.0_24x": `{}`,
	} {
		_, err := tb.Apply(KV{Key: key, Value: []byte(value), Revision: 2})
		require.ErrorContains(t, err, key)
	}
	require.Empty(t, tb.Pools())
	require.Empty(t, tb.Nodes())
	_, err := tb.Apply(KV{Key: "future/x", Value: []byte("?"), Revision: 3})
	require.NoError(t, err, "what a newer version writes is ignored")
}
