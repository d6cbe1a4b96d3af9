package kernel

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port/xdp"
)

// AttachVeth creates a pod's veth pair and configures it: the pod's end in its namespace like a TAP's, the host's end, dev.Host, in the caller's, with an XDP
// program that gives all it receives to the port's sockets. Both ends have a queue for every pool (and room for as many as there are processors, should
// the next daemon have more workers). Of cfg, Interface, Program and MTU are ignored. On failure nothing is left behind.
//
// The pod's stack finishes checksums itself: over a veth they are left to a device that never sees the frame, and nothing in the frame
// says which are (docs/decisions).
//
// Errors are those of AttachTAP; ErrLinkExists also says that the host's end is taken.
func AttachVeth(dev PodDevice, cfg xdp.VethConfig) (_ *xdp.VethPort, err error) {
	if err := dev.completeVeth(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("pod device %s in %s (host's end %s): %w", dev.Name, dev.NetNS, dev.Host, err)
		}
	}()
	pod, err := openNetNS(dev.NetNS)
	if err != nil {
		return nil, err
	}
	defer func() { _ = pod.Close() }()
	podPath := fmt.Sprintf("/proc/self/fd/%d", int(pod))
	if err := dev.vacant(podPath); err != nil {
		return nil, err
	}
	program, err := xdp.NewVethProgram(len(cfg.Pools))
	if err != nil {
		return nil, err
	}
	defer func() { _ = program.Close() }()
	if err := checkVethMTU(dev.MTU, program); err != nil {
		return nil, err
	}

	queues := uint32(max(len(cfg.Pools), runtime.NumCPU()))
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = dev.Host, dev.MTU
	attrs.NumRxQueues, attrs.NumTxQueues = int(queues), int(queues)
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerHardwareAddr, pair.PeerNamespace, pair.PeerMTU = dev.Name, dev.MAC, netlink.NsFd(pod), uint32(dev.MTU)
	pair.PeerNumRxQueues, pair.PeerNumTxQueues = queues, queues
	if err := netlink.LinkAdd(pair); err != nil {
		if errors.Is(err, unix.EEXIST) {
			err = fmt.Errorf("%w: %s here, or %s in the pod", ErrLinkExists, dev.Host, dev.Name)
		}
		return nil, fmt.Errorf("creating the pair: %w", err)
	}
	defer func() {
		if err != nil {
			// Takes the pod's end along, and with it all that was configured on it.
			err = errors.Join(err, deleteVeth(dev.Host))
		}
	}()
	return dev.openVeth(podPath, program, cfg, true)
}

// ReopenVeth takes over the pair of an earlier daemon in place: program and sockets are made anew, and what is missing of its configuration
// put right (a changed MTU or number of queues too). Connections of the pod go on. Of cfg, Interface, Program and MTU are ignored.
//
// ErrNoNetNS, ErrNoLink: the pod or its device is no more. ErrLinkExists: there is something else of that name.
func ReopenVeth(dev PodDevice, cfg xdp.VethConfig) (_ *xdp.VethPort, err error) {
	if err := dev.completeVeth(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("pod device %s in %s (host's end %s): %w", dev.Name, dev.NetNS, dev.Host, err)
		}
	}()
	if err := dev.paired(); err != nil {
		return nil, err
	}
	program, err := xdp.NewVethProgram(len(cfg.Pools))
	if err != nil {
		return nil, err
	}
	defer func() { _ = program.Close() }()
	if err := checkVethMTU(dev.MTU, program); err != nil {
		return nil, err
	}
	return dev.openVeth(dev.NetNS, program, cfg, false)
}

// completeVeth is complete for a veth pair.
func (dev *PodDevice) completeVeth() error {
	if dev.Host == "" {
		return fmt.Errorf("kernel: pod device %s in %s: no name for the host's end", dev.Name, dev.NetNS)
	}
	return dev.complete()
}

func checkVethMTU(mtu int, program *xdp.VethProgram) error {
	if most := program.MaxMTU(); mtu > most {
		return fmt.Errorf("MTU %d: a veth device with an XDP program takes %d on this kernel (more needs xdp.frags, Linux 5.18): set a lower MTU, or use a port of kind tap", mtu, most)
	}
	return nil
}

