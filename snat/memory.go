package snat

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/packet"
)

// Layout of the memfd: a page of header, then the records, each part on pages of its own. Indices and wheels mean nothing to another process, which
// makes them anew; they lie in anonymous memory, where the kernel gives huge pages more readily.
const (
	layoutMagic   = 0x3154414e53564f // "OVSNAT1" in memory on little-endian machines
	layoutVersion = 1
	pageSize      = 4096
)

// header says what the rest of the memfd is. Everything after high4 and high6 may change while the tables are in use.
type header struct {
	magic                uint64
	version              uint32
	recordSize, pairSize uint32
	worker, workers      uint32
	mapping              uint32
	sessions4, sessions6 uint32
	first, shift         uint32
	chunks, tickShift    uint32

	high4, high6 uint32
	node4, node6 packet.Addr
}

// memory is a mapped memfd, and what is kept beside it.
type memory struct {
	file *os.File
	mem  []byte // header and records
	idx  []byte // indices and wheels
	head *header
	cfg  *Config
}

// part is where a part of the memfd or of the anonymous memory lies.
type part struct{ off, size int }

// parts are: records, IPv6 addresses, indices, wheel heads.
type parts struct {
	recs4, recs6, addrs6, out4, in4, out6, in6, wheel4, wheel6 part
	total, idxTotal                                            int
}

// indexSlots is the size of an index for n records: a power of two, at a load of at most 3/4.
func indexSlots(n int) int {
	s := 8
	for s*3/4 < n {
		s *= 2
	}
	return s
}

func layout(c *Config) (p parts) {
	type sized struct {
		p    *part
		size int
	}
	place := func(at int, all ...sized) int {
		for _, x := range all {
			*x.p = part{at, x.size}
			at += (x.size + pageSize - 1) &^ (pageSize - 1)
		}
		return at
	}
	p.total = place(pageSize, sized{&p.recs4, c.Sessions4 * recordSize}, sized{&p.recs6, c.Sessions6 * recordSize}, sized{&p.addrs6, c.Sessions6 * pairSize})
	p.idxTotal = place(0,
		sized{&p.out4, indexSlots(c.Sessions4) * 4}, sized{&p.in4, indexSlots(c.Sessions4) * 4},
		sized{&p.out6, indexSlots(c.Sessions6) * 4}, sized{&p.in6, indexSlots(c.Sessions6) * 4},
		sized{&p.wheel4, noBucket * 4}, sized{&p.wheel6, noBucket * 4})
	return p
}

func headerFor(c *Config, a *Allocator) header {
	return header{magic: layoutMagic, version: layoutVersion, recordSize: recordSize, pairSize: pairSize, worker: uint32(c.Worker),
		workers: uint32(a.cfg.Workers), mapping: uint32(c.Mapping), sessions4: uint32(c.Sessions4), sessions6: uint32(c.Sessions6),
		first: uint32(a.cfg.First), shift: uint32(a.shift), chunks: uint32(a.chunks), tickShift: tickShift}
}

// newMemory makes and maps an empty memfd. Pages are taken when they are first written.
func newMemory(c *Config, a *Allocator) (*memory, error) {
	fd, err := unix.MemfdCreate(fmt.Sprintf("overplane-sessions-%d", c.Worker), unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("snat: memfd for the sessions of worker %d: %w", c.Worker, err)
	}
	return newMemoryIn(c, a, os.NewFile(uintptr(fd), "overplane-sessions"))
}

// newMemoryIn makes and maps the empty tables in a file without content, which it takes over, also if it returns an error.
func newMemoryIn(c *Config, a *Allocator, file *os.File) (*memory, error) {
	if err := unix.Ftruncate(int(file.Fd()), int64(layout(c).total)); err != nil {
		file.Close()
		return nil, fmt.Errorf("snat: file of %d bytes for the sessions: %w", layout(c).total, err)
	}
	m, err := mapMemory(c, file)
	if err != nil {
		file.Close()
		return nil, err
	}
	*m.head = headerFor(c, a)
	return m, nil
}

func mapMemory(c *Config, file *os.File) (*memory, error) {
	mem, err := unix.Mmap(int(file.Fd()), 0, layout(c).total, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("snat: cannot map the memfd of worker %d: %w", c.Worker, err)
	}
	// Huge pages, where the kernel gives them to shared memory, save TLB misses. Where not, nothing is lost.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	idx, err := unix.Mmap(-1, 0, layout(c).idxTotal, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		_ = unix.Munmap(mem)
		return nil, fmt.Errorf("snat: no memory for the indices of worker %d: %w", c.Worker, err)
	}
	_ = unix.Madvise(idx, unix.MADV_HUGEPAGE)
	return &memory{file: file, mem: mem, idx: idx, head: &cast[header](mem, 1)[0], cfg: c}, nil
}

// openMemory maps what another process left. It takes over the file, also if it returns an error.
func openMemory(c *Config, a *Allocator, file *os.File) (*memory, error) {
	info, err := file.Stat()
	if err != nil || info.Size() < pageSize {
		file.Close()
		return nil, errors.Join(errors.New("snat: the descriptor handed over holds no sessions"), err)
	}
	one, err := unix.Mmap(int(file.Fd()), 0, pageSize, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("snat: cannot map the sessions handed over: %w", err)
	}
	got, want := cast[header](one, 1)[0], headerFor(c, a)
	unix.Munmap(one)
	want.high4, want.high6, want.node4, want.node6 = got.high4, got.high6, got.node4, got.node6
	switch {
	case got != want:
		err = fmt.Errorf("snat: the sessions handed over were laid out otherwise: %+v, want %+v", got, want)
	case info.Size() != int64(layout(c).total):
		err = fmt.Errorf("snat: the sessions handed over take %d bytes, want %d", info.Size(), layout(c).total)
	case got.high4 > got.sessions4 || got.high6 > got.sessions6:
		err = fmt.Errorf("snat: the sessions handed over claim %d and %d records of %d and %d", got.high4, got.high6, got.sessions4, got.sessions6)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	m, err := mapMemory(c, file)
	if err != nil {
		file.Close()
	}
	return m, err
}

// tables are the two tables over the memory, with empty indices.
func (m *memory) tables() (v4, v6 *table) {
	l := layout(m.cfg)
	at := func(p part) []byte { return m.mem[p.off:][:p.size:p.size] }
	words := func(p part) []uint32 { return cast[uint32](m.idx[p.off:][:p.size:p.size], p.size/4) }
	v4 = &table{recs: cast[record](at(l.recs4), m.cfg.Sessions4), outIdx: words(l.out4), inIdx: words(l.in4), high: &m.head.high4}
	v6 = &table{v6: true, recs: cast[record](at(l.recs6), m.cfg.Sessions6), addrs: cast[addrPair](at(l.addrs6), m.cfg.Sessions6),
		outIdx: words(l.out6), inIdx: words(l.in6), high: &m.head.high6}
	v4.wheel.heads, v6.wheel.heads = words(l.wheel4), words(l.wheel6)
	v4.mask, v6.mask = uint64(len(v4.outIdx)-1), uint64(len(v6.outIdx)-1)
	return v4, v6
}

func (m *memory) close() error {
	return errors.Join(unix.Munmap(m.mem), unix.Munmap(m.idx), m.file.Close())
}
