package xdp

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrForeignProgram is what a [ForeignProgramError] matches with errors.Is.
var ErrForeignProgram = errors.New("another XDP program is attached")

// ForeignProgramError says that an interface carries an XDP program that is not ours. It was left in place: somebody relies on it.
type ForeignProgramError struct {
	Interface string
	ID        uint32 // the kernel's program id, 0 if the kernel did not tell
	Name      string // the program's name, "" if it could not be read
}

// Error implements error.
func (e *ForeignProgramError) Error() string {
	return fmt.Sprintf("xdp: another XDP program is attached to %s (id %d, name %q): detach it with its own tool, or with `ip link set dev %s xdp off` if nothing uses it",
		e.Interface, e.ID, e.Name, e.Interface)
}

// Is makes errors.Is(err, ErrForeignProgram) true.
func (e *ForeignProgramError) Is(target error) bool { return target == ErrForeignProgram }

// CapabilityError says that the process lacks a capability (capabilities(7)) for something.
type CapabilityError struct {
	Op         string // what was refused
	Capability string // what it takes, e.g. "CAP_NET_RAW"
	Err        error  // what the kernel said
}

// Error implements error.
func (e *CapabilityError) Error() string {
	return fmt.Sprintf("xdp: %s: %v: it takes %s", e.Op, e.Err, e.Capability)
}

// Unwrap returns what the kernel said.
func (e *CapabilityError) Unwrap() error { return e.Err }

// capability is one that something takes.
type capability struct {
	name string
	bit  int
}

var (
	capNetRaw      = capability{"CAP_NET_RAW", unix.CAP_NET_RAW}
	capNetAdmin    = capability{"CAP_NET_ADMIN", unix.CAP_NET_ADMIN}
	capBPF         = capability{"CAP_BPF", unix.CAP_BPF}
	capSysResource = capability{"CAP_SYS_RESOURCE", unix.CAP_SYS_RESOURCE}
)

// held reports whether the calling thread has the capability in effect. CAP_SYS_ADMIN includes CAP_BPF.
func (c capability) held() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&hdr, &data[0]) != nil {
		return false
	}
	has := func(bit int) bool { return data[bit/32].Effective&(1<<(bit%32)) != 0 }
	return has(c.bit) || c.bit == unix.CAP_BPF && has(unix.CAP_SYS_ADMIN)
}

// needs wraps err. If it is a refusal of permission, it names which of the capabilities that op takes are missing, or all of them if none is:
// then a security module or a lockdown is in the way.
func needs(op string, err error, caps ...capability) error {
	if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
		return fmt.Errorf("xdp: %s: %w", op, err)
	}
	var all, missing []string
	for _, c := range caps {
		all = append(all, c.name)
		if !c.held() {
			missing = append(missing, c.name)
		}
	}
	if len(missing) == 0 {
		missing = all
	}
	return &CapabilityError{Op: op, Capability: strings.Join(missing, " and "), Err: err}
}

// MemlockError says that the kernel refused to pin frame memory. Pinned pages count against RLIMIT_MEMLOCK of the user unless the process
// has CAP_IPC_LOCK (xdp_umem_account_pages in net/xdp/xdp_umem.c).
type MemlockError struct {
	Want  uint64 // bytes that were to be pinned
	Limit uint64 // RLIMIT_MEMLOCK, bytes
	Err   error
}

// Error implements error.
func (e *MemlockError) Error() string {
	return fmt.Sprintf("xdp: pinning %d KiB of frame memory: %v: RLIMIT_MEMLOCK is %d KiB: raise it (LimitMEMLOCK=infinity in a systemd unit, ulimit -l unlimited in a shell) or give the process CAP_IPC_LOCK",
		e.Want>>10, e.Err, e.Limit>>10)
}

// Unwrap returns what the kernel said.
func (e *MemlockError) Unwrap() error { return e.Err }

// pinError explains a refusal to register want bytes of memory.
func pinError(want uint64, err error) error {
	if errors.Is(err, unix.ENOBUFS) {
		var limit unix.Rlimit
		_ = unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit) // a zero limit in the message is the worst that can happen
		return &MemlockError{Want: want, Limit: limit.Cur, Err: err}
	}
	return fmt.Errorf("xdp: registering %d KiB of frame memory (XDP_UMEM_REG): %w", want>>10, err)
}
