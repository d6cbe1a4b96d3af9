package xdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// STEER_FLAG_ROUTED, STEER_FLAG_TRANSLATE and STEER_FLAG_OUTSIDE.
const (
	flagRouted    = 1
	flagTranslate = 2
	flagOutside   = 4
)

// portWords is the number of entries of the bitmaps of ports: TCP's and UDP's.
const portWords = 2 * 65536 / 64

// flipPause is how long an entry of the configuration that was just replaced is left alone: longer than any program that may still
// read it runs.
const flipPause = 10 * time.Millisecond

// counterNames are the counters of enum steer_counter, in its order.
var counterNames = [...]string{"redirected", "passed", "passed_other_mac", "dropped_not_member", "dropped_no_socket", "dropped_stale"}

// loadConfig reads the configuration that is active in the maps: the zero one if they are new.
func (s *Steering) loadConfig() error {
	zero := uint32(0)
	if err := s.maps[bpf.SteerMapActive].Lookup(&zero, &s.active); err != nil {
		return fmt.Errorf("xdp: steering: reading the configuration: %w", err)
	}
	s.active &= 1
	if err := s.maps[bpf.SteerMapConfig].Lookup(&s.active, &s.cfg); err != nil {
		return fmt.Errorf("xdp: steering: reading the configuration: %w", err)
	}
	return nil
}

// storeConfig makes s.cfg the active configuration, as a whole.
func (s *Steering) storeConfig() error {
	if rest := flipPause - time.Since(s.flipped); rest > 0 {
		time.Sleep(rest)
	}
	table, err := s.table(bpf.SteerMapConfig)
	if err != nil {
		return err
	}
	zero, next := uint32(0), s.active^1
	if err := table.Put(&next, &s.cfg); err != nil {
		return fmt.Errorf("xdp: steering: writing the configuration: %w", err)
	}
	if err := s.maps[bpf.SteerMapActive].Put(&zero, &next); err != nil {
		return fmt.Errorf("xdp: steering: writing the configuration: %w", err)
	}
	s.active, s.flipped = next, time.Now()
	return nil
}

// change edits a copy of the configuration and stores it; a refused edit leaves all as it was.
func (s *Steering) change(edit func(*bpf.SteerSteerConfig) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.cfg
	err := edit(&s.cfg)
	if err == nil && s.cfg != old {
		err = s.storeConfig()
	}
	if err != nil {
		s.cfg = old
	}
	return err
}

// SetPodCIDRs says which addresses are pods': frames to or from them are ours. At most MaxPodCIDRs of each family; host bits are masked
// off. All of them change at once.
func (s *Steering) SetPodCIDRs(cidrs []netip.Prefix) error {
	return s.change(func(cfg *bpf.SteerSteerConfig) error { return setPrefixes(cfg, cidrs) })
}

func setPrefixes(cfg *bpf.SteerSteerConfig, cidrs []netip.Prefix) error {
	var n4, n6 int
	cfg.Prefix4, cfg.Prefix6 = [MaxPodCIDRs]bpf.SteerSteerPrefix4{}, [MaxPodCIDRs]bpf.SteerSteerPrefix6{}
	for _, c := range cidrs {
		if !c.IsValid() || c.Addr().Is4In6() {
			return fmt.Errorf("xdp: steering: pod CIDR %v: want an IPv4 or IPv6 prefix", c)
		}
		n := &n6
		if c.Addr().Is4() {
			n = &n4
		}
		if *n == MaxPodCIDRs {
			return fmt.Errorf("xdp: steering: pod CIDR %v is one too many: want at most %d of a family", c, MaxPodCIDRs)
		}
		// The program compares words as they lie in the header, hence the native order of network-order bytes.
		if c.Addr().Is4() {
			a, mask := c.Masked().Addr().As4(), mask(c.Bits(), 4)
			cfg.Prefix4[*n].Addr = binary.NativeEndian.Uint32(a[:])
			cfg.Prefix4[*n].Mask = binary.NativeEndian.Uint32(mask[:])
		} else {
			a, mask := c.Masked().Addr().As16(), mask(c.Bits(), 16)
			for w := range 2 {
				cfg.Prefix6[*n].Addr[w] = binary.NativeEndian.Uint64(a[8*w:])
				cfg.Prefix6[*n].Mask[w] = binary.NativeEndian.Uint64(mask[8*w:])
			}
		}
		*n++
	}
	cfg.Prefixes4, cfg.Prefixes6 = uint32(n4), uint32(n6)
	return nil
}

