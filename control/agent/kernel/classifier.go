package kernel

import (
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Our filters' place in the chain: before all others, by a handle that nobody picks by accident.
const (
	filterPriority = 1
	filterHandle   = 0x4f56
)

// Classifier attaches tc programs to the ingress or egress of interfaces of the caller's namespace as cls_bpf filters in direct-action mode (Linux 4.5), for kernels
// without tcx links. The queueing discipline they hang on (clsact) is shared with others: it is made if it is missing and
// never removed, and other filters stay.
type Classifier struct{}

// Attach makes the program with that descriptor the filter of that name, of ingress or egress. An earlier one of that name is replaced without a gap.
func (Classifier) Attach(ifindex, fd int, name string, egress bool) error {
	link, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return fmt.Errorf("reading interface %d: %w", ifindex, err)
	}
	dev := link.Attrs().Name
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding queueing discipline clsact to %s (Linux 4.5, CONFIG_NET_SCH_INGRESS): %w", dev, err)
	}
	parent, side := uint32(netlink.HANDLE_MIN_INGRESS), "ingress"
	if egress {
		parent, side = netlink.HANDLE_MIN_EGRESS, "egress"
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: parent, Handle: filterHandle, Priority: filterPriority, Protocol: unix.ETH_P_ALL,
		},
		Fd: fd, Name: name, DirectAction: true,
	}
	old, err := filtersOf(link, parent)
	if err != nil {
		return err
	}
	put := netlink.FilterAdd // refuses if something else has the place
	for _, f := range old {
		if f.Name == name {
			put = netlink.FilterReplace
			filter.Handle, filter.Priority = f.Handle, f.Priority
		}
	}
	if err := put(filter); err != nil {
		if errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EINVAL) {
			err = fmt.Errorf("%w: has another filter priority %d? see `tc filter show dev %s %s`", err, filterPriority, dev, side)
		}
		return fmt.Errorf("adding filter %s to the %s of %s (cls_bpf, CONFIG_NET_CLS_BPF): %w", name, side, dev, err)
	}
	return nil
}

// Detach removes the filters of those names from an interface; none, or no such interface, is no error.
func (Classifier) Detach(ifindex int, names ...string) error {
	link, err := netlink.LinkByIndex(ifindex)
	if notFound := (netlink.LinkNotFoundError{}); errors.As(err, &notFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading interface %d: %w", ifindex, err)
	}
	return removeFilters(link, names)
}

// DetachAll removes the filters of those names from every interface of the caller's namespace.
func (Classifier) DetachAll(names ...string) error {
	links, err := netlink.LinkList()
	for try := 0; errors.Is(err, netlink.ErrDumpInterrupted) && try < 10; try++ {
		links, err = netlink.LinkList()
	}
	if err != nil {
		return fmt.Errorf("listing interfaces: %w", err)
	}
	var errs []error
	for _, link := range links {
		errs = append(errs, removeFilters(link, names))
	}
	return errors.Join(errs...)
}

func removeFilters(link netlink.Link, names []string) error {
	var errs []error
	for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
		filters, err := filtersOf(link, parent)
		if err != nil {
			return err
		}
		for _, f := range filters {
			if !slices.Contains(names, f.Name) {
				continue
			}
			if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
				errs = append(errs, fmt.Errorf("removing filter %s from %s: %w", f.Name, link.Attrs().Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// filtersOf lists the cls_bpf filters on an interface's ingress or egress.
func filtersOf(link netlink.Link, parent uint32) ([]*netlink.BpfFilter, error) {
	filters, err := netlink.FilterList(link, parent)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // there is no clsact, or no interface any more
	}
	if err != nil {
		return nil, fmt.Errorf("listing filters of %s: %w", link.Attrs().Name, err)
	}
	var out []*netlink.BpfFilter
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok {
			out = append(out, b)
		}
	}
	return out, nil
}
