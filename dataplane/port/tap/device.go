package tap

import (
	"errors"
	"fmt"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

// devicePath is a variable for tests that take it away.
var devicePath = "/dev/net/tun"

// What the device's far end may leave unfinished for us (include/uapi/linux/if_tun.h, TUNSETOFFLOAD).
const (
	offloads    = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	offloadsUSO = unix.TUN_F_USO4 | unix.TUN_F_USO6 // kernel 6.2
)

// Port is a device with its descriptors. It implements port.Port; its methods may be called from any goroutine except where they say
// otherwise.
type Port struct {
	name   string
	caps   port.Caps
	queues []*Queue
}

var _ port.Port = (*Port)(nil)

// Create makes the device in the calling thread's network namespace, down and without addresses. A device of that name that
// is there already is ErrExists; nothing is left behind on failure.
//
// The descriptors stay bound to that namespace: when the device is moved into another and that one is deleted, the device dies and the
// queues are dead (see Queue.Receive).
func Create(cfg Config) (*Port, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	return open(cfg, true)
}

// Reopen attaches to a persistent device by name in the calling thread's network namespace, with as many queues as cfg says now. The
// device's addresses, routes and established connections are not touched. No such device is ErrNotExist, one that
// Create would not have made ErrMode.
//
// The descriptors hold a reference to that namespace: it and the device stay alive, unreachable, until Close, even if its
// name is deleted. Whoever re-opens a device must watch the namespace.
//
// The driver does not tell whether another process has queues of the device open; both would then get a part of the packets.
func Reopen(cfg Config) (*Port, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	return open(cfg, false)
}

// complete checks cfg and fills in defaults.
func (cfg *Config) complete() error {
	switch {
	case cfg.Name == "" || cfg.Name == "." || cfg.Name == ".." || strings.ContainsAny(cfg.Name, "/:% \t\n\v\f\r"):
		return fmt.Errorf("tap: interface name %q: want 1 to %d bytes without '/', ':', '%%' and white space", cfg.Name, unix.IFNAMSIZ-1)
	case len(cfg.Name) >= unix.IFNAMSIZ:
		return fmt.Errorf("tap: interface name %q is too long: %d bytes, the kernel takes %d", cfg.Name, len(cfg.Name), unix.IFNAMSIZ-1)
	case len(cfg.Pools) == 0:
		return fmt.Errorf("tap: %s: no frame pool", cfg.Name)
	case cfg.Queues < 0 || cfg.Queues > MaxQueues:
		return fmt.Errorf("tap: %s: %d queues: want 1 to %d", cfg.Name, cfg.Queues, MaxQueues)
	case cfg.SendBuffer < 0:
		return fmt.Errorf("tap: %s: send buffer of %d bytes", cfg.Name, cfg.SendBuffer)
	}
	if cfg.Queues == 0 {
		cfg.Queues = len(cfg.Pools)
	}
	if cfg.SendBuffer == 0 {
		cfg.SendBuffer = DefaultSendBuffer
	}
	return nil
}

func open(cfg Config, create bool) (_ *Port, err error) {
	index := 0
	if !create {
		if index, err = ifindex(cfg.Name); err != nil {
			return nil, fmt.Errorf("tap: %s: %w", cfg.Name, err)
		}
	}
	p := &Port{name: cfg.Name, caps: port.Caps{Chains: true, MaxFrame: MaxFrame}}
	header := headerLen
	if cfg.Plain {
		header = 0
	} else {
		p.caps.Checksum, p.caps.TSO4, p.caps.TSO6 = true, true, true
	}
	defer func() {
		if err != nil {
			undo := p.Close
			if create && cfg.Plain { // persistent from its first queue on
				undo = p.Destroy
			}
			err = errors.Join(err, undo())
		}
	}()
	var onDead func()
	if cfg.OnDead != nil {
		onDead = sync.OnceFunc(cfg.OnDead)
	}
	for i := range cfg.Queues {
		// The first queue makes the device, and only if it is not there yet; the others join it.
		fd, err := openQueue(&cfg, create && i == 0)
		if err != nil {
			return nil, fmt.Errorf("tap: %s: queue %d of %d: %w", cfg.Name, i, cfg.Queues, err)
		}
		p.queues = append(p.queues, newQueue(fd, header, cfg.Pools[i%len(cfg.Pools)], onDead))
		if i > 0 {
			continue
		}
		// Between the look-up and the attaching the device may have gone, and TUNSETIFF then made a new one.
		if now, err := ifindex(cfg.Name); !create && (err != nil || now != index) {
			return nil, fmt.Errorf("tap: %s: deleted while it was opened: %w", cfg.Name, ErrNotExist)
		}
		// These are properties of the device; queues that join inherit them.
		if cfg.Plain {
			configurePlain(fd, cfg.SendBuffer)
		} else if p.caps.USO, err = configure(fd, cfg.SendBuffer); err != nil {
			return nil, fmt.Errorf("tap: %s: %w", cfg.Name, err)
		}
	}
	if create && cfg.Persist != cfg.Plain { // plain devices are made persistent, others are not
		persist := 0
		if cfg.Persist {
			persist = 1
		}
		if err := unix.IoctlSetInt(p.queues[0].fd, unix.TUNSETPERSIST, persist); err != nil {
			return nil, fmt.Errorf("tap: %s: setting its persistence to %d: %w", cfg.Name, persist, err)
		}
	}
	return p, nil
}

// openQueue opens a descriptor and makes it a queue of the device, which with create must not exist yet.
func openQueue(cfg *Config, create bool) (int, error) {
	if cfg.Plain {
		return openPlain(cfg.Name, create)
	}
	fd, err := openDevice()
	if err != nil {
		return -1, err
	}
	if err := attach(fd, cfg.Name, create); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openDevice opens the driver's file: one open file is one queue.
func openDevice() (int, error) {
	fd, err := unix.Open(devicePath, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, openError(err)
	}
	return fd, nil
}

// openError explains a refusal to open the driver's file.
func openError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: there is no %s: create the device node (c 10 200), or mount it into the container", ErrNoTUN, devicePath)
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return fmt.Errorf("%w: %s has no driver: load the kernel module tun", ErrNoTUN, devicePath)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("opening %s: %w: check the file's mode and the device rules of the cgroup (DeviceAllow=/dev/net/tun)", devicePath, errors.Join(ErrPermission, err))
	}
	return fmt.Errorf("opening %s: %w", devicePath, err)
}

