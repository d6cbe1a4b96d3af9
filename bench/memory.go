package bench

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// wantLocked is how much memory AF_XDP sockets of all systems lock, at most.
const wantLocked = 512 << 20

// lockMemory raises the limit of locked memory, which frame memory of AF_XDP sockets is subject to without CAP_IPC_LOCK.
func lockMemory() error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l); err != nil {
		return err
	}
	if l.Cur >= wantLocked || capable(unix.CAP_IPC_LOCK) {
		return nil
	}
	want := unix.Rlimit{Cur: wantLocked, Max: max(l.Max, wantLocked)}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &want); err != nil {
		return fmt.Errorf("the limit of locked memory is %d KiB and cannot be raised to the %d KiB that AF_XDP needs (%w): ulimit -l unlimited, or LimitMEMLOCK=infinity",
			l.Cur>>10, uint64(wantLocked)>>10, err)
	}
	return nil
}

// capable reports whether this process has a capability.
func capable(capability int) bool {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(status)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err == nil && set>>capability&1 == 1
		}
	}
	return false
}
