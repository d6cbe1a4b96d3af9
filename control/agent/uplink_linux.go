package agent

import (
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/control/agent/kernel"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/tap"
	"github.com/overplane/overplane/dataplane/port/xdp"
	"github.com/overplane/overplane/snat"
)

// steering is the steering program on the uplink, whatever hook it is attached to.
type steering struct {
	*xdp.Steering
	routed bool
}

// AttachSteering makes or adopts the tables. The program follows with the rung: OpenUplink attaches it to the hook that the rung needs.
func (l *linux) AttachSteering(uplink string, workers int) (Steering, error) {
	s, err := xdp.OpenSteering(xdp.SteeringConfig{
		Interface: uplink, PinDir: l.cfg.BPFDir, Workers: workers, Routed: l.cfg.Routed(), HeartbeatLimit: l.cfg.HeartbeatLimit,
	})
	if err != nil {
		return nil, fmt.Errorf("making the steering of uplink %s: %w", uplink, err)
	}
	return &steering{Steering: s, routed: l.cfg.Routed()}, nil
}

func (s *steering) AttachHost(hostPort string) error {
	link, err := net.InterfaceByName(hostPort)
	if err != nil {
		return fmt.Errorf("host port %s: %w", hostPort, err)
	}
	return s.Steering.AttachHost(xdp.TCConfig{Device: link.Index, Gateway: GatewayMAC, Classifier: kernel.Classifier{}})
}

func (s *steering) Flows(events []snat.FlowEvent) error {
	var errs []error
	for i := range events {
		e := &events[i]
		f := xdp.Flow{Proto: e.Proto, Remote: e.Remote.Netip(), RemotePort: e.RemotePort, NodePort: e.NodePort}
		if e.Began {
			errs = append(errs, s.AddFlow(f))
		} else {
			errs = append(errs, s.RemoveFlow(f))
		}
	}
	return errors.Join(errs...)
}

func (s *steering) KnownFlows() (out []snat.FlowEvent, err error) {
	flows, err := s.Steering.Flows()
	for _, f := range flows {
		out = append(out, snat.FlowEvent{Began: true, Proto: f.Proto, Remote: packet.AddrFrom(f.Remote), RemotePort: f.RemotePort, NodePort: f.NodePort})
	}
	return out, err
}

func (s *steering) Apply(p SteeringPlan) error {
	err := errors.Join(s.SetUplinkMAC(p.UplinkMAC), s.SetPodCIDRs(p.PodCIDRs), s.SetTranslation(xdp.Translation{
		Node4: p.Node4, Node6: p.Node6, First: p.FirstPort, Last: p.LastPort, HostTCP: p.HostTCP, HostUDP: p.HostUDP,
	}))
	if err = errors.Join(err, s.SetOutside(p.OutsideSeesPods)); s.routed || p.OutsideSeesPods {
		if len(p.GatewayMACs) > 1 {
			err = errors.Join(err, fmt.Errorf("the IPv4 and IPv6 gateways have different Ethernet addresses (%s, %s); frames are accepted from the first alone",
				formatMAC(p.GatewayMACs[0]), formatMAC(p.GatewayMACs[1])))
		}
		var gw packet.MAC
		if len(p.GatewayMACs) > 0 {
			gw = p.GatewayMACs[0]
		}
		err = errors.Join(err, s.SetGatewayMAC(gw))
	}
	if s.routed {
		return err
	}
	macs := make([][6]byte, len(p.Members))
	for i, m := range p.Members {
		macs[i] = m
	}
	return errors.Join(err, s.SetMembers(macs))
}

// What the rungs take.
const (
	needsXDP   = "an XDP program in the driver and AF_XDP sockets: Linux 5.11, CAP_NET_RAW, a driver with native XDP, and for zero-copy one that has that"
	needsTC    = "a tc program on the uplink: Linux 6.6 for tcx, or CONFIG_NET_CLS_BPF and CONFIG_NET_SCH_INGRESS"
	needsTun   = needsTC + "; and a TAP with virtio-net header and queues: /dev/net/tun of Linux 3.8"
	needsPlain = needsTC + "; and a TAP with queues: /dev/net/tun of Linux 3.8"
)

// neverXDP says why an interface cannot be driven by AF_XDP, whatever the kernel grants; empty: it may.
func neverXDP(f Facts, workers int) string {
	switch {
	case f.Kind == kernel.KindVLAN || f.Kind == kernel.KindBond:
		return fmt.Sprintf("%s is a %s, whose frames AF_XDP can only take from the interfaces below it", f.Name, f.Kind)
	case f.Queues > 0 && f.Queues < workers:
		return fmt.Sprintf("%s has fewer queues (%d) than there are workers (%d), which need one each: add some with `ethtool -L %s combined %d`, or set %sWORKERS=%d",
			f.Name, f.Queues, workers, f.Name, workers, EnvPrefix, f.Queues)
	}
	return ""
}

