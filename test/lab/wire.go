package lab

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Wire is two NICs of this machine that are connected with each other and with nothing else, by their permanent Ethernet addresses: one serves as a bridge port
// of the underlay, the other as a node's uplink. A node that has a wire has no veth pair.
type Wire struct {
	Port   string `json:"port"`
	Uplink string `json:"uplink"`
}

// ParseWires reads a list of wires, each PORT/UPLINK, with commas between them: 02:00:00:00:01:00/02:00:00:00:01:01,...
func ParseWires(list string) ([]Wire, error) {
	var wires []Wire
	for item := range strings.SplitSeq(list, ",") {
		port, uplink, ok := strings.Cut(item, "/")
		if !ok {
			return nil, fmt.Errorf("wire %q: want two Ethernet addresses with a slash between them", item)
		}
		var w Wire
		for _, end := range []struct {
			text string
			to   *string
		}{{port, &w.Port}, {uplink, &w.Uplink}} {
			mac, err := net.ParseMAC(end.text)
			if err != nil {
				return nil, fmt.Errorf("wire %q: %w", item, err)
			}
			*end.to = mac.String()
		}
		wires = append(wires, w)
	}
	return wires, nil
}

// openHome is netlink in the calling program's own network namespace, where NICs are that no lab uses.
func openHome() (*netnsHandle, error) {
	// Threads that are in other namespaces are locked to what they do there (onOwnThread): this one is at home.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ns, err := netns.Get()
	if err != nil {
		return nil, err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		ns.Close()
		return nil, err
	}
	return &netnsHandle{h, ns, "this machine"}, nil
}

// plug takes the first wire of the list that is free, and makes of its ends what wire makes of a veth pair's.
func (h *netnsHandle) plug(near, far string, wires []Wire, w wireOptions) error {
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.close()
	there, err := openHandle(far)
	if err != nil {
		return err
	}
	defer there.close()
	nics, err := home.nics()
	if err != nil {
		return err
	}
	free := map[string]netlink.Link{}
	for _, link := range nics {
		free[link.Attrs().PermHWAddr.String()] = link
	}
	for _, x := range wires {
		port, uplink := free[x.Port], free[x.Uplink]
		if port == nil || uplink == nil {
			continue
		}
		if err := home.hand(port, h, near, w.mtu, nil); err != nil {
			return err
		}
		if err := home.hand(uplink, there, uplinkName, w.mtu, w.mac); err != nil {
			return err
		}
		return h.join(near, far, w)
	}
	return fmt.Errorf("no wire is free for %s: this machine has %d, and a lab or something else uses them", far, len(wires))
}

// hand moves a NIC to another namespace, where it gets a name, an MTU and, if one is given, an Ethernet address. It is down then.
func (h *netnsHandle) hand(nic netlink.Link, to *netnsHandle, name string, mtu int, mac net.HardwareAddr) error {
	failed := func(err error) error {
		return fmt.Errorf("moving NIC %s from %s to %s: %w", nic.Attrs().PermHWAddr, h.name, to.name, err)
	}
	if err := h.LinkSetDown(nic); err != nil {
		return failed(err)
	}
	// A name that nothing has on either side.
	own := "nic" + strings.ReplaceAll(nic.Attrs().PermHWAddr.String(), ":", "")
	if err := h.LinkSetName(nic, own); err != nil {
		return failed(err)
	}
	if err := h.LinkSetNsFd(nic, int(to.ns)); err != nil {
		return failed(err)
	}
	link, err := to.LinkByName(own)
	if err != nil {
		return failed(err)
	}
	if name != own {
		if err := to.LinkSetName(link, name); err != nil {
			return failed(err)
		}
	}
	if mac != nil {
		if err := to.LinkSetHardwareAddr(link, mac); err != nil {
			return failed(err)
		}
	}
	if link.Attrs().MTU != mtu {
		if err := to.LinkSetMTU(link, mtu); err != nil {
			return failed(err)
		}
	}
	return nil
}

// isNIC says whether a link is a piece of hardware: a veth, a bridge or a TAP has a kind, and lo has no permanent address.
func isNIC(link netlink.Link) bool {
	return link.Type() == "device" && len(link.Attrs().PermHWAddr) == 6
}

// nics lists the NICs of the namespace.
func (h *netnsHandle) nics() (nics []netlink.Link, err error) {
	for range 10 {
		var links []netlink.Link
		links, err = h.LinkList()
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			continue // something appeared or went meanwhile
		}
		for _, link := range links {
			if isNIC(link) {
				nics = append(nics, link)
			}
		}
		break
	}
	if err != nil {
		return nil, fmt.Errorf("%s: listing devices: %w", h.name, err)
	}
	return nics, nil
}

// returnNICs gives the NICs in a namespace back to the machine, as they were: without programs, up to the machine to use them. The kernel itself would
// give them back when it gets round to removing the namespace, with the node's Ethernet address and whatever name.
func returnNICs(ns string) error {
	h, err := openHandle(ns)
	if err != nil {
		return nil // a name without a namespace: whatever was in it is home
	}
	defer h.close()
	nics, err := h.nics()
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range nics {
		errs = append(errs, h.remove(link))
	}
	return errors.Join(errs...)
}

// remove deletes a device, or gives it back to the machine if it is a NIC.
func (h *netnsHandle) remove(link netlink.Link) error {
	if !isNIC(link) {
		return h.LinkDel(link)
	}
	// A program whose last pin is gone is detached in the kernel's own time; the next daemon on the NIC would take it for somebody else's.
	for range 100 {
		now, err := h.LinkByIndex(link.Attrs().Index)
		if err != nil {
			return err
		}
		if now.Attrs().Xdp == nil || !now.Attrs().Xdp.Attached {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	home, err := openHome()
	if err != nil {
		return err
	}
	defer home.close()
	name := "nic" + strings.ReplaceAll(link.Attrs().PermHWAddr.String(), ":", "")
	if err := h.LinkSetNoMaster(link); err != nil {
		return err
	}
	return h.hand(link, home, name, 1500, link.Attrs().PermHWAddr)
}
