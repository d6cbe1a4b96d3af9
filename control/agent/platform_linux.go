package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/overplane/overplane/control/agent/kernel"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/tap"
	"github.com/overplane/overplane/dataplane/port/xdp"
)

// netnsPoll is how often namespaces are looked at whose deletion nothing announces.
const netnsPoll = 2 * time.Second

// linux is this machine.
type linux struct {
	cfg Config
	log *slog.Logger

	podCPUs []int // set by Pools

	mu      sync.Mutex // guards watcher
	watcher *kernel.Watcher
}

// NewPlatform is the machine the process runs on, in its network namespace.
func NewPlatform(cfg Config, log *slog.Logger) Platform { return &linux{cfg: cfg, log: log} }

func (l *linux) HostPorts() (tcp, udp []uint16, err error) { return kernel.BoundPorts() }

func (l *linux) HostConnections() ([]uint16, error) { return kernel.ConnectionPorts() }

func (l *linux) ReservePorts(first, last uint16) error { return kernel.ReservePorts(first, last) }

func (l *linux) Preflight(frameMemory uint64) error { return preflight(&l.cfg, frameMemory) }

func (l *linux) Uplink() (Facts, error) {
	u, err := kernel.ReadUplink(l.cfg.Uplink)
	if err != nil {
		if l.cfg.Uplink == "" {
			return Facts{}, fmt.Errorf("finding the uplink: %w; name it in %sUPLINK", err, EnvPrefix)
		}
		return Facts{}, fmt.Errorf("uplink (%sUPLINK): %w", EnvPrefix, err)
	}
	return factsOf(u), nil
}

func (l *linux) WatchUplink(ctx context.Context, name string, changed func(Facts)) error {
	return kernel.WatchUplink(ctx, name, func(u kernel.Uplink) { changed(factsOf(u)) })
}

func factsOf(u kernel.Uplink) Facts {
	return Facts{
		Name: u.Name, Index: u.Index, Kind: u.Kind, MAC: macOf(u.MAC), MTU: u.MTU, Up: u.Up, Gone: u.Gone, Queues: u.RxQueues,
		Addresses: u.Addresses, Gateway4: u.Gateway4, Gateway6: u.Gateway6,
		GatewayMAC4: macOf(u.GatewayMAC4), GatewayMAC6: macOf(u.GatewayMAC6),
		Primary4: u.IPv4.Addr(), Primary6: u.IPv6.Addr(),
	}
}

// macOf converts; an address of another length, as of interfaces without Ethernet, is none.
func macOf(hw net.HardwareAddr) packet.MAC {
	if len(hw) != 6 {
		return packet.MAC{}
	}
	return packet.MAC(hw)
}

func (l *linux) Pools(n int) ([]*port.Pool, func(), error) {
	var err error
	if l.podCPUs, err = podCPUs(l.cfg.PodCPUs, l.cfg.CPUs, n); err != nil {
		return nil, nil, err
	}
	var memories []*xdp.Memory
	release := func() {
		for _, m := range memories {
			if err := m.Close(); err != nil {
				l.log.Warn("releasing frame memory", "error", err)
			}
		}
	}
	var pools []*port.Pool
	for range n {
		pc := poolConfig(&l.cfg)
		m, err := xdp.NewMemory(pc.Size())
		if err != nil {
			release()
			return nil, nil, err
		}
		memories = append(memories, m)
		p, err := port.NewPool(m.Bytes(), pc)
		if err != nil {
			release()
			return nil, nil, err
		}
		pools = append(pools, p)
	}
	return pools, release, nil
}

func (l *linux) hostPort(d HostDevice) kernel.HostPort {
	return kernel.HostPort{
		Name: d.Name, MAC: hardware(HostMAC), MTU: d.MTU, GatewayMAC: hardware(GatewayMAC), PodCIDRs: d.PodCIDRs, HostIPv4: d.Node4, HostIPv6: d.Node6,
	}
}

func (l *linux) OpenHost(d HostDevice, pools []*port.Pool) (port.Port, error) {
	p, err := withHeader(tap.Config{Name: d.Name, Pools: pools, Persist: true}, func(cfg tap.Config) (*tap.Port, error) {
		return kernel.AttachHostPort(l.hostPort(d), cfg)
	})
	if err != nil {
		return nil, fmt.Errorf("host port (%sHOST_PORT): %w", EnvPrefix, err)
	}
	return p, nil
}

func (l *linux) SetHost(d HostDevice) error { return kernel.SetHostPort(l.hostPort(d)) }

func podDevice(d PodDevice) kernel.PodDevice {
	out := kernel.PodDevice{
		NetNS: d.NetNS, Name: d.Interface, IPv4: d.Addr4, IPv6: d.Addr6, MAC: hardware(d.MAC), MTU: d.MTU,
		Gateway4: Gateway4, Gateway6: Gateway6, GatewayMAC: hardware(GatewayMAC),
	}
	if d.Kind == KindVeth {
		out.Host = vethHost(d.Pod)
	}
	return out
}

