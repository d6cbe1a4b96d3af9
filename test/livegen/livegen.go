// Package livegen sends frames faster than any socket: an XDP program that the kernel runs over and over on frames of its own (BPF_PROG_RUN with
// BPF_F_TEST_XDP_LIVE_FRAMES, Linux 5.18) and that transmits each. One core makes some 2.5 million a second on a veth device.
//
//	generator (program, one core) -> transmit on a device -> its peer receives
//
// The peer must receive XDP frames: a veth device with an XDP program or with GRO on. What it cannot take is dropped without a word: count at
// the other end.
package livegen

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

const (
	liveFrames = 2       // BPF_F_TEST_XDP_LIVE_FRAMES
	batch      = 1 << 16 // frames of one system call
	rewritten  = 56      // bytes that the program writes, less than the shortest frame
	xdpTX      = 3
)

// Generator is a running generator.
type Generator struct {
	end  atomic.Bool
	done chan error
}

// Start sends copies of frame, at least 64 bytes, by an interface of the network namespace at a path, from a thread pinned to cpu. It needs CAP_BPF,
// CAP_NET_ADMIN and CAP_SYS_ADMIN.
func Start(netns, ifname string, frame []byte, cpu int) (*Generator, error) {
	if len(frame) < 64 {
		return nil, fmt.Errorf("livegen: frame of %d bytes: want at least 64", len(frame))
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, License: "GPL", Instructions: program(frame)})
	if err != nil {
		return nil, fmt.Errorf("livegen: loading the program: %w", err)
	}
	g := &Generator{done: make(chan error, 1)}
	ready := make(chan error, 1)
	go func() {
		defer prog.Close()
		// The thread stays locked: it is in another namespace and pinned, and ends with its goroutine.
		runtime.LockOSThread()
		index, err := enter(netns, ifname, cpu)
		ready <- err
		if err != nil {
			return
		}
		g.done <- g.run(prog, frame, index)
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("livegen: %w", err)
	}
	return g, nil
}

// Stop ends the generator and returns what it failed by, if it did.
func (g *Generator) Stop() error {
	g.end.Store(true)
	return <-g.done
}

// program writes the front of the frame and transmits it. The kernel recycles frames without resetting them, and whoever had one may have
// changed its headers.
func program(frame []byte) asm.Instructions {
	code := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // struct xdp_md: data, data_end
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, rewritten),
		asm.JGT.Reg(asm.R4, asm.R3, "out"),
	}
	for i := 0; i < rewritten; i += 8 {
		code = append(code,
			asm.LoadImm(asm.R5, int64(binary.NativeEndian.Uint64(frame[i:])), asm.DWord),
			asm.StoreMem(asm.R2, int16(i), asm.R5, asm.DWord))
	}
	return append(code, asm.Mov.Imm(asm.R0, xdpTX).WithSymbol("out"), asm.Return())
}

// enter moves the calling thread and returns the interface's index.
func enter(netns, ifname string, cpu int) (int, error) {
	fd, err := unix.Open(netns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return 0, err
	}
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return 0, err
	}
	dev, err := net.InterfaceByName(ifname)
	if err != nil {
		return 0, err
	}
	return dev.Index, nil
}

func (g *Generator) run(prog *ebpf.Program, frame []byte, index int) error {
	context := [6]uint32{1: uint32(len(frame)), 3: uint32(index)} // struct xdp_md: data_end, ingress_ifindex
	for !g.end.Load() {
		_, err := prog.Run(&ebpf.RunOptions{Data: frame, Context: context, Repeat: batch, Flags: liveFrames})
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("livegen: running the program: %w", err)
		}
	}
	return nil
}
