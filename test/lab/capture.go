package lab

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// packetIgnoreOutgoing is PACKET_IGNORE_OUTGOING of linux/if_packet.h (Linux 4.20).
const packetIgnoreOutgoing = 23

// maxCaptured bounds what a capture keeps.
const maxCaptured = 20000

// Frame is a frame seen on a wire.
type Frame struct {
	Interface int // index of the device it came in by
	Bytes     []byte
}

// Capture collects the frames that come in by any device of a namespace, each once: on the gw namespace, what nodes send to the
// underlay.
type Capture struct {
	file *os.File
	keep func([]byte) bool
	done chan struct{}

	mu     sync.Mutex
	frames []Frame
	missed int
}

// StartCapture begins to collect the frames that keep accepts (nil: all). keep must not hold on to its argument.
func StartCapture(netns string, keep func([]byte) bool) (*Capture, error) {
	fd := -1
	err := InNetns(netns, func() (err error) {
		fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(hostToNetwork16(unix.ETH_P_ALL)))
		return err
	})
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, packetIgnoreOutgoing, 1),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
	)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	c := &Capture{file: os.NewFile(uintptr(fd), "packet socket"), keep: keep, done: make(chan struct{})}
	go c.collect()
	return c, nil
}

func (c *Capture) collect() {
	defer close(c.done)
	raw, err := c.file.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 1<<17)
	for {
		var n, ifindex int
		var rxErr error
		err := raw.Read(func(fd uintptr) bool {
			var from unix.Sockaddr
			n, from, rxErr = unix.Recvfrom(int(fd), buf, 0)
			if ll, ok := from.(*unix.SockaddrLinklayer); ok {
				ifindex = ll.Ifindex
			}
			return !errors.Is(rxErr, unix.EAGAIN)
		})
		if err != nil {
			return // closed
		}
		if rxErr != nil { // ENETDOWN of one device is not the others' concern
			continue
		}
		if c.keep != nil && !c.keep(buf[:n]) {
			continue
		}
		c.mu.Lock()
		if len(c.frames) < maxCaptured {
			c.frames = append(c.frames, Frame{ifindex, append([]byte(nil), buf[:n]...)})
		} else {
			c.missed++
		}
		c.mu.Unlock()
	}
}

// Frames are those collected so far.
func (c *Capture) Frames() []Frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]Frame(nil), c.frames...)
}

// Stop ends the capture and returns what it collected.
func (c *Capture) Stop() []Frame {
	c.file.Close()
	<-c.done
	return c.Frames()
}

// OuterIP is the first IP header of a frame and what follows it.
type OuterIP struct {
	SrcMAC, DstMAC net.HardwareAddr
	Src, Dst       netip.Addr
	Protocol       uint8  // of the header itself: extension headers are not skipped
	Payload        []byte // bounded by the header's length field
}

// ParseOuterIP reads the Ethernet and the first IP header of a frame. It has no VLAN tags in mind: the lab has none.
func ParseOuterIP(frame []byte) (ip OuterIP, ok bool) {
	if len(frame) < 14 {
		return ip, false
	}
	ip.DstMAC, ip.SrcMAC = frame[:6], frame[6:12]
	b := frame[14:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		if len(b) < 20 {
			return ip, false
		}
		hl, total := int(b[0]&15)*4, int(binary.BigEndian.Uint16(b[2:]))
		if hl < 20 || total < hl || len(b) < total {
			return ip, false
		}
		ip.Src, ip.Dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		ip.Protocol, ip.Payload = b[9], b[hl:total]
	case unix.ETH_P_IPV6:
		if len(b) < 40 {
			return ip, false
		}
		total := 40 + int(binary.BigEndian.Uint16(b[4:]))
		if len(b) < total {
			return ip, false
		}
		ip.Src, ip.Dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		ip.Protocol, ip.Payload = b[6], b[40:total]
	default:
		return ip, false
	}
	return ip, true
}

func hostToNetwork16(v uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], v)
	return binary.NativeEndian.Uint16(b[:])
}
