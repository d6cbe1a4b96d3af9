// Package load has the benchmarks' load generators and sinks. They share no code with the data plane: frames that the kernel makes (BPF_PROG_RUN
// in live-frames mode), UDP and TCP sockets. Every part says on which core it runs.
//
//	Live, UDP ──► eth0 of the sending namespace ──► system under test ──► eth0 of the receiving namespace ──► Sink (tc ingress: counts, drops)
//	Streams, Ping: TCP sockets at both ends
//
// Frames carry a mark and the time they were sent, so that a sink counts nothing else and knows how old they are.
package load

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

const (
	headerBytes = 42         // Ethernet, IPv4, UDP
	mark        = 0x6f767062 // first in the payload, native byte order
	// MinFrame is the least frame size, in bytes without FCS: headers, mark and time stamp, rounded up to what Ethernet and custom want.
	MinFrame = 64
)

// Endpoint is where load enters or leaves: a device of a named network namespace.
type Endpoint struct {
	Netns  string
	Device string
	Addr   netip.Addr
	MAC    net.HardwareAddr // of the device
	Next   net.HardwareAddr // of the device's next hop: where its frames go
}

// frame is a UDP datagram without checksum, with a good IPv4 header, of size bytes.
func frame(from Endpoint, to netip.Addr, size int, sport, dport uint16) []byte {
	f := make([]byte, size)
	copy(f, from.Next)
	copy(f[6:], from.MAC)
	binary.BigEndian.PutUint16(f[12:], 0x0800)
	h := f[14:34]
	h[0], h[8], h[9] = 0x45, 64, 17
	binary.BigEndian.PutUint16(h[2:], uint16(size-14))
	src, dst := from.Addr.As4(), to.As4()
	copy(h[12:], src[:])
	copy(h[16:], dst[:])
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(h[10:], ^uint16(sum))
	binary.BigEndian.PutUint16(f[34:], sport)
	binary.BigEndian.PutUint16(f[36:], dport)
	binary.BigEndian.PutUint16(f[38:], uint16(size-34))
	return f
}

// pinned runs fn on a thread of its own in a namespace and on a core; cpu below 0 leaves it unpinned. The thread ends with fn.
func pinned(netns string, cpu int, fn func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the runtime ends the thread, and with it its affinity and namespace.
		runtime.LockOSThread()
		done <- func() error {
			fd, err := unix.Open(lab.NetnsPath(netns), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("network namespace %s: %w", netns, err)
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("network namespace %s: %w", netns, err)
			}
			if cpu >= 0 {
				var set unix.CPUSet
				set.Set(cpu)
				if err := unix.SchedSetaffinity(0, &set); err != nil {
					return fmt.Errorf("pinning to core %d: %w", cpu, err)
				}
			}
			return fn()
		}()
	}()
	return <-done
}

func interfaceIndex(name string) (int, error) {
	dev, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return dev.Index, nil
}
