package xdp

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// bindPatience is how long a queue is waited for that an earlier socket still holds: the kernel releases it from a work queue.
const bindPatience = 2 * time.Second

// The most buffers of one transmitted packet. Copy mode: one linear part and MAX_SKB_FRAGS (17 unless the kernel was configured otherwise)
// pages. Zero-copy: what the drivers that can do it share (I40E_MAX_BUFFER_TXD, ICE_MAX_BUF_TXD).
const (
	maxSegmentsCopy     = 17
	maxSegmentsZeroCopy = 8
)

// attempt is one set of bind flags.
type attempt struct {
	zeroCopy bool
	sg       bool // XDP_USE_SG: frames larger than a chunk
}

// String says what is attempted.
func (a attempt) String() string {
	s := "copy mode"
	if a.zeroCopy {
		s = "zero-copy (the driver decides)"
	}
	if a.sg {
		s += " with multi-buffer frames (XDP_USE_SG, Linux 6.6)"
	}
	return s
}

// bindAttempts is what to try, best first. Frames that do not fit a chunk are better copied than dropped.
func bindAttempts(mode Mode, sg bool) []attempt {
	var modes []bool
	if mode != Copy {
		modes = append(modes, true)
	}
	if mode != ZeroCopy {
		modes = append(modes, false)
	}
	var out []attempt
	if sg {
		for _, zc := range modes {
			out = append(out, attempt{zeroCopy: zc, sg: true})
		}
	}
	for _, zc := range modes {
		out = append(out, attempt{zeroCopy: zc})
	}
	return out
}

// socket is a bound AF_XDP socket with its rings mapped.
type socket struct {
	rings
	fd       int
	zeroCopy bool
	sg       bool
}

// ringSizes are the entries of a socket's four rings, powers of two.
type ringSizes struct{ fill, completion, rx, tx int }

// socketSpec says what a socket is made of.
type socketSpec struct {
	ifname     string
	ifindex    int
	queue      int
	memory     []byte // the UMEM: whole chunks, page-aligned
	chunkSize  int
	rings      ringSizes
	txBudget   int  // XDP_MAX_TX_SKB_BUDGET; 0 leaves the kernel's
	txMetadata bool // frames to send may have struct xsk_tx_metadata in front of them (txMetadataLen bytes)
}

// spec is what the socket of a queue is made of: the memory of its worker's pool.
func (c *Config) spec(ifindex, queue int) socketSpec {
	pool := c.Pools[queue%len(c.Pools)]
	pc := pool.Config()
	return socketSpec{
		ifname: c.Interface, ifindex: ifindex, queue: queue, memory: pool.Memory()[:pc.Chunks*pc.ChunkSize], chunkSize: pc.ChunkSize,
		rings: ringSizes{c.RingSize, c.RingSize, c.RingSize, c.RingSize}, txBudget: c.TxBudget,
	}
}

// openSocket makes a socket and binds it.
func openSocket(spec socketSpec, a attempt) (_ *socket, err error) {
	fd, err := unix.Socket(unix.AF_XDP, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.EAFNOSUPPORT) {
			return nil, fmt.Errorf("xdp: the kernel has no AF_XDP sockets (CONFIG_XDP_SOCKETS, Linux 4.18): %w", err)
		}
		return nil, needs("opening an AF_XDP socket", err, capNetRaw)
	}
	s := &socket{fd: fd, sg: a.sg}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()

	if err := registerUMEM(fd, spec.memory, spec.chunkSize, spec.txMetadata); err != nil {
		return nil, err
	}
	for _, ring := range [...]struct{ opt, size int }{
		{unix.XDP_UMEM_FILL_RING, spec.rings.fill}, {unix.XDP_UMEM_COMPLETION_RING, spec.rings.completion},
		{unix.XDP_RX_RING, spec.rings.rx}, {unix.XDP_TX_RING, spec.rings.tx},
	} {
		if err := unix.SetsockoptInt(fd, unix.SOL_XDP, ring.opt, ring.size); err != nil {
			return nil, fmt.Errorf("xdp: making a ring of %d entries: %w", ring.size, err)
		}
	}
	if err := s.mapRings(fd, spec.rings); err != nil {
		return nil, err
	}
	setSendBuffer(fd, spec.rings.tx*(spec.chunkSize+1024))
	if spec.txBudget != 0 {
		// Before Linux 6.17 the budget is 32 and cannot be changed: more system calls, nothing worse.
		_ = unix.SetsockoptInt(fd, unix.SOL_XDP, unix.XDP_MAX_TX_SKB_BUDGET, spec.txBudget)
	}
	if err := bind(fd, spec.ifindex, spec.queue, a); err != nil {
		return nil, &bindError{spec.ifname, spec.queue, a, err}
	}
	if s.zeroCopy, err = zeroCopyGranted(fd); err != nil {
		return nil, fmt.Errorf("xdp: asking what was granted (XDP_OPTIONS): %w", err)
	}
	return s, nil
}

// setSendBuffer lets n bytes of copied packets be in flight: more than the default, with which a full ring stalls. What the administrator
// allows (net.core.wmem_max) has to do without CAP_NET_ADMIN.
func setSendBuffer(fd, n int) {
	n = min(n, 1<<28)
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, n) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, n)
	}
}

// bind retries while the queue is busy.
func bind(fd, ifindex, queue int, a attempt) error {
	sa := &unix.SockaddrXDP{Flags: unix.XDP_USE_NEED_WAKEUP, Ifindex: uint32(ifindex), QueueID: uint32(queue)}
	if a.zeroCopy {
		sa.Flags |= unix.XDP_ZEROCOPY
	} else {
		sa.Flags |= unix.XDP_COPY
	}
	if a.sg {
		sa.Flags |= unix.XDP_USE_SG
	}
	deadline := time.Now().Add(bindPatience)
	for wait := 5 * time.Millisecond; ; wait *= 2 {
		err := unix.Bind(fd, sa)
		left := time.Until(deadline)
		if !errors.Is(err, unix.EBUSY) || left <= 0 {
			return err
		}
		time.Sleep(min(wait, left))
	}
}

// bindError is a refusal to bind.
type bindError struct {
	ifname string
	queue  int
	attempt
	err error
}

// Error implements error.
func (e *bindError) Error() string {
	hint := ""
	switch {
	case errors.Is(e.err, unix.EBUSY):
		hint = ": another AF_XDP socket holds the queue"
	case errors.Is(e.err, unix.ENETDOWN):
		hint = ": the link is down"
	case errors.Is(e.err, unix.ENODEV):
		hint = ": the interface or the queue is gone"
	}
	return fmt.Sprintf("xdp: binding to queue %d of %s in %v: %v%s", e.queue, e.ifname, e.attempt, e.err, hint)
}

// Unwrap returns what the kernel said.
func (e *bindError) Unwrap() error { return e.err }

// close closes the socket, then its rings' mappings.
func (s *socket) close() error {
	if s.fd < 0 {
		return nil
	}
	err := unix.Close(s.fd)
	s.fd = -1
	return errors.Join(err, s.unmap())
}
