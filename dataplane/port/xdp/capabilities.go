package xdp

import (
	"errors"
	"fmt"
	"math"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Capabilities tries what kernel and process grant the package whatever the interface, and touches none: unlike [Probe] it may be called beside live
// traffic. Required is what the XDP hook and its sockets cannot do without.
func Capabilities() []Capability {
	return []Capability{
		{"XDP programs", "4.8", true, features.HaveProgramType(ebpf.XDP)},
		{"XSKMAP", "4.18", true, features.HaveMapType(ebpf.XSKMap)},
		{"AF_XDP sockets with need_wakeup", "5.4", true, haveSocket()},
		{"mappable arrays", "5.5", true, features.HaveMapFlag(features.BPF_F_MMAPABLE)},
		{"coarse clock in programs", "5.11", true, features.HaveProgramHelper(ebpf.XDP, asm.FnKtimeGetCoarseNs)},
		{"multi-buffer XDP (xdp.frags)", "5.18", false, haveFrags()},
		{"transmit budget (XDP_MAX_TX_SKB_BUDGET)", "6.17", false, haveTxBudget()},
		{"tc programs", "4.1", false, features.HaveProgramType(ebpf.SchedCLS)},
		{"tcx links", "6.6", false, haveTCX()},
	}
}

func haveSocket() error {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return needs("opening an AF_XDP socket", err, capNetRaw)
	}
	return unix.Close(fd)
}

// haveTCX asks for an attachment to an interface that does not exist: a kernel that knows tcx says that, another that it does not know tcx.
func haveTCX() error {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name:         "probe_tcx",
		Type:         ebpf.SchedCLS,
		License:      "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		return needs("loading a tc program", err, capBPF, capNetAdmin)
	}
	defer p.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: math.MaxInt32, Program: p, Attach: ebpf.AttachTCXIngress})
	if errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err == nil {
		_ = l.Close()
		return fmt.Errorf("xdp: there is an interface %d", math.MaxInt32)
	}
	return needs("attaching a program by tcx", err, capNetAdmin)
}
