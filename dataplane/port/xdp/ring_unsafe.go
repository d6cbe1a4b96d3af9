package xdp

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// rings are the four rings of a socket and the mappings they lie in.
type rings struct {
	fill       fillRing
	completion completionRing
	rx         rxRing
	tx         txRing
	mappings   [][]byte
}

// mapRings maps the rings of fd, which were made with these sizes.
func (r *rings) mapRings(fd int, size ringSizes) error {
	var off unix.XDPMmapOffsets
	if err := getsockopt(fd, unix.XDP_MMAP_OFFSETS, unsafe.Pointer(&off), unsafe.Sizeof(off)); err != nil {
		return fmt.Errorf("xdp: asking for the rings' layout (XDP_MMAP_OFFSETS, Linux 5.4): %w", err)
	}
	var err error
	if r.fill.addrs, err = mapRing[uint64](r, &r.fill.ring, fd, unix.XDP_UMEM_PGOFF_FILL_RING, off.Fr, size.fill); err != nil {
		return err
	}
	if r.completion.addrs, err = mapRing[uint64](r, &r.completion.ring, fd, unix.XDP_UMEM_PGOFF_COMPLETION_RING, off.Cr, size.completion); err != nil {
		return err
	}
	if r.rx.descs, err = mapRing[unix.XDPDesc](r, &r.rx.ring, fd, unix.XDP_PGOFF_RX_RING, off.Rx, size.rx); err != nil {
		return err
	}
	r.tx.descs, err = mapRing[unix.XDPDesc](r, &r.tx.ring, fd, unix.XDP_PGOFF_TX_RING, off.Tx, size.tx)
	return err
}

// mapRing maps one ring and fills in what is common.
func mapRing[T uint64 | unix.XDPDesc](owner *rings, r *ring, fd int, pgoff int64, off unix.XDPRingOffset, size int) ([]T, error) {
	var entry T
	m, err := unix.Mmap(fd, pgoff, int(off.Desc)+size*int(unsafe.Sizeof(entry)), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("xdp: mapping a ring of %d entries: %w", size, err)
	}
	owner.mappings = append(owner.mappings, m)
	// The kernel laid the ring out: four-byte words at three offsets below Desc and size entries from Desc, all naturally aligned in a
	// page-aligned mapping whose length is checked by the slice expressions. The mapping outlives the pointers: unmap clears them.
	word := func(o uint64) *uint32 { return (*uint32)(unsafe.Pointer(unsafe.SliceData(m[o:][:4]))) }
	*r = ring{producer: word(off.Producer), consumer: word(off.Consumer), flags: word(off.Flags), mask: uint32(size - 1)}
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(m[off.Desc:]))), size), nil
}

// unmap removes the mappings. The rings must not be used after it.
func (r *rings) unmap() error {
	var errs []error
	for _, m := range r.mappings {
		errs = append(errs, unix.Munmap(m))
	}
	*r = rings{}
	return errors.Join(errs...)
}

// registerUMEM makes mem the memory of fd, in chunks of chunkSize bytes. With txMetadata, frames to send may have txMetadataLen bytes of
// struct xsk_tx_metadata in front of them (XDP_UMEM_TX_METADATA_LEN, Linux 6.11; EINVAL before).
func registerUMEM(fd int, mem []byte, chunkSize int, txMetadata bool) error {
	// The kernel pins the pages and keeps its own references; the address is only used during the call. mem is no Go heap memory in
	// production, and the heap does not move.
	reg := unix.XDPUmemReg{Addr: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem)))), Len: uint64(len(mem)), Size: uint32(chunkSize)}
	if txMetadata {
		reg.Flags, reg.Tx_metadata_len = unix.XDP_UMEM_TX_METADATA_LEN, txMetadataLen
	}
	if page := uint64(os.Getpagesize()); reg.Addr%page != 0 {
		return fmt.Errorf("xdp: frame memory at %#x is not aligned to pages of %d bytes: use the bytes of a Memory from their start", reg.Addr, page)
	}
	size := unsafe.Sizeof(reg)
	for {
		// reg is alive and of the length that is said; older kernels refuse the newer, longer structure only if its end is not zero, and
		// take any length from the first version's on.
		_, _, errno := unix.Syscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_XDP, unix.XDP_UMEM_REG, uintptr(unsafe.Pointer(&reg)), size, 0)
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return pinError(reg.Len, errno)
		}
	}
}

// statistics reads XDP_STATISTICS. Kernels before 5.9 know the first three fields only and leave the others zero.
func statistics(fd int) (st unix.XDPStatistics, err error) {
	err = getsockopt(fd, unix.XDP_STATISTICS, unsafe.Pointer(&st), unsafe.Sizeof(st))
	return st, err
}

// zeroCopyGranted reads XDP_OPTIONS.
func zeroCopyGranted(fd int) (bool, error) {
	var flags uint32
	err := getsockopt(fd, unix.XDP_OPTIONS, unsafe.Pointer(&flags), unsafe.Sizeof(flags))
	return flags&unix.XDP_OPTIONS_ZEROCOPY != 0, err
}

// getsockopt reads an option of level SOL_XDP into size bytes at p.
func getsockopt(fd, opt int, p unsafe.Pointer, size uintptr) error {
	length := uint32(size)
	// p points to size bytes of a live variable of the caller's, length is live: the kernel writes no further than length says.
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_XDP, uintptr(opt), uintptr(p), uintptr(unsafe.Pointer(&length)), 0); errno != 0 {
		return errno
	}
	return nil
}

// kick is a sendto that lets the kernel look at the TX ring. It never blocks (MSG_DONTWAIT) and does a bounded number of packets, so the
// scheduler need not know: RawSyscall.
func kick(fd int) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return errno
}

// wake is a recvfrom that lets the driver look at the FILL ring.
func wake(fd int) unix.Errno {
	_, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), 0, 0, unix.MSG_DONTWAIT, 0, 0)
	return errno
}
