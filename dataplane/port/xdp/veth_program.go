package xdp

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// The largest MTU of a veth device with a native XDP program on it (veth_xdp_set in drivers/net/veth.c): what one page holds behind its headroom,
// or, for a program that takes frames of several buffers (xdp.frags, Linux 5.18), that and MAX_SKB_FRAGS pages more.
const (
	vethMTU      = 3506
	vethMTUFrags = 65535 - ethernetHeader // the kernel's is larger than an IP packet
)

// VethProgram is the XDP program of the host's end of a pod's veth pair: every frame goes to the socket of the queue it came in by; without
// one it dies. So it does while the daemon is away: what a pod sends never gets to the node's own stack.
//
// It is the caller's to attach it to the device (IFLA_XDP_FD in native mode), which keeps it, with its table, for as long as the
// device lives or until it is replaced.
type VethProgram struct {
	prog  *ebpf.Program
	socks *ebpf.Map
	frags bool
}

// NewVethProgram loads the program for a device of so many receive queues. It takes frames of several buffers where the kernel knows them. It needs CAP_BPF
// and CAP_NET_ADMIN.
func NewVethProgram(queues int) (*VethProgram, error) {
	if queues < 1 || queues > MaxQueues {
		return nil, fmt.Errorf("xdp: veth program for %d queues: want 1 to %d", queues, MaxQueues)
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, needs("removing RLIMIT_MEMLOCK for BPF maps (kernels before 5.11 count them)", err, capSysResource)
	}
	p := &VethProgram{}
	var err error
	p.socks, err = ebpf.NewMap(&ebpf.MapSpec{Name: "overplane_pod", Type: ebpf.XSKMap, KeySize: 4, ValueSize: 4, MaxEntries: uint32(queues)})
	if err != nil {
		return nil, needs("creating the table of a pod's sockets", err, capBPF, capNetAdmin)
	}
	var errs []error
	for _, p.frags = range []bool{true, false} {
		if p.prog, err = ebpf.NewProgram(vethProgramSpec(p.socks, p.frags)); err == nil {
			return p, nil
		}
		errs = append(errs, needs("loading a pod's XDP program", err, capBPF, capNetAdmin))
	}
	return nil, errors.Join(append(errs, p.Close())...)
}

// vethProgramSpec is the program: return bpf_redirect_map(socks, ctx->rx_queue_index, XDP_DROP).
func vethProgramSpec(socks *ebpf.Map, frags bool) *ebpf.ProgramSpec {
	const rxQueueIndex, xdpDrop = 16, 1 // offset in struct xdp_md; the action when there is no socket
	spec := &ebpf.ProgramSpec{
		Name: "overplane_pod", Type: ebpf.XDP, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, rxQueueIndex, asm.Word),
			asm.LoadMapPtr(asm.R1, socks.FD()),
			asm.Mov.Imm(asm.R3, xdpDrop),
			asm.FnRedirectMap.Call(),
			asm.Return(),
		},
	}
	if frags {
		spec.Flags = unix.BPF_F_XDP_HAS_FRAGS
	}
	return spec
}

// FD is the program's descriptor, for attaching it.
func (p *VethProgram) FD() int { return p.prog.FD() }

// MaxMTU is the largest MTU, bytes without Ethernet header, that the kernel allows a device with this program; its peer must not have a
// larger one either.
func (p *VethProgram) MaxMTU() int {
	if p.frags {
		return vethMTUFrags
	}
	return vethMTU
}

// addSocket gives the frames of a queue to a socket.
func (p *VethProgram) addSocket(queue, fd int) error {
	if p.socks == nil {
		return fmt.Errorf("xdp: a pod's sockets: %w", os.ErrClosed)
	}
	key, value := uint32(queue), uint32(fd)
	if err := p.socks.Put(&key, &value); err != nil {
		return fmt.Errorf("xdp: giving a pod's queue %d to its socket: %w", queue, err)
	}
	return nil
}

// Close closes the descriptors. A device that carries the program keeps it.
func (p *VethProgram) Close() error {
	var errs []error
	if p.prog != nil {
		errs = append(errs, p.prog.Close())
		p.prog = nil
	}
	if p.socks != nil {
		errs = append(errs, p.socks.Close())
		p.socks = nil
	}
	return errors.Join(errs...)
}