func podTAP(d PodDevice, pools []*port.Pool) tap.Config {
	return tap.Config{Name: d.Interface, Pools: pools, Persist: true}
}

func hardware(m packet.MAC) net.HardwareAddr { return net.HardwareAddr(m[:]) }

func (l *linux) CreatePod(d PodDevice, pools []*port.Pool) (port.Port, string, error) {
	id, err := kernel.Identify(d.NetNS)
	if err != nil {
		return nil, "", gone(err)
	}
	p, err := l.attachPod(d, pools)
	if err != nil {
		return nil, "", gone(err)
	}
	l.watch(d, id)
	return p, id.String(), nil
}

// sameNetNS finds the namespace that the path names now, and refuses when it is another one than it was.
func sameNetNS(d PodDevice) (kernel.Identity, error) {
	id, err := kernel.Identify(d.NetNS)
	if err != nil {
		return id, gone(err)
	}
	if d.NetNSID != "" && id.String() != d.NetNSID {
		return id, fmt.Errorf("%w: %s names another namespace than when the pod was attached", ErrPodGone, d.NetNS)
	}
	return id, nil
}

func (l *linux) ReopenPod(d PodDevice, pools []*port.Pool) (port.Port, error) {
	id, err := sameNetNS(d)
	if err != nil {
		return nil, err
	}
	p, err := l.reopenPod(d, pools)
	if err != nil {
		return nil, gone(err)
	}
	l.watch(d, id)
	return p, nil
}

func (l *linux) RemovePod(d PodDevice) error {
	l.mu.Lock()
	if l.watcher != nil {
		l.watcher.Remove(d.Pod)
	}
	l.mu.Unlock()
	if d.Kind == KindVeth {
		return kernel.RemoveVeth(vethHost(d.Pod)) // ours whatever became of the namespace
	}
	if _, err := sameNetNS(d); errors.Is(err, ErrPodGone) {
		return nil // the device went with its namespace; what the path names now is somebody else's
	}
	if err := kernel.RemoveTAP(podDevice(d)); err != nil && !errors.Is(gone(err), ErrPodGone) {
		return err
	}
	return nil
}

func (l *linux) SetPodMTU(d PodDevice) error { return kernel.SetPodMTU(podDevice(d)) }

func (l *linux) PodAlive(d PodDevice) bool {
	return kernel.PodAlive(podDevice(d), d.NetNSID)
}

func (l *linux) WatchPods(ctx context.Context, gone func(pod string)) {
	w := kernel.WatchNetNS(netnsPoll, func(n kernel.GoneNetNS) { gone(n.Key) })
	l.mu.Lock()
	l.watcher = w
	l.mu.Unlock()
	go func() {
		<-ctx.Done()
		l.mu.Lock()
		if l.watcher == w {
			l.watcher = nil
		}
		l.mu.Unlock()
		w.Close()
	}()
}

func (l *linux) watch(d PodDevice, id kernel.Identity) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.watcher != nil {
		l.watcher.Add(d.Pod, d.NetNS, id)
	}
}

// gone marks the errors that mean that there is no pod any more.
func gone(err error) error {
	if errors.Is(err, kernel.ErrNoNetNS) || errors.Is(err, kernel.ErrNoLink) || errors.Is(err, tap.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrPodGone, err)
	}
	return err
}

func (l *linux) Uninstall() error {
	return errors.Join(xdp.Uninstall(l.cfg.BPFDir), kernel.Classifier{}.DetachAll(xdp.TCPrograms()...), kernel.RemoveUplinkDevice(), kernel.RemoveHostPort(l.cfg.HostPort))
}

// Uninstall removes all that outlives the daemon: pods' devices, the steering program with its pins, the host port with its routes, and what
// is remembered. It refuses while a daemon runs.
func Uninstall(cfg Config, log *slog.Logger, plat Platform) error {
	if plat == nil {
		plat = NewPlatform(cfg, log)
	}
	claim, err := claimNode(cfg.StateDir)
	if err != nil {
		return err
	}
	defer claim.Close()
	store := podStore{path: filepath.Join(cfg.StateDir, "pods.json"), node: cfg.NodeName}
	pods, err := store.Load()
	if err != nil {
		return err
	}
	var errs []error
	for i := range pods {
		if err := plat.RemovePod(pods[i].device(0)); err != nil {
			errs = append(errs, fmt.Errorf("pod %s: %w", pods[i].Name, err))
			continue
		}
		log.Info("pod's device removed", "pod", pods[i].Name)
	}
	errs = append(errs, plat.Uninstall())
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, name := range []string{"pods.json", lastState, syncclient.TableFile} {
		if err := os.Remove(filepath.Join(cfg.StateDir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	log.Info("uninstalled")
	return nil
}
