package kernel

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port/tap"
)

// PodDevice is a pod's interface: where it is and what it is configured with. At least one address is required, and MTU.
type PodDevice struct {
	NetNS string // path of the pod's network namespace
	Name  string // of the interface there
	Host  string // of the other end in the daemon's namespace: the device is a veth pair. Empty: it is a TAP

	IPv4, IPv6 netip.Addr       // the pod's addresses; invalid: not of that family
	MAC        net.HardwareAddr // nil: PodMAC of the addresses
	MTU        int              // bytes

	// The next hop of the pod's default routes; zero values mean the package's Gateway4, Gateway6, GatewayMAC.
	Gateway4, Gateway6 netip.Addr
	GatewayMAC         net.HardwareAddr
}

// PodMAC derives a pod's Ethernet address from its IP addresses, so that it survives anything that the addresses do. Locally administered.
func PodMAC(ipv4, ipv6 netip.Addr) net.HardwareAddr {
	if ipv4.IsValid() {
		b := ipv4.As4()
		return net.HardwareAddr{0x02, 'P', b[0], b[1], b[2], b[3]}
	}
	b := ipv6.As16()
	return net.HardwareAddr{0x02, '6', b[12], b[13], b[14], b[15]}
}

// complete checks dev and fills in defaults.
func (dev *PodDevice) complete() error {
	dev.IPv4, dev.IPv6 = dev.IPv4.Unmap(), dev.IPv6.Unmap()
	min := 68 // RFC 791
	if dev.IPv6.IsValid() {
		min = 1280 // RFC 8200
	}
	switch {
	case dev.Name == "":
		return errors.New("kernel: pod device without a name")
	case !dev.IPv4.IsValid() && !dev.IPv6.IsValid():
		return fmt.Errorf("kernel: pod device %s in %s has no address", dev.Name, dev.NetNS)
	case dev.IPv4.IsValid() && !dev.IPv4.Is4(), dev.IPv6.IsValid() && !dev.IPv6.Is6():
		return fmt.Errorf("kernel: pod device %s in %s: IPv4 address %s, IPv6 address %s: wrong family", dev.Name, dev.NetNS, dev.IPv4, dev.IPv6)
	case dev.MTU < min || dev.MTU > maxMTU:
		return fmt.Errorf("kernel: pod device %s in %s: MTU %d: want %d to %d", dev.Name, dev.NetNS, dev.MTU, min, maxMTU)
	}
	if dev.MAC == nil {
		dev.MAC = PodMAC(dev.IPv4, dev.IPv6)
	}
	if !dev.Gateway4.IsValid() {
		dev.Gateway4 = Gateway4
	}
	if !dev.Gateway6.IsValid() {
		dev.Gateway6 = Gateway6
	}
	if dev.GatewayMAC == nil {
		dev.GatewayMAC = GatewayMAC
	}
	return nil
}

// maxMTU is what the TUN/TAP driver takes for a TAP (drivers/net/tun.c: MAX_MTU less the Ethernet header).
const maxMTU = 65535 - 14

// AttachTAP creates a pod's device and configures it: a persistent TAP, made in the caller's namespace (whose reference the descriptors hold, so that
// the device dies with the pod's namespace), moved into the pod's, with addresses, a permanent neighbour and routes. Of cfg, Name and
// Persist are ignored. On failure nothing is left behind.
//
// ErrNoNetNS: the namespace is not there. ErrLinkExists: the pod has an interface of that name. ErrForeignRoute: the pod has a default route
// already.
func AttachTAP(dev PodDevice, cfg tap.Config) (_ *tap.Port, err error) {
	if err := dev.complete(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("pod device %s in %s: %w", dev.Name, dev.NetNS, err)
		}
	}()
	pod, err := openNetNS(dev.NetNS)
	if err != nil {
		return nil, err
	}
	defer func() { _ = pod.Close() }()
	// From here on the namespace is what the handle says, whatever the path becomes.
	podPath := fmt.Sprintf("/proc/self/fd/%d", int(pod))

	if err := dev.vacant(podPath); err != nil {
		return nil, err
	}
	cfg.Name = temporaryName()
	cfg.Persist = true
	p, err := tap.Create(cfg)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			// Takes the device along wherever it is, and with it all that was configured on it.
			err = errors.Join(err, p.Destroy())
		}
	}()
	if err := move(cfg.Name, dev.MAC, pod); err != nil {
		return nil, err
	}
	err = InNetNS(podPath, func() error {
		link, err := linkByName(cfg.Name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetName(link, dev.Name); err != nil {
			if errors.Is(err, unix.EEXIST) {
				err = ErrLinkExists
			}
			return fmt.Errorf("naming it: %w", err)
		}
		if link, err = linkByName(dev.Name); err != nil {
			return err
		}
		return dev.configure(link, true)
	})
	if err != nil {
		return nil, err
	}
	p.SetName(dev.Name)
	return p, nil
}

// vacant checks, before anything is made, that the pod has no interface of the device's name: it may be a running pod's.
func (dev *PodDevice) vacant(podPath string) error {
	return InNetNS(podPath, func() error {
		if _, err := netlink.LinkByName(dev.Name); err == nil {
			return fmt.Errorf("%w: %s", ErrLinkExists, dev.Name)
		}
		return nil
	})
}

