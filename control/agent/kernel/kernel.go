// Package kernel is the node daemon's dealings with the kernel's network configuration: everything that needs netlink or a change of network
// namespace. It decides nothing; the agent says what it wants, and this package makes it so or says why not.
//
//	pods        AttachTAP, ReopenTAP, RemoveTAP: a TAP in the pod's namespace with its addresses and routes; SetPodMTU, PodAlive
//	            AttachVeth, ReopenVeth, RemoveVeth: the same with a veth pair, whose other end AF_XDP sockets drive
//	host port   AttachHostPort, SyncHostRoutes, RemoveHostPort: the TAP that the node's own stack reaches pods by
//	uplink      ReadUplink, WatchUplink: addresses, MTU, state, and the gateways with their Ethernet addresses
//	namespaces  InNetNS, Identify, Watcher
//
// "The caller's namespace" is the network namespace of the calling thread: the process's own, unless the caller locked its goroutine to a thread
// and changed it (InNetNS does). Functions are safe for concurrent use unless they say otherwise; two calls about the same device must
// not overlap. All of them may block on the kernel's configuration lock (RTNL), so no worker calls them.
package kernel

import (
	"errors"
	"net"
	"net/netip"
)

// The pods' gateway. The data plane answers for these addresses; they are the same on every node, so that a pod's routes do not depend on
// where it runs.
var (
	Gateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	Gateway6 = netip.MustParseAddr("fe80::1")
	// GatewayMAC is locally administered and on no wire: only pods and the host's stack send to it.
	GatewayMAC = net.HardwareAddr{0x02, 'O', 'V', 'P', 'G', 'W'}
)

// What functions of this package fail by, wrapped in sentences; test with errors.Is. Errors of package tap pass through.
var (
	// ErrNoNetNS: the path names no network namespace.
	ErrNoNetNS = errors.New("no such network namespace")
	// ErrNoLink: there is no interface of that name.
	ErrNoLink = errors.New("no such interface")
	// ErrLinkExists: an interface of that name is there already, and is not ours to change.
	ErrLinkExists = errors.New("interface exists")
	// ErrForeignRoute: somebody else's route leads to addresses that are pods'.
	ErrForeignRoute = errors.New("foreign route")
	// ErrBusy: another process holds the device.
	ErrBusy = errors.New("device is held by another process")
)
