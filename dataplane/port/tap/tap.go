// Package tap drives Ethernet devices of the kernel's TUN/TAP driver: pod ports, the host port, the fallback uplink.
//
// A device has one queue per worker, each with a descriptor of its own; a packet is one read or one write of that descriptor:
//
//	pod's stack -> device -> read(virtio-net header, chunk, large buffer) -> Frame + Offload, or a chain of two frames
//	Frame or chain + Offload -> write(virtio-net header, bytes...) -> device -> pod's stack
//
// The virtio-net header says what is unfinished about a packet, so a TCP or UDP train of up to 64 KiB crosses whole, its checksum never
// computed. What comes out of a pod is hostile: headers are copied as they are and checked by packet.CheckOffload. Nothing here blocks
// or allocates per packet; all calls on descriptors are raw system calls on non-blocking files.
//
// A device may also be plain ([Config.Plain]), without that header; it is then opened by github.com/songgao/water and costs a read or a write
// for every MTU-sized packet.
//
// Devices are always made with IFF_MULTI_QUEUE, even with one queue, because a device can only be re-opened in the mode that it was made in and
// the next daemon may have more workers. The header is the 10 bytes of struct virtio_net_hdr (no num_buffers, which a TAP does not
// use), little-endian whatever the machine. See drivers/net/tun.c and include/uapi/linux/{if_tun,virtio_net}.h.
package tap

import (
	"errors"

	"github.com/overplane/overplane/dataplane/port"
)

// Config says what a device is. Name and Pools are required.
type Config struct {
	// Name of the interface, at most 15 bytes, without '/', ':', '%' and white space.
	Name string
	// Pools is the frame memory: queue i allocates from and frees to Pools[i % len(Pools)], and belongs to that pool's worker.
	Pools []*port.Pool
	// Queues is how many queues to open, 1 to MaxQueues; 0 means one for each pool.
	Queues int
	// Persist makes the device outlive its descriptors, so that the next daemon can re-open it. Reopen ignores it.
	Persist bool
	// Plain does without the virtio-net header, for hosts that refuse it: packets are then single, their checksums finished, none longer than the MTU. The kernel
	// segments what is sent to the device.
	Plain bool
	// SendBuffer bounds the bytes that were written but not yet taken by the receiving stack, for each queue; 0 means
	// DefaultSendBuffer. Beyond it Transmit answers TxFull.
	SendBuffer int
	// OnDead, if not nil, is called once, on a goroutine of its own, when a worker found that the device was deleted under it.
	OnDead func()
}

// Limits and defaults.
const (
	// MaxQueues is the kernel's limit (MAX_TAP_QUEUES).
	MaxQueues = 256
	// DefaultSendBuffer is some hundred full-size packets, or 64 trains.
	DefaultSendBuffer = 4 << 20
	// MaxFrame is the longest frame that Transmit takes: an IP packet of 65,535 bytes behind an Ethernet header.
	MaxFrame = 65535 + 14
)

// What Create and Reopen can fail by. They come wrapped in sentences that say what to do; test with errors.Is.
var (
	ErrNoTUN      = errors.New("no TUN/TAP driver")
	ErrPermission = errors.New("not permitted")
	ErrExists     = errors.New("device exists")
	ErrNotExist   = errors.New("no such device")
	ErrBusy       = errors.New("device is busy")
	ErrHeader     = errors.New("no virtio-net header (Linux 2.6.27)")
	ErrMode       = errors.New("device was made in another mode")
)