// OpenUplink climbs the ladder.
func (l *linux) OpenUplink(f Facts, st Steering, pools []*port.Pool) (UplinkGrant, error) {
	s := st.(*steering)
	viaXDP := rung{names: []string{ModeXDPZeroCopy, ModeXDPCopy}, needs: needsXDP, open: func() (UplinkGrant, error) { return l.openXDP(f, s, pools) }}
	viaXDP.never = neverXDP(f, len(pools))
	switch l.cfg.UplinkMode {
	case ModeXDPZeroCopy, ModeXDPCopy:
		viaXDP.names = []string{l.cfg.UplinkMode}
	}
	grant, err := climb(onlyMode(l.cfg.UplinkMode, []rung{
		viaXDP,
		{names: []string{ModeTun}, needs: needsTun, open: func() (UplinkGrant, error) { return l.openTC(f, s, pools, false) }},
		{names: []string{ModePlain}, needs: needsPlain, open: func() (UplinkGrant, error) { return l.openTC(f, s, pools, true) }},
	}))
	if err != nil {
		return UplinkGrant{}, fmt.Errorf("opening uplink %s (%sUPLINK_MODE=%s): %w", f.Name, EnvPrefix, l.cfg.UplinkMode, err)
	}
	grant.Capabilities = capabilities()
	for _, c := range grant.Capabilities {
		if c.Reason != "" {
			l.log.Info("the machine does not grant", "capability", c.Name, "since_linux", c.Kernel, "reason", c.Reason)
		}
	}
	if s.Adopted() {
		l.log.Info("took over the steering program of an earlier daemon", "interface", f.Name, "pins", l.cfg.BPFDir)
	}
	return grant, nil
}

// capabilities asks the kernel for all that rungs make use of.
func capabilities() []Capability {
	var out []Capability
	add := func(name, kernel string, err error) {
		c := Capability{Name: name, Kernel: kernel}
		if err != nil {
			c.Reason = err.Error()
		}
		out = append(out, c)
	}
	for _, c := range xdp.Capabilities() {
		add(c.Name, c.Kernel, c.Err)
	}
	for _, c := range tap.Capabilities() {
		add(c.Name, c.Kernel, c.Err)
	}
	return out
}

// openXDP drives the uplink by AF_XDP sockets.
func (l *linux) openXDP(f Facts, s *steering, pools []*port.Pool) (UplinkGrant, error) {
	mode := xdp.Auto
	switch l.cfg.UplinkMode {
	case ModeXDPZeroCopy:
		mode = xdp.ZeroCopy
	case ModeXDPCopy:
		mode = xdp.Copy
	}
	if err := s.AttachXDP(); err != nil {
		if errors.Is(err, xdp.ErrForeignProgram) {
			// Whoever put it there may want all frames; that is not to be found out by sharing the interface.
			return UplinkGrant{}, &finalError{fmt.Errorf("%w. With %sUPLINK_MODE=%s both can share the interface: that program sees every frame first", err, EnvPrefix, ModeTun)}
		}
		return UplinkGrant{}, errors.Join(err, s.DetachXDP())
	}
	p, err := xdp.Open(xdp.Config{
		Interface: f.Name, Pools: pools, RingSize: l.cfg.RingSize, Mode: mode, TxBudget: l.cfg.TXBudget, MTU: f.MTU, Steering: s.Steering,
	})
	if err != nil {
		if !f.Up || errors.Is(err, unix.ENETDOWN) {
			return UplinkGrant{}, &finalError{err} // sockets cannot be bound before the link is up
		}
		return UplinkGrant{}, errors.Join(err, s.DetachXDP())
	}
	// What another rung left: nothing steers to it any more.
	if err := errors.Join(kernel.Classifier{}.DetachAll(xdp.TCPrograms()...), kernel.RemoveUplinkDevice()); err != nil {
		l.log.Warn("removing what an earlier daemon drove the uplink by", "error", err)
	}
	grant := UplinkGrant{Port: p, Rung: p.Granted()}
	if why := p.WhyNotMore(); why != nil && !p.ZeroCopy() {
		grant.Refused = append(grant.Refused, Refusal{Rung: ModeXDPZeroCopy, Reason: why.Error()})
	} else if mode == xdp.Copy && !p.ZeroCopy() {
		grant.Refused = append(grant.Refused, Refusal{Rung: ModeXDPZeroCopy, Reason: "not asked for: " + EnvPrefix + "UPLINK_MODE=" + ModeXDPCopy})
	}
	return grant, nil
}

// openTC drives the uplink through a device of the TUN/TAP driver and tc.
func (l *linux) openTC(f Facts, s *steering, pools []*port.Pool, plain bool) (UplinkGrant, error) {
	p, index, err := kernel.AttachUplinkDevice(f.MTU, tap.Config{Pools: pools, Plain: plain, SendBuffer: uplinkSendBuffer})
	if err != nil {
		return UplinkGrant{}, err
	}
	if err := s.AttachTC(xdp.TCConfig{Device: index, Classifier: kernel.Classifier{}}); err != nil {
		return UplinkGrant{}, errors.Join(err, p.Destroy())
	}
	name := ModeTun
	if plain {
		name = ModePlain
	}
	return UplinkGrant{Port: p, Rung: name}, nil
}

// uplinkSendBuffer is how many bytes of each worker may be on their way through the uplink's queueing discipline and driver. Beyond it packets die of
// port_full.
const uplinkSendBuffer = 8 << 20

// withHeader calls f with the configuration of a TAP, and once more without the virtio-net header if the host refuses that.
func withHeader(cfg tap.Config, f func(tap.Config) (*tap.Port, error)) (*tap.Port, error) {
	p, err := f(cfg)
	if !errors.Is(err, tap.ErrHeader) {
		return p, err
	}
	cfg.Plain = true
	p, plainErr := f(cfg)
	if plainErr != nil {
		return nil, errors.Join(err, plainErr)
	}
	return p, nil
}
