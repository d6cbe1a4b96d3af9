package xdp

import (
	"errors"
	"fmt"
	"math/bits"
	"net"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// Mode is how the kernel is to move frames between the device and the memory.
type Mode uint8

// The modes.
const (
	Auto     Mode = iota // zero-copy if the driver has it, else copy
	ZeroCopy             // zero-copy or an error
	Copy                 // copy, also where zero-copy could be had
)

// DefaultRingSize is the number of entries of each ring.
const DefaultRingSize = 4096

// ethernetHeader is its length in bytes, without a VLAN tag.
const ethernetHeader = 14

// Config says how to open an interface.
type Config struct {
	Interface string

	// Pools are the workers' frame memories: queue q uses Pools[q mod len(Pools)] and belongs to that worker. Their chunks are registered
	// once for every queue that uses them, so their memory must be page-aligned (Memory.Bytes is). At most half of a pool's chunks wait
	// in its queues for frames.
	Pools []*port.Pool

	RingSize int       // entries of each ring: a power of two up to 65536; 0 is DefaultRingSize
	Mode     Mode      // Auto is the zero value
	TxBudget int       // most packets one system call of a copy-mode socket sends (Linux 6.17; 32 before): 32 to RingSize; 0 leaves the kernel's
	MTU      int       // the interface's MTU in bytes, without Ethernet header; 0 reads it
	Steering *Steering // gives received frames to the sockets; nil: the port only transmits
}

// Port is an interface driven through AF_XDP sockets, one a receive queue. It implements [port.Port].
type Port struct {
	name     string
	queues   []*Queue
	caps     port.Caps
	zeroCopy bool
	why      error
}

// Open binds a socket to every receive queue of cfg.Interface, which must be in the current network namespace, and has cfg.Steering send
// them their frames. Attach the steering first: drivers size their queues by it. It does not touch the pools' free lists, so that their workers may be running. A
// queue that is still being released by an earlier socket (EBUSY) is waited for up to two seconds. It takes CAP_NET_RAW and Linux
// 5.4; pinning the memory takes CAP_IPC_LOCK or a sufficient RLIMIT_MEMLOCK ([MemlockError]).
func Open(cfg Config) (*Port, error) {
	iface, err := net.InterfaceByName(cfg.Interface)
	if err != nil {
		return nil, fmt.Errorf("xdp: interface %q: %w", cfg.Interface, err)
	}
	if cfg.RingSize == 0 {
		cfg.RingSize = DefaultRingSize
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

	p := &Port{name: cfg.Interface}
	chunk := cfg.Pools[0].Config().ChunkSize
	attempts := bindAttempts(cfg.Mode, cfg.MTU+ethernetHeader > chunk-port.Headroom)
	var refused []error
	for q := range rx {
		s, at, errs := openFirst(&cfg, iface.Index, q, attempts)
		if s == nil {
			return nil, errors.Join(append(errs, p.Close())...)
		}
		refused = append(refused, errs...)
		attempts = attempts[at : at+1] // what the first queue got is what the others must get
		queue := newQueue(&cfg, s, q, rx)
		p.queues = append(p.queues, queue)
		if cfg.Steering != nil {
			if err := cfg.Steering.addSocket(q, s.fd); err != nil {
				return nil, errors.Join(err, p.Close())
			}
		}
	}
	p.zeroCopy = p.queues[0].zeroCopy
	p.why = errors.Join(refused...)
	p.caps = port.Caps{Chains: p.queues[0].sg, MaxFrame: p.queues[0].maxFrame, Polled: true}
	return p, nil
}

// check says everything that is wrong with the configuration.
func (c *Config) check(rx, tx int) error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("xdp: %s: "+format, append([]any{c.Interface}, args...)...))
	}
	if bits.OnesCount(uint(c.RingSize)) != 1 || c.RingSize < 64 || c.RingSize > 65536 {
		bad("rings of %d entries: want a power of two from 64 to 65536", c.RingSize)
	}
	if c.Mode > Copy {
		bad("mode %d: want Auto, ZeroCopy or Copy", c.Mode)
	}
	if c.TxBudget != 0 && (c.TxBudget < 32 || c.TxBudget > c.RingSize) {
		bad("transmit budget %d: want 0, or 32 to the ring size %d", c.TxBudget, c.RingSize)
	}
	if c.MTU < 68 || c.MTU > 65535 {
		bad("MTU %d: want 68 to 65535", c.MTU)
	}
	if rx > MaxQueues {
		bad("%d receive queues: want at most %d: reduce them with `ethtool -L`", rx, MaxQueues)
	}
	if tx < rx {
		// The kernel accepts a bind to a queue that cannot transmit and then sends nothing without saying so.
		bad("%d receive but %d transmit queues: want at least as many of these: change them with `ethtool -L`", rx, tx)
	}
	if len(c.Pools) == 0 {
		bad("no frame memory: want one pool a worker")
	}
	for i, p := range c.Pools {
		if p.Config().ChunkSize != c.Pools[0].Config().ChunkSize {
			bad("pool %d has chunks of %d bytes, pool 0 of %d: want the same", i, p.Config().ChunkSize, c.Pools[0].Config().ChunkSize)
		}
	}
	if c.Steering != nil && c.Steering.ifname != c.Interface {
		bad("the steering is attached to %s", c.Steering.ifname)
	}
	return errors.Join(errs...)
}

