package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// RouteProtocol marks our routes in the kernel's tables (rtm_protocol, see /etc/iproute2/rt_protos; values from 5 on are for user space).
	// Routes with it are ours to change and delete.
	RouteProtocol = 111

	// The routes to the host port, and the unreachable ones that take over when it is gone: nothing for a pod ever follows the default route.
	routeMetric       = 100
	unreachableMetric = 4096
)

// SyncHostRoutes makes our routes those of h.PodCIDRs: for each one by the host port and a worse one that is unreachable. What is there and right is
// not touched, what is new is added before what is old is deleted. No device is ErrNoLink, and the unreachable routes are there nevertheless.
//
// A route of somebody else to a pod CIDR or a part of it is ErrForeignRoute, names the route, and nothing is changed.
func SyncHostRoutes(h HostPort) error {
	if err := h.complete(); err != nil {
		return err
	}
	err := h.checkForeign()
	if err == nil {
		err = h.syncRoutes()
	}
	if err != nil {
		return fmt.Errorf("host port %s: %w", h.Name, err)
	}
	return nil
}

// checkForeign looks for routes that would take pods' packets away.
func (h *HostPort) checkForeign() error {
	var errs []error
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := listRoutes(fam)
		if err != nil {
			return err
		}
		for _, r := range routes {
			dst := prefixOf(r.Dst, fam)
			for _, c := range h.PodCIDRs {
				if r.Protocol != RouteProtocol && dst.Bits() >= c.Bits() && c.Contains(dst.Addr()) {
					errs = append(errs, fmt.Errorf("%w in pod CIDR %s: %s: delete it, or choose another pod CIDR", ErrForeignRoute, c, describe(r)))
				}
			}
		}
	}
	return errors.Join(errs...)
}

// syncRoutes makes the difference.
func (h *HostPort) syncRoutes() error {
	own, err := ownRoutes()
	if err != nil {
		return err
	}
	var noLink error
	index := 0
	if link, err := linkByName(h.Name); err != nil {
		noLink = err
	} else {
		index = link.Attrs().Index
	}
	var wanted []netlink.Route
	for _, c := range h.PodCIDRs {
		wanted = append(wanted, netlink.Route{
			Family: family(c.Addr()), Dst: ipNet(c), Type: unix.RTN_UNREACHABLE, Priority: unreachableMetric, Protocol: RouteProtocol, Table: unix.RT_TABLE_MAIN,
		})
	}
	for _, c := range h.PodCIDRs {
		if index == 0 {
			break
		}
		r := netlink.Route{
			Family: family(c.Addr()), Dst: ipNet(c), Type: unix.RTN_UNICAST, Priority: routeMetric, Protocol: RouteProtocol, Table: unix.RT_TABLE_MAIN,
			LinkIndex: index, Gw: Gateway6.AsSlice(), Src: h.HostIPv6.AsSlice(),
		}
		if c.Addr().Is4() {
			// The next hop is in no subnet of the interface, which has none.
			r.Flags, r.Gw, r.Src = int(netlink.FLAG_ONLINK), Gateway4.AsSlice(), h.HostIPv4.AsSlice()
		}
		wanted = append(wanted, r)
	}
	for i := range wanted {
		r := &wanted[i]
		if slices.ContainsFunc(own, func(o netlink.Route) bool { return equalRoute(o, *r) }) {
			continue
		}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("adding route %s, preferred source %s: %w", describe(*r), r.Src, err)
		}
	}
	for i := range own {
		if slices.ContainsFunc(wanted, func(r netlink.Route) bool { return keyOf(r) == keyOf(own[i]) }) {
			continue
		}
		if err := netlink.RouteDel(&own[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("deleting route %s: %w", describe(own[i]), err)
		}
	}
	return noLink
}

// routeKey is what the kernel tells routes of a table apart by.
type routeKey struct {
	dst    netip.Prefix
	metric int
}

func keyOf(r netlink.Route) routeKey { return routeKey{prefixOf(r.Dst, r.Family), metric(r)} }

func equalRoute(a, b netlink.Route) bool {
	if keyOf(a) != keyOf(b) || a.Type != b.Type {
		return false
	}
	// IPv6 gives unreachable routes the loopback interface.
	return a.Type == unix.RTN_UNREACHABLE || a.LinkIndex == b.LinkIndex && a.Gw.Equal(b.Gw) && a.Src.Equal(b.Src) &&
		a.Flags&int(netlink.FLAG_ONLINK) == b.Flags&int(netlink.FLAG_ONLINK)
}

// ownRoutes lists what has our protocol number, both families.
func ownRoutes() ([]netlink.Route, error) {
	var own []netlink.Route
	for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := listRoutes(fam)
		if err != nil {
			return nil, err
		}
		for _, r := range routes {
			if r.Protocol == RouteProtocol {
				r.Family = fam
				own = append(own, r)
			}
		}
	}
	return own, nil
}

func deleteOwnRoutes() error {
	own, err := ownRoutes()
	if err != nil {
		return err
	}
	var errs []error
	for i := range own {
		if err := netlink.RouteDel(&own[i]); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("deleting route %s: %w", describe(own[i]), err))
		}
	}
	return errors.Join(errs...)
}
