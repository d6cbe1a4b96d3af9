package load

import (
	"context"
	"encoding/binary"
	"time"

	"github.com/asavie/xdp"
	"golang.org/x/sys/unix"
)

// xskRing is the length of an AF_XDP generator's rings, in frames.
const xskRing = 512

// XSK sends frames by an AF_XDP socket (github.com/asavie/xdp, copy mode) from a thread pinned to a core for a while, as fast as it can. It returns how many frames the kernel took.
func XSK(ctx context.Context, from, to Endpoint, size, cpu int, span time.Duration) (sent uint64, took time.Duration, err error) {
	err = pinned(from.Netns, cpu, func() error {
		index, err := interfaceIndex(from.Device)
		if err != nil {
			return err
		}
		s, err := xdp.NewSocket(index, 0, &xdp.SocketOptions{NumFrames: xskRing, FrameSize: 2048, FillRingNumDescs: xskRing,
			CompletionRingNumDescs: xskRing, RxRingNumDescs: xskRing, TxRingNumDescs: xskRing})
		if err != nil {
			return err
		}
		defer s.Close()
		model := frame(from, to.Addr, size, 10000, 20000)
		binary.NativeEndian.PutUint32(model[headerBytes:], mark)
		begin := time.Now()
		defer func() { took = time.Since(begin) }()
		for ctx.Err() == nil && time.Since(begin) < span {
			if n := s.NumCompleted(); n > 0 {
				s.Complete(n)
				sent += uint64(n)
			}
			batch := s.GetDescs(min(64, s.NumFreeTxSlots()))
			var ts unix.Timespec
			_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
			binary.NativeEndian.PutUint64(model[headerBytes+4:], uint64(ts.Nano()))
			for i := range batch {
				batch[i].Len = uint32(size)
				copy(s.GetFrame(batch[i]), model)
			}
			if s.Transmit(batch) == 0 {
				// What was not sent yet is sent by a poll.
				_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.FD()), Events: unix.POLLOUT}}, 1)
			}
		}
		sent += uint64(s.NumCompleted())
		return ctx.Err()
	})
	return sent, took, err
}
