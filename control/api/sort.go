package api

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Sort puts the entries of s into one order, in place: prefixes IPv4 before IPv6, by address, shorter ones first; members by name. What is no
// prefix comes last, as text. Two states with equal entries are equal messages when both are sorted.
func Sort(s *controlv1.NodeState) {
	sortByPrefix(s.GetPools(), (*controlv1.Pool).GetCidr)
	sortByPrefix(s.GetOwnBlocks(), (*controlv1.OwnBlock).GetCidr)
	sortByPrefix(s.GetRoutes(), (*controlv1.Route).GetPrefix)
	slices.SortStableFunc(s.GetMembers(), func(a, b *controlv1.Member) int { return strings.Compare(a.GetName(), b.GetName()) })
}

// sorted is s with its lists in order; s keeps its own order, and both share the entries.
func sorted(s *controlv1.NodeState) *controlv1.NodeState {
	out := &controlv1.NodeState{
		Node: s.GetNode(), Version: s.GetVersion(), Digest: s.GetDigest(), EntryCount: s.GetEntryCount(),
		Pools: slices.Clone(s.GetPools()), OwnBlocks: slices.Clone(s.GetOwnBlocks()), Members: slices.Clone(s.GetMembers()),
		Routes: slices.Clone(s.GetRoutes()), Snat: s.GetSnat(),
	}
	Sort(out)
	return out
}

func sortByPrefix[E any](list []E, key func(E) string) {
	type keyed struct {
		prefix netip.Prefix
		text   string
		value  E
	}
	// Parsed once each: comparing by parsing anew would cost log(n) times as much.
	keys := make([]keyed, len(list))
	for i, e := range list {
		p, err := netip.ParsePrefix(key(e))
		if err != nil {
			p = netip.Prefix{}
		}
		keys[i] = keyed{p, key(e), e}
	}
	slices.SortStableFunc(keys, func(a, b keyed) int {
		if a.prefix.IsValid() != b.prefix.IsValid() {
			if a.prefix.IsValid() {
				return -1
			}
			return 1
		}
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()), strings.Compare(a.text, b.text))
	})
	for i := range keys {
		list[i] = keys[i].value
	}
}
