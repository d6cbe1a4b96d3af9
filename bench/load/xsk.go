package load

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/asavie/xdp"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

// xskRing is the length of an AF_XDP generator's rings, in frames.
const xskRing = 512

// XSK is a generator of frames: an AF_XDP socket (github.com/asavie/xdp, copy mode) of the sender's device. The package never unmaps a socket's rings, so that the device stays
// taken after Close until the process or the device ends: one generator for a device.
type XSK struct {
	socket *xdp.Socket
	model  []byte
	netns  string
	cpu    int
}

// NewXSK opens a generator of UDP frames of size bytes without FCS for a core.
func NewXSK(from, to Endpoint, size, cpu int) (*XSK, error) {
	x := &XSK{model: frame(from, to.Addr, size, 10000, 20000), netns: from.Netns, cpu: cpu}
	binary.NativeEndian.PutUint32(x.model[headerBytes:], mark)
	err := lab.InNetns(from.Netns, func() error {
		index, err := interfaceIndex(from.Device)
		if err != nil {
			return err
		}
		x.socket, err = xdp.NewSocket(index, 0, &xdp.SocketOptions{NumFrames: xskRing, FrameSize: 2048, FillRingNumDescs: xskRing,
			CompletionRingNumDescs: xskRing, RxRingNumDescs: xskRing, TxRingNumDescs: xskRing})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("AF_XDP socket of %s in %s: %w", from.Device, from.Netns, err)
	}
	return x, nil
}

// Close closes the socket.
func (x *XSK) Close() error { return x.socket.Close() }

// Run sends for a while, as fast as it can, and returns how many frames the kernel took.
func (x *XSK) Run(ctx context.Context, span time.Duration) (sent uint64, took time.Duration, err error) {
	s := x.socket
	err = pinned(x.netns, x.cpu, func() error {
		begin := time.Now()
		defer func() { took = time.Since(begin) }()
		for ctx.Err() == nil && time.Since(begin) < span {
			sent += x.completed()
			batch := s.GetDescs(min(64, s.NumFreeTxSlots()))
			var ts unix.Timespec
			_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
			binary.NativeEndian.PutUint64(x.model[headerBytes+4:], uint64(ts.Nano()))
			for i := range batch {
				batch[i].Len = uint32(len(x.model))
				copy(s.GetFrame(batch[i]), x.model)
			}
			if s.Transmit(batch) == 0 {
				// What was not sent yet is sent by a poll.
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.FD()), Events: unix.POLLOUT}}, 1)
			}
		}
		sent += x.completed()
		return ctx.Err()
	})
	return sent, took, err
}

// completed takes back the frames that the kernel is done with.
func (x *XSK) completed() uint64 {
	n := x.socket.NumCompleted()
	if n > 0 {
		x.socket.Complete(n)
	}
	return uint64(n)
}
