package agent

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// Input is all that a snapshot is a function of.
type Input struct {
	Node   string // this node's name
	Routed bool   // every frame for another node goes to the gateway
	Facts  Facts

	// Node4 and Node6 are configured primary addresses; invalid: the uplink's first of that family.
	Node4, Node6 netip.Addr

	state *desired    // nil: none yet
	rules *snat.Rules // nil: the state's

	Uplink    port.Port // nil: no device now
	UplinkMTU int       // bytes of the largest IP packet the uplink sends: its MTU, or less if the rung cannot carry as much
	Host      port.Port
	HostName  string
	PodMTU    int // bytes of the largest IP packet of pods and host port
	Pods      []PodPort
}

// Desire makes a state, which must be valid and this node's, the desired one.
func (in *Input) Desire(s *controlv1.NodeState) error {
	d, err := checkState(in.Node, s)
	if err == nil {
		in.state = d
	}
	return err
}

// PodPort is one attached pod in its slot.
type PodPort struct {
	Slot         int
	Name         string
	MAC          packet.MAC
	Addr4, Addr6 netip.Addr
	Port         port.Port // nil: known, but without a device
}

// Built is what Build made.
type Built struct {
	Snapshot *dataplane.Snapshot
	Routes   int // entries in the table
	Problems []string
	// Failures are the entries of the desired state that could not be programmed: what Problems say of single ones, for the controller.
	Failures []*controlv1.EntryFailure
}

// Build makes a snapshot. It is a pure function and always makes one: an entry that cannot be programmed becomes a problem, a
// sentence for people, and the rest stands.
//
// The entries, in order (the first of two that collide wins): the pools; the node's own addresses, to the host; the pods; the desired
// routes; other members' addresses; the default routes.
func Build(in Input) Built {
	b := builder{in: in, fib: fib.NewBuilder()}
	snap := &dataplane.Snapshot{
		GatewayMAC: GatewayMAC, Gateway4: packet.AddrFrom(Gateway4), Gateway6: packet.AddrFrom(Gateway6),
	}
	node4, node6 := primaryAddresses(in.Facts, in.Node4, in.Node6)
	snap.Node4, snap.Node6 = packet.AddrFrom(node4), packet.AddrFrom(node6)
	if in.state != nil {
		b.fib.Grow(len(in.state.routes)+2*len(in.state.members)+2*len(in.Pods)+len(in.Facts.Addresses)+2, len(in.state.members)+len(in.Pods)+4)
		snap.NoSNAT, snap.SNAT = in.state.noSNAT, in.state.rules
		if in.rules != nil {
			snap.SNAT = in.rules
		}
		for _, p := range in.state.pools {
			if err := b.fib.AddPool(p.cidr, p.bits); err != nil {
				b.problem("pool %s cannot be programmed: %v", p.cidr, err)
				b.fail("pool", p.cidr.String(), err.Error())
			}
		}
	}
	snap.Ports = b.ports()
	b.own()
	b.pods()
	if in.state != nil {
		b.desired()
	}
	b.outside()

	table := b.fib.Build()
	snap.FIB = table
	b.summarise()
	return Built{Snapshot: snap, Routes: table.Len(), Problems: b.problems, Failures: b.failures}
}

type builder struct {
	in       Input
	fib      *fib.Builder
	problems []string
	failures []*controlv1.EntryFailure
	offLink  []string // members that are not on the uplink's link
	noMAC    []string // members without an Ethernet address
	failed   int      // entries that the table refused, beyond those spelled out
}

// maxSpelled is how many problems of one kind are spelled out.
const maxSpelled = 4

func (b *builder) problem(format string, args ...any) {
	b.problems = append(b.problems, fmt.Sprintf(format, args...))
}

func (b *builder) fail(kind, key, reason string) {
	b.failures = append(b.failures, &controlv1.EntryFailure{Kind: kind, Key: key, Reason: reason})
}

func (b *builder) ports() []dataplane.PortInfo {
	in := &b.in
	n := dataplane.FirstPodSlot
	for i := range in.Pods {
		n = max(n, in.Pods[i].Slot+1)
	}
	ports := make([]dataplane.PortInfo, n)
	ports[dataplane.UplinkSlot] = dataplane.PortInfo{Kind: dataplane.PortUplink, Port: in.Uplink, Name: in.Facts.Name, MAC: in.Facts.MAC}
	ports[dataplane.HostSlot] = dataplane.PortInfo{Kind: dataplane.PortHost, Port: in.Host, Name: in.HostName, MAC: HostMAC}
	for i := range in.Pods {
		p := &in.Pods[i]
		ports[p.Slot] = dataplane.PortInfo{
			Kind: dataplane.PortPod, Port: p.Port, Name: p.Name, MAC: p.MAC,
			Addr4: packet.AddrFrom(p.Addr4), Addr6: packet.AddrFrom(p.Addr6),
		}
	}
	return ports
}