// attach makes fd a queue of the device, which with create must not exist yet.
func attach(fd int, name string, create bool) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	// A driver that knows its features and not this one would make a device without it.
	if features, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES); err == nil && features&unix.IFF_VNET_HDR == 0 {
		return fmt.Errorf("%w: the driver does not offer it", ErrHeader)
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE)
	if create {
		flags |= unix.IFF_TUN_EXCL
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return attachError(err, create)
	}
	return nil
}

// attachError explains a refusal to make a descriptor a queue.
func attachError(err error, create bool) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: CAP_NET_ADMIN is needed in the device's network namespace", ErrPermission)
	case errors.Is(err, unix.EBUSY) && create:
		return fmt.Errorf("%w in this network namespace", ErrExists)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: another process holds it", ErrBusy)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: it is no multi-queue TAP", ErrMode)
	case errors.Is(err, unix.E2BIG):
		return fmt.Errorf("too many queues, the kernel takes %d for one device", MaxQueues)
	}
	return fmt.Errorf("TUNSETIFF: %w", err)
}

// configure sets what holds for the whole device, and reports whether UDP segmentation offload was granted.
func configure(fd, sendBuffer int) (uso bool, err error) {
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, headerLen); err != nil {
		return false, fmt.Errorf("%w: setting its size: %w", ErrHeader, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETLE, 1); err != nil {
		return false, fmt.Errorf("%w: setting its byte order: %w", ErrHeader, err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETSNDBUF, sendBuffer); err != nil {
		return false, fmt.Errorf("setting the send buffer to %d bytes: %w", sendBuffer, err)
	}
	err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads|offloadsUSO)
	if err == nil {
		return true, nil
	}
	if errors.Is(err, unix.EINVAL) {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads)
	}
	if err != nil {
		return false, fmt.Errorf("%w: setting offloads: %w", ErrHeader, err)
	}
	return false, nil
}

// ifindex looks an interface of the calling thread's namespace up.
func ifindex(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("socket: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, ifr); errors.Is(err, unix.ENODEV) {
		return 0, fmt.Errorf("%w in this network namespace", ErrNotExist)
	} else if err != nil {
		return 0, fmt.Errorf("SIOCGIFINDEX: %w", err)
	}
	return int(ifr.Uint32()), nil
}

// Name is the name the device was opened by, or what SetName said since.
func (p *Port) Name() string { return p.name }

// SetName records that the device was renamed. Before the port is shared only.
func (p *Port) SetName(name string) { p.name = name }

// NumQueues implements port.Port.
func (p *Port) NumQueues() int { return len(p.queues) }

// Queue implements port.Port; the value is a *Queue.
func (p *Port) Queue(i int) port.Queue { return p.queues[i] }

// Caps implements port.Port: unfinished checksums, TCP trains of both families, chains; UDP trains where the kernel has them.
func (p *Port) Caps() port.Caps { return p.caps }

// Dead reports whether a queue has found the device deleted. A dead port stays dead: close it.
func (p *Port) Dead() bool {
	for _, q := range p.queues {
		if q.Dead() {
			return true
		}
	}
	return false
}

// Stats sums what the queues counted.
func (p *Port) Stats() Stats {
	var s Stats
	for _, q := range p.queues {
		s.add(q.Stats())
	}
	return s
}

// Close closes the descriptors. A persistent device stays, without carrier; packets sent to it are dropped by the kernel. Closing twice is
// harmless. Only after every worker dropped the queues.
func (p *Port) Close() error {
	var errs []error
	for _, q := range p.queues {
		errs = append(errs, q.close())
	}
	return errors.Join(errs...)
}

// Destroy closes the descriptors and thereby deletes the device, wherever it was moved, with its addresses and routes (unless another process
// holds queues of it). Conditions as for Close.
func (p *Port) Destroy() error {
	var errs []error
	if len(p.queues) > 0 && p.queues[0].fd >= 0 {
		// EBADFD, or ENOTTY of a queue that knows: the device is gone already.
		err := unix.IoctlSetInt(p.queues[0].fd, unix.TUNSETPERSIST, 0)
		if err != nil && !errors.Is(err, unix.EBADFD) && !errors.Is(err, unix.ENOTTY) {
			errs = append(errs, fmt.Errorf("tap: %s: giving up persistence: %w", p.name, err))
		}
	}
	return errors.Join(append(errs, p.Close())...)
}
