package xdp

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// memoryName is the memfd's name: what it holds and the version of its layout. A process that adopts a descriptor of another version must
// not touch what is in it.
const memoryName = "overplane-frames-v1"

// hugePage is the size of the huge pages that are asked for: the one that amd64 and arm64 (4 KiB granule) share.
const hugePage = 2 << 20

// Memory is a shared mapping that frames live in, backed by a memfd so that another process can map the same pages. Pages are
// populated when first touched (or pinned, by [Open]). Its methods may be called from any goroutine; Close only when nothing uses the bytes.
type Memory struct {
	fd      int
	mapping []byte
	size    int
}

// NewMemory makes size bytes of zeroed memory of ordinary pages. The descriptor is closed on exec and sealed: nobody who is given it can
// shrink the file, which would turn accesses into SIGBUS.
func NewMemory(size int) (*Memory, error) { return newMemory(size, size, 0) }

// NewHugeMemory is NewMemory over 2 MiB pages, which save TLB misses. The administrator has to reserve them (vm.nr_hugepages); the error
// says how many are needed.
func NewHugeMemory(size int) (*Memory, error) {
	length := (size + hugePage - 1) &^ (hugePage - 1)
	m, err := newMemory(size, length, unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	if errors.Is(err, unix.ENOMEM) {
		return nil, fmt.Errorf("%w: reserve %d huge pages of 2 MiB with `sysctl -w vm.nr_hugepages=N`", err, length/hugePage)
	}
	return m, err
}

func newMemory(size, length, flags int) (*Memory, error) {
	if size <= 0 {
		return nil, fmt.Errorf("xdp: frame memory of %d bytes: want at least one", size)
	}
	fd, err := unix.MemfdCreate(memoryName, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|flags)
	if err != nil {
		return nil, fmt.Errorf("xdp: frame memory: memfd_create: %w", err)
	}
	if err := unix.Ftruncate(fd, int64(length)); err != nil {
		return nil, errors.Join(fmt.Errorf("xdp: frame memory of %d bytes: %w", size, err), unix.Close(fd))
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, errors.Join(fmt.Errorf("xdp: frame memory: sealing: %w", err), unix.Close(fd))
	}
	return mapMemory(fd, size, length)
}

// OpenMemory adopts the memory behind fd, a descriptor of [Memory.FD] that outlived its process. The Memory owns fd if the error is nil.
// A descriptor of another version, or one that could shrink, is refused.
func OpenMemory(fd int) (*Memory, error) {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, fmt.Errorf("xdp: adopting frame memory: %w", err)
	}
	if !strings.HasPrefix(name, "/memfd:"+memoryName+" ") {
		return nil, fmt.Errorf("xdp: adopting frame memory: descriptor %d is %q, want memfd %q", fd, name, memoryName)
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil || seals&unix.F_SEAL_SHRINK == 0 {
		return nil, fmt.Errorf("xdp: adopting frame memory: descriptor %d is not sealed against shrinking (seals %#x, %v)", fd, seals, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("xdp: adopting frame memory: %w", err)
	}
	return openMapping(fd, int(st.Size), int(st.Size))
}

func mapMemory(fd, size, length int) (*Memory, error) {
	m, err := openMapping(fd, size, length)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return m, nil
}

func openMapping(fd, size, length int) (*Memory, error) {
	mapping, err := unix.Mmap(fd, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("xdp: mapping frame memory of %d bytes: %w", length, err)
	}
	return &Memory{fd: fd, mapping: mapping, size: size}, nil
}

// Bytes is the memory, page-aligned. It is valid until Close.
func (m *Memory) Bytes() []byte { return m.mapping[:m.size:m.size] }

// FD is the memfd, owned by the Memory. To hand it on, duplicate it.
func (m *Memory) FD() int { return m.fd }

// Close unmaps the memory and closes the descriptor. Slices of Bytes must not be used after it. Pages that a socket has pinned stay until
// the socket is closed.
func (m *Memory) Close() error {
	if m.mapping == nil {
		return nil
	}
	err := errors.Join(unix.Munmap(m.mapping), unix.Close(m.fd))
	m.mapping, m.fd = nil, -1
	return err
}