// mask is the network mask of a prefix length in the first size bytes, network order.
func mask(bits, size int) (m [16]byte) {
	for i := range size {
		m[i] = byte(uint16(0xff00) >> min(max(bits-8*i, 0), 8))
	}
	return m
}

// Translation says which packets for the node's own addresses may be replies to translated ones.
type Translation struct {
	Node4, Node6 netip.Addr // invalid: none
	// First and Last are the range of ports and identifiers used outside, both included.
	First, Last uint16
	// HostTCP and HostUDP are ports in the range that the node's own sockets hold: packets to them pass.
	HostTCP, HostUDP []uint16
}

// SetTranslation gives the data plane what is for the node's addresses and a port of the range, and, to be found out and given back through the host port if need
// be (AttachHost), echo replies of the range, ICMP errors and fragments. Zero: nothing of that.
func (s *Steering) SetTranslation(t Translation) error {
	var bits [portWords]uint64
	on := t.Node4.IsValid() || t.Node6.IsValid()
	if on {
		for p := int(t.First); p <= int(t.Last); p++ {
			bits[p/64] |= 1 << (p % 64)
			bits[portWords/2+p/64] |= 1 << (p % 64)
		}
		for _, p := range t.HostTCP {
			bits[p/64] &^= 1 << (p % 64)
		}
		for _, p := range t.HostUDP {
			bits[portWords/2+p/64] &^= 1 << (p % 64)
		}
	}
	if err := s.setPorts(&bits); err != nil {
		return err
	}
	return s.change(func(cfg *bpf.SteerSteerConfig) error {
		cfg.Flags &^= flagTranslate
		cfg.Node4, cfg.Node6, cfg.EchoFirst, cfg.EchoLast = 0, [2]uint64{}, t.First, t.Last
		if on {
			cfg.Flags |= flagTranslate
		}
		if t.Node4.IsValid() {
			a := t.Node4.As4()
			cfg.Node4 = binary.NativeEndian.Uint32(a[:])
		}
		if t.Node6.IsValid() {
			a := t.Node6.As16()
			cfg.Node6 = [2]uint64{binary.NativeEndian.Uint64(a[:]), binary.NativeEndian.Uint64(a[8:])}
		}
		return nil
	})
}

// setPorts writes the words of the bitmaps that differ. Each is one aligned word, which a running program sees whole.
func (s *Steering) setPorts(bits *[portWords]uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	table, err := s.table(bpf.SteerMapPorts)
	if err != nil {
		return err
	}
	known := s.ports
	if known == nil {
		known = new([portWords]uint64)
		for i := range known {
			if err := table.Lookup(uint32(i), &known[i]); err != nil {
				return fmt.Errorf("xdp: steering: reading the ports: %w", err)
			}
		}
		s.ports = known
	}
	for i, want := range bits {
		if want == known[i] {
			continue
		}
		if err := table.Put(uint32(i), want); err != nil {
			return fmt.Errorf("xdp: steering: writing the ports: %w", err)
		}
		known[i] = want
	}
	return nil
}

// SetUplinkMAC says which destination address our frames carry. AttachSteering sets it to the interface's; call it when that changes.
func (s *Steering) SetUplinkMAC(mac [6]byte) error {
	return s.change(func(cfg *bpf.SteerSteerConfig) error { copy(cfg.UplinkMac[:], mac[:]); return nil })
}

