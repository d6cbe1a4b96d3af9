package server

import (
	"encoding/json"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/encoding/protojson"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/ipam"
)

// update brings one entry up to date with the records and says whether it changed.
func (g *graph) update(k entryKey) bool {
	before, after := g.entries[k], g.wanted(k)
	if before == nil && after == nil || before != nil && after != nil && before.hash == after.hash {
		return false
	}
	if before != nil {
		g.digest ^= before.hash
		delete(g.entries, k)
	}
	if after != nil {
		g.digest ^= after.hash
		g.entries[k] = after
	}
	return true
}

// wanted is the entry that the records ask for, or nil.
func (g *graph) wanted(k entryKey) *entry {
	switch k.kind {
	case kindPool:
		if p := g.pools[prefix(k.key)]; p != nil {
			return newEntry(k, &controlv1.NodeState{Pools: []*controlv1.Pool{{Cidr: k.key, BlockPrefixLength: uint32(p.BlockBits)}}})
		}
	case kindMember:
		if g.member(k.key) {
			return newEntry(k, &controlv1.NodeState{Members: []*controlv1.Member{member(g.nodes[k.key])}})
		}
	case kindRoute:
		if r := g.wantedRoute(prefix(k.key)); r != nil {
			return newEntry(k, &controlv1.NodeState{Routes: []*controlv1.Route{r}})
		}
	case kindSNAT:
		if len(g.settings.SNAT) == 0 {
			return nil
		}
		rules := &controlv1.SnatRules{}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(json.RawMessage(g.settings.SNAT), rules); err != nil {
			g.log.Error("the store's SNAT rules cannot be read; nodes keep to the defaults", "error", err)
			return nil
		}
		return newEntry(k, &controlv1.NodeState{Snat: rules})
	}
	return nil
}

func (g *graph) member(name string) bool {
	n := g.nodes[name]
	return n != nil && !n.Gone
}

func (g *graph) wantedRoute(p netip.Prefix) *controlv1.Route {
	if b := g.blocks[p]; b != nil && b.Held() && g.member(b.Owner) {
		return &controlv1.Route{Prefix: p.String(), Target: &controlv1.Route_Node{Node: b.Owner}}
	}
	if slices.Contains(g.settings.Ranges.Services, p) {
		return &controlv1.Route{Prefix: p.String(), Target: &controlv1.Route_Host{Host: true}}
	}
	if r := g.routes[p]; r != nil && (r.Node == "" || g.member(r.Node)) {
		return staticRoute(r)
	}
	return nil
}

func staticRoute(r *ipam.StaticRoute) *controlv1.Route {
	out := &controlv1.Route{Prefix: r.Prefix.String(), Target: &controlv1.Route_Unreachable{Unreachable: true}}
	switch {
	case r.Node != "":
		out.Target = &controlv1.Route_Node{Node: r.Node}
	case r.Host:
		out.Target = &controlv1.Route_Host{Host: true}
	}
	return out
}

func member(n *ipam.Node) *controlv1.Member {
	m := &controlv1.Member{Name: n.Name, Mac: n.MAC}
	if n.IPv4.IsValid() {
		m.Ipv4 = n.IPv4.String()
	}
	if n.IPv6.IsValid() {
		m.Ipv6 = n.IPv6.String()
	}
	return m
}

func prefix(s string) netip.Prefix {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}
