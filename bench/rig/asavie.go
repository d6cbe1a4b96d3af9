package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/asavie/xdp"
	"golang.org/x/sys/unix"
)

// asavie is a forwarder made of github.com/asavie/xdp, the usual AF_XDP library for Go: no routing, no checks, one direction. It says what AF_XDP itself costs in Go.
var asavie = &Kind{
	Name: "asavie/xdp", About: "a forwarder of frames by github.com/asavie/xdp v0.3.3: no routing, no checks, one direction, one copy, rings of 2,048",
	Topologies: []Topology{SameNode}, FramesOnly: true, Build: buildAsavie,
}

// Forward is the hidden command of overplane-bench that the forwarder runs as, in a process of its own.
const Forward = "forward-asavie"

func buildAsavie(ctx context.Context, env *Env, spec Spec) (*System, error) {
	s := env.space(ctx)
	sys := &System{Name: "asavie/xdp", close: []func() error{s.close}, Placement: fmt.Sprintf("its thread pinned to core %d", ForwardCore())}
	node := s.add("n1", false)
	sys.From, sys.To = s.pod(1, 1, defaultMTU), s.pod(1, 2, defaultMTU)
	s.finishedFrames(sys.From)
	ready := filepath.Join(env.Dir, s.name+".ready")
	cmd, log := s.start(node, nil, env.Self, Forward, "--in", nodePort+"1", "--out", nodePort+"2", "--mac", podMAC(1, 2), "--cpu", fmt.Sprint(ForwardCore()), "--ready", ready)
	s.waitFile(ready, log)
	if err := s.err(); err != nil {
		return nil, fail(sys, err)
	}
	sys.Pids = []int{cmd.Process.Pid}
	sys.Drops = spaceDrops(s.netns, nil, nil)
	return sys, nil
}

// RunForward forwards frames that arrive at one interface to another with another destination address, until the process is killed.
func RunForward(in, out, mac string, cpu int, ready func() error) error {
	dst, err := net.ParseMAC(mac)
	if err != nil {
		return err
	}
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("pinning to core %d: %w", cpu, err)
	}
	var index [2]int
	for i, name := range []string{in, out} {
		dev, err := net.InterfaceByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		index[i] = dev.Index
	}
	prog, err := xdp.NewProgram(1)
	if err != nil {
		return err
	}
	if err := prog.Attach(index[0]); err != nil {
		return err
	}
	const ring = 2048
	options := &xdp.SocketOptions{NumFrames: 2 * ring, FrameSize: 2048, FillRingNumDescs: ring, CompletionRingNumDescs: ring, RxRingNumDescs: ring, TxRingNumDescs: ring}
	rx, err := xdp.NewSocket(index[0], 0, options)
	if err != nil {
		return err
	}
	if err := prog.Register(0, rx.FD()); err != nil {
		return err
	}
	tx, err := xdp.NewSocket(index[1], 0, options)
	if err != nil {
		return err
	}
	if err := ready(); err != nil {
		return err
	}
	for {
		rx.Fill(rx.GetDescs(rx.NumFreeFillSlots()))
		if n := tx.NumCompleted(); n > 0 {
			tx.Complete(n)
		}
		if rx.NumReceived() == 0 {
			if _, err := unix.Poll([]unix.PollFd{{Fd: int32(rx.FD()), Events: unix.POLLIN}}, int(time.Second.Milliseconds())); err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
		}
		got := rx.Receive(min(64, rx.NumReceived()))
		free := tx.GetDescs(len(got))
		for i := range free {
			frame := rx.GetFrame(got[i])
			n := copy(tx.GetFrame(xdp.Desc{Addr: free[i].Addr, Len: uint32(options.FrameSize)}), frame)
			free[i].Len = uint32(n)
			copy(tx.GetFrame(free[i]), dst)
		}
		tx.Transmit(free)
	}
}