// Name is the interface's name.
func (p *Port) Name() string { return p.name }

// NumQueues is the number of receive queues the interface had when it was opened.
func (p *Port) NumQueues() int { return len(p.queues) }

// Queue returns queue i, a [*Queue].
func (p *Port) Queue(i int) port.Queue { return p.queues[i] }

// Caps says what the sockets take. Chains: multi-buffer (XDP_USE_SG, Linux 6.6) was needed and granted. Checksums and segmentation are never
// left to the device: a received frame could not say that its checksum is unfinished either.
func (p *Port) Caps() port.Caps { return p.caps }

// ZeroCopy reports whether the driver moves frames without a copy.
func (p *Port) ZeroCopy() bool { return p.zeroCopy }

// Granted is the rung that was reached: xdp-zerocopy or xdp-copy.
func (p *Port) Granted() string {
	if p.zeroCopy {
		return "xdp-zerocopy"
	}
	return "xdp-copy"
}

// WhyNotMore is what the kernel refused on the way to what was granted; nil if the first attempt was granted.
func (p *Port) WhyNotMore() error { return p.why }

// Lost counts, by name and over all queues, the frames that the kernel dropped on the way into or out of the sockets, where no worker saw them. A system
// call a queue; from any goroutine while the port is open. Queues whose counters cannot be read are left out.
func (p *Port) Lost() map[string]uint64 {
	lost := map[string]uint64{"socket_full": 0, "socket_invalid": 0}
	for _, q := range p.queues {
		s, err := q.Stats()
		if err != nil {
			continue
		}
		// In copy mode, RxDropped includes the frames of FillRingEmpty.
		lost["socket_full"] += max(s.RxDropped, s.FillRingEmpty) + s.RxRingFull
		lost["socket_invalid"] += s.RxInvalid + s.TxInvalid
	}
	return lost
}

// Close closes the sockets, which removes them from the steering. Frames that the kernel holds are lost with
// their pools, unless their workers call [Queue.Recover].
func (p *Port) Close() error {
	var errs []error
	for _, q := range p.queues {
		errs = append(errs, q.close())
	}
	return errors.Join(errs...)
}

// openFirst opens queue with the first of the attempts that the kernel grants, and returns which it was and what was refused before.
func openFirst(cfg *Config, ifindex, queue int, attempts []attempt) (*socket, int, []error) {
	var errs []error
	for i, a := range attempts {
		s, err := openSocket(cfg.spec(ifindex, queue), a)
		if err == nil {
			return s, i, errs
		}
		errs = append(errs, err)
		// Only what may depend on the flags is worth another attempt. Drivers refuse with whatever number they like.
		var refused *bindError
		if !errors.As(err, &refused) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENODEV) {
			return nil, 0, errs
		}
	}
	return nil, 0, errs
}
