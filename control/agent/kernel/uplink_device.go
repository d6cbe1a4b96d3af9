package kernel

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/overplane/overplane/dataplane/port/tap"
)

// UplinkDeviceName is the name of the device that stands between the data plane and the uplink where it is not driven by AF_XDP.
const UplinkDeviceName = "ovp-up0"

// How many packets wait in each of its queues for a worker: whole trains with the virtio-net header, their segments without.
const (
	uplinkDeviceQueue      = 1024
	uplinkDeviceQueuePlain = 8192
)

// AttachUplinkDevice makes that device in the caller's namespace, or re-opens the one that an earlier daemon left, and returns its interface index too. Nothing of
// the kernel's own is to use it: it has no address, neither IPv4 nor IPv6, and answers no ARP. mtu is the uplink's. Of cfg, Name and
// Persist are ignored.
//
// ErrLinkExists: something else has the name. ErrBusy: another daemon holds the device.
func AttachUplinkDevice(mtu int, cfg tap.Config) (_ *tap.Port, index int, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("uplink device %s: %w", UplinkDeviceName, err)
		}
	}()
	cfg.Name, cfg.Persist = UplinkDeviceName, true
	var p *tap.Port
	undo := func() error { return p.Close() }
	if _, err := unheldTAP(cfg.Name); errors.Is(err, ErrNoLink) {
		if p, err = tap.Create(cfg); err != nil {
			return nil, 0, err
		}
		undo = func() error { return p.Destroy() }
	} else if err != nil {
		return nil, 0, err
	} else if p, err = tap.Reopen(cfg); err != nil {
		return nil, 0, err
	}
	if index, err = configureUplinkDevice(mtu, cfg.Plain); err != nil {
		return nil, 0, errors.Join(err, undo())
	}
	return p, index, nil
}

func configureUplinkDevice(mtu int, plain bool) (int, error) {
	link, err := ourTAP(UplinkDeviceName)
	if err != nil {
		return 0, err
	}
	// Before the device comes up, which would have the kernel send router solicitations and the like. Without IPv6 in the kernel there is nothing to turn off.
	if err := sysctl6(UplinkDeviceName, "disable_ipv6", "1"); err != nil {
		if _, statErr := os.Stat("/proc/sys/net/ipv6"); !errors.Is(statErr, os.ErrNotExist) {
			return 0, err
		}
	}
	if err := netlink.LinkSetARPOff(link); err != nil {
		return 0, fmt.Errorf("turning ARP off: %w", err)
	}
	queue := uplinkDeviceQueue
	if plain {
		queue = uplinkDeviceQueuePlain
	}
	if link.Attrs().TxQLen != queue {
		if err := netlink.LinkSetTxQLen(link, queue); err != nil {
			return 0, fmt.Errorf("setting its queues' length to %d: %w", queue, err)
		}
	}
	if err := setMTU(link, mtu); err != nil {
		return 0, err
	}
	if err := setUp(link); err != nil {
		return 0, err
	}
	// The driver's queues are the queue: a queueing discipline in front of them only costs time, so that one that stays is no error.
	_ = netlink.QdiscReplace(&netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Parent: netlink.HANDLE_ROOT}, QdiscType: "noqueue",
	})
	return link.Attrs().Index, nil
}

// RemoveUplinkDevice deletes the device. None is no error.
func RemoveUplinkDevice() error {
	if err := deleteTAP(UplinkDeviceName); err != nil {
		return fmt.Errorf("removing uplink device %s: %w", UplinkDeviceName, err)
	}
	return nil
}
