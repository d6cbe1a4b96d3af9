package snat

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	crand "crypto/rand"

	"github.com/overplane/overplane/dataplane/packet"
)

// Class is a space of external ports of its own: TCP's, UDP's, and the identifiers of ICMP and ICMPv6 echo. Both families use the same
// leases, each with ports of its own.
type Class uint8

// The classes.
const (
	ClassTCP Class = iota
	ClassUDP
	ClassICMP
	NumClasses
)

// String is the class's name.
func (c Class) String() string { return [...]string{"tcp", "udp", "icmp"}[c] }

// ClassOf is the class of an L4 protocol's ports; false for protocols whose ports are not translated.
func ClassOf(proto uint8) (Class, bool) {
	switch proto {
	case packet.ProtoTCP:
		return ClassTCP, true
	case packet.ProtoUDP:
		return ClassUDP, true
	case packet.ProtoICMP, packet.ProtoICMPv6:
		return ClassICMP, true
	}
	return 0, false
}

// AllocatorConfig says what is to be divided among how many. Zero fields mean the defaults given.
type AllocatorConfig struct {
	First, Last uint16 // of the ports and identifiers used outside: 10000 to 29999
	Workers     int    // 1
	MaxPods     int    // pods that may be attached at once; their indices are below it: 250
	ChunkIdle   int64  // nanoseconds an unused chunk stays with its pod: 120 s
}

// Allocator leases the node's external ports, in chunks, to the pods of each worker's translator. A chunk belongs to one worker and one pod
// at a time: who used a port is answered from the chunks alone (RFC 7422 calls for no more to be logged), in both mappings.
//
// The size of a chunk is a power of two, such that half of the chunks are enough for each pod to have one of each class on each worker: that much is
// guaranteed to it. Over the others the rule of share decides.
//
// Leases are made and returned under a mutex, once for many sessions; Owner, Ours and HostPort take no lock and may be called by
// any goroutine.
type Allocator struct {
	cfg    AllocatorConfig
	shift  uint
	chunks int // of each class

	owners [NumClasses][]atomic.Uint32 // 0: free; else (worker+1) << 16 | pod
	host   [256][]atomic.Uint32        // by protocol: bitmap of ports bound by the node's sockets; nil for those that have none
	hostV  atomic.Uint32               // counts changes of host
	pins   pinFilter
	short  atomic.Uint32 // last tick in which somebody was refused: unused chunks are to be returned at once

	mu     sync.Mutex
	rand   *rand.ChaCha8
	rest   [NumClasses][]uint32 // tick until which a free chunk rests
	share  [NumClasses]share
	held   [NumClasses][]uint32 // chunks by pod
	users  []int                // workers a pod is attached to
	onLog  func(Lease)
	leases uint64

	// portRest holds, by port, the tick until which it rests, plus 1. Only the holder of the port's chunk touches it; a lease hands it on.
	portRest [NumClasses][]uint32
}

// Lease is one block of ports given to or taken from a pod, for the log.
type Lease struct {
	Class       Class
	First, Last uint16
	Worker, Pod int
	Returned    bool
}

// NewAllocator makes the allocator of a node. All its translators share it.
func NewAllocator(cfg AllocatorConfig) (*Allocator, error) {
	if cfg.First == 0 && cfg.Last == 0 {
		cfg.First, cfg.Last = 10000, 29999
	}
	if cfg.Workers == 0 {
		cfg.Workers = 1
	}
	if cfg.MaxPods == 0 {
		cfg.MaxPods = 250
	}
	if cfg.ChunkIdle == 0 {
		cfg.ChunkIdle = 120e9
	}
	ports := int(cfg.Last) - int(cfg.First) + 1
	if cfg.First < 1 || ports < 1 || cfg.Workers < 1 || cfg.Workers > 256 || cfg.MaxPods < 1 || cfg.MaxPods > 4096 {
		return nil, fmt.Errorf("snat: ports %d-%d, %d workers, %d pods: want a range of ports, 1 to 256 workers, 1 to 4096 pods", cfg.First, cfg.Last,
			cfg.Workers, cfg.MaxPods)
	}
	size := min(64, ports/(2*cfg.Workers*cfg.MaxPods))
	if size < 1 {
		size = 1
	}
	a := &Allocator{cfg: cfg, shift: uint(bits.Len(uint(size)) - 1), rand: newRand(), users: make([]int, cfg.MaxPods)}
	a.chunks = ports >> a.shift
	seeds := newSeeds()
	a.pins.seed = [2]uint64(seeds[:2])
	for c := range NumClasses {
		a.owners[c] = make([]atomic.Uint32, a.chunks)
		a.rest[c] = make([]uint32, a.chunks)
		a.held[c] = make([]uint32, cfg.MaxPods)
		a.portRest[c] = make([]uint32, a.chunks<<a.shift)
		a.share[c] = share{capacity: a.chunks, guarantee: min(cfg.Workers, max(1, a.chunks/(2*cfg.MaxPods)))}
	}
	for _, p := range []uint8{packet.ProtoTCP, packet.ProtoUDP, packet.ProtoSCTP} {
		a.host[p] = make([]atomic.Uint32, 1<<16/32)
	}
	return a, nil
}

