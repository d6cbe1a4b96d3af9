package xdp

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// Capability is one thing that the package makes use of.
type Capability struct {
	Name     string
	Kernel   string // first Linux version that has it; for drivers' abilities, the first in which any driver has it
	Required bool   // without it the package does not work
	Err      error  // nil: granted. Else why not
}

// ProbeReport is what this kernel, process and driver grant for an interface.
type ProbeReport struct {
	Interface    string
	Driver       string // "" if it does not say
	RXQueues     int
	TXQueues     int
	Capabilities []Capability
}

// Err joins what is missing of the required capabilities; nil if [Open] and [AttachSteering] can be expected to work.
func (r *ProbeReport) Err() error {
	var errs []error
	for _, c := range r.Capabilities {
		if c.Required && c.Err != nil {
			errs = append(errs, fmt.Errorf("%s (Linux %s): %w", c.Name, c.Kernel, c.Err))
		}
	}
	return errors.Join(errs...)
}

// Probe tries what the package makes use of on an interface of the current network namespace, and undoes it. Sockets are bound to
// queue 0, without a program: no frame is received and none sent. A queue that is in use is reported as such. For some drivers a zero-copy bind resets the
// queue: do not probe an interface that carries traffic that matters.
func Probe(ifname string) (*ProbeReport, error) {
	iface, err := net.InterfaceByName(ifname)
	if err != nil {
		return nil, fmt.Errorf("xdp: interface %q: %w", ifname, err)
	}
	r := &ProbeReport{Interface: ifname, Driver: driver(ifname)}
	if r.RXQueues, r.TXQueues, err = queues(ifname); err != nil {
		return nil, err
	}
	add := func(name, kernel string, required bool, err error) {
		r.Capabilities = append(r.Capabilities, Capability{Name: name, Kernel: kernel, Required: required, Err: err})
	}
	add("XDP programs", "4.8", true, features.HaveProgramType(ebpf.XDP))
	add("XSKMAP", "4.18", true, features.HaveMapType(ebpf.XSKMap))
	add("mappable arrays", "5.5", true, features.HaveMapFlag(features.BPF_F_MMAPABLE))
	add("coarse clock in programs", "5.11", true, features.HaveProgramHelper(ebpf.XDP, asm.FnKtimeGetCoarseNs))
	add("multi-buffer XDP (xdp.frags)", "5.18", false, haveFrags())

	pool, mem, err := probePool()
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	cfg := Config{Interface: ifname, Pools: []*port.Pool{pool}, RingSize: 64}
	try := func(a attempt) error {
		s, err := openSocket(cfg.spec(iface.Index, 0), a)
		if err != nil {
			return err
		}
		return s.close()
	}
	add("AF_XDP copy mode with need_wakeup", "5.4", true, try(attempt{}))
	add("AF_XDP multi-buffer (XDP_USE_SG)", "6.6", false, try(attempt{sg: true}))
	add("transmit budget (XDP_MAX_TX_SKB_BUDGET)", "6.17", false, haveTxBudget())
	add("AF_XDP zero-copy", "4.20", false, try(attempt{zeroCopy: true}))
	return r, nil
}

func probePool() (*port.Pool, *Memory, error) {
	pc := port.PoolConfig{Chunks: max(64, os.Getpagesize()/2048), ChunkSize: 2048}
	mem, err := NewMemory(pc.Size())
	if err != nil {
		return nil, nil, err
	}
	pool, err := port.NewPool(mem.Bytes(), pc)
	if err != nil {
		return nil, nil, errors.Join(err, mem.Close())
	}
	return pool, mem, nil
}

// haveFrags loads an empty program with BPF_F_XDP_HAS_FRAGS.
func haveFrags() error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "probe_frags",
		Type:         ebpf.XDP,
		Flags:        unix.BPF_F_XDP_HAS_FRAGS,
		License:      "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	if err != nil {
		return needs("loading a program with BPF_F_XDP_HAS_FRAGS", err, capBPF, capNetAdmin)
	}
	return p.Close()
}

func haveTxBudget() error {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return needs("opening an AF_XDP socket", err, capNetRaw)
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.SOL_XDP, unix.XDP_TX_RING, 64); err != nil {
		return fmt.Errorf("xdp: making a ring: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, 64); err != nil {
		return fmt.Errorf("xdp: setting the transmit budget: %w", err)
	}
	return nil
}
