package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Kind is what sort of interface a link is: the kernel's name of its type (rtnl_link_ops.kind), "physical" for those that have none.
type Kind string

// Kinds that are treated specially somewhere.
const (
	KindPhysical Kind = "physical"
	KindVeth     Kind = "veth"
	KindBond     Kind = "bond"
	KindVLAN     Kind = "vlan"
)

// Uplink is what the kernel says about the underlay's interface at one moment.
type Uplink struct {
	Name  string
	Index int
	Kind  Kind
	MAC   net.HardwareAddr
	MTU   int  // bytes
	Up    bool // administratively up, and with carrier
	Gone  bool // there is no such interface now: everything but Name is zero

	// IPv4 and IPv6 are the primary global addresses with the lengths of their subnets; invalid if there is none. Primary is the first that the kernel lists
	// and that is fit to be a source: no secondary, temporary, deprecated or tentative one. Addresses are all global ones, in the kernel's order.
	IPv4, IPv6 netip.Prefix
	Addresses  []netip.Prefix

	// Gateway4 and Gateway6 are the next hops of the best default routes by this interface; invalid if there is none. GatewayMAC4 and GatewayMAC6 are their
	// Ethernet addresses, nil while unresolved.
	Gateway4, Gateway6       netip.Addr
	GatewayMAC4, GatewayMAC6 net.HardwareAddr

	RxQueues, TxQueues int // in use now, not the most that could be
}

// Equal reports whether two uplinks are the same in everything.
func (u Uplink) Equal(v Uplink) bool {
	return u.Name == v.Name && u.Index == v.Index && u.Kind == v.Kind && u.MTU == v.MTU && u.Up == v.Up && u.Gone == v.Gone &&
		u.IPv4 == v.IPv4 && u.IPv6 == v.IPv6 && u.Gateway4 == v.Gateway4 && u.Gateway6 == v.Gateway6 &&
		u.RxQueues == v.RxQueues && u.TxQueues == v.TxQueues && slices.Equal(u.Addresses, v.Addresses) &&
		bytes.Equal(u.MAC, v.MAC) && bytes.Equal(u.GatewayMAC4, v.GatewayMAC4) && bytes.Equal(u.GatewayMAC6, v.GatewayMAC6)
}

// ReadUplink reads the facts about an interface in the caller's namespace; "" means the interface of the best default route, IPv4's before IPv6's. It provokes nothing: a
// gateway that nobody has talked to has no Ethernet address yet. No such interface, or no default route, is ErrNoLink.
func ReadUplink(name string) (Uplink, error) {
	u, _, err := readUplink(name)
	if err != nil {
		return Uplink{}, fmt.Errorf("uplink: %w", err)
	}
	return u, nil
}

// neighbourStates are the kernel's states (NUD_*) of the gateways' entries, 0 where there is none.
type neighbourStates struct{ v4, v6 int }

func readUplink(name string) (Uplink, neighbourStates, error) {
	var (
		states neighbourStates
		link   netlink.Link
	)
	routes4, err := listRoutes(unix.AF_INET)
	if err != nil {
		return Uplink{}, states, err
	}
	routes6, err := listRoutes(unix.AF_INET6)
	if err != nil {
		return Uplink{}, states, err
	}
	if name == "" {
		index, _ := defaultRoute(routes4, unix.AF_INET, 0)
		if index == 0 {
			index, _ = defaultRoute(routes6, unix.AF_INET6, 0)
		}
		if index == 0 {
			return Uplink{}, states, fmt.Errorf("%w: there is no default route to find it by; name the interface", ErrNoLink)
		}
		if link, err = netlink.LinkByIndex(index); err != nil {
			return Uplink{}, states, fmt.Errorf("reading interface %d: %w", index, err)
		}
	} else if link, err = linkByName(name); err != nil {
		return Uplink{}, states, err
	}
	a := link.Attrs()
	u := Uplink{
		Name: a.Name, Index: a.Index, Kind: Kind(link.Type()), MAC: a.HardwareAddr, MTU: a.MTU,
		Up: a.RawFlags&unix.IFF_UP != 0 && a.RawFlags&unix.IFF_LOWER_UP != 0,
	}
	if u.Kind == "device" {
		u.Kind = KindPhysical
	}
	if u.RxQueues, u.TxQueues, err = channels(a.Index); err != nil {
		u.RxQueues, u.TxQueues = a.NumRxQueues, a.NumTxQueues
	}
	if err := u.readAddresses(link); err != nil {
		return Uplink{}, states, err
	}
	_, u.Gateway4 = defaultRoute(routes4, unix.AF_INET, u.Index)
	_, u.Gateway6 = defaultRoute(routes6, unix.AF_INET6, u.Index)
	if u.GatewayMAC4, states.v4, err = neighbour(u.Index, u.Gateway4); err != nil {
		return Uplink{}, states, err
	}
	if u.GatewayMAC6, states.v6, err = neighbour(u.Index, u.Gateway6); err != nil {
		return Uplink{}, states, err
	}
	return u, states, nil
}