// openVeth configures both ends and opens the sockets. The program is on the device, and the device configured, before it is up: no frame of
// the pod gets to the node's stack, and the first that the pod sends has a finished checksum.
func (dev *PodDevice) openVeth(podPath string, program *xdp.VethProgram, cfg xdp.VethConfig, fresh bool) (*xdp.VethPort, error) {
	host, err := ourVeth(dev.Host)
	if err != nil {
		return nil, err
	}
	n := len(cfg.Pools)
	resize := func(link netlink.Link) error {
		if err := setChannels(link.Attrs().Index, n); err != nil {
			return fmt.Errorf("giving %s %d queues: %w; detach the pod and attach it again", link.Attrs().Name, n, err)
		}
		return nil
	}
	hostRx, _, err := channels(host.Attrs().Index)
	if err != nil {
		return nil, fmt.Errorf("reading the queues of %s: %w", dev.Host, err)
	}
	// A device with a program must not receive by fewer queues than its peer sends by: the host's end grows first and shrinks last.
	if n >= hostRx {
		if err := resize(host); err != nil {
			return nil, err
		}
	}
	if err := setMTU(host, dev.MTU); err != nil {
		return nil, err
	}
	err = InNetNS(podPath, func() error {
		link, err := ourVeth(dev.Name)
		if err != nil {
			return err
		}
		if err := resize(link); err != nil {
			return err
		}
		return finishChecksums(link)
	})
	if err != nil {
		return nil, err
	}
	if n < hostRx {
		if err := resize(host); err != nil {
			return nil, err
		}
	}
	// The node's own stack has nothing to say on this link: no neighbour discovery, no address.
	if err := sysctl6(dev.Host, "disable_ipv6", "1"); err != nil && !errors.Is(err, errNoIPv6) {
		return nil, err
	}
	if err := netlink.LinkSetXdpFdWithFlags(host, program.FD(), nl.XDP_FLAGS_DRV_MODE); err != nil {
		return nil, fmt.Errorf("attaching the XDP program to %s: %w", dev.Host, err)
	}
	if err := setUp(host); err != nil {
		return nil, err
	}
	err = InNetNS(podPath, func() error {
		link, err := ourVeth(dev.Name)
		if err != nil {
			return err
		}
		return dev.configure(link, fresh)
	})
	if err != nil {
		return nil, err
	}
	cfg.Interface, cfg.Program, cfg.MTU = dev.Host, program, dev.MTU
	return xdp.OpenVeth(cfg)
}

// finishChecksums has the stack behind link compute the checksums of what it sends.
func finishChecksums(link netlink.Link) error {
	err := disableFeatures(link.Attrs().Index, "tx-checksum-ip-generic", "tx-checksum-sctp")
	if err != nil {
		return fmt.Errorf("turning checksum offload of %s off: %w", link.Attrs().Name, err)
	}
	return nil
}

// RemoveVeth deletes the pair by its host's end, wherever the pod's is. One that is gone is no error; something else of that name is ErrLinkExists and
// stays.
func RemoveVeth(host string) error {
	if err := deleteVeth(host); err != nil {
		return fmt.Errorf("removing the veth pair %s: %w", host, err)
	}
	return nil
}

func deleteVeth(host string) error {
	link, err := ourVeth(host)
	if errors.Is(err, ErrNoLink) {
		return nil
	}
	if err != nil {
		return err
	}
	// ENODEV: it went with the pod's namespace this moment.
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return err
	}
	return nil
}

// paired checks that the device in the pod is the other end of dev.Host.
func (dev *PodDevice) paired() error {
	host, err := ourVeth(dev.Host)
	if err != nil {
		return err
	}
	return InNetNS(dev.NetNS, func() error {
		link, err := ourVeth(dev.Name)
		if err != nil {
			return err
		}
		if host.Attrs().ParentIndex != link.Attrs().Index {
			return fmt.Errorf("%w: %s in the pod is not the other end of %s", ErrLinkExists, dev.Name, dev.Host)
		}
		return nil
	})
}

// ourVeth finds an interface that must be a veth device. Something else of that name is ErrLinkExists.
func ourVeth(name string) (*netlink.Veth, error) {
	link, err := linkByName(name)
	if err != nil {
		return nil, err
	}
	v, ok := link.(*netlink.Veth)
	if !ok {
		return nil, fmt.Errorf("%w and is no veth device: %s is a %s", ErrLinkExists, name, link.Type())
	}
	return v, nil
}

// setVethMTU changes both ends.
func (dev *PodDevice) setVethMTU() error {
	host, err := ourVeth(dev.Host)
	if err != nil {
		return err
	}
	if err := setMTU(host, dev.MTU); err != nil {
		return err
	}
	return InNetNS(dev.NetNS, func() error {
		link, err := ourVeth(dev.Name)
		if err != nil {
			return err
		}
		return setMTU(link, dev.MTU)
	})
}
