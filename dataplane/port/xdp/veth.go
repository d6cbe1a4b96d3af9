package xdp

import (
	"errors"
	"fmt"
	"math/bits"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// Sizes of a pod's queues. docs/decisions has the measurements behind them.
const (
	// DefaultVethRing is how many frames of a pod wait for its worker, per queue.
	DefaultVethRing = 512
	// vethTxChunks is how many frames may be on their way to the pod's stack: two batches, since it may run on another core.
	vethTxChunks = 256
	// vethTxOffset is where a frame to send begins in its chunk: a cache line, with the metadata at its end.
	vethTxOffset = 64
)

// VethConfig says how to open the host's end of a pod's veth pair.
type VethConfig struct {
	// Interface is the end in the current network namespace; Program is attached to it, and it is up.
	Interface string
	Program   *VethProgram
	// Pools are the workers' frame memories: queue q copies into and from Pools[q mod len(Pools)] and belongs to that worker.
	Pools    []*port.Pool
	RingSize int // frames waiting to be received, per queue: a power of two from 64 to 32768; 0 is DefaultVethRing
	TxBudget int // most packets one system call sends (Linux 6.17): at least 32; 0 leaves the kernel's 32
	MTU      int // the device's, bytes without Ethernet header; it may shrink later, but not grow. 0 reads it
}

// VethPort is a pod's port over AF_XDP. It implements [port.Port].
//
// A queue has memory of its own, a UMEM of as many chunks as its rings hold, and frames are copied from it into the worker's pool
// and back. The kernel keeps 128 bytes for each chunk of a UMEM and queue: the pool as the UMEM of every pod would cost hundreds of
// megabytes, and a copy of a frame that the kernel copied a moment ago costs little beside the system call (docs/decisions). So a pod cannot
// hold frames of others either, nor see what they left behind: the kernel writes to and reads from its own chunks only.
type VethPort struct {
	name   string
	caps   port.Caps
	queues []*VethQueue
}

var _ port.Port = (*VethPort)(nil)

// OpenVeth binds a socket to every receive queue of cfg.Interface in copy mode and has cfg.Program send them their frames. It may be called while the
// pools' workers run. A queue that an earlier socket still holds (EBUSY) is waited for up to two seconds. Needs CAP_NET_RAW; memory is locked
// ([MemlockError]).
func OpenVeth(cfg VethConfig) (_ *VethPort, err error) {
	iface, err := net.InterfaceByName(cfg.Interface)
	if err != nil {
		return nil, fmt.Errorf("xdp: interface %q: %w", cfg.Interface, err)
	}
	if cfg.RingSize == 0 {
		cfg.RingSize = DefaultVethRing
	}
	if cfg.MTU == 0 {
		cfg.MTU = iface.MTU
	}
	rx, tx, err := queues(cfg.Interface)
	if err != nil {
		return nil, err
	}
	if err := cfg.check(rx, tx); err != nil {
		return nil, err
	}
	p := &VethPort{name: cfg.Interface}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
		}
	}()
	chunk, sg := vethChunk(cfg.MTU)
	metadata := true
	for q := range rx {
		queue, err := openVethQueue(&cfg, iface.Index, q, chunk, attempt{sg: sg}, metadata)
		if errors.Is(err, unix.EINVAL) && metadata && q == 0 {
			metadata = false // Linux before 6.11
			queue, err = openVethQueue(&cfg, iface.Index, q, chunk, attempt{sg: sg}, metadata)
		}
		if errors.Is(err, unix.EINVAL) && sg {
			most := vethChunkMax - XDPHeadroom - ethernetHeader
			return nil, fmt.Errorf("%w: an MTU above %d takes frames of several buffers in AF_XDP (Linux 6.6); lower the MTU or use a port of kind tap", err, most)
		}
		if err != nil {
			return nil, err
		}
		p.queues = append(p.queues, queue)
		if err := cfg.Program.addSocket(q, queue.fd); err != nil {
			return nil, err
		}
	}
	p.caps = port.Caps{Checksum: metadata, Chains: true, MaxFrame: p.queues[0].maxFrame}
	return p, nil
}

// XDPHeadroom is what XDP leaves free in front of a received frame (XDP_PACKET_HEADROOM), bytes.
const XDPHeadroom = 256