func (u *Uplink) readAddresses(link netlink.Link) error {
	var addrs []netlink.Addr
	for try := 0; ; try++ {
		var err error
		addrs, err = netlink.AddrList(link, netlink.FAMILY_ALL)
		if err == nil {
			break
		}
		if !errors.Is(err, netlink.ErrDumpInterrupted) || try == 10 {
			return fmt.Errorf("listing addresses of %s: %w", u.Name, err)
		}
	}
	const unfit = unix.IFA_F_SECONDARY | unix.IFA_F_DEPRECATED | unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED // IFA_F_TEMPORARY is IFA_F_SECONDARY
	for _, a := range addrs {
		if a.Scope != unix.RT_SCOPE_UNIVERSE {
			continue
		}
		p := prefixOf(a.IPNet, 0)
		u.Addresses = append(u.Addresses, p)
		if a.Flags&unfit != 0 {
			continue
		}
		if p.Addr().Is4() && !u.IPv4.IsValid() {
			u.IPv4 = p
		}
		if p.Addr().Is6() && !u.IPv6.IsValid() {
			u.IPv6 = p
		}
	}
	return nil
}

// defaultRoute finds the best default route by the interface with that index (0 = any), and its next hop, invalid if it has none.
func defaultRoute(routes []netlink.Route, family, index int) (int, netip.Addr) {
	best, bestMetric, gateway := 0, 0, netip.Addr{}
	for _, r := range routes {
		if r.Type != unix.RTN_UNICAST || prefixOf(r.Dst, family).Bits() != 0 {
			continue
		}
		hops := r.MultiPath
		if len(hops) == 0 {
			hops = []*netlink.NexthopInfo{{LinkIndex: r.LinkIndex, Gw: r.Gw, Via: r.Via}}
		}
		for _, h := range hops {
			if h.LinkIndex == 0 || index != 0 && h.LinkIndex != index || best != 0 && r.Priority >= bestMetric {
				continue
			}
			best, bestMetric, gateway = h.LinkIndex, r.Priority, netip.Addr{}
			if gw, ok := netip.AddrFromSlice(h.Gw); ok {
				gateway = gw.Unmap()
			} else if via, ok := h.Via.(*netlink.Via); ok { // an IPv4 route by an IPv6 next hop (RFC 5549)
				gw, _ := netip.AddrFromSlice(via.Addr)
				gateway = gw
			}
		}
	}
	return best, gateway
}

// usable are the states in which the kernel itself would send to a neighbour.
const usable = netlink.NUD_REACHABLE | netlink.NUD_STALE | netlink.NUD_DELAY | netlink.NUD_PROBE | netlink.NUD_PERMANENT | netlink.NUD_NOARP

// neighbour reads one entry of the neighbour table: the address, nil if unresolved, and the state, 0 if there is no entry.
func neighbour(index int, addr netip.Addr) (net.HardwareAddr, int, error) {
	if !addr.IsValid() {
		return nil, 0, nil
	}
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	req.AddData(&netlink.Ndmsg{Family: uint8(family(addr)), Index: uint32(index)})
	req.AddData(nl.NewRtAttr(netlink.NDA_DST, addr.AsSlice()))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if errors.Is(err, unix.ENOENT) || err == nil && len(msgs) == 0 {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("reading neighbour %s: %w", addr, err)
	}
	n, err := netlink.NeighDeserialize(msgs[0])
	if err != nil {
		return nil, 0, fmt.Errorf("reading neighbour %s: %w", addr, err)
	}
	if n.State&usable == 0 || len(n.HardwareAddr) != 6 {
		return nil, n.State, nil
	}
	return n.HardwareAddr, n.State, nil
}

// provoke makes the kernel resolve or confirm a neighbour, as a packet to it would (NTF_USE).
func provoke(index int, addr netip.Addr) error {
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: index, Family: family(addr), IP: addr.AsSlice(), Flags: netlink.NTF_USE, State: netlink.NUD_NONE})
}
