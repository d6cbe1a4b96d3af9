package xdp

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// Classifier attaches tc programs where the kernel has no tcx links (before Linux 6.6): as cls_bpf filters of a clsact queueing discipline, in
// direct-action mode, which stay until they are detached. Other filters of the interface must be left alone.
type Classifier interface {
	// Attach makes fd the ingress or egress program of that name on the interface, in the place of an earlier one of that name.
	Attach(ifindex, fd int, name string, egress bool) error
	// Detach takes the programs of those names off the interface again. None, or no such interface, is no error.
	Detach(ifindex int, names ...string) error
}

// TCConfig says how an uplink is joined to a device of the TUN/TAP driver.
type TCConfig struct {
	// Device is the device's interface index, in the uplink's network namespace.
	Device int
	// Classifier is used where tcx cannot be had; nil: it must be had.
	Classifier Classifier
	// Gateway is the Ethernet address that the data plane is known by behind the device. AttachHost.
	Gateway [6]byte
	// NoTCX goes to the Classifier without trying tcx.
	NoTCX bool
}

// tcAttachment is what AttachTC attached.
type tcAttachment struct {
	links      []link.Link // tcx
	classifier Classifier  // in their place
	device     int
	adopted    bool
}

// tcPrograms are the programs' names, in the kernel and as filters.
var (
	tcPrograms   = []string{bpf.TCProgOverplaneTcIn, bpf.TCProgOverplaneTcOut}
	hostPrograms = []string{bpf.TCProgOverplaneTcHost, bpf.TCProgOverplaneTcKernel} // those of AttachHost
)

// AttachTC puts the tc programs on the interface and on cfg.Device: frames that arrive by the interface and are ours are transmitted by the device, all that arrives by
// the device is transmitted by the interface. Programs and filters of others stay; ours comes first on the interface and leaves to them what is not ours. Programs that an
// earlier process of ours pinned are replaced without a gap; large receive offload of the interface is turned off; an XDP program that it attached is detached afterwards. It takes CAP_NET_ADMIN and CAP_BPF, and
// Linux 6.6, or a Classifier.
func (s *Steering) AttachTC(cfg TCConfig) error {
	if err := disableLRO(s.ifname); err != nil {
		return err
	}
	coll, err := s.loadTC(cfg)
	if err != nil {
		return err
	}
	defer coll.Close() // attachments hold the programs
	in, out := coll.Programs[bpf.TCProgOverplaneTcIn], coll.Programs[bpf.TCProgOverplaneTcOut]

	tc := &tcAttachment{device: cfg.Device}
	var refused error
	if !cfg.NoTCX {
		// The way out first: a worker that gets a frame can then answer it.
		refused = errors.Join(s.attachTCX(tc, cfg.Device, out, tcOutPin, ebpf.AttachTCXIngress), s.attachTCX(tc, s.ifindex, in, tcInPin, ebpf.AttachTCXIngress))
		if refused == nil {
			if s.pinDir != "" {
				if err := s.pinMaps(); err != nil {
					return errors.Join(err, tc.abandon(s.ifindex))
				}
			}
			return s.finishTC(tc, tcInPin, tcOutPin)
		}
		refused = fmt.Errorf("tcx links (Linux 6.6): %w", refused)
		if err := tc.abandon(s.ifindex); err != nil || cfg.Classifier == nil {
			return errors.Join(refused, err)
		}
	}
	if cfg.Classifier == nil {
		return errors.New("xdp: steering: neither tcx nor a classifier to attach by")
	}
	tc = &tcAttachment{device: cfg.Device, classifier: cfg.Classifier}
	err = cfg.Classifier.Attach(cfg.Device, out.FD(), bpf.TCProgOverplaneTcOut, false)
	if err == nil {
		err = cfg.Classifier.Attach(s.ifindex, in.FD(), bpf.TCProgOverplaneTcIn, false)
	}
	if err == nil && s.pinDir != "" {
		err = s.pinMaps()
	}
	if err != nil {
		return errors.Join(refused, needs("attaching the steering as filters", err, capNetAdmin), tc.abandon(s.ifindex))
	}
	return s.finishTC(tc)
}

// AttachHost puts two programs beside the host port, cfg.Device. By the one on the device, frames that the steering could not tell apart, and that the data plane gives back, enter the
// kernel's stack by the uplink; the data plane writes them to the host port as they came. By the one on the uplink's egress, frames with a pod's address that the kernel would send by the
// uplink reach the data plane instead, by the host port. Programs that an earlier process of ours pinned are replaced.
func (s *Steering) AttachHost(cfg TCConfig) error {
	coll, err := s.loadTC(cfg)
	if err != nil {
		return err
	}
	defer coll.Close()
	back, kernel := coll.Programs[bpf.TCProgOverplaneTcHost], coll.Programs[bpf.TCProgOverplaneTcKernel]
	tc := &tcAttachment{device: cfg.Device}
	if !cfg.NoTCX {
		err = errors.Join(s.attachTCX(tc, cfg.Device, back, hostPin, ebpf.AttachTCXIngress), s.attachTCX(tc, s.ifindex, kernel, kernelPin, ebpf.AttachTCXEgress))
		if err == nil {
			s.setHost(tc)
			return nil
		}
		for _, l := range tc.links {
			err = errors.Join(err, l.Detach(), l.Close())
		}
		if cfg.Classifier == nil {
			return err
		}
	}
	if cfg.Classifier == nil {
		return errors.New("xdp: steering: neither tcx nor a classifier to attach by")
	}
	if cerr := errors.Join(cfg.Classifier.Attach(cfg.Device, back.FD(), bpf.TCProgOverplaneTcHost, false),
		cfg.Classifier.Attach(s.ifindex, kernel.FD(), bpf.TCProgOverplaneTcKernel, true)); cerr != nil {
		return errors.Join(err, needs("attaching the steering beside the host port as filters", cerr, capNetAdmin))
	}
	tc.classifier, tc.links = cfg.Classifier, nil
	s.setHost(tc)
	return nil
}

