package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const bridgeName = "br0"

// netnsHandle is netlink in one named namespace.
type netnsHandle struct {
	*netlink.Handle
	ns   netns.NsHandle
	name string
}

func openHandle(name string) (*netnsHandle, error) {
	ns, err := netns.GetFromPath(NetnsPath(name))
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: %w", name, err)
	}
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, fmt.Errorf("network namespace %s: netlink: %w", name, err)
	}
	return &netnsHandle{h, ns, name}, nil
}

func (h *netnsHandle) close() {
	h.Handle.Close()
	h.ns.Close()
}

// setLoopbackUp brings lo of the calling thread's namespace up.
func setLoopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// address adds an address without duplicate address detection: it can be used at once.
func (h *netnsHandle) address(link netlink.Link, cidr string) error {
	addr, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	addr.Flags = unix.IFA_F_NODAD
	if err := h.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("%s: address %s: %w", h.name, cidr, err)
	}
	return nil
}

// route adds a route; dst nil is a default route of via's family.
func (h *netnsHandle) route(link netlink.Link, dst *net.IPNet, via string) error {
	r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: net.ParseIP(via)}
	if err := h.RouteAdd(r); err != nil {
		return fmt.Errorf("%s: route via %s: %w", h.name, via, err)
	}
	return nil
}

// AddRoute adds a route to prefix via a next hop in the named namespace.
func AddRoute(netnsName string, prefix netip.Prefix, device string, via netip.Addr) error {
	h, err := openHandle(netnsName)
	if err != nil {
		return err
	}
	defer h.close()
	link, err := h.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", netnsName, device, err)
	}
	dst := &net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())}
	return h.route(link, dst, via.String())
}

// SetLink brings a device of the named namespace up or down.
func SetLink(netnsName, device string, up bool) error {
	h, err := openHandle(netnsName)
	if err != nil {
		return err
	}
	defer h.close()
	link, err := h.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", netnsName, device, err)
	}
	if up {
		return h.LinkSetUp(link)
	}
	return h.LinkSetDown(link)
}

// SetLinkMTU changes the MTU of a device of the named namespace.
func SetLinkMTU(netnsName, device string, mtu int) error {
	h, err := openHandle(netnsName)
	if err != nil {
		return err
	}
	defer h.close()
	link, err := h.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", netnsName, device, err)
	}
	return h.LinkSetMTU(link, mtu)
}

// SetLinkMAC changes the Ethernet address of a device of the named namespace.
func SetLinkMAC(netnsName, device string, mac net.HardwareAddr) error {
	h, err := openHandle(netnsName)
	if err != nil {
		return err
	}
	defer h.close()
	link, err := h.LinkByName(device)
	if err != nil {
		return fmt.Errorf("%s: %s: %w", netnsName, device, err)
	}
	return h.LinkSetHardwareAddr(link, mac)
}

// quietIPv6 switches duplicate address detection and router solicitations off for devices that are about to appear in the calling
// thread's namespace.
func quietIPv6() error {
	for _, key := range []string{"accept_dad", "accept_ra", "router_solicitations"} {
		for _, conf := range []string{"all", "default"} {
			if err := setSysctl("net/ipv6/conf/"+conf+"/"+key, "0"); err != nil {
				return err
			}
		}
	}
	return nil
}

// newNetns makes a namespace and prepares its sysctls.
func newNetns(name string, forward bool) error {
	if err := createNetns(name); err != nil {
		return err
	}
	return InNetns(name, func() error {
		if err := quietIPv6(); err != nil {
			return err
		}
		value := map[bool]string{false: "0", true: "1"}[forward]
		if err := setSysctl("net/ipv4/ip_forward", value); err != nil {
			return err
		}
		return setSysctl("net/ipv6/conf/all/forwarding", value)
	})
}

// NoBridgeNetfilter keeps frames that cross the bridge away from iptables, where br_netfilter is loaded: the underlay is a switch, and switches have
// no firewall. In the calling thread's network namespace.
func NoBridgeNetfilter() error {
	for _, what := range []string{"arptables", "ip6tables", "iptables"} {
		err := setSysctl("net/bridge/bridge-nf-call-"+what, "0")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// buildUnderlay makes the gw and ext namespaces: the bridge, the router, and the network beyond it.
func buildUnderlay(lab string, mtu int) error {
	gw, ext := lab+"-gw", lab+"-ext"
	if err := newNetns(gw, true); err != nil {
		return err
	}
	if err := newNetns(ext, false); err != nil {
		return err
	}
	if err := InNetns(gw, NoBridgeNetfilter); err != nil {
		return err
	}
	h, err := openHandle(gw)
	if err != nil {
		return err
	}
	defer h.close()
	off := false
	bridge := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs(), MulticastSnooping: &off}
	bridge.Name, bridge.HardwareAddr, bridge.MTU = bridgeName, gatewayMAC(), mtu
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("%s: bridge: %w", gw, err)
	}
	if err := h.LinkSetUp(bridge); err != nil {
		return fmt.Errorf("%s: bridge up: %w", gw, err)
	}
	for _, a := range []string{gatewayIPv4 + "/24", gatewayIPv6 + "/64"} {
		if err := h.address(bridge, a); err != nil {
			return err
		}
	}
	if err := h.wire("ext", ext, wireOptions{mtu: mtu, queues: 1}); err != nil {
		return err
	}
	port, err := h.LinkByName("ext")
	if err != nil {
		return err
	}
	for _, a := range []string{extGatewayIPv4 + "/24", extGatewayIPv6 + "/64"} {
		if err := h.address(port, a); err != nil {
			return err
		}
	}
	return configureEnd(ext, []string{extIPv4 + "/24", extIPv6 + "/64"}, []string{extGatewayIPv4, extGatewayIPv6})
}