// newRand is a generator whose output nobody can predict (RFC 6056, RFC 4086).
func newRand() *rand.ChaCha8 {
	var seed [32]byte
	crand.Read(seed[:]) // never fails
	return rand.NewChaCha8(seed)
}

// newSeeds are the secrets of a table's hash.
func newSeeds() (s [4]uint64) {
	var b [32]byte
	crand.Read(b[:])
	for i := range s {
		s[i] = binary.NativeEndian.Uint64(b[i*8:])
	}
	return s
}

// Config is the configuration with its defaults filled in.
func (a *Allocator) Config() AllocatorConfig { return a.cfg }

// ChunkSize is how many ports a chunk has.
func (a *Allocator) ChunkSize() int { return 1 << a.shift }

// OnLease has f called for every chunk leased and returned, under the allocator's lock: it must be quick and must not call back. nil: nobody listens.
// To be called before there are translators.
func (a *Allocator) OnLease(f func(Lease)) { a.onLog = f }

// Owner is the worker and the pod that hold an external port; ok is false if nobody does. Any goroutine.
func (a *Allocator) Owner(class Class, port uint16) (worker, pod int, ok bool) {
	i := (int(port) - int(a.cfg.First)) >> a.shift
	if port < a.cfg.First || i >= a.chunks {
		return 0, 0, false
	}
	o := a.owners[class][i].Load()
	return int(o>>16) - 1, int(o & 0xffff), o != 0
}

// InRange reports whether the port lies in the range used outside. Any goroutine.
func (a *Allocator) InRange(port uint16) bool {
	return port >= a.cfg.First && int(port-a.cfg.First)>>a.shift < a.chunks
}

// Ours reports whether packets to the node's address and this port are the translator's business, with or without a session: the port is
// in the range and no socket of the node holds it. False for protocols without translated ports. Any goroutine.
func (a *Allocator) Ours(proto uint8, port uint16) bool {
	_, ok := ClassOf(proto)
	return ok && a.InRange(port) && !a.HostPort(proto, port)
}

// HostPort reports whether a socket of the node holds the port. Any goroutine.
func (a *Allocator) HostPort(proto uint8, port uint16) bool {
	b := a.host[proto]
	return b != nil && b[port>>5].Load()>>(port&31)&1 != 0
}

// SetHostPorts replaces the set of ports that the node's own sockets hold, for TCP, UDP or SCTP; other protocols have none. From now on no new session
// gets one of them. The host comes first: packets from outside to such a port are the host's at once, and sessions that use
// it are ended by their translators' next calls of Expire, which count them as HostPort. Any goroutine.
func (a *Allocator) SetHostPorts(proto uint8, ports []uint16) {
	b := a.host[proto]
	if b == nil {
		return
	}
	var next [1 << 16 / 32]uint32
	for _, p := range ports {
		next[p>>5] |= 1 << (p & 31)
	}
	taken := false
	a.mu.Lock()
	for i := range next {
		taken = taken || next[i]&^b[i].Load() != 0
		b[i].Store(next[i])
	}
	a.mu.Unlock()
	if taken {
		a.hostV.Add(1)
	}
}

// attach promises a pod its guarantee. The pod may be attached to several workers; the promise is one.
func (a *Allocator) attach(pod int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.users[pod]++; a.users[pod] == 1 {
		for c := range a.share {
			a.share[c].attach(a.held[c][pod])
		}
	}
}

func (a *Allocator) detach(pod int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.users[pod]--; a.users[pod] == 0 {
		for c := range a.share {
			a.share[c].detach(a.held[c][pod])
		}
	}
}