// temporaryName is a name nobody else uses, for the moment the device is in the node's namespace. The prefix tells people what it is.
func temporaryName() string { return "ovpt" + rand.Text()[:10] }

func move(name string, mac net.HardwareAddr, ns netns.NsHandle) error {
	link, err := linkByName(name)
	if err != nil {
		return err
	}
	if err := setMAC(link, mac); err != nil {
		return err
	}
	if err := netlink.LinkSetNsFd(link, int(ns)); err != nil {
		return fmt.Errorf("moving the device: %w", err)
	}
	return nil
}

// ReopenTAP attaches to the device of an earlier daemon in place, and puts right what is missing of its configuration (a changed MTU too). Connections
// of the pod go on. Routes of others are left alone. Of cfg, Name and Persist are ignored.
//
// ErrNoNetNS, ErrNoLink: the pod or its device is no more. ErrLinkExists: there is something else of that name. ErrBusy: another process holds it.
func ReopenTAP(dev PodDevice, cfg tap.Config) (*tap.Port, error) {
	if err := dev.complete(); err != nil {
		return nil, err
	}
	cfg.Name = dev.Name
	var p *tap.Port
	err := InNetNS(dev.NetNS, func() (err error) {
		link, err := unheldTAP(dev.Name)
		if err != nil {
			return err
		}
		if p, err = tap.Reopen(cfg); err != nil {
			return err
		}
		if err := dev.configure(link, false); err != nil {
			return errors.Join(err, p.Close())
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("pod device %s in %s: %w", dev.Name, dev.NetNS, err)
	}
	return p, nil
}

// configure brings link to what dev says, in the pod's namespace. Every step is idempotent. A default route by another interface is an error for a new
// device and the pod's own business for an old one.
func (dev *PodDevice) configure(link netlink.Link, fresh bool) error {
	if dev.IPv6.IsValid() {
		// Before the device comes up, which starts all this. Container runtimes turn IPv6 off by default.
		for _, s := range [][2]string{{"disable_ipv6", "0"}, {"accept_dad", "0"}, {"accept_ra", "0"}, {"autoconf", "0"}} {
			if err := sysctl6(dev.Name, s[0], s[1]); err != nil {
				return err
			}
		}
	}
	if err := errors.Join(setMAC(link, dev.MAC), setMTU(link, dev.MTU)); err != nil {
		return err
	}
	if err := setUp(link); err != nil {
		return err
	}
	for _, f := range []struct{ addr, gateway netip.Addr }{{dev.IPv4, dev.Gateway4}, {dev.IPv6, dev.Gateway6}} {
		if !f.addr.IsValid() {
			continue
		}
		if err := addAddress(link, f.addr); err != nil {
			return err
		}
		if err := setNeighbour(link, f.gateway, dev.GatewayMAC); err != nil {
			return err
		}
		fam := family(f.addr)
		if fam == unix.AF_INET || !f.gateway.IsLinkLocalUnicast() {
			// An IPv6 link-local gateway needs no route to itself.
			if err := addRoute(link, netlink.Route{Family: fam, Dst: hostNet(f.gateway), Scope: netlink.SCOPE_LINK}); err != nil {
				return err
			}
		}
		err := addRoute(link, netlink.Route{Family: fam, Dst: ipNet(prefixOf(nil, fam)), Gw: f.gateway.AsSlice(), Src: f.addr.AsSlice()})
		if err != nil && (fresh || !errors.Is(err, ErrForeignRoute)) {
			return err
		}
	}
	return nil
}

// RemoveTAP deletes the device. A namespace or device that is gone is no error; something else of that name is ErrLinkExists and stays. The port must be
// closed, or its queues die.
func RemoveTAP(dev PodDevice) error {
	err := InNetNS(dev.NetNS, func() error { return deleteTAP(dev.Name) })
	if errors.Is(err, ErrNoNetNS) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("removing pod device %s in %s: %w", dev.Name, dev.NetNS, err)
	}
	return nil
}

func deleteTAP(name string) error {
	link, err := ourTAP(name)
	if errors.Is(err, ErrNoLink) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// SetPodMTU changes the device's MTU to dev.MTU. Routes without an MTU of their own follow.
func SetPodMTU(dev PodDevice) error {
	if err := dev.complete(); err != nil {
		return err
	}
	err := dev.setMTU()
	if err != nil {
		return fmt.Errorf("pod device %s in %s: %w", dev.Name, dev.NetNS, err)
	}
	return nil
}

func (dev *PodDevice) setMTU() error {
	if dev.Host != "" {
		return dev.setVethMTU()
	}
	return InNetNS(dev.NetNS, func() error {
		link, err := ourTAP(dev.Name)
		if err != nil {
			return err
		}
		return setMTU(link, dev.MTU)
	})
}

// PodAlive reports whether the namespace still is the one with the identity (Identity.String; "" = whichever it is) and the device is in it.
func PodAlive(dev PodDevice, id string) bool {
	if id != "" {
		now, err := Identify(dev.NetNS)
		if err != nil || now.String() != id {
			return false
		}
	}
	if dev.Host != "" {
		return dev.paired() == nil
	}
	return InNetNS(dev.NetNS, func() error { _, err := ourTAP(dev.Name); return err }) == nil
}
