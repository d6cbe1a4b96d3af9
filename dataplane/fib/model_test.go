package fib

import "net/netip"

// model is the golden model: the longest match by looking at every prefix, the pools being unreachable routes that an equal
// route of the builder's overrides.
type model struct {
	routes map[netip.Prefix]Entry
	pools  []netip.Prefix
}

func (m *model) lookup(a netip.Addr) Entry {
	best, e := -1, Entry(0)
	for _, p := range m.pools {
		if p.Contains(a) && p.Bits() > best {
			best, e = p.Bits(), MakeEntry(Unreachable, 0)
		}
	}
	for p, re := range m.routes {
		if p.Contains(a) && p.Bits() >= best {
			best, e = p.Bits(), re
		}
	}
	return e
}
