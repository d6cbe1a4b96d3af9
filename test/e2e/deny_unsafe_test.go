package e2e

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// denyArgument makes the test binary a program that gives up what follows it (comma-separated) and then executes the rest of its arguments: a host that
// refuses something.
const denyArgument = "deny"

// Offsets in struct seccomp_data. Arguments are 64 bits, little-endian on every machine that we run on; their low halves decide.
const (
	seccompNr   = 0
	seccompArg0 = 16
	seccompArg1 = 24
)

// denied are the calls that can be denied: those whose argument has the value.
var denied = map[string]struct {
	call, offset, value uint32
	errno               unix.Errno
}{
	"af_xdp":     {unix.SYS_SOCKET, seccompArg0, unix.AF_XDP, unix.EAFNOSUPPORT},
	"bpf_links":  {unix.SYS_BPF, seccompArg0, 28 /* BPF_LINK_CREATE */, unix.EINVAL},
	"vnet_hdr":   {unix.SYS_IOCTL, seccompArg1, unix.TUNSETVNETHDRSZ, unix.EINVAL},
	"tun_attach": {unix.SYS_IOCTL, seccompArg1, unix.TUNSETIFF, unix.EPERM},
}

// denyWrap is a StartOptions.Wrap that denies the daemon these.
func denyWrap(what ...string) []string {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return []string{self, denyArgument, strings.Join(what, ",")}
}

// denyAndExec does not return if it succeeds. The caller's thread is the only one that goes on in the new program, so that a filter of its own is enough.
func denyAndExec(args []string) error {
	var filter []unix.SockFilter
	stmt := func(code uint16, k uint32) { filter = append(filter, unix.SockFilter{Code: code, K: k}) }
	jump := func(k uint32, skip uint8) {
		filter = append(filter, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: skip, K: k})
	}
	const load, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_RET | unix.BPF_K
	for _, name := range strings.Split(args[0], ",") {
		d, ok := denied[name]
		if !ok {
			return fmt.Errorf("cannot deny %q", name)
		}
		stmt(load, seccompNr)
		jump(d.call, 3)
		stmt(load, d.offset)
		jump(d.value, 1)
		stmt(ret, unix.SECCOMP_RET_ERRNO|uint32(d.errno))
	}
	stmt(ret, unix.SECCOMP_RET_ALLOW)
	runtime.LockOSThread() // the thread that takes the filter is the one that executes
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// The kernel copies the program during the call; it and what it points to are alive until then.
	if _, _, errno := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program))); errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return unix.Exec(args[1], slices.Clone(args[1:]), os.Environ())
}