// SetOutside says whether the gateway (SetGatewayMAC) may send pods packets from addresses that are no pods', whatever the underlay.
func (s *Steering) SetOutside(on bool) error {
	return s.change(func(cfg *bpf.SteerSteerConfig) error {
		if cfg.Flags &^= flagOutside; on {
			cfg.Flags |= flagOutside
		}
		return nil
	})
}

// SetGatewayMAC says whose frames for pods are accepted on a routed underlay, and with SetOutside. The zero address accepts none.
func (s *Steering) SetGatewayMAC(mac [6]byte) error {
	return s.change(func(cfg *bpf.SteerSteerConfig) error { copy(cfg.GatewayMac[:], mac[:]); return nil })
}

// SetHeartbeatLimit says how long a worker may be silent before its frames are dropped. 0 or less: for ever.
func (s *Steering) SetHeartbeatLimit(limit time.Duration) error {
	return s.change(func(cfg *bpf.SteerSteerConfig) error { cfg.HeartbeatLimitNs = uint64(max(limit, 0)); return nil })
}

// SetMembers says whose frames for pods are accepted: the Ethernet addresses of the cluster's nodes. The table becomes exactly that set;
// new members are added before old ones go, so that none that stays is missing in between. At most MaxMembers.
func (s *Steering) SetMembers(macs [][6]byte) error {
	if len(macs) > MaxMembers {
		return fmt.Errorf("xdp: steering: %d members: want at most %d", len(macs), MaxMembers)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	table, err := s.table(bpf.SteerMapMembers)
	if err != nil {
		return err
	}
	have := map[bpf.SteerSteerMac]bool{}
	var key bpf.SteerSteerMac
	var value uint32
	it := table.Iterate()
	for it.Next(&key, &value) {
		have[key] = true
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("xdp: steering: reading the members: %w", err)
	}
	want := make(map[bpf.SteerSteerMac]bool, len(macs))
	for _, mac := range macs {
		key := bpf.SteerSteerMac{}
		copy(key.Addr[:], mac[:])
		if want[key] = true; have[key] {
			continue
		}
		if err := table.Put(&key, uint32(1)); err != nil {
			return fmt.Errorf("xdp: steering: adding member %x: %w", mac, err)
		}
		have[key] = true
	}
	var errs []error
	for key := range have {
		if want[key] {
			continue
		}
		if err := table.Delete(&key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			errs = append(errs, fmt.Errorf("xdp: steering: removing member %x: %w", key.Addr[:6], err))
		}
	}
	return errors.Join(errs...)
}

// Counters returns what became of the frames that arrived since the tables were made (a restart keeps them), by name: redirected, passed,
// passed_other_mac, and dropped_* with the cause.
func (s *Steering) Counters() (map[string]uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	table, err := s.table(bpf.SteerMapCounters)
	if err != nil {
		return nil, err
	}
	out := make(map[string]uint64, len(counterNames))
	var perCPU []uint64
	for i, name := range counterNames {
		if err := table.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("xdp: steering: reading counter %s: %w", name, err)
		}
		for _, n := range perCPU {
			out[name] += n
		}
	}
	return out, nil
}

// The two readings of CLOCK_MONOTONIC that tie the runtime's clock, which has an arbitrary zero, to the kernel's.
var (
	clockBase   = time.Now()
	clockKernel = func() uint64 {
		var ts unix.Timespec
		_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) // cannot fail for this clock
		return uint64(ts.Nano())
	}()
)

// Beat stores now, in the clock of bpf_ktime_get_ns, to a worker's heartbeat, a result of [Steering.Heartbeat]. The runtime reads the same
// clock through the vDSO: no system call.
func Beat(heartbeat *uint64) {
	atomic.StoreUint64(heartbeat, clockKernel+uint64(time.Since(clockBase)))
}

// addSocket gives queue's frames to the socket.
func (s *Steering) addSocket(queue, fd int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	table, err := s.table(bpf.SteerMapXsks)
	if err != nil {
		return err
	}
	if err := table.Put(uint32(queue), uint32(fd)); err != nil {
		return fmt.Errorf("xdp: steering: adding the socket of queue %d of %s: %w", queue, s.ifname, err)
	}
	return nil
}