// buildNode makes the namespace of node number n and wires it to the bridge of the underlay's gw namespace.
func buildNode(o *Options, gw, ns string, n int) error {
	if err := newNetns(ns, o.IPForward == 1); err != nil {
		return err
	}
	h, err := openHandle(gw)
	if err != nil {
		return err
	}
	defer h.close()
	w := wireOptions{mtu: o.MTU, queues: o.Queues, mac: nodeMAC(n), bridge: bridgeName}
	if len(o.Wires) > 0 {
		err = h.plug(nodeName(n), ns, o.Wires, w)
	} else {
		err = h.wire(nodeName(n), ns, w)
	}
	if err != nil {
		return err
	}
	return configureEnd(ns,
		[]string{nodeIPv4(n).String() + "/24", nodeIPv6(n).String() + "/64"},
		[]string{gatewayIPv4, gatewayIPv6})
}

type wireOptions struct {
	mtu, queues int
	mac         net.HardwareAddr // of the far end
	bridge      string           // device of the near namespace that the near end becomes a port of
}

// wire makes a veth pair: the near end here under the given name, the far end as eth0 in another namespace. Both are up.
func (h *netnsHandle) wire(near, far string, w wireOptions) error {
	farNS, err := netns.GetFromPath(NetnsPath(far))
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", far, err)
	}
	defer farNS.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = near, w.mtu
	// Both directions need a queue a worker: what the near end sends by its queue i arrives by queue i of the far end.
	attrs.NumTxQueues, attrs.NumRxQueues = w.queues, w.queues
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerMTU = uplinkName, w.mac, uint32(w.mtu)
	veth.PeerNumTxQueues, veth.PeerNumRxQueues = uint32(w.queues), uint32(w.queues)
	veth.PeerNamespace = netlink.NsFd(farNS)
	if err := h.LinkAdd(veth); err != nil {
		return fmt.Errorf("%s: veth %s to %s: %w", h.name, near, far, err)
	}
	return h.join(near, far, w)
}

// join makes the two ends of a wire behave like one, makes the near end a port of the bridge, and brings both up.
func (h *netnsHandle) join(near, far string, w wireOptions) error {
	for _, end := range []struct{ ns, dev string }{{h.name, near}, {far, uplinkName}} {
		if err := InNetns(end.ns, func() error { return disableTxOffloads(end.dev) }); err != nil {
			return fmt.Errorf("%s: %w", end.ns, err)
		}
	}
	link, err := h.LinkByName(near)
	if err != nil {
		return err
	}
	if w.bridge != "" {
		br, err := h.LinkByName(w.bridge)
		if err != nil {
			return fmt.Errorf("%s: %s: %w", h.name, w.bridge, err)
		}
		if err := h.LinkSetMaster(link, br); err != nil {
			return fmt.Errorf("%s: %s into %s: %w", h.name, near, w.bridge, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return err
	}
	return SetLink(far, uplinkName, true)
}

// configureEnd gives eth0 of a namespace its addresses and default routes.
func configureEnd(ns string, addrs, gateways []string) error {
	h, err := openHandle(ns)
	if err != nil {
		return err
	}
	defer h.close()
	link, err := h.LinkByName(uplinkName)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if err := h.address(link, a); err != nil {
			return err
		}
	}
	return h.defaultRoutes(link, gateways)
}

func (h *netnsHandle) defaultRoutes(link netlink.Link, gateways []string) error {
	for _, g := range gateways {
		if err := h.route(link, nil, g); err != nil {
			return err
		}
	}
	return nil
}

// RestoreRoutes puts the node's default routes back after its uplink was down: the kernel forgets them then.
func (n *Node) RestoreRoutes() error {
	h, err := openHandle(n.Netns())
	if err != nil {
		return err
	}
	defer h.close()
	link, err := h.LinkByName(uplinkName)
	if err != nil {
		return err
	}
	return h.defaultRoutes(link, []string{gatewayIPv4, gatewayIPv6})
}
