package xdp

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// Limits of the steering's tables, as in bpf/steer.h.
const (
	MaxPodCIDRs = 8 // per family
	MaxMembers  = 16384
	MaxQueues   = 256
	MaxWorkers  = 64

	heartbeatStride = 8 // u64s between two workers' heartbeats
)

// DefaultHeartbeatLimit is how long a worker may be silent before its frames are dropped.
const DefaultHeartbeatLimit = 2 * time.Second

// layoutVersion is part of the pins' names. It counts changes of what the maps' values mean; changes of their sizes are seen by comparing.
const layoutVersion = "-v2"

// The names of the pinned attachments: of the XDP program, of the tc program on the uplink, of that on the device, of those of AttachHost. They have no version: a program of any
// version is replaced through them.
const (
	linkPin   = "link"
	tcInPin   = "tc-in"
	tcOutPin  = "tc-out"
	hostPin   = "tc-host"
	kernelPin = "tc-kernel"
)

// SteeringConfig says where the steering program goes and whom frames belong to.
type SteeringConfig struct {
	// Interface is the uplink.
	Interface string

	// PinDir is a folder on a bpffs in which the attachment and its tables are pinned, so that they outlive the process: one folder per
	// interface. It is created (its parent must exist). "": nothing is pinned and Close detaches the program.
	PinDir string

	// Workers is the number of workers: queue q belongs to worker q mod Workers. 1 to MaxWorkers.
	Workers int

	// Routed means that the gateway is the only Ethernet neighbour: frames for pods are accepted from its address alone
	// (SetGatewayMAC), and then only with a source in a pod CIDR. Otherwise they are accepted from members' addresses (SetMembers).
	Routed bool

	// Generic attaches to the kernel's generic hook, after the sk_buff was made: slow, but any device has it.
	Generic bool

	// HeartbeatLimit is how long a worker may be silent; 0 is DefaultHeartbeatLimit, negative is for ever.
	HeartbeatLimit time.Duration
}

// Steering is the steering program on the uplink, XDP's or tc's, together with its tables. Setters may be called from any goroutine and take a lock;
// a change is seen by frames that arrive after it. Attach and Detach are for one goroutine at a time. Heartbeat's result is for one worker each.
type Steering struct {
	ifname  string
	ifindex int
	pinDir  string
	generic bool
	link    link.Link            // XDP's
	maps    map[string]*ebpf.Map // nil when closed
	prog    *ebpf.Program
	frags   bool
	adopted bool
	tc      *tcAttachment // nil: not attached by tc
	host    *tcAttachment // to the host port; nil: not

	beats []byte    // mapping of the heartbeats map
	flows *ebpf.Map // one of maps, for workers: they stop before Close

	mu      sync.Mutex // guards all below
	cfg     bpf.SteerSteerConfig
	active  uint32
	flipped time.Time
	ports   *[portWords]uint64 // as the map has them; nil: not read yet
}

