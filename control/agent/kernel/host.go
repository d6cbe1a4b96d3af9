package kernel

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/overplane/overplane/dataplane/port/tap"
)

// HostPortName is the host port's default name.
const HostPortName = "ovp0"

// HostMAC is the host port's default Ethernet address. It is the same on every node, since only the node's own data plane sees it.
var HostMAC = net.HardwareAddr{0x02, 'O', 'V', 'P', 'H', 'P'}

// HostPort is the interface that the node's stack reaches pods by, in the caller's namespace. It has no address of its own.
type HostPort struct {
	Name       string           // "" = HostPortName
	MAC        net.HardwareAddr // nil: HostMAC
	MTU        int              // bytes
	GatewayMAC net.HardwareAddr // of the data plane's end; nil: the package's GatewayMAC

	// PodCIDRs are routed to it.
	PodCIDRs []netip.Prefix
	// HostIPv4 and HostIPv6 are the source addresses towards pods: the node's, which must be configured on some interface. Invalid: the kernel chooses.
	HostIPv4, HostIPv6 netip.Addr
}

func (h *HostPort) complete() error {
	if h.Name == "" {
		h.Name = HostPortName
	}
	if h.MAC == nil {
		h.MAC = HostMAC
	}
	if h.GatewayMAC == nil {
		h.GatewayMAC = GatewayMAC
	}
	h.HostIPv4, h.HostIPv6 = h.HostIPv4.Unmap(), h.HostIPv6.Unmap()
	if h.MTU < 1280 || h.MTU > maxMTU {
		return fmt.Errorf("kernel: host port %s: MTU %d: want 1280 to %d", h.Name, h.MTU, maxMTU)
	}
	if h.HostIPv4.IsValid() && !h.HostIPv4.Is4() || h.HostIPv6.IsValid() && !h.HostIPv6.Is6() {
		return fmt.Errorf("kernel: host port %s: IPv4 address %s, IPv6 address %s: wrong family", h.Name, h.HostIPv4, h.HostIPv6)
	}
	for i, c := range h.PodCIDRs {
		if !c.IsValid() || c != c.Masked() || c.Bits() == 0 {
			return fmt.Errorf("kernel: host port %s: pod CIDR %d is %s: want a prefix without host bits", h.Name, i, c)
		}
	}
	return nil
}

// AttachHostPort makes the host port, or re-opens the one that an earlier daemon left, configures it and its routes (SyncHostRoutes). Of cfg, Name and
// Persist are ignored: the device is persistent. On failure a device that was made is removed again.
//
// A strict rp_filter is satisfied as it is: packets from pods arrive by the interface that the routes to pods lead to.
//
// ErrLinkExists: something else has the name. ErrBusy: another daemon holds the device. ErrForeignRoute: see SyncHostRoutes.
func AttachHostPort(h HostPort, cfg tap.Config) (_ *tap.Port, err error) {
	if err := h.complete(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("host port %s: %w", h.Name, err)
		}
	}()
	if err := h.checkForeign(); err != nil {
		return nil, err
	}
	cfg.Name, cfg.Persist = h.Name, true
	var p *tap.Port
	undo := func() error { return p.Close() }
	if _, err := unheldTAP(h.Name); errors.Is(err, ErrNoLink) {
		if p, err = tap.Create(cfg); err != nil {
			return nil, err
		}
		undo = func() error { return p.Destroy() }
	} else if err != nil {
		return nil, err
	} else if p, err = tap.Reopen(cfg); err != nil {
		return nil, err
	}
	if err := h.configure(); err != nil {
		return nil, errors.Join(err, undo())
	}
	if err := h.syncRoutes(); err != nil {
		return nil, errors.Join(err, undo())
	}
	return p, nil
}

// SetHostPort brings the existing device (MTU, Ethernet address, neighbours) and its routes to what h says. No device is ErrNoLink.
func SetHostPort(h HostPort) error {
	if err := h.complete(); err != nil {
		return err
	}
	if err := errors.Join(h.checkForeign(), h.configure()); err != nil {
		return fmt.Errorf("host port %s: %w", h.Name, err)
	}
	if err := h.syncRoutes(); err != nil {
		return fmt.Errorf("host port %s: %w", h.Name, err)
	}
	return nil
}

// wants6 reports whether IPv6 is used on the host port.
func (h *HostPort) wants6() bool {
	for _, c := range h.PodCIDRs {
		if c.Addr().Is6() {
			return true
		}
	}
	return false
}

func (h *HostPort) configure() error {
	link, err := ourTAP(h.Name)
	if err != nil {
		return err
	}
	if h.wants6() {
		for _, s := range [][2]string{{"disable_ipv6", "0"}, {"accept_ra", "0"}, {"autoconf", "0"}} {
			if err := sysctl6(h.Name, s[0], s[1]); err != nil {
				return err
			}
		}
		// No link-local address: it would be a source that pods can not answer.
		if err := netlink.LinkSetIP6AddrGenMode(link, nlAddrGenNone); err != nil {
			return fmt.Errorf("turning IPv6 address generation off: %w", err)
		}
	}
	if err := errors.Join(setMAC(link, h.MAC), setMTU(link, h.MTU)); err != nil {
		return err
	}
	if err := setUp(link); err != nil {
		return err
	}
	if err := setNeighbour(link, Gateway4, h.GatewayMAC); err != nil {
		return err
	}
	if h.wants6() {
		return setNeighbour(link, Gateway6, h.GatewayMAC)
	}
	return nil
}

// nlAddrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const nlAddrGenNone = 1

// RemoveHostPort deletes the device ("" = HostPortName) and every route of ours, also the unreachable ones: after that pod addresses follow the node's
// default route. For uninstalling. What is gone already is no error.
func RemoveHostPort(name string) error {
	if name == "" {
		name = HostPortName
	}
	if err := errors.Join(deleteOwnRoutes(), deleteTAP(name)); err != nil {
		return fmt.Errorf("removing host port %s: %w", name, err)
	}
	return nil
}