// lease gives a pod chunks, appended to list: one, and as many more, up to want, as leave three quarters of what is free to others. The list
// is returned unchanged if there is none to be had.
func (a *Allocator) lease(list []uint16, class Class, worker, pod int, now uint32, want int) []uint16 {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.share[class]
	pods := 0
	for _, n := range a.users {
		if n > 0 {
			pods++
		}
	}
	want = max(1, min(want, (s.capacity-s.used-s.unmet)/(4*max(1, pods))))
	for range want {
		if !s.allows(a.held[class][pod]) {
			break
		}
		c := a.pick(class, now)
		if c < 0 {
			break
		}
		a.grant(class, c, worker, pod)
		list = append(list, uint16(c))
		want--
	}
	if want > 0 {
		a.short.Store(now)
	}
	return list
}

// pick is a free chunk with a usable port, at random, or -1.
func (a *Allocator) pick(class Class, now uint32) int {
	start := int(a.rand.Uint64() % uint64(a.chunks))
	for i := range a.chunks {
		c := start + i
		if c >= a.chunks {
			c -= a.chunks
		}
		if a.owners[class][c].Load() == 0 && int32(a.rest[class][c]-now) <= 0 && a.usable(class, c) {
			return c
		}
	}
	return -1
}

// leaseOf leases the chunk that a port lies in, if it is free. It reports whether the pod holds it now.
func (a *Allocator) leaseOf(class Class, port uint16, worker, pod int, now uint32) bool {
	c := int(port-a.cfg.First) >> a.shift
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.owners[class][c].Load() != 0 || int32(a.rest[class][c]-now) > 0 || !a.share[class].allows(a.held[class][pod]) {
		return false
	}
	a.grant(class, c, worker, pod)
	return true
}

func (a *Allocator) grant(class Class, c, worker, pod int) {
	a.owners[class][c].Store(uint32(worker+1)<<16 | uint32(pod))
	a.share[class].add(&a.held[class][pod])
	a.leases++
	a.log(class, c, worker, pod, false)
}

// adopt takes a chunk for sessions that exist already. It reports false if it is somebody else's.
func (a *Allocator) adopt(class Class, c, worker, pod int) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.owners[class][c].Load() != 0 {
		return false
	}
	a.grant(class, c, worker, pod)
	return true
}

// giveBack returns a chunk, which rests until the given tick.
func (a *Allocator) giveBack(class Class, c, worker, pod int, rest uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.owners[class][c].Store(0)
	a.rest[class][c] = rest
	a.share[class].sub(&a.held[class][pod])
	a.log(class, c, worker, pod, true)
}

func (a *Allocator) log(class Class, c, worker, pod int, returned bool) {
	if a.onLog != nil {
		first := a.cfg.First + uint16(c<<a.shift)
		a.onLog(Lease{Class: class, First: first, Last: first + 1<<a.shift - 1, Worker: worker, Pod: pod, Returned: returned})
	}
}

// usable reports whether a chunk has a port that the node's sockets leave.
func (a *Allocator) usable(class Class, c int) bool {
	first := a.cfg.First + uint16(c<<a.shift)
	for i := range uint16(1) << a.shift {
		if !a.excluded(class, first+i) {
			return true
		}
	}
	return false
}

// excluded reports whether the port is the host's.
func (a *Allocator) excluded(class Class, port uint16) bool {
	switch class {
	case ClassTCP:
		return a.HostPort(packet.ProtoTCP, port)
	case ClassUDP:
		return a.HostPort(packet.ProtoUDP, port)
	}
	return false
}

// Usage is how the ports of a class stand.
type Usage struct {
	Ports, Leased int   // in all and held by pods
	PerPod        []int // held, by pod index
	Limit         []int // that the pod may hold in all, by pod index; 0 for pods that are not attached
}

// Usage is a copy of how the ports of a class stand. Any goroutine.
func (a *Allocator) Usage(class Class) Usage {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &a.share[class]
	u := Usage{Ports: a.chunks << a.shift, Leased: s.used << a.shift, PerPod: make([]int, a.cfg.MaxPods), Limit: make([]int, a.cfg.MaxPods)}
	for pod, n := range a.held[class] {
		u.PerPod[pod] = int(n) << a.shift
		if a.users[pod] > 0 {
			u.Limit[pod] = s.limit() << a.shift
		}
	}
	return u
}
