package view

import (
	"fmt"
	"io"
	"net/netip"
	"slices"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// RouteKinds are the values of ProgrammedRoute.kind.
var RouteKinds = []string{"pod", "node", "member", "host", "outside", "unreachable"}

// SelectRoutes returns the routes of the given kinds, all of them if none is given. The result is a new slice of the same routes.
func SelectRoutes(routes []*controlv1.ProgrammedRoute, kinds []string) []*controlv1.ProgrammedRoute {
	var out []*controlv1.ProgrammedRoute
	for _, r := range routes {
		if len(kinds) == 0 || slices.Contains(kinds, r.GetKind()) {
			out = append(out, r)
		}
	}
	return out
}

// ParseDestination reads what a lookup is for: an address, or a prefix whose every address is meant.
func ParseDestination(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf(`%q: want an address or a prefix, e.g. "10.244.2.7" or "10.244.2.0/24"`, text)
	}
	return p.Masked(), nil
}

// Lookup returns the longest of the routes that covers the whole destination, as the data plane decides, or nil. Where a pool, which is listed
// as unreachable, and another route have the same prefix, the other route holds.
func Lookup(routes []*controlv1.ProgrammedRoute, to netip.Prefix) *controlv1.ProgrammedRoute {
	var best *controlv1.ProgrammedRoute
	longest := -1
	for _, r := range routes {
		p, err := netip.ParsePrefix(r.GetPrefix())
		if err != nil || p.Bits() > to.Bits() || !p.Contains(to.Addr()) {
			continue
		}
		if p.Bits() > longest || p.Bits() == longest && best.GetKind() == "unreachable" {
			best, longest = r, p.Bits()
		}
	}
	return best
}

// Routes writes a table of routes, in the order given.
func Routes(w io.Writer, routes []*controlv1.ProgrammedRoute) error {
	if len(routes) == 0 {
		_, err := io.WriteString(w, "no routes\n")
		return err
	}
	t := newTable("PREFIX", "KIND", "TARGET", "MAC", ">MTU")
	for _, r := range routes {
		mtu := ""
		if r.GetMtu() != 0 {
			mtu = number(r.GetMtu())
		}
		t.row(r.GetPrefix(), r.GetKind(), r.GetTarget(), r.GetMac(), mtu)
	}
	return t.write(w)
}
