package api

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func TestValidateAcceptsWhatMakesSense(t *testing.T) {
	tests := map[string]func(*controlv1.NodeState){
		"three nodes":    func(*controlv1.NodeState) {},
		"an empty state": func(s *controlv1.NodeState) { proto.Reset(s); s.Node = "n1" },
		"a block as large as its pool": func(s *controlv1.NodeState) {
			s.Pools = append(s.Pools, &controlv1.Pool{Cidr: "10.250.0.0/24", BlockPrefixLength: 24})
		},
		"a default route to a node":         func(s *controlv1.NodeState) { s.Routes = append(s.Routes, toNode("0.0.0.0/0", "n2")) },
		"a route around the pool":           func(s *controlv1.NodeState) { s.Routes = append(s.Routes, toHost("10.0.0.0/8")) },
		"part of a block":                   func(s *controlv1.NodeState) { s.Routes = append(s.Routes, toNode("10.244.2.128/25", "n3")) },
		"several blocks unreachable":        func(s *controlv1.NodeState) { s.Routes = append(s.Routes, toNowhere("10.244.128.0/17")) },
		"a node-local service":              func(s *controlv1.NodeState) { s.Routes = append(s.Routes, toHost("169.254.20.10/32")) },
		"no-masquerade CIDRs over the pool": func(s *controlv1.NodeState) { s.Snat.NoMasqueradeCidrs = []string{"10.244.0.0/16", "0.0.0.0/0"} },
		"a port range of one":               func(s *controlv1.NodeState) { s.Snat.FirstPort, s.Snat.LastPort = 1024, 1024 },
		"a routed underlay without MACs": func(s *controlv1.NodeState) {
			for _, m := range s.Members {
				m.Mac = ""
			}
		},
		"no hash, but a revision": func(s *controlv1.NodeState) { s.Version = &controlv1.Version{Revision: 1} },
		"eight pools a family": func(s *controlv1.NodeState) {
			for i := range 7 {
				s.Pools = append(s.Pools, &controlv1.Pool{Cidr: fmt.Sprintf("10.%d.0.0/16", i+100), BlockPrefixLength: 32},
					&controlv1.Pool{Cidr: fmt.Sprintf("fd12:3456:789a:%d::/64", i+1), BlockPrefixLength: 80})
			}
		},
		"a node named like a host": func(s *controlv1.NodeState) {
			s.Members[1].Name = "worker-2.eu-1.example"
			s.Routes = nil
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			s := cluster()
			change(s)
			require.NoError(t, Validate(s))
			Seal(s)
			require.NoError(t, Validate(s))
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	type state = controlv1.NodeState
	addPool := func(cidr string, block uint32) func(*state) {
		return func(s *state) { s.Pools = append(s.Pools, &controlv1.Pool{Cidr: cidr, BlockPrefixLength: block}) }
	}
	addOwn := func(cidr string) func(*state) {
		return func(s *state) { s.OwnBlocks = append(s.OwnBlocks, &controlv1.OwnBlock{Cidr: cidr}) }
	}
	addRoute := func(r *controlv1.Route) func(*state) { return func(s *state) { s.Routes = append(s.Routes, r) } }
	addMember := func(m *controlv1.Member) func(*state) { return func(s *state) { s.Members = append(s.Members, m) } }
	tests := []struct {
		name   string
		change func(*state)
		want   string // the whole of it: one mistake is one problem
	}{
		{"no node name", func(s *state) { proto.Reset(s) }, `node: the name is empty`},
		{"incarnation with a space", func(s *state) { s.Version.Incarnation = "a b" }, `version: incarnation "a b": want at most 64 visible ASCII characters, e.g. a UUID`},

		{"pool with host bits", addPool("10.9.0.1/16", 24), `pool "10.9.0.1/16": cidr: not in canonical form: want "10.9.0.0/16"`},
		{"pool in other letters", addPool("FD00::/64", 80), `pool "FD00::/64": cidr: not in canonical form: want "fd00::/64"`},
		{"pool that is an address", addPool("10.9.0.0", 24), `pool "10.9.0.0": cidr: not a prefix: want an address and a length, e.g. "10.244.0.0/16"`},
		{"pool mapped into IPv6", addPool("::ffff:10.9.0.0/112", 120), `pool "::ffff:10.9.0.0/112": cidr: an IPv4 address mapped into IPv6: want it as IPv4`},
		{"pool without cidr", addPool("", 24), `pool number 3: cidr: it is empty: want a prefix, e.g. "10.244.0.0/16"`},
		{"block outside the pool", addPool("10.9.0.0/16", 15), `pool "10.9.0.0/16": block_prefix_length 15: want 16 to 32 (at most 16 bits longer than the pool's)`},
		{"block of no address", addPool("10.9.0.0/20", 33), `pool "10.9.0.0/20": block_prefix_length 33: want 20 to 32 (at most 16 bits longer than the pool's)`},
		{"too many blocks", addPool("10.8.0.0/14", 31), `pool "10.8.0.0/14": block_prefix_length 31: want 14 to 30 (at most 16 bits longer than the pool's)`},
		{"same pool twice", addPool("10.244.0.0/16", 24), `pool "10.244.0.0/16": the pool stands twice: want each once`},
		{"pools overlap", addPool("10.244.128.0/17", 24), `pool "10.244.128.0/17": cidr overlaps pool "10.244.0.0/16": pools must not overlap one another`},
		{"pool of link-local addresses", addPool("169.254.0.0/17", 24), `pool "169.254.0.0/17": cidr overlaps "169.254.0.0/16", link-local (RFC 3927); the pods' gateway is there: no pod can have such an address`},
		{"pool of multicast", addPool("ff00::/60", 64), `pool "ff00::/60": cidr overlaps "ff00::/8", multicast (RFC 4291 section 2.7): no pod can have such an address`},

		{"own block in no pool", addOwn("10.9.1.0/24"), `own_block "10.9.1.0/24": cidr is in no pool: want a block of one of the pools`},
		{"own block of another size", addOwn("10.244.64.0/25"), `own_block "10.244.64.0/25": cidr is no block of pool "10.244.0.0/16": want prefix length 24, the pool's block_prefix_length`},
		{"second own block of a pool", addOwn("10.244.64.0/24"), `own_block "10.244.64.0/24": own_block "10.244.1.0/24" is of the same pool "10.244.0.0/16": want at most one block of each pool`},
		{"own block twice", addOwn("10.244.1.0/24"), `own_block "10.244.1.0/24": the block stands twice: want each once`},
		{"own block with host bits", addOwn("10.244.1.1/24"), `own_block "10.244.1.1/24": cidr: not in canonical form: want "10.244.1.0/24"`},

		{"member without a name", addMember(&controlv1.Member{Ipv4: "10.240.0.99"}), `member number 4: the name is empty`},
		{"member in capitals", addMember(&controlv1.Member{Name: "N4", Ipv4: "10.240.0.99"}), `member "N4": name "N4": want labels of lower-case letters, digits and '-' (not first or last; at most 63 each), joined by '.', at most 253 bytes`},
		{"member twice", addMember(&controlv1.Member{Name: "n2", Ipv4: "10.240.0.99"}), `member "n2": there are two members of this name: want each name once`},
		{"member without addresses", addMember(&controlv1.Member{Name: "n4"}), `member "n4": ipv4 and ipv6 are both empty: want at least one address`},
		{"ipv6 in ipv4", addMember(&controlv1.Member{Name: "n4", Ipv4: "fd00::9"}), `member "n4": ipv4 "fd00::9": want an IPv4 address without zone`},
		{"ipv4 in ipv6", addMember(&controlv1.Member{Name: "n4", Ipv6: "10.240.0.99"}), `member "n4": ipv6 "10.240.0.99": want an IPv6 address without zone`},
		{"mapped address", addMember(&controlv1.Member{Name: "n4", Ipv6: "::ffff:10.240.0.99"}), `member "n4": ipv6 "::ffff:10.240.0.99": want an IPv6 address without zone`},
		{"address with zone", addMember(&controlv1.Member{Name: "n4", Ipv6: "fd00::9%eth0"}), `member "n4": ipv6 "fd00::9%eth0": want an IPv6 address without zone`},
		{"long form", addMember(&controlv1.Member{Name: "n4", Ipv6: "fd00:0::9"}), `member "n4": ipv6 "fd00:0::9": not in canonical form: want "fd00::9"`},
		{"link-local member", addMember(&controlv1.Member{Name: "n4", Ipv6: "fe80::9"}), `member "n4": ipv6 "fe80::9": want a unicast address that other nodes can reach: not unspecified, loopback, link-local, multicast or broadcast`},
		{"address taken", addMember(&controlv1.Member{Name: "n4", Ipv4: "10.240.0.12"}), `member "n4": ipv4 "10.240.0.12" is member "n2"'s as well: want a different one for each node`},
		{"address in a pool", addMember(&controlv1.Member{Name: "n4", Ipv4: "10.244.9.9"}), `member "n4": ipv4 "10.244.9.9" is inside pool "10.244.0.0/16": node addresses and pod ranges must not overlap`},
		{"short MAC", func(s *state) { s.Members[1].Mac = "02:00:00:00:01" }, `member "n2": mac "02:00:00:00:01": want six bytes in lower-case hexadecimal, e.g. "02:00:0a:f0:00:0b"`},
		{"EUI-64", func(s *state) { s.Members[1].Mac = "02:00:00:00:01:02:03:04" }, `member "n2": mac "02:00:00:00:01:02:03:04": want six bytes in lower-case hexadecimal, e.g. "02:00:0a:f0:00:0b"`},
		{"MAC with dashes", func(s *state) { s.Members[1].Mac = "02-00-00-00-01-02" }, `member "n2": mac "02-00-00-00-01-02": want six bytes in lower-case hexadecimal, e.g. "02:00:0a:f0:00:0b"`},
		{"multicast MAC", func(s *state) { s.Members[1].Mac = "01:00:5e:00:00:01" }, `member "n2": mac "01:00:5e:00:00:01": want the unicast address of a station (lowest bit of the first byte 0, not all zero)`},
		{"zero MAC", func(s *state) { s.Members[1].Mac = "00:00:00:00:00:00" }, `member "n2": mac "00:00:00:00:00:00": want the unicast address of a station (lowest bit of the first byte 0, not all zero)`},
		{"MAC taken", func(s *state) { s.Members[2].Mac = "02:00:0a:f0:00:0c" }, `member "n3": mac "02:00:0a:f0:00:0c" is member "n2"'s as well: want a different one for each node`},
		{"this node is no member", func(s *state) { s.Node = "n9" }, `members: this node, "n9", is not among them: want every node of the cluster, this one included`},

		{"route without target", addRoute(&controlv1.Route{Prefix: "10.9.0.0/16"}), `route "10.9.0.0/16": it has no target: want one of node, host and unreachable`},
		{"route to nobody", addRoute(toNode("10.9.0.0/16", "")), `route "10.9.0.0/16": node "": want the name of a member`},
		{"route to a stranger", addRoute(toNode("10.9.0.0/16", "n9")), `route "10.9.0.0/16": node "n9" is no member: want the name of a member`},
		{"route to itself", addRoute(toNode("10.9.0.0/16", "n1")), `route "10.9.0.0/16": node "n1" is this node itself: its blocks belong into own_blocks, not into routes`},
		{"host: false", addRoute(&controlv1.Route{Prefix: "10.9.0.0/16", Target: &controlv1.Route_Host{}}), `route "10.9.0.0/16": host false: want true, or another target`},
		{"unreachable: false", addRoute(&controlv1.Route{Prefix: "10.9.0.0/16", Target: &controlv1.Route_Unreachable{}}), `route "10.9.0.0/16": unreachable false: want true, or another target`},
		{"route with host bits", addRoute(toNode("10.9.0.1/16", "n2")), `route "10.9.0.1/16": prefix: not in canonical form: want "10.9.0.0/16"`},
		{"route twice", addRoute(toNode("10.244.2.0/24", "n3")), `route "10.244.2.0/24" to node "n3": the prefix stands twice, before to node "n2": want each once`},
		{"two blocks to one node", addRoute(toNode("10.244.8.0/23", "n3")), `route "10.244.8.0/23": prefix is more than one block of pool "10.244.0.0/16": want prefix length 24 (a block) to 32, since a node owns one block of a pool`},
		{"route is the own block", addRoute(toNode("10.244.1.0/24", "n2")), `route "10.244.1.0/24": prefix is inside own_block "10.244.1.0/24": the addresses of an own block are this node's pods'`},
		{"route into the own block", addRoute(toNowhere("10.244.1.7/32")), `route "10.244.1.7/32": prefix is inside own_block "10.244.1.0/24": the addresses of an own block are this node's pods'`},
		{"services among pods", addRoute(toHost("10.244.200.0/24")), `route "10.244.200.0/24": prefix is inside pool "10.244.0.0/16": service addresses and pod ranges must not overlap`},
		{"route to a member's address", addRoute(toHost("10.240.0.12/32")), `route "10.240.0.12/32": prefix is the address of member "n2": members are reached directly, without a route`},
		{"multicast route", addRoute(toNode("ff05::/16", "n2")), `route "ff05::/16": prefix is multicast (RFC 4291 section 2.7): want one that is routed`},
		{"loopback route", addRoute(toHost("127.0.0.1/32")), `route "127.0.0.1/32": prefix is loopback (RFC 1122 section 3.2.1.3): want one that is routed`},

		{"ports backwards", func(s *state) { s.Snat.FirstPort, s.Snat.LastPort = 2000, 1999 }, `snat: first_port 2000, last_port 1999: want 1024 <= first_port <= last_port <= 65535, or both 0 for the default`},
		{"ports half given", func(s *state) { s.Snat.LastPort = 20000 }, `snat: first_port 0, last_port 20000: want 1024 <= first_port <= last_port <= 65535, or both 0 for the default`},
		{"port too high", func(s *state) { s.Snat.FirstPort, s.Snat.LastPort = 2000, 65536 }, `snat: first_port 2000, last_port 65536: want 1024 <= first_port <= last_port <= 65535, or both 0 for the default`},
		{"unknown mapping", func(s *state) { s.Snat.Mapping = 3 }, `snat: mapping 3: unknown: want 0 (the default) to 2`},
		{"unknown port choice", func(s *state) { s.Snat.PortChoice = -1 }, `snat: port_choice -1: unknown: want 0 (the default) to 3`},
		{"unknown filtering", func(s *state) { s.Snat.Filtering = 4 }, `snat: filtering 4: unknown: want 0 (the default) to 3`},
		{"no prefix", func(s *state) { s.Snat.NoMasqueradeCidrs = []string{"10.0.0.0"} }, `snat: no_masquerade_cidrs "10.0.0.0": not a prefix: want an address and a length, e.g. "10.244.0.0/16"`},
		{"the same destinations twice", func(s *state) { s.Snat.NoMasqueradeCidrs = []string{"10.0.0.0/8", "10.0.0.0/8"} }, `snat: no_masquerade_cidrs "10.0.0.0/8" stands twice: want each once`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := cluster()
			tt.change(s)
			require.EqualError(t, Validate(s), tt.want)
		})
	}
}

func TestValidateSaysEverythingAtOnce(t *testing.T) {
	s := cluster()
	s.Pools[0].BlockPrefixLength = 8
	s.Members[1].Mac = "x"
	s.Members[2].Ipv4 = "10.244.3.3"
	s.Routes = append(s.Routes, toNode("10.9.0.0/16", "n9"))
	s.Snat.FirstPort = 1
	err := Validate(s)
	for _, want := range []string{`block_prefix_length 8`, `mac "x"`, `"10.244.3.3" is inside pool`, `node "n9" is no member`, `first_port 1`} {
		require.ErrorContains(t, err, want)
	}
}

func TestValidateBoundsWhatItSays(t *testing.T) {
	s := cluster()
	for i := range 5000 {
		s.Routes = append(s.Routes, toNode(fmt.Sprintf("11.%d.%d.0/24", i>>8, i&255), "nobody"))
	}
	lines := strings.Split(Validate(s).Error(), "\n")
	require.Len(t, lines, maxProblems+1)
	require.Equal(t, "and 4900 more problems", lines[maxProblems])
}

func TestValidateBoundsLists(t *testing.T) {
	s := &controlv1.NodeState{Node: "n1", Members: []*controlv1.Member{{Name: "n1", Ipv4: "10.240.0.1"}}, Snat: &controlv1.SnatRules{}}
	for i := range 100_000 {
		if i < 20 {
			s.Pools = append(s.Pools, &controlv1.Pool{Cidr: fmt.Sprintf("10.%d.0.0/16", i), BlockPrefixLength: 24})
			s.OwnBlocks = append(s.OwnBlocks, &controlv1.OwnBlock{Cidr: fmt.Sprintf("10.%d.1.0/24", i)})
		}
		if i < 2000 {
			s.Snat.NoMasqueradeCidrs = append(s.Snat.NoMasqueradeCidrs, fmt.Sprintf("12.%d.%d.0/24", i>>8, i&255))
		}
		s.Members = append(s.Members, &controlv1.Member{Name: fmt.Sprint("m", i), Ipv4: fmt.Sprintf("172.%d.%d.%d", 16+i>>16, i>>8&255, i&255)})
	}
	err := Validate(s)
	require.ErrorContains(t, err, "pools: there are 20 of IPv4: want at most 8 per family")
	require.ErrorContains(t, err, "own_blocks: there are 20: want at most one for each of 20 pools")
	require.ErrorContains(t, err, "members: there are 100001: want at most 65535")
	require.ErrorContains(t, err, "snat: no_masquerade_cidrs: there are 2000: want at most 1024")
}

func TestValidateComparesDigestAndCount(t *testing.T) {
	for name, change := range map[string]func(*controlv1.NodeState){
		"digest":        func(s *controlv1.NodeState) { s.Digest++ },
		"count":         func(s *controlv1.NodeState) { s.EntryCount++ },
		"entry missing": func(s *controlv1.NodeState) { s.Routes = s.Routes[1:] },
		"entry changed": func(s *controlv1.NodeState) { s.Routes[0].Hash++ },
	} {
		t.Run(name, func(t *testing.T) {
			s := cluster()
			Seal(s)
			change(s)
			err := Validate(s)
			var mismatch *DigestMismatchError
			require.ErrorAs(t, err, &mismatch)
			require.ErrorContains(t, err, "digest and entry_count are not those of the entries")
		})
	}
	s := cluster()
	Seal(s)
	s.Routes[1].Hash, s.Snat.Hash = 0, 0
	require.EqualError(t, Validate(s), `route "10.244.3.0/24": hash 0: want one in every entry, or neither hash nor digest nor entry_count anywhere`+"\n"+
		`snat: hash 0: want one in every entry, or neither hash nor digest nor entry_count anywhere`)
}

func TestValidateWithoutAState(t *testing.T) {
	require.Error(t, Validate(nil))
}

func TestNodeNames(t *testing.T) {
	for _, ok := range []string{"n1", "1", "worker-2.eu-1.example", strings.Repeat("a", 63), "a." + strings.Repeat(strings.Repeat("b", 60)+".", 4) + "c"} {
		require.NoError(t, ValidateNodeName(ok), ok)
	}
	for _, bad := range []string{"", "N1", "-a", "a-", "a..b", ".a", "a.", "a_b", "a/b", "ä", "a b", strings.Repeat("a", 64), strings.Repeat("a.", 130) + "a"} {
		require.Error(t, ValidateNodeName(bad), bad)
	}
}
