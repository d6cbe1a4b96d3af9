package snat

import (
	"net/netip"

	"github.com/gaissmai/bart"

	"github.com/overplane/overplane/dataplane/packet"
)

// RulesConfig says which destinations outside the pod CIDRs see the node's address.
type RulesConfig struct {
	// Off: none. Pods' own addresses leave the cluster, and somebody else translates them (external SNAT).
	Off bool
	// NoMasquerade are destinations that see pods' own addresses.
	NoMasquerade []netip.Prefix
	// Nodes are the cluster's nodes. They see pods' own addresses, too, unless TranslateNodes.
	Nodes          []netip.Addr
	TranslateNodes bool
}

// Rules answers whether a destination is translated for. It is immutable: any goroutine may ask. The zero Rules, and nil, translate for all.
type Rules struct {
	off   bool
	plain *bart.Lite // destinations that are not translated for; nil: none
}

// NewRules makes the rules.
func NewRules(c RulesConfig) *Rules {
	r := &Rules{off: c.Off}
	add := func(p netip.Prefix) {
		if r.plain == nil {
			r.plain = new(bart.Lite)
		}
		r.plain.Insert(p.Masked())
	}
	for _, p := range c.NoMasquerade {
		add(p)
	}
	if !c.TranslateNodes {
		for _, a := range c.Nodes {
			a = a.Unmap()
			add(netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return r
}

// Translate reports whether new flows to the destination get the node's address. Flows that have a session keep it, whatever the rules have become.
func (r *Rules) Translate(dst packet.Addr) bool {
	if r == nil || !r.off && r.plain == nil {
		return true
	}
	return !r.off && !r.plain.Contains(dst.Netip())
}
