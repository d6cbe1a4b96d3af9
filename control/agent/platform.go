package agent

import (
	"context"
	"errors"
	"net/netip"

	"github.com/overplane/overplane/control/agent/kernel"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// The pods' gateway. Every pod of every node has the same: link-local addresses that the data plane itself answers ARP, neighbour
// solicitations and ping for, so that a pod's routes do not depend on where it runs.
var (
	Gateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	Gateway6 = netip.MustParseAddr("fe80::1")
	// GatewayMAC is locally administered (IEEE 802: the second-lowest bit of the first byte) and on no wire: only pods and the
	// host port's kernel side see it.
	GatewayMAC = packet.MAC{0x02, 'O', 'V', 'P', 'G', 'W'}
	// HostMAC is the host port's own Ethernet address, as the kernel side has it. Locally administered and on no wire, too.
	HostMAC = packet.MAC{0x02, 'O', 'V', 'P', 'H', 'P'}
)

// ErrPodGone says that a pod's namespace or device does not exist any more.
var ErrPodGone = errors.New("the pod's network namespace or device is gone")

// Facts is what the kernel says about the uplink.
type Facts struct {
	Name   string
	Index  int // of the interface; another index is another interface, whatever its name
	Kind   kernel.Kind
	MAC    packet.MAC
	MTU    int
	Up     bool // administratively up and with carrier
	Gone   bool // there is no such interface any more; other fields mean nothing
	Queues int  // it receives by

	// Addresses are the interface's global addresses with their subnets' lengths, in the kernel's order.
	Addresses []netip.Prefix
	// Primary4 and Primary6 are the addresses to send from; invalid: the first of the family.
	Primary4, Primary6 netip.Addr
	// Gateway4 and Gateway6 are the default routes' next hops by this interface, invalid if there is none; their MACs are zero while
	// unresolved.
	Gateway4, Gateway6       netip.Addr
	GatewayMAC4, GatewayMAC6 packet.MAC
}

// PodDevice names a pod's device and what it is configured with.
type PodDevice struct {
	Pod       string // name
	Kind      string // KindTAP or KindVeth
	NetNS     string // path of the namespace
	NetNSID   string // the namespace's identity, since a path may name another one later; empty: whatever the path names
	Interface string
	MAC       packet.MAC
	Addr4     netip.Addr // invalid: none
	Addr6     netip.Addr
	MTU       int
}

// HostDevice is what the host port is configured with. Its Ethernet address is HostMAC.
type HostDevice struct {
	Name         string
	MTU          int
	Node4, Node6 netip.Addr     // the node's own addresses, preferred as source towards pods
	PodCIDRs     []netip.Prefix // routed to it
}

// UplinkGrant says how the uplink is driven, and why not better.
type UplinkGrant struct {
	Port    port.Port
	Rung    string
	Refused []Refusal // better rungs, with the reason for each
	// Capabilities are what was asked of the kernel, whether the rung uses it or not.
	Capabilities []Capability
}

// Capability is one thing that some rung makes use of.
type Capability struct {
	Name   string
	Kernel string // the first Linux that has it
	Reason string // why it is not granted; empty: it is
}

// Refusal is a rung that was not granted.
type Refusal struct{ Rung, Reason string }

// SteeringPlan is all that the steering program needs to know.
type SteeringPlan struct {
	UplinkMAC packet.MAC
	PodCIDRs  []netip.Prefix
	// Members are the other nodes' Ethernet addresses, which frames for pods are accepted from. Not on a routed underlay.
	Members []packet.MAC
	// GatewayMACs are those that frames for pods are accepted from on a routed underlay, and, if OutsideSeesPods, from addresses that are no pods'.
	GatewayMACs     []packet.MAC
	OutsideSeesPods bool // pods' own addresses leave the cluster: replies come to them

	// Node4 and Node6 are the addresses that translated packets leave with, invalid if there is none; the ports they use there, and those of them that are the
	// node's own sockets' after all.
	Node4, Node6        netip.Addr
	FirstPort, LastPort uint16
	HostTCP, HostUDP    []uint16
}

// Steering is the program on the uplink that decides which frames are ours.
type Steering interface {
	// Apply changes the program's tables to the plan.
	Apply(SteeringPlan) error
	// AttachHost has frames that the data plane writes to the host port as they came from the uplink enter the kernel by the uplink.
	AttachHost(hostPort string) error
	// Flows tells the program of translated flows of SCTP, ESP and GRE, which it recognises by their far end. Workers call it, any number at once: it must not block.
	Flows(events []snat.FlowEvent) error
	// KnownFlows are those that the program was told of, by this daemon or an earlier one.
	KnownFlows() ([]snat.FlowEvent, error)
	// Counters says what the program did, by name.
	Counters() (map[string]uint64, error)
	// Heartbeat is where worker i says that it is alive; nil if the program does not look.
	Heartbeat(i int) *uint64
	// Close gives up the descriptors. The program stays and drops what is ours until a daemon comes back. No worker may run.
	Close() error
}

// Platform is the machine. The agent's goroutine calls it; the callbacks given to WatchUplink and WatchPods run on goroutines of its own.
// Errors are for people: they say what failed, on what, and what to do.
type Platform interface {
	// HostPorts lists the ports that the node's own listening TCP and UDP sockets hold, in any order, perhaps more than once.
	HostPorts() (tcp, udp []uint16, err error)
	// HostConnections is HostPorts for the other TCP sockets. It takes milliseconds.
	HostConnections() ([]uint16, error)
	// ReservePorts keeps the kernel from choosing ports of the range, both ends included, for sockets that name none.
	ReservePorts(first, last uint16) error

	// Preflight checks what the machine must grant; frameMemory is how many bytes of memory will be locked.
	Preflight(frameMemory uint64) error
	// Uplink reads the uplink's state.
	Uplink() (Facts, error)
	// WatchUplink calls changed with the state now and after each change, until ctx ends.
	WatchUplink(ctx context.Context, name string, changed func(Facts)) error

	// Pools makes the frame memory of n workers. release gives it back, when nothing uses it any more.
	Pools(n int) (pools []*port.Pool, release func(), err error)
	// AttachSteering makes the steering's tables, or adopts those of an earlier daemon, whose program goes on by them.
	AttachSteering(uplink string, workers int) (Steering, error)
	// OpenUplink opens the uplink by the best rung allowed and has the steering program attached where that rung needs it; queue q uses the pool of worker
	// q mod len(pools). It refuses when another program is in the way. After an error it may be called again.
	OpenUplink(f Facts, s Steering, pools []*port.Pool) (UplinkGrant, error)

	// OpenHost creates the host port, or opens and corrects the one that is there.
	OpenHost(d HostDevice, pools []*port.Pool) (port.Port, error)
	// SetHost changes what the host port is configured with.
	SetHost(d HostDevice) error

	// CreatePod makes a device in a pod's namespace with its addresses and routes, and returns the namespace's identity.
	CreatePod(d PodDevice, pools []*port.Pool) (p port.Port, netnsID string, err error)
	// ReopenPod opens the device of an earlier daemon again. ErrPodGone: the namespace or the device is no more.
	ReopenPod(d PodDevice, pools []*port.Pool) (port.Port, error)
	// RemovePod deletes the device; one that is gone is no error.
	RemovePod(d PodDevice) error
	// SetPodMTU changes the device's MTU.
	SetPodMTU(d PodDevice) error
	// PodAlive reports whether the pod's namespace and device are still there.
	PodAlive(d PodDevice) bool
	// WatchPods calls gone with the name of each pod that was created or re-opened and whose namespace went away, until ctx ends.
	// To be called before the first pod.
	WatchPods(ctx context.Context, gone func(pod string))

	// Uninstall takes away what outlives the daemon: steering, host port and its routes.
	Uninstall() error
}
