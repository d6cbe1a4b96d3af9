package dataplane

import (
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// Slots of the ports that every snapshot has. Pods take the slots from FirstPodSlot on.
const (
	UplinkSlot   = 0
	HostSlot     = 1
	FirstPodSlot = 2
)

// PortKind is which side of the node a port is on; it decides which source checks its packets pass.
type PortKind uint8

// The kinds of port.
const (
	PortNone PortKind = iota // an empty slot
	PortUplink
	PortHost
	PortPod
	NumPortKinds
)

// PortInfo is what the snapshot says about the port in one slot.
type PortInfo struct {
	Kind PortKind
	Port port.Port // nil: known, but without a device now; packets for it are dropped as port_down
	Name string    // pod name, or the interface's name; for counters and people

	// MAC is the Ethernet address of the far end's interface as frames for it must carry it: the pod's or the host device's own; for
	// the uplink this node's own uplink address.
	MAC packet.MAC
	// Addr4 and Addr6 are the pod's addresses, the only ones it may send from; zero if it has none of that family.
	Addr4, Addr6 packet.Addr
	// Pod is the pod's index for address translation: its slot less FirstPodSlot. Dataplane.Publish sets it.
	Pod int
}

// Snapshot is everything the workers share: immutable once published, loaded once a batch. One publisher goroutine builds them.
type Snapshot struct {
	// Generation counts published snapshots; Dataplane.Publish sets it.
	Generation uint64

	FIB *fib.Table

	// Ports by slot. An adjacency names its port by slot. A slot may be given to another port only in a snapshot that is published after
	// every worker passed one in which the slot was empty (Dataplane.Quiesce).
	Ports []PortInfo

	// Node4 and Node6 are the node's own underlay addresses: the source of the ICMP errors it sends. Zero: none of that family.
	Node4, Node6 packet.Addr

	// GatewayMAC is the Ethernet address that pods and the host device know as their gateway's; Gateway4 and Gateway6 its link-local
	// addresses, for which ARP and neighbour solicitations are answered.
	GatewayMAC         packet.MAC
	Gateway4, Gateway6 packet.Addr

	// NoSNAT lets packets leave the cluster with the pods' own addresses (external SNAT). Without it they are translated, by SNAT's rules, or dropped where
	// workers have no translator.
	NoSNAT bool
	// SNAT says which destinations outside the pod CIDRs see the node's address; nil: all.
	SNAT *snat.Rules
}