// adjacency registers a next hop.
func (b *builder) adjacency(dst, src packet.MAC, slot, mtu int) uint32 {
	i, err := b.fib.AddAdjacency(fib.Adjacency{Dst: dst, Src: src, Port: uint16(slot), MTU: uint16(min(max(mtu, 0), math.MaxUint16))})
	if err != nil {
		b.refused(err)
	}
	return i
}

func (b *builder) add(p netip.Prefix, kind fib.Kind, adjacency uint32) {
	if err := b.fib.Add(p, fib.MakeEntry(kind, adjacency)); err != nil {
		b.refused(err)
		b.fail("route", p.String(), err.Error())
	}
}

func (b *builder) refused(err error) {
	if b.failed++; b.failed <= maxSpelled {
		b.problem("a route cannot be programmed: %v", err)
	}
}

func (b *builder) hostAdjacency() uint32 {
	return b.adjacency(HostMAC, GatewayMAC, dataplane.HostSlot, b.in.PodMTU)
}

// own routes the node's own addresses to its kernel.
func (b *builder) own() {
	host := b.hostAdjacency()
	for _, a := range ownAddresses(b.in.Facts, b.in.Node4, b.in.Node6) {
		b.add(netip.PrefixFrom(a, a.BitLen()), fib.Host, host)
	}
}

func (b *builder) pods() {
	for i := range b.in.Pods {
		p := &b.in.Pods[i]
		adj := b.adjacency(p.MAC, GatewayMAC, p.Slot, b.in.PodMTU)
		for _, a := range []netip.Addr{p.Addr4, p.Addr6} {
			if a.IsValid() {
				b.add(netip.PrefixFrom(a, a.BitLen()), fib.Pod, adj)
			}
		}
	}
}

// hop is how one member is reached, by family.
type hop struct {
	via4, via6 uint32
	ok4, ok6   bool
}

// desired programs routes and members.
func (b *builder) desired() {
	d := b.in.state
	hops := make([]hop, len(d.members))
	gateways := b.gatewayHops()
	own := -1
	for i := range d.members {
		if d.members[i].name == b.in.Node {
			own = i
			b.checkOwn(&d.members[i])
			continue
		}
		if b.in.Routed {
			hops[i] = gateways
			continue
		}
		hops[i] = b.directHop(&d.members[i])
	}
	host := b.hostAdjacency()
	for i := range d.routes {
		r := &d.routes[i]
		switch {
		case r.target == toHost:
			b.add(r.prefix, fib.Host, host)
		case r.target == toNowhere:
			b.add(r.prefix, fib.Unreachable, 0)
		case r.member == own:
			// The node's own blocks answer by themselves: pods, else unreachable.
		default:
			h := &hops[r.member]
			via, ok := h.via6, h.ok6
			if r.prefix.Addr().Is4() {
				via, ok = h.via4, h.ok4
			}
			if ok {
				b.add(r.prefix, fib.Node, via)
			} else {
				b.add(r.prefix, fib.Unreachable, 0)
			}
		}
	}
	for i := range d.members {
		if i == own {
			continue
		}
		m, h := &d.members[i], &hops[i]
		if m.addr4.IsValid() && h.ok4 {
			b.add(netip.PrefixFrom(m.addr4, 32), fib.Member, h.via4)
		}
		if m.addr6.IsValid() && h.ok6 {
			b.add(netip.PrefixFrom(m.addr6, 128), fib.Member, h.via6)
		}
	}
}

// checkOwn compares what the cluster believes of this node with what it is: other nodes send to what the cluster believes.
func (b *builder) checkOwn(m *member) {
	f := &b.in.Facts
	if !b.in.Routed && m.mac != (packet.MAC{}) && m.mac != f.MAC {
		b.problem("the desired state has Ethernet address %s for this node, but uplink %s has %s: other nodes cannot reach it", formatMAC(m.mac), f.Name, formatMAC(f.MAC))
	}
	for _, a := range []netip.Addr{m.addr4, m.addr6} {
		if a.IsValid() && !slices.Contains(ownAddresses(*f, b.in.Node4, b.in.Node6), a) {
			b.problem("the desired state has address %s for this node, but uplink %s has %s", a, f.Name, prefixList(f.Addresses))
		}
	}
}

