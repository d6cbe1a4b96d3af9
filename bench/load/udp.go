package load

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// maxGSO is how much one write of a segmenting UDP socket takes, less than 64 KiB and at most 64 segments.
const maxGSO = 60000

// UDP sends datagrams by one socket from a thread pinned to a core for a while, as fast as it can. size is that of the frame, without FCS. With gso set, one
// write hands the kernel many datagrams (UDP_SEGMENT). It returns how many datagrams were written. What leaves the device may be less.
func UDP(ctx context.Context, from, to Endpoint, size, cpu int, gso bool, span time.Duration) (sent uint64, took time.Duration, err error) {
	err = pinned(from.Netns, cpu, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		payload, segments := size-headerBytes, 1
		if gso {
			segments = min(64, maxGSO/payload)
			if err := unix.SetsockoptInt(fd, unix.IPPROTO_UDP, unix.UDP_SEGMENT, payload); err != nil {
				return fmt.Errorf("UDP_SEGMENT: %w", err)
			}
		}
		if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr.As4(), Port: 20000}); err != nil {
			return fmt.Errorf("%s to %v: %w", from.Netns, to.Addr, err)
		}
		b := make([]byte, payload*segments)
		begin := time.Now()
		defer func() { took = time.Since(begin) }()
		for ctx.Err() == nil && time.Since(begin) < span {
			for range 16 {
				stamp(b, payload)
				_, err := unix.Write(fd, b)
				switch err {
				case nil:
					sent += uint64(segments)
				case unix.ENOBUFS, unix.ECONNREFUSED, unix.EAGAIN, unix.EINTR:
				default:
					return fmt.Errorf("%s to %v: %w", from.Netns, to.Addr, err)
				}
			}
		}
		return ctx.Err()
	})
	return sent, took, err
}

// stamp writes mark and time into each datagram.
func stamp(b []byte, payload int) {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	now := uint64(ts.Nano())
	for at := 0; at < len(b); at += payload {
		binary.NativeEndian.PutUint32(b[at:], mark)
		binary.NativeEndian.PutUint64(b[at+4:], now)
	}
}
