package api

import (
	"fmt"
	"net/netip"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// notForPods are addresses that no pod can have: a router must not forward from or to them, or they mean something else.
var notForPods = []struct {
	cidr netip.Prefix
	what string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), `"this network" (RFC 1122 section 3.2.1.3)`},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback (RFC 1122 section 3.2.1.3)"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local (RFC 3927); the pods' gateway is there"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast (RFC 1112)"},
	{netip.MustParsePrefix("255.255.255.255/32"), "the limited broadcast (RFC 919)"},
	{netip.MustParsePrefix("::/127"), "unspecified and loopback (RFC 4291 section 2.5)"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4-mapped (RFC 4291 section 2.5.5.2)"},
	{netip.MustParsePrefix("fe80::/10"), "link-local (RFC 4291 section 2.5.6); the pods' gateway is there"},
	{netip.MustParsePrefix("ff00::/8"), "multicast (RFC 4291 section 2.7)"},
}

// unroutable are destinations that never leave a host or a link by a route. They are those of notForPods less link-local, where node-local
// services live.
func unroutable(p netip.Prefix) (what string, ok bool) {
	for _, r := range notForPods {
		if r.cidr.Addr().IsLinkLocalUnicast() {
			continue
		}
		if r.cidr.Bits() <= p.Bits() && r.cidr.Contains(p.Addr()) {
			return r.what, true
		}
	}
	return "", false
}

// covers reports whether every address of b is in a.
func covers(a, b netip.Prefix) bool { return a.Bits() <= b.Bits() && a.Contains(b.Addr()) }

func (v *validator) pools() {
	list := v.state.GetPools()
	var family [2]int
	for _, p := range list {
		if prefix, err := parsePrefix(p.GetCidr()); err == nil {
			family[index(prefix)]++
		}
	}
	for i, name := range [2]string{"IPv4", "IPv6"} {
		if family[i] > MaxPoolsPerFamily {
			v.addf("pools: there are %d of %s: want at most %d per family", family[i], name, MaxPoolsPerFamily)
		}
	}
	// Every pool is compared with every other one, so no more than could be right are looked at.
	if len(list) > 2*MaxPoolsPerFamily {
		list = list[:2*MaxPoolsPerFamily]
	}
	for i, p := range list {
		who := label{kindPool, p.GetCidr(), i}
		cidr, err := parsePrefix(p.GetCidr())
		if err != nil {
			v.addf("%s: cidr: %w", who, err)
			continue
		}
		block := int(p.GetBlockPrefixLength())
		if most := min(cidr.Bits()+MaxBlockBits, cidr.Addr().BitLen()); block < cidr.Bits() || block > most {
			v.addf("%s: block_prefix_length %d: want %d to %d (at most %d bits longer than the pool's)", who, p.GetBlockPrefixLength(), cidr.Bits(), most, MaxBlockBits)
			block = cidr.Bits()
		}
		for _, r := range notForPods {
			if r.cidr.Overlaps(cidr) {
				v.addf("%s: cidr overlaps %q, %s: no pod can have such an address", who, r.cidr, r.what)
			}
		}
		for _, other := range v.pool {
			if other.cidr == cidr {
				v.addf("%s: the pool stands twice: want each once", who)
			} else if other.cidr.Overlaps(cidr) {
				v.addf("%s: cidr overlaps pool %q: pools must not overlap one another", who, other.cidr)
			}
		}
		v.pool = append(v.pool, poolRange{cidr, block})
	}
}

func index(p netip.Prefix) int {
	if p.Addr().Is4() {
		return 0
	}
	return 1
}

// poolAround is the pool that covers the prefix.
func (v *validator) poolAround(p netip.Prefix) (poolRange, bool) {
	for _, pool := range v.pool {
		if covers(pool.cidr, p) {
			return pool, true
		}
	}
	return poolRange{}, false
}