// directHop is the member's own Ethernet address, which serves both families: one link carries both.
func (b *builder) directHop(m *member) hop {
	if !onLink(b.in.Facts, m.addr4) && !onLink(b.in.Facts, m.addr6) {
		b.offLink = append(b.offLink, m.name)
		b.fail("member", m.name, "it is on another link than the uplink")
		return hop{}
	}
	if m.mac == (packet.MAC{}) {
		b.noMAC = append(b.noMAC, m.name)
		b.fail("member", m.name, "its Ethernet address is not known")
		return hop{}
	}
	adj := b.adjacency(m.mac, b.in.Facts.MAC, dataplane.UplinkSlot, b.in.UplinkMTU)
	return hop{via4: adj, via6: adj, ok4: true, ok6: true}
}

// gatewayHops reaches everything by the gateways. A family without a gateway takes the other's: on a routed underlay it is
// one fabric, and packets are told apart by their own headers. While a gateway's Ethernet address is unknown, what it leads to is unreachable, as RFC 1812
// section 5.3.3 has it for a next hop that does not answer.
func (b *builder) gatewayHops() hop {
	f := &b.in.Facts
	mac4, mac6 := f.GatewayMAC4, f.GatewayMAC6
	if !f.Gateway4.IsValid() {
		mac4 = mac6
	}
	if !f.Gateway6.IsValid() {
		mac6 = mac4
	}
	var h hop
	if h.ok4 = mac4 != (packet.MAC{}); h.ok4 {
		h.via4 = b.toGateway(mac4)
	}
	if h.ok6 = mac6 != (packet.MAC{}); h.ok6 {
		h.via6 = b.toGateway(mac6)
	}
	return h
}

func (b *builder) toGateway(mac packet.MAC) uint32 {
	return b.adjacency(mac, b.in.Facts.MAC, dataplane.UplinkSlot, b.in.UplinkMTU)
}

// outside is the way out of the cluster, for each family that has a gateway.
func (b *builder) outside() {
	f := &b.in.Facts
	needed := b.in.Routed || b.in.state != nil
	for _, g := range []struct {
		gateway netip.Addr
		mac     packet.MAC
		all     netip.Addr
	}{{f.Gateway4, f.GatewayMAC4, netip.IPv4Unspecified()}, {f.Gateway6, f.GatewayMAC6, netip.IPv6Unspecified()}} {
		switch {
		case !g.gateway.IsValid():
		case g.mac != (packet.MAC{}):
			b.add(netip.PrefixFrom(g.all, 0), fib.Outside, b.toGateway(g.mac))
		case needed:
			b.problem("gateway %s does not answer on uplink %s: what it leads to is unreachable", g.gateway, f.Name)
		}
	}
	if b.in.Routed && !f.Gateway4.IsValid() && !f.Gateway6.IsValid() {
		b.problem("underlay is routed, but uplink %s has no default route: no other node can be reached", f.Name)
	}
}

func (b *builder) summarise() {
	if n := len(b.offLink); n > 0 {
		b.problem("members on another link than uplink %s (%s): %s; their pods are unreachable: needs %sUNDERLAY=routed, and a fabric that carries routes for the pod CIDRs",
			b.in.Facts.Name, prefixList(b.in.Facts.Addresses), someOf(b.offLink), EnvPrefix)
	}
	if n := len(b.noMAC); n > 0 {
		b.problem("members without an Ethernet address: %s; their pods are unreachable: an underlay of kind direct needs the mac of every member", someOf(b.noMAC))
	}
	if b.failed > maxSpelled {
		b.problem("%d more routes cannot be programmed", b.failed-maxSpelled)
	}
}

func someOf(names []string) string {
	if len(names) <= maxSpelled {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:maxSpelled], ", "), len(names)-maxSpelled)
}

func prefixList(list []netip.Prefix) string {
	if len(list) == 0 {
		return "no addresses"
	}
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return strings.Join(out, ", ")
}

// onLink reports whether the address is in one of the uplink's subnets.
func onLink(f Facts, a netip.Addr) bool {
	if !a.IsValid() {
		return false
	}
	for _, p := range f.Addresses {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// primaryAddresses are the addresses the node is known by: the configured ones, else the uplink's primary or first of each family.
func primaryAddresses(f Facts, node4, node6 netip.Addr) (a4, a6 netip.Addr) {
	a4, a6 = f.Primary4, f.Primary6
	for _, p := range f.Addresses {
		switch a := p.Addr(); {
		case a.Is4() && !a4.IsValid():
			a4 = a
		case a.Is6() && !a6.IsValid():
			a6 = a
		}
	}
	if node4.IsValid() {
		a4 = node4
	}
	if node6.IsValid() {
		a6 = node6
	}
	return a4, a6
}

// ownAddresses are all of the node's addresses that pods may reach it by, without repetition.
func ownAddresses(f Facts, node4, node6 netip.Addr) []netip.Addr {
	var out []netip.Addr
	add := func(a netip.Addr) {
		if a.IsValid() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, p := range f.Addresses {
		add(p.Addr())
	}
	add(node4)
	add(node6)
	return out
}