const vethChunkMax = 4096

// vethChunk is the size of a chunk for an MTU, and whether frames need several.
func vethChunk(mtu int) (size int, sg bool) {
	frame := mtu + ethernetHeader
	for size = 2048; size < vethChunkMax && frame > size-XDPHeadroom; {
		size *= 2
	}
	return size, frame > size-XDPHeadroom
}

// check says everything that is wrong with the configuration.
func (c *VethConfig) check(rx, tx int) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("xdp: %s: "+format, append([]any{c.Interface}, args...)...))
	}
	if bits.OnesCount(uint(c.RingSize)) != 1 || c.RingSize < 64 || c.RingSize > 32768 {
		bad("rings of %d entries: want a power of two from 64 to 32768", c.RingSize)
	}
	if c.TxBudget != 0 && c.TxBudget < 32 {
		bad("transmit budget %d: want 0 or at least 32", c.TxBudget)
	}
	if c.Program == nil {
		bad("no program to give received frames to the sockets")
	} else if most := c.Program.MaxMTU(); c.MTU < 68 || c.MTU > most {
		bad("MTU %d: want 68 to %d; more takes xdp.frags (Linux 5.18), or a port of kind tap", c.MTU, most)
	}
	if tx < rx {
		bad("%d receive but %d transmit queues: want at least as many of these", rx, tx)
	}
	if rx > MaxQueues {
		bad("%d receive queues: want at most %d", rx, MaxQueues)
	}
	if len(c.Pools) == 0 {
		bad("no frame memory: want one pool a worker")
	}
	return errors.Join(errs...)
}

// openVethQueue opens one queue.
func openVethQueue(cfg *VethConfig, ifindex, index, chunk int, a attempt, metadata bool) (*VethQueue, error) {
	chunks := cfg.RingSize + vethTxChunks
	page := os.Getpagesize()
	memory, err := unix.Mmap(-1, 0, (chunks*chunk+page-1)/page*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("xdp: %s: memory for %d frames: %w", cfg.Interface, chunks, err)
	}
	s, err := openSocket(socketSpec{
		ifname: cfg.Interface, ifindex: ifindex, queue: index, memory: memory, chunkSize: chunk,
		rings:    ringSizes{fill: cfg.RingSize, completion: vethTxChunks, rx: cfg.RingSize, tx: vethTxChunks},
		txBudget: min(cfg.TxBudget, vethTxChunks), txMetadata: metadata,
	}, a)
	if err != nil {
		return nil, errors.Join(err, unix.Munmap(memory))
	}
	return newVethQueue(cfg, s, memory, chunk, cfg.Pools[index%len(cfg.Pools)], metadata), nil
}

// Name is the name of the host's end.
func (p *VethPort) Name() string { return p.name }

// NumQueues is the number of receive queues the device had when it was opened.
func (p *VethPort) NumQueues() int { return len(p.queues) }

// Queue returns queue i, a [*VethQueue].
func (p *VethPort) Queue(i int) port.Queue { return p.queues[i] }

// Caps says what the pod's stack takes: unfinished checksums where the kernel has TX metadata (Linux 6.11); no GSO frames, which AF_XDP cannot carry.
func (p *VethPort) Caps() port.Caps { return p.caps }

// Dead reports whether the device was deleted under the sockets. A dead port stays dead: close it.
func (p *VethPort) Dead() bool {
	for _, q := range p.queues {
		if q.isDead() {
			return true
		}
	}
	return false
}

// Close closes the sockets, which takes them out of the program, and gives their memory back. What the pod sends dies from then on. Only
// after every worker dropped the queues.
func (p *VethPort) Close() error {
	var errs []error
	for _, q := range p.queues {
		errs = append(errs, q.close())
	}
	return errors.Join(errs...)
}

// isDead asks the kernel whether the device was unregistered: xsk_notifier in net/xdp/xsk.c sets the socket's error, which is told once. Any goroutine.
func (q *VethQueue) isDead() bool {
	if q.dead.Load() {
		return true
	}
	if errno, err := unix.GetsockoptInt(q.fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && errno == int(unix.ENETDOWN) {
		q.dead.Store(true)
		return true
	}
	return false
}