func (v *validator) ownBlocks() {
	list := v.state.GetOwnBlocks()
	if len(list) > 2*MaxPoolsPerFamily {
		v.addf("own_blocks: there are %d: want at most one for each of %d pools", len(list), len(v.state.GetPools()))
		list = list[:2*MaxPoolsPerFamily]
	}
	blocks := make(map[netip.Prefix]netip.Prefix, len(list)) // pool -> block
	for i, b := range list {
		who := label{kindOwnBlock, b.GetCidr(), i}
		cidr, err := parsePrefix(b.GetCidr())
		if err != nil {
			v.addf("%s: cidr: %w", who, err)
			continue
		}
		pool, ok := v.poolAround(cidr)
		switch other, taken := blocks[pool.cidr]; {
		case !ok:
			v.addf("%s: cidr is in no pool: want a block of one of the pools", who)
		case cidr.Bits() != pool.block:
			v.addf("%s: cidr is no block of pool %q: want prefix length %d, the pool's block_prefix_length", who, pool.cidr, pool.block)
		case taken && other == cidr:
			v.addf("%s: the block stands twice: want each once", who)
		case taken:
			v.addf("%s: own_block %q is of the same pool %q: want at most one block of each pool", who, other, pool.cidr)
		default:
			blocks[pool.cidr] = cidr
		}
		v.own = append(v.own, cidr)
	}
}

func (v *validator) routes() {
	list := v.state.GetRoutes()
	if len(list) > MaxRoutes {
		v.addf("routes: there are %d: want at most %d", len(list), MaxRoutes)
		list = list[:MaxRoutes]
	}
	seen := make(map[netip.Prefix]*controlv1.Route, len(list))
	for i, r := range list {
		who := label{kindRoute, r.GetPrefix(), i}
		v.target(who, r)
		p, err := parsePrefix(r.GetPrefix())
		if err != nil {
			v.addf("%s: prefix: %w", who, err)
			continue
		}
		if other, twice := seen[p]; twice {
			v.addf("%s to %s: the prefix stands twice, before to %s: want each once", who, targetName(r), targetName(other))
		}
		seen[p] = r
		v.routeRange(who, r, p)
	}
}

// target checks where a route leads.
func (v *validator) target(who label, r *controlv1.Route) {
	switch t := r.GetTarget().(type) {
	case *controlv1.Route_Node:
		_, known := v.names[t.Node]
		switch {
		case t.Node == "":
			v.addf("%s: node %q: want the name of a member", who, t.Node)
		case t.Node == v.state.GetNode():
			v.addf("%s: node %q is this node itself: its blocks belong into own_blocks, not into routes", who, t.Node)
		case !known:
			v.addf("%s: node %q is no member: want the name of a member", who, t.Node)
		}
	case *controlv1.Route_Host:
		if !t.Host {
			v.addf("%s: host false: want true, or another target", who)
		}
	case *controlv1.Route_Unreachable:
		if !t.Unreachable {
			v.addf("%s: unreachable false: want true, or another target", who)
		}
	default:
		v.addf("%s: it has no target: want one of node, host and unreachable", who)
	}
}

func targetName(r *controlv1.Route) string {
	switch t := r.GetTarget().(type) {
	case *controlv1.Route_Node:
		return fmt.Sprintf("node %q", t.Node)
	case *controlv1.Route_Host:
		return "the host"
	case *controlv1.Route_Unreachable:
		return "unreachable"
	}
	return "nowhere"
}

// routeRange checks a route's prefix against everything else that has one.
func (v *validator) routeRange(who label, r *controlv1.Route, p netip.Prefix) {
	if what, ok := unroutable(p); ok {
		v.addf("%s: prefix is %s: want one that is routed", who, what)
	}
	if name, ok := v.addresses[p.Addr()]; ok && p.IsSingleIP() {
		v.addf("%s: prefix is the address of member %q: members are reached directly, without a route", who, name)
	}
	for _, own := range v.own {
		if covers(own, p) {
			v.addf("%s: prefix is inside own_block %q: the addresses of an own block are this node's pods'", who, own)
			return
		}
	}
	pool, ok := v.poolAround(p)
	if !ok {
		return
	}
	switch r.GetTarget().(type) {
	case *controlv1.Route_Node:
		if p.Bits() < pool.block {
			v.addf("%s: prefix is more than one block of pool %q: want prefix length %d (a block) to %d, since a node owns one block of a pool",
				who, pool.cidr, pool.block, p.Addr().BitLen())
		}
	case *controlv1.Route_Host:
		v.addf("%s: prefix is inside pool %q: service addresses and pod ranges must not overlap", who, pool.cidr)
	}
}
