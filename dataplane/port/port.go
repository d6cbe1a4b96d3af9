// Package port is what frames enter and leave the data plane by: the uplink, the pods, the host.
//
// A [Port] is a device with one or more queues. Queue q belongs to worker q mod workers and nobody else touches it, so nothing here takes
// a lock. Bytes live in the [Pool] of the worker; a [Frame] is a small descriptor without pointers that says where. Frames move like this:
//
//	Queue.Receive     device -> worker: the worker owns the frames it was given
//	Queue.Transmit    worker -> device: the queue owns the frames it took, and gives their memory back to the pool when the device is done
//	Pool.Free         worker: the frame died
//
// A packet is one frame, or a chain: consecutive frames of a slice of which all but the last carry [More]. The first holds every header,
// the others continue its payload. A chain is a GSO frame read from a TAP, a multi-buffer frame of AF_XDP, or a train of
// coalesced segments about to be written to a TAP.
//
// The package imports the standard library only. Concrete ports are its sub-packages and are injected into package dataplane.
package port

// Port is one device. Its methods other than Close may be called from any goroutine; Close only after every worker has
// dropped the port's queues (see dataplane.Dataplane.Quiesce).
type Port interface {
	// Name is the device's name, for people.
	Name() string
	// NumQueues is fixed for the life of the port.
	NumQueues() int
	// Queue returns queue i, 0 <= i < NumQueues. The same value each time.
	Queue(i int) Queue
	// Caps says what the device takes unfinished. Fixed for the life of the port.
	Caps() Caps
	// Close releases the device's descriptors. Frames still owned by the device are lost with the pool, not returned.
	Close() error
}

// Caps is what a device accepts on transmit; all it does not accept is done by the worker before.
type Caps struct {
	Checksum bool // takes frames whose L4 checksum is unfinished (Offload.Flags has NeedsChecksum)
	TSO4     bool // takes TCP over IPv4 GSO frames
	TSO6     bool // takes TCP over IPv6 GSO frames
	USO      bool // takes UDP GSO frames (both families), kernel 6.2+
	Chains   bool // takes chains that are no GSO frames (multi-buffer)
	MaxFrame int  // most bytes of one packet with its Ethernet header, chains included
	Polled   bool // Receive costs no system call when nothing is there: call it on every poll, without asking epoll
}

// Queue is one worker's end of a port. Only the owning worker's goroutine calls its methods.
type Queue interface {
	// Receive stores up to len(frames) frames and returns how many. Chains are never cut: a packet of several frames is
	// returned whole or left for the next call (len(frames) is at least MaxChain). The caller owns them.
	Receive(frames []Frame) int

	// Transmit sends packets from the front of frames. It returns how many frames it took (whole packets only) and why it stopped:
	// TxOK means all were taken. frames[n:] stay the caller's. Like write(2), it never blocks.
	Transmit(frames []Frame) (n int, status TxStatus)

	// FD is the descriptor to wait on for received frames (epoll, level-triggered), or -1 if there is none.
	FD() int
}

// Flusher is implemented by queues that need a kick once a batch: the worker calls Flush after the last Transmit of a poll, and on every
// further poll while it reports that frames are outstanding.
type Flusher interface {
	Flush() (outstanding bool)
}

// MaxChain is the most frames one packet may consist of.
const MaxChain = 64

// TxStatus is why Transmit stopped.
type TxStatus uint8

const (
	TxOK       TxStatus = iota // everything was taken
	TxFull                     // the device has no room now
	TxDown                     // the device is down or gone
	TxRejected                 // the device refuses the packet at frames[n]; those behind it may be fine
)

// Frame says where a frame's bytes are in its worker's pool, and what is unfinished about them. It has no pointers, so that storing
// one costs no write barrier. The zero Frame is no frame.
type Frame struct {
	Off     uint32 // first byte, counted from the start of the pool's memory
	Len     uint32 // bytes
	Flags   FrameFlags
	Offload Offload // valid on the first frame of a packet
}

// FrameFlags are the properties of one frame.
type FrameFlags uint16

// More says that the next frame of the slice continues this packet.
const More FrameFlags = 1 << 0

// Offload is a packet's virtio-net metadata (struct virtio_net_hdr of the VIRTIO specification 1.2, section 5.1.6, in host byte order).
// The zero value is a plain packet whose checksums are what they are. From pods it is hostile input until packet.CheckOffload passed it.
type Offload struct {
	Flags          uint8  // NeedsChecksum, DataValid
	GSO            uint8  // GSONone, GSOTCP4, GSOTCP6, GSOUDP, perhaps with GSOECN
	HeaderLen      uint16 // Ethernet, IP and L4 header bytes; a hint, never trusted
	SegmentSize    uint16 // L4 payload bytes of each segment
	ChecksumStart  uint16 // where summing starts, from the first byte of the frame
	ChecksumOffset uint16 // where the sum goes, from ChecksumStart
}

// IsZero reports whether it is the zero value. Comparing with that takes the compiler a branch for each field.
func (o *Offload) IsZero() bool {
	return uint16(o.Flags|o.GSO)|o.HeaderLen|o.SegmentSize|o.ChecksumStart|o.ChecksumOffset == 0
}

// Values of Offload.Flags and Offload.GSO, as in linux/virtio_net.h.
const (
	NeedsChecksum uint8 = 1
	DataValid     uint8 = 2

	GSONone uint8 = 0
	GSOTCP4 uint8 = 1
	GSOTCP6 uint8 = 4
	GSOUDP  uint8 = 5 // VIRTIO_NET_HDR_GSO_UDP_L4
	GSOECN  uint8 = 0x80
)

// PacketFrames returns how many frames the packet at the front of frames consists of. frames is not empty; a chain whose
// end is missing counts as ending with the slice.
func PacketFrames(frames []Frame) int {
	for i := range frames {
		if frames[i].Flags&More == 0 {
			return i + 1
		}
	}
	return len(frames)
}

// PacketLen returns the bytes of the packet at the front of frames, and how many frames it consists of.
func PacketLen(frames []Frame) (bytes, n int) {
	for i := range frames {
		bytes += int(frames[i].Len)
		if frames[i].Flags&More == 0 {
			return bytes, i + 1
		}
	}
	return bytes, len(frames)
}
