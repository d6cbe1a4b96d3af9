package pipeline

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// Counters are the processor's, of the calling thread.
type Counters struct{ fds []int }

// The events counted, as in linux/perf_event.h.
var events = []uint64{unix.PERF_COUNT_HW_CPU_CYCLES, unix.PERF_COUNT_HW_CACHE_MISSES}

// OpenCounters starts counting cycles and cache misses, where the machine does: virtual machines often do not. The thread must stay the same.
func OpenCounters() (*Counters, error) {
	c := &Counters{}
	for _, e := range events {
		attr := &unix.PerfEventAttr{Type: unix.PERF_TYPE_HARDWARE, Config: e, Size: uint32(unix.PERF_ATTR_SIZE_VER0), Bits: unix.PerfBitExcludeKernel}
		fd, err := unix.PerfEventOpen(attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if err != nil {
			c.Close()
			return nil, fmt.Errorf("this machine counts no cycles and cache misses: %w", err)
		}
		c.fds = append(c.fds, fd)
	}
	return c, nil
}

// Read returns cycles and cache misses so far.
func (c *Counters) Read() (cycles, misses uint64) {
	var v [2]uint64
	for i, fd := range c.fds {
		var b [8]byte
		if n, err := unix.Read(fd, b[:]); err == nil && n == 8 {
			v[i] = binary.NativeEndian.Uint64(b[:])
		}
	}
	return v[0], v[1]
}

// Close ends counting.
func (c *Counters) Close() {
	for _, fd := range c.fds {
		unix.Close(fd)
	}
}