func (s *Steering) setHost(tc *tcAttachment) {
	if s.host != nil {
		_ = s.host.close()
	}
	s.host = tc
}

// TCPrograms are the names that AttachTC and AttachHost give a [Classifier].
func TCPrograms() []string { return slices.Concat(hostPrograms, tcPrograms) }

// loadTC loads the programs over the tables, aimed at the interfaces.
func (s *Steering) loadTC(cfg TCConfig) (*ebpf.Collection, error) {
	spec, err := bpf.LoadTC()
	if err != nil {
		return nil, fmt.Errorf("xdp: steering programs: %w", err)
	}
	var gateway [8]byte
	copy(gateway[:], cfg.Gateway[:])
	for name, value := range map[string]any{bpf.TCVarUplinkIfindex: uint32(s.ifindex), bpf.TCVarDeviceIfindex: uint32(cfg.Device), bpf.TCVarHostGateway: gateway} {
		if err := spec.Variables[name].Set(value); err != nil {
			return nil, fmt.Errorf("xdp: steering programs: %s: %w", name, err)
		}
	}
	shared := map[string]*ebpf.Map{}
	for name := range spec.Maps {
		if !strings.HasPrefix(name, ".") { // those are the programs' own constants
			shared[name] = s.maps[name]
		}
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: shared})
	if err != nil {
		return nil, needs("loading the steering programs for tc", err, capBPF, capNetAdmin)
	}
	return coll, nil
}

// attachTCX makes prog an ingress or egress program of the interface: by the pinned link if there is one, else by a new one, before all others.
func (s *Steering) attachTCX(tc *tcAttachment, ifindex int, prog *ebpf.Program, pin string, where ebpf.AttachType) error {
	path := filepath.Join(s.pinDir, pin)
	if s.pinDir != "" {
		l, err := adoptTCX(path, ifindex)
		if err != nil {
			return err
		}
		if l != nil {
			tc.links = append(tc.links, l)
			tc.adopted = true
			if err := l.Update(prog); err != nil {
				return needs("replacing the program of "+path, err, capNetAdmin)
			}
			return nil
		}
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: prog, Attach: where, Anchor: link.Head()})
	if err != nil {
		return needs(fmt.Sprintf("attaching to interface %d by tcx", ifindex), err, capNetAdmin)
	}
	tc.links = append(tc.links, l)
	if s.pinDir != "" {
		if err := l.Pin(path); err != nil {
			return needs("pinning "+path, err, capBPF)
		}
	}
	return nil
}

// adoptTCX opens a pinned tcx link, if it is that of the interface; one of another interface, which is no longer ours to use, goes.
func adoptTCX(path string, ifindex int) (link.Link, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, needs("opening the pinned steering "+path, err, capBPF)
	}
	info, err := l.Info()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("xdp: reading the pinned steering %s: %w", path, err), l.Close())
	}
	if x := info.TCX(); x != nil && int(x.Ifindex) == ifindex {
		return l, nil
	}
	return nil, errors.Join(l.Close(), detachPinned(path))
}

// finishTC makes tc the attachment, and takes away what other hooks left. pins are the links that stay.
func (s *Steering) finishTC(tc *tcAttachment, pins ...string) error {
	s.tc, s.adopted = tc, tc.adopted
	if s.pinDir == "" {
		return nil
	}
	var errs []error
	for _, pin := range []string{linkPin, tcInPin, tcOutPin} {
		keep := false
		for _, p := range pins {
			keep = keep || p == pin
		}
		if !keep {
			errs = append(errs, detachPinned(filepath.Join(s.pinDir, pin)))
		}
	}
	return errors.Join(append(errs, s.sweepPins(pins...))...)
}

// DetachTC takes the tc programs off again, with their pins: those that were adopted, too. It is no error if there are none.
func (s *Steering) DetachTC() error {
	var errs []error
	if s.tc != nil {
		errs = append(errs, s.tc.abandon(s.ifindex))
		s.tc = nil
	}
	if s.pinDir != "" {
		errs = append(errs, detachPinned(filepath.Join(s.pinDir, tcInPin)), detachPinned(filepath.Join(s.pinDir, tcOutPin)))
	}
	s.adopted = false
	return errors.Join(errs...)
}

// abandon detaches and unpins.
func (tc *tcAttachment) abandon(ifindex int) error {
	var errs []error
	for _, l := range tc.links {
		if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
			errs = append(errs, err)
		}
		if err := l.Unpin(); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, tc.detach(ifindex), tc.close())...)
}

// detach ends what closing descriptors does not.
func (tc *tcAttachment) detach(ifindex int) error {
	if tc.classifier == nil {
		return nil
	}
	return errors.Join(tc.classifier.Detach(ifindex, tcPrograms...), tc.classifier.Detach(tc.device, tcPrograms...))
}

func (tc *tcAttachment) close() error {
	var errs []error
	for _, l := range tc.links {
		errs = append(errs, l.Close())
	}
	tc.links = nil
	return errors.Join(errs...)
}