// AttachSteering is [OpenSteering] and [Steering.AttachXDP] in one; on failure nothing of it stays.
func AttachSteering(cfg SteeringConfig) (*Steering, error) {
	s, err := OpenSteering(cfg)
	if err != nil {
		return nil, err
	}
	if err := s.AttachXDP(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// OpenSteering makes the steering's tables, or adopts those that an earlier process of ours pinned in cfg.PinDir, and brings them in line with cfg; pod CIDRs and members
// in them stay until they are set again. It attaches nothing: a program that is attached goes on by the same tables until AttachXDP or AttachTC
// replaces it. It takes CAP_NET_ADMIN and CAP_BPF, and Linux 5.9.
func OpenSteering(cfg SteeringConfig) (*Steering, error) {
	if cfg.Workers < 1 || cfg.Workers > MaxWorkers {
		return nil, fmt.Errorf("xdp: steering: %d workers: want 1 to %d", cfg.Workers, MaxWorkers)
	}
	iface, err := net.InterfaceByName(cfg.Interface)
	if err != nil {
		return nil, fmt.Errorf("xdp: steering: interface %q: %w", cfg.Interface, err)
	}
	if len(iface.HardwareAddr) != 6 {
		return nil, fmt.Errorf("xdp: steering: interface %q has no Ethernet address", cfg.Interface)
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, needs("removing RLIMIT_MEMLOCK for BPF maps (kernels before 5.11 count them)", err, capSysResource)
	}
	if err := makePinDir(cfg.PinDir); err != nil {
		return nil, err
	}

	s := &Steering{ifname: cfg.Interface, ifindex: iface.Index, pinDir: cfg.PinDir, generic: cfg.Generic, maps: map[string]*ebpf.Map{}}
	if err := s.checkPins(); err != nil {
		return nil, err
	}
	if err := s.makeMaps(); err != nil {
		return nil, errors.Join(err, s.release())
	}
	s.flows = s.maps[bpf.SteerMapFlows]
	if err := s.configure(cfg, [6]byte(iface.HardwareAddr)); err != nil {
		return nil, errors.Join(err, s.release())
	}
	return s, nil
}

// makePinDir creates dir and checks that it is on a bpffs.
func makePinDir(dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("xdp: folder for pinned steering: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("xdp: folder for pinned steering %q: %w", dir, err)
	}
	if uint32(st.Type) != unix.BPF_FS_MAGIC {
		// Leave nothing behind where nothing of ours belongs; a folder that others use does not go away.
		_ = os.Remove(dir)
		return fmt.Errorf("xdp: %q is not on a bpffs: mount one with `mount -t bpf bpf /sys/fs/bpf`", dir)
	}
	return nil
}

// checkPins makes sure that the tables in the pin folder are not another interface's.
func (s *Steering) checkPins() error {
	if s.pinDir == "" {
		return nil
	}
	for _, pin := range []string{linkPin, tcInPin} {
		path := filepath.Join(s.pinDir, pin)
		l, err := link.LoadPinnedLink(path, nil)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return needs("opening the pinned steering "+path, err, capBPF)
		}
		info, err := l.Info()
		err = errors.Join(err, l.Close())
		if err != nil {
			return fmt.Errorf("xdp: reading the pinned steering %s: %w", path, err)
		}
		index := 0 // of an interface that was deleted, too
		if x := info.XDP(); x != nil {
			index = int(x.Ifindex)
		} else if x := info.TCX(); x != nil {
			index = int(x.Ifindex)
		}
		if index != 0 && index != s.ifindex {
			return fmt.Errorf("xdp: the steering pinned in %s belongs to another interface than %s: use one folder per interface, or uninstall that one", s.pinDir, s.ifname)
		}
	}
	return nil
}

// configure brings the tables in line with cfg and keeps what it does not say.
func (s *Steering) configure(cfg SteeringConfig, mac [6]byte) error {
	if err := s.mapHeartbeats(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.loadConfig(); err != nil {
		return err
	}
	limit := cfg.HeartbeatLimit
	if limit == 0 {
		limit = DefaultHeartbeatLimit
	}
	s.cfg.HeartbeatLimitNs = uint64(max(limit, 0))
	s.cfg.Workers = uint32(cfg.Workers)
	s.cfg.Flags &= flagTranslate | flagOutside
	if cfg.Routed {
		s.cfg.Flags |= flagRouted
	}
	copy(s.cfg.UplinkMac[:], mac[:])
	return s.storeConfig()
}

// Multibuffer reports whether frames of several buffers reach the program (xdp.frags, Linux 5.18 and a driver that knows them).
func (s *Steering) Multibuffer() bool { return s.frags }

// Adopted reports whether a pinned attachment of an earlier process was taken over.
func (s *Steering) Adopted() bool { return s.adopted }

// Close closes the descriptors. With a PinDir the program stays attached, and drops what is ours until workers beat again; see
// [Uninstall]. Without one it is detached. No worker may use its heartbeat after it.
func (s *Steering) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	if s.pinDir == "" && s.tc != nil {
		errs = append(errs, s.tc.detach(s.ifindex))
	}
	if s.pinDir == "" && s.host != nil && s.host.classifier != nil {
		errs = append(errs, s.host.classifier.Detach(s.host.device, hostPrograms...), s.host.classifier.Detach(s.ifindex, hostPrograms...))
	}
	return errors.Join(append(errs, s.release())...)
}

func (s *Steering) release() error {
	var errs []error
	if s.beats != nil {
		// Nobody will beat any more: say so at once, not only when the last beat is stale.
		clear(s.beats)
		errs = append(errs, unix.Munmap(s.beats))
		s.beats = nil
	}
	if s.tc != nil {
		errs = append(errs, s.tc.close())
		s.tc = nil
	}
	if s.host != nil {
		errs = append(errs, s.host.close())
		s.host = nil
	}
	if s.link != nil {
		errs = append(errs, s.link.Close())
		s.link = nil
	}
	if s.prog != nil {
		errs = append(errs, s.prog.Close())
		s.prog = nil
	}
	for _, m := range s.maps {
		errs = append(errs, m.Close())
	}
	s.maps = nil
	return errors.Join(errs...)
}

// table is one of the maps.
func (s *Steering) table(name string) (*ebpf.Map, error) {
	m := s.maps[name]
	if m == nil {
		return nil, fmt.Errorf("xdp: steering of %s: %w", s.ifname, os.ErrClosed)
	}
	return m, nil
}

// Uninstall detaches the programs pinned in pinDir and removes the folder. Frames for pods then go to the kernel's stack. A folder that is
// not there is no error. Programs that a [Classifier] attached are its own to remove.
func Uninstall(pinDir string) error {
	entries, err := os.ReadDir(pinDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("xdp: uninstalling: %w", err)
	}
	var errs []error
	for _, pin := range []string{linkPin, tcInPin, tcOutPin, hostPin, kernelPin} {
		errs = append(errs, detachPinned(filepath.Join(pinDir, pin)))
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(pinDir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, os.Remove(pinDir))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("xdp: uninstalling %q: %w", pinDir, err)
	}
	return nil
}

// detachPinned detaches a pinned attachment and removes its pin, if there is one.
func detachPinned(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return needs("opening the pinned link "+path, err, capBPF)
	}
	// Detach rather than only unpin: another process may hold a descriptor. The attachment of an interface that was deleted is detached already.
	err = l.Detach()
	if errors.Is(err, unix.ENOLINK) || errors.Is(err, unix.EINVAL) {
		err = nil
	}
	return errors.Join(err, l.Unpin(), l.Close())
}

// newObjects is the compiled program's specification with the variant that is wanted, and no other.
func newObjects(frags bool) (*ebpf.CollectionSpec, string, error) {
	spec, err := bpf.LoadSteer()
	if err != nil {
		return nil, "", fmt.Errorf("xdp: steering program: %w", err)
	}
	keep, remove := bpf.SteerProgOverplaneXdp, bpf.SteerProgOverplaneXdpFrags
	if frags {
		keep, remove = remove, keep
	}
	delete(spec.Programs, remove)
	return spec, keep, nil
}
