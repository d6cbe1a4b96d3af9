package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Down removes everything of a lab: processes, namespaces with all devices in them, BPF pins, files. It goes by the name alone and so
// also removes what a crash has left. A lab that is not there is no error.
func Down(name string) error {
	if err := CheckRoot(); err != nil {
		return err
	}
	if err := checkName(name); err != nil {
		return err
	}
	guests, err := joined(name)
	if err != nil {
		return err
	}
	if len(guests) > 0 {
		return fmt.Errorf("lab %s lives on the underlay of lab %s: take it down first (`overplane lab down --name %s`)", guests[0], name, guests[0])
	}
	unlock, err := lock(name)
	if err != nil {
		return err
	}
	defer unlock()
	return down(name)
}

// Down takes the lab down; see [Down].
func (l *Lab) Down() error {
	for _, n := range l.Nodes {
		n.mu.Lock()
		if n.notify != nil {
			n.notify.close()
			n.notify = nil
		}
		n.mu.Unlock()
	}
	return Down(l.Name)
}

func down(name string) error {
	var errs []error
	l, err := Load(name)
	mountedBPF := err == nil && l.MountedBPF

	names, err := labNetns(name)
	errs = append(errs, err)
	errs = append(errs, endProcesses(names))
	if p, ok := readProcess(controllerPid(name)); ok { // it lives on another lab's underlay
		errs = append(errs, p.end(3*time.Second))
	}
	errs = append(errs, removePins(name))
	if l != nil {
		// The ports on another lab's bridge go with their far ends, but not before the kernel has got round to it.
		errs = append(errs, l.unplug())
	}
	for _, ns := range names {
		errs = append(errs, returnNICs(ns), deleteNetns(ns))
	}
	unlock, err := lockShared()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	defer unlock()
	if pins, err := os.ReadDir(bpffsPath); mountedBPF && err == nil && len(pins) == 0 {
		// Pins would go with the mount, and do not keep it busy: whoever else has some by now keeps it.
		if err := unix.Unmount(bpffsPath, 0); err != nil && !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("%s: unmount: %w", bpffsPath, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lab %s: %w", name, err)
	}
	if err := os.RemoveAll(filepath.Join(runRoot, name)); err != nil {
		return err
	}
	_ = os.Remove(runRoot) // if it was the last
	return nil
}

// endProcesses ends every process that lives in one of the namespaces: the daemons, and what was started by exec.
func endProcesses(names []string) error {
	inodes := map[uint64]bool{}
	for _, ns := range names {
		if ino, err := netnsInode(NetnsPath(ns)); err == nil {
			inodes[ino] = true
		}
	}
	if len(inodes) == 0 {
		return nil
	}
	// A name whose mount is gone is an empty file, on a file system that processes' namespaces are not on; but the machine's own
	// namespace must not be there whatever happened.
	if own, err := netnsInode("/proc/1/ns/net"); err == nil && inodes[own] {
		return errors.New("one of its network namespaces is the machine's own: not touching it")
	}
	pids, err := processesIn(inodes)
	if err != nil {
		return err
	}
	var all []process
	for _, pid := range pids {
		if p, ok := findProcess(pid); ok {
			all = append(all, p)
			_ = p.signal(unix.SIGCONT)
			_ = p.signal(unix.SIGTERM)
		}
	}
	var errs []error
	patience := time.Now().Add(3 * time.Second)
	for _, p := range all {
		p.wait(time.Until(patience))
		errs = append(errs, p.end(0))
	}
	return errors.Join(errs...)
}

// unplug deletes the bridge ports of the lab's nodes on another lab's underlay.
func (l *Lab) unplug() error {
	if l.Underlay == "" || len(l.Nodes) == 0 {
		return nil
	}
	h, err := openHandle(l.Gateway())
	if err != nil {
		return nil // the underlay is gone, and its ports with it
	}
	defer h.close()
	for _, n := range l.Nodes {
		link, err := h.LinkByName(n.Name())
		if err != nil {
			continue
		}
		if err := h.remove(link); err != nil {
			return fmt.Errorf("%s: port %s: %w", l.Gateway(), n.Name(), err)
		}
	}
	return nil
}

// removePins removes the lab's folder of the BPF file system: with its pins, programs detach.
func removePins(name string) error {
	unlock, err := lockShared()
	if err != nil {
		return err
	}
	defer unlock()
	if err := os.RemoveAll(filepath.Join(pinRoot, name)); err != nil {
		return err
	}
	if err := os.Remove(pinRoot); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// Leftovers lists what there still is of a lab: names of namespaces, folders and processes. Empty after Down.
func Leftovers(name string) ([]string, error) {
	left, err := labNetns(name)
	if err != nil {
		return nil, err
	}
	for _, path := range []string{filepath.Join(runRoot, name), filepath.Join(pinRoot, name)} {
		if _, err := os.Lstat(path); err == nil {
			left = append(left, path)
		}
	}
	// Every program has its settings in its environment.
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		mine := filepath.Join(runRoot, name) + "/"
		if err == nil && (strings.Contains(string(env), "OVERPLANE_SOCKET="+mine) || strings.Contains(string(env), "OVERPLANE_CONTROLLER_STATE_DIR="+mine)) {
			left = append(left, "process "+e.Name())
		}
	}
	return left, nil
}
