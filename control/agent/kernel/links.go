package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The functions of this file act in the calling thread's network namespace.

// linkByName finds an interface; ErrNoLink if there is none.
func linkByName(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		return nil, fmt.Errorf("%w: %s", ErrNoLink, name)
	}
	if err != nil {
		return nil, fmt.Errorf("reading interface %s: %w", name, err)
	}
	return link, nil
}

// ourTAP finds an interface that must be a TAP of the kind package tap makes. Something else of that name is ErrLinkExists.
func ourTAP(name string) (*netlink.Tuntap, error) {
	link, err := linkByName(name)
	if err != nil {
		return nil, err
	}
	t, ok := link.(*netlink.Tuntap)
	if !ok || t.Mode != netlink.TUNTAP_MODE_TAP || t.Flags&netlink.TUNTAP_MULTI_QUEUE == 0 {
		return nil, fmt.Errorf("%w and is no multi-queue TAP: %s is a %s", ErrLinkExists, name, link.Type())
	}
	return t, nil
}

// heldTime is how long a device may be held by a process that is about to end: an exiting process closes its files one after the other.
const heldTime = 500 * time.Millisecond

// unheldTAP is ourTAP, and nobody may have queues of it open, or not for long any more.
func unheldTAP(name string) (*netlink.Tuntap, error) {
	for end := time.Now().Add(heldTime); ; time.Sleep(10 * time.Millisecond) {
		t, err := ourTAP(name)
		if err != nil {
			return nil, err
		}
		queues := t.Queues + t.DisabledQueues
		if queues == 0 {
			return t, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("%w: %s has %d open queues; is another daemon running?", ErrBusy, name, queues)
		}
	}
}

// setMAC and setMTU change what differs.
func setMAC(link netlink.Link, mac net.HardwareAddr) error {
	if len(mac) == 0 || bytes.Equal(link.Attrs().HardwareAddr, mac) {
		return nil
	}
	if err := netlink.LinkSetHardwareAddr(link, mac); err != nil {
		return fmt.Errorf("setting %s's Ethernet address to %s: %w", link.Attrs().Name, mac, err)
	}
	return nil
}

func setMTU(link netlink.Link, mtu int) error {
	if mtu == 0 || link.Attrs().MTU == mtu {
		return nil
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("setting %s's MTU to %d: %w", link.Attrs().Name, mtu, err)
	}
	return nil
}

func setUp(link netlink.Link) error {
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", link.Attrs().Name, err)
	}
	return nil
}

var errNoIPv6 = errors.New("IPv6 is off in this kernel")

// sysctl6 sets an interface's IPv6 parameter if it differs. /proc/sys/net shows the namespace of the thread that reads it.
func sysctl6(name, key, value string) error {
	path := "/proc/sys/net/ipv6/conf/" + name + "/" + key
	old, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%s: %w (ipv6.disable=1, or the module is missing)", path, errNoIPv6)
	case err != nil:
		return err
	case strings.TrimSpace(string(old)) == value:
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("%w: /proc/sys must be writable for the daemon", err)
	}
	return nil
}

// addAddress gives link one address with a full-length prefix, if it has not got it.
func addAddress(link netlink.Link, addr netip.Addr) error {
	a := &netlink.Addr{IPNet: hostNet(addr)}
	if addr.Is6() {
		// No duplicate address detection: nobody else is on this link, and it would hold the address back for a second.
		a.Flags = unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE
	}
	if err := netlink.AddrReplace(link, a); err != nil {
		return fmt.Errorf("adding %s to %s: %w", addr, link.Attrs().Name, err)
	}
	return nil
}

// setNeighbour makes a permanent neighbour entry, so that the kernel never asks.
func setNeighbour(link netlink.Link, addr netip.Addr, mac net.HardwareAddr) error {
	n := &netlink.Neigh{LinkIndex: link.Attrs().Index, IP: addr.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT, Family: family(addr)}
	if err := netlink.NeighSet(n); err != nil {
		return fmt.Errorf("setting neighbour %s of %s to %s: %w", addr, link.Attrs().Name, mac, err)
	}
	return nil
}

// addRoute adds a route of the main table, or changes our own. One to the same destination by another interface is ErrForeignRoute.
func addRoute(link netlink.Link, r netlink.Route) error {
	r.LinkIndex = link.Attrs().Index
	err := netlink.RouteAdd(&r)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return fmt.Errorf("adding route %s by %s: %w", r.Dst, link.Attrs().Name, err)
		}
		return nil
	}
	routes, err := listRoutes(r.Family)
	if err != nil {
		return err
	}
	for _, old := range routes {
		if prefixOf(old.Dst, r.Family) == prefixOf(r.Dst, r.Family) && metric(old) == metric(r) && old.LinkIndex != r.LinkIndex {
			return fmt.Errorf("%w: %s", ErrForeignRoute, describe(old))
		}
	}
	if err := netlink.RouteReplace(&r); err != nil {
		return fmt.Errorf("changing route %s by %s: %w", r.Dst, link.Attrs().Name, err)
	}
	return nil
}

// listRoutes lists the main table of a family.
func listRoutes(family int) ([]netlink.Route, error) {
	for try := 0; ; try++ {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
		if errors.Is(err, netlink.ErrDumpInterrupted) && try < 10 {
			continue // the table changed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("listing routes: %w", err)
		}
		return routes, nil
	}
}

// metric is the route's priority as the kernel compares it: IPv6 has none that is 0.
func metric(r netlink.Route) int {
	if r.Family == unix.AF_INET6 && r.Priority == 0 {
		return 1024 // IP6_RT_PRIO_USER
	}
	return r.Priority
}

// describe says which route it is, for people.
func describe(r netlink.Route) string {
	s := prefixOf(r.Dst, r.Family).String()
	if r.Gw != nil {
		s += " via " + r.Gw.String()
	}
	if link, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
		s += " dev " + link.Attrs().Name
	}
	return s + " proto " + r.Protocol.String()
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func hostNet(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf converts back; nil is the default route.
func prefixOf(n *net.IPNet, family int) netip.Prefix {
	if n == nil {
		if family == unix.AF_INET {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}
