package xdp

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// mapHeartbeats maps the heartbeat table (BPF_F_MMAPABLE, Linux 5.5) into the process.
func (s *Steering) mapHeartbeats() error {
	size := MaxWorkers * heartbeatStride * 8
	page := os.Getpagesize()
	beats, err := unix.Mmap(s.maps[bpf.SteerMapHeartbeats].FD(), 0, (size+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("xdp: steering: mapping the heartbeats: %w", err)
	}
	s.beats = beats
	return nil
}

// Heartbeat is where a worker stores CLOCK_MONOTONIC nanoseconds (atomically, see [Beat]) more often than the limit, to say that it takes its
// frames. The address is valid until Close and lies in a cache line of its own. 0 <= worker < MaxWorkers.
func (s *Steering) Heartbeat(worker int) *uint64 {
	if worker < 0 || worker >= MaxWorkers {
		panic(fmt.Sprintf("xdp: heartbeat of worker %d: want 0 to %d", worker, MaxWorkers-1))
	}
	// The mapping is page-aligned and longer than MaxWorkers strides of 8 u64s, so every slot is an aligned u64 inside it; the slice
	// expression checks the bound again.
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(s.beats[worker*heartbeatStride*8:][:8])))
}
