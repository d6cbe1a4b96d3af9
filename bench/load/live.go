package load

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/bench/load/bpf"
)

const (
	liveFrames = 2 // BPF_F_TEST_XDP_LIVE_FRAMES, Linux 5.18
	// floodBatch is how many frames one system call makes at most: the call cannot be interrupted in between.
	floodBatch = 1 << 14
	// tick is the pause between two bursts of a paced generator. A call costs some 20 µs, and what a burst can overrun is rings.
	tick = 250 * time.Microsecond
)

// Live is a generator of frames: an XDP program that the kernel runs over and over on frames of its own and that transmits each. On a veth
// device one core makes some 2 million a second. The peer of the device must receive XDP frames: a veth with an XDP program or with GRO on.
type Live struct {
	prog  *ebpf.Program
	limit uint64
	frame []byte
	from  Endpoint
	cpu   int
}

// Shape is what a generator's frames look like: size in bytes without FCS, at least [MinFrame]; flows take turns, at most a million. Flows of other shapes with the same Salt are the same
// ones; salts go from 0 to 40. Limit is how many frames a run makes at most, 0 as many as it can.
type Shape struct{ Size, Flows, Salt, Limit int }

// sourcePorts is how many source ports flows are spread over, before they get another destination port: source_ports of bench.c.
const sourcePorts = 1000

// NewLive loads a generator of UDP frames for a core.
func NewLive(from Endpoint, to Endpoint, shape Shape, cpu int) (*Live, error) {
	if shape.Size < MinFrame || shape.Flows < 1 || shape.Flows > 1000*sourcePorts || shape.Salt < 0 || shape.Salt > 40 {
		return nil, fmt.Errorf("frames of %d bytes of %d flows, salt %d: want at least %d bytes, 1 to 1,000,000 flows, a salt of 0 to 40", shape.Size, shape.Flows, shape.Salt, MinFrame)
	}
	spec, err := bpf.LoadBench()
	if err != nil {
		return nil, err
	}
	l := &Live{frame: frame(from, to.Addr, shape.Size, uint16(10000+shape.Salt*sourcePorts), 20000), from: from, cpu: cpu, limit: uint64(shape.Limit)}
	var words [6]uint64
	for i := range words {
		words[i] = binary.NativeEndian.Uint64(l.frame[i*8:])
	}
	if err := errors.Join(spec.Variables["headers"].Set(words), spec.Variables["flows"].Set(uint32(shape.Flows))); err != nil {
		return nil, err
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("loading the generator: %w", err)
	}
	defer coll.Close()
	l.prog = coll.DetachProgram("bench_send")
	return l, nil
}

// Close unloads the generator.
func (l *Live) Close() error { return l.prog.Close() }

// Run sends for a while, rate frames a second, or as fast as it can if rate is 0. It returns how many frames it made and how long that really took. What the
// device did not take is among them: count at the other end.
func (l *Live) Run(ctx context.Context, rate float64, span time.Duration) (sent uint64, took time.Duration, err error) {
	err = pinned(l.from.Netns, l.cpu, func() error {
		index, err := interfaceIndex(l.from.Device)
		if err != nil {
			return err
		}
		release, err := l.keepDispatched()
		if err != nil {
			return err
		}
		defer release()
		_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
		xdp := [6]uint32{1: uint32(len(l.frame)), 3: uint32(index)} // struct xdp_md: data_end, ingress_ifindex
		begin := time.Now()
		defer func() { took = time.Since(begin) }()
		for ctx.Err() == nil {
			n := uint64(floodBatch)
			if elapsed := time.Since(begin); elapsed >= span {
				return nil
			} else if rate > 0 {
				due := uint64(rate * min(span, elapsed+tick).Seconds())
				if n = due - min(due, sent); n == 0 || n < 8 && elapsed+tick < span {
					sleep(tick)
					continue
				}
				// After a stall do not catch up in one burst that no ring takes.
				if most := uint64(rate*tick.Seconds())*4 + 64; n > most {
					n = most
				}
			}
			if l.limit > 0 {
				if n = min(n, l.limit-sent); n == 0 {
					return nil
				}
			}
			_, err := l.prog.Run(&ebpf.RunOptions{Data: l.frame, Context: xdp, Repeat: uint32(n), Flags: liveFrames})
			if err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("running the generator on %s: %w", l.from.Device, err)
			}
			if sent += n; rate > 0 {
				sleep(tick / 2)
			}
		}
		return ctx.Err()
	})
	return sent, took, err
}

// keepDispatched attaches the program to the loopback device of the thread's network namespace, which nobody uses. The kernel patches a running program into
// its XDP dispatcher (kernel/bpf/dispatcher.c) and out again, and waits for all cores each time: milliseconds for every call, in which nothing is sent. A program that is attached
// somewhere stays in.
func (l *Live) keepDispatched() (release func(), err error) {
	lo, err := interfaceIndex("lo")
	if err != nil {
		return nil, err
	}
	attached, err := link.AttachXDP(link.XDPOptions{Program: l.prog, Interface: lo, Flags: link.XDPGenericMode})
	if err != nil {
		return nil, fmt.Errorf("attaching the generator to lo: %w", err)
	}
	return func() { _ = attached.Close() }, nil
}

// sleep is nanosleep(2): the runtime's timers are too coarse for bursts a few hundred microseconds apart.
func sleep(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	_ = unix.Nanosleep(&ts, nil)
}
