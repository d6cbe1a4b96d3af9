package xdp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// AttachXDP puts the XDP program on the interface, in native mode unless the configuration asks for the generic one. A program that an earlier
// process of ours pinned is replaced without a gap, one that it attached by tc is detached afterwards. A program of somebody else
// is refused with a [ForeignProgramError]. It takes CAP_NET_ADMIN and CAP_BPF; multi-buffer frames need Linux 5.18 and a driver that knows them.
//
// It is no error if it is attached already.
func (s *Steering) AttachXDP() error {
	if s.link != nil {
		return nil
	}
	attached, err := attachedProgram(s.ifindex)
	if err != nil {
		return err
	}
	if err := s.adoptLink(s.ifindex, attached); err != nil {
		return err
	}
	if s.link == nil && attached != 0 {
		return foreign(s.ifname, attached)
	}
	var errs []error
	for _, frags := range []bool{true, false} {
		err := s.attachVariant(s.ifindex, s.generic, frags)
		if err == nil {
			s.frags = frags
			return s.pin()
		}
		if errors.Is(err, ErrForeignProgram) {
			return err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// DetachXDP takes the XDP program off the interface again, with its pin: one that was adopted, too. It is no error if there is none.
func (s *Steering) DetachXDP() error {
	var errs []error
	if s.pinDir != "" {
		errs = append(errs, detachPinned(filepath.Join(s.pinDir, linkPin)))
	}
	if s.link != nil {
		errs = append(errs, s.link.Close())
		s.link = nil
	}
	if s.prog != nil {
		errs = append(errs, s.prog.Close())
		s.prog = nil
	}
	s.adopted, s.frags = false, false
	return errors.Join(errs...)
}

// adoptLink opens the pinned link, if it is that of the interface. attached is the program that the interface has now.
func (s *Steering) adoptLink(ifindex int, attached uint32) error {
	if s.pinDir == "" {
		return nil
	}
	path := filepath.Join(s.pinDir, linkPin)
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return needs("opening the pinned steering "+path, err, capBPF)
	}
	info, err := l.Info()
	if err != nil {
		return errors.Join(fmt.Errorf("xdp: reading the pinned steering %s: %w", path, err), l.Close())
	}
	x := info.XDP()
	switch {
	case x != nil && int(x.Ifindex) == ifindex && uint32(info.Program) == attached:
		s.link, s.adopted = l, true
		return nil
	case x != nil && x.Ifindex == 0:
		// Its interface was deleted and with it the attachment. What is left is a name.
		return errors.Join(l.Unpin(), l.Close())
	}
	return errors.Join(fmt.Errorf("xdp: the steering pinned in %s belongs to another interface than %s: use one folder per interface, or uninstall that one", s.pinDir, s.ifname), l.Close())
}

// makeMaps opens the pinned maps that fit, and creates the rest. Nothing is pinned before the program is attached.
func (s *Steering) makeMaps() error {
	spec, _, err := newObjects(false)
	if err != nil {
		return err
	}
	for name, ms := range spec.Maps {
		if s.pinDir != "" {
			m, err := ebpf.LoadPinnedMap(s.mapPin(name), nil)
			if err == nil && ms.Compatible(m) == nil {
				s.maps[name] = m
				continue
			}
			if err == nil {
				_ = m.Close() // of another layout: replaced by pin
			} else if !errors.Is(err, fs.ErrNotExist) {
				return needs("opening the pinned map "+s.mapPin(name), err, capBPF)
			}
		}
		m, err := ebpf.NewMap(ms)
		if err != nil {
			return needs("creating the BPF map "+name, err, capBPF, capNetAdmin)
		}
		s.maps[name] = m
	}
	return nil
}

func (s *Steering) mapPin(name string) string { return filepath.Join(s.pinDir, name+layoutVersion) }

// attachVariant loads one variant of the program and attaches it.
func (s *Steering) attachVariant(ifindex int, generic, frags bool) error {
	spec, name, err := newObjects(frags)
	if err != nil {
		return err
	}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: s.maps})
	if err != nil {
		return needs("loading the steering program "+name, err, capBPF, capNetAdmin)
	}
	defer coll.Close() // the replaced maps are clones, the program is taken out
	prog := coll.DetachProgram(name)

	if s.link != nil {
		err = s.link.Update(prog)
	} else {
		flags := link.XDPDriverMode
		if generic {
			flags = link.XDPGenericMode
		}
		s.link, err = link.AttachXDP(link.XDPOptions{Program: prog, Interface: ifindex, Flags: flags})
	}
	if err != nil {
		_ = prog.Close()
		if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) {
			id, _ := attachedProgram(ifindex)
			return foreign(s.ifname, id)
		}
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, ebpf.ErrNotSupported) {
			return fmt.Errorf("xdp: attaching %s to %s: %w: the driver has no native XDP for this configuration", name, s.ifname, err)
		}
		return needs(fmt.Sprintf("attaching %s to %s", name, s.ifname), err, capNetAdmin)
	}
	s.prog = prog
	return nil
}

// pin makes link and maps outlive the process, and removes pins of other versions and hooks.
func (s *Steering) pin() error {
	if s.pinDir == "" {
		return nil
	}
	err := s.pinMaps()
	if err == nil && !s.adopted {
		if err = s.link.Pin(filepath.Join(s.pinDir, linkPin)); err != nil {
			err = needs("pinning the steering's link", err, capBPF)
		}
	}
	if err != nil {
		if !s.adopted {
			err = errors.Join(err, s.link.Detach())
		}
		return err
	}
	return errors.Join(detachPinned(filepath.Join(s.pinDir, tcInPin)), detachPinned(filepath.Join(s.pinDir, tcOutPin)), s.sweepPins(linkPin))
}

// pinMaps pins the tables that are not yet.
func (s *Steering) pinMaps() error {
	for name, m := range s.maps {
		if m.IsPinned() {
			continue
		}
		path := s.mapPin(name)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("xdp: replacing the pinned map: %w", err)
		}
		if err := m.Pin(path); err != nil {
			return needs("pinning "+path, err, capBPF)
		}
	}
	return nil
}

// sweepPins removes what is neither a table of this version nor one of the links.
func (s *Steering) sweepPins(links ...string) error {
	entries, err := os.ReadDir(s.pinDir)
	if err != nil {
		return fmt.Errorf("xdp: %w", err)
	}
	for _, e := range entries {
		name, isMap := strings.CutSuffix(e.Name(), layoutVersion)
		if isMap && s.maps[name] != nil || e.Name() == hostPin || e.Name() == kernelPin || slices.Contains(links, e.Name()) {
			continue
		}
		// A table of another version that nothing reads any more; one that stays is found next time.
		_ = os.Remove(filepath.Join(s.pinDir, e.Name()))
	}
	return nil
}

// foreign is the error about program id, with its name if it can be read.
func foreign(ifname string, id uint32) error {
	e := &ForeignProgramError{Interface: ifname, ID: id}
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if err != nil {
		return e
	}
	defer p.Close()
	if info, err := p.Info(); err == nil {
		e.Name = info.Name
	}
	return e
}
