// Package dataplane forwards packets between a node's uplink, its pods and its kernel.
//
// This page is a packet's journey; read it from top to bottom. A [Worker] receives a batch of packets from one port and takes them
// through these stages, the whole batch through each:
//
//	parse    what is it?                                         packet.Parse: a value, malformed or not
//	decide   who sent it, where to, does it fit?                 Decide: a function of (snapshot, sessions, port, packet) without side effects
//	execute  rewrite it and put it into the queue of its port    or answer it, fragment it, drop it with its one reason
//	         translated first, if it leaves the cluster or
//	         comes back                                          translate.go; what a session is, package snat
//	flush    hand each touched port what is queued for it        once a batch
//
// Every packet ends in exactly one of: sent to a port (the host's is one), answered, one drop reason. ICMP errors leave by a second exit
// with a budget of its own (exits.go). What a port cannot take as it is — a GSO frame, an unfinished checksum — is done on the way into its
// queue (egress.go). The shared tables are one immutable [Snapshot] behind an atomic pointer (snapshot.go); loop, parking and counters are in worker.go
// and stats.go.
package dataplane

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// forward takes the frames received from one port through their journey. It owns them from here.
func (w *Worker) forward(in *slot, frames []port.Frame) {
	n := w.parse(in, frames)
	if w.completing {
		w.complete(n)
	}
	w.decide(in, n)
	w.execute(in, frames, n)
	w.flush()
}

// parse fills journeys[:n], up to the verdicts.
func (w *Worker) parse(in *slot, frames []port.Frame) (n int) {
	w.fetch(frames)
	var traffic Traffic // in registers, not in memory, while the batch is counted
	for i := 0; i < len(frames); n++ {
		f, j := &frames[i], &w.journeys[n]
		total := int(f.Len)
		j.first, j.frames = uint16(i), 1
		if f.Flags&port.More != 0 {
			bytes, frames := port.PacketLen(frames[i:])
			total, j.frames = bytes, uint16(frames)
		}
		i += int(j.frames)
		packet.Parse(&j.packet, w.pool.Bytes(f), total)
		j.size, j.segments = j.packet.Length, 1
		if !f.Offload.IsZero() {
			w.parseOffload(j, j.chain(frames), total)
		}
		traffic.Frames++
		traffic.Packets += uint64(j.segments)
		traffic.Bytes += uint64(total)
	}
	in.in.add(&traffic)
	w.received += traffic.Packets
	return n
}

// fetch loads the first line of every frame. The loads depend on nothing, so that the memory works on all of them at once, where Parse
// would wait for one after the other.
func (w *Worker) fetch(frames []port.Frame) {
	memory, sum := w.pool.Memory(), byte(0)
	for i := range frames {
		sum += memory[frames[i].Off]
	}
	w.fetched = sum
}

// decide fills in the verdicts of journeys[:n].
func (w *Worker) decide(in *slot, n int) {
	w.prefetch(in.info, n)
	for i := range w.journeys[:n] {
		j := &w.journeys[i]
		Decide(w.snap, w.translator, in.info, &j.packet, w.pool.Bytes(&w.batch[j.first]), j.size, &j.verdict)
	}
}

// execute does to each packet what was decided.
func (w *Worker) execute(in *slot, frames []port.Frame, n int) {
	for i := range w.journeys[:n] {
		j := &w.journeys[i]
		v, p, chain := &j.verdict, &j.packet, j.chain(frames)
		if v.Translation != NoTranslation && v.Reason == drop.None && !w.translate(in, j, chain) {
			continue
		}
		switch v.Action {
		case Forward:
			adj := w.snap.FIB.Adjacency(v.Adjacency)
			w.rewrite(v, adj, p, &chain[0])
			w.enqueue(w.slots[adj.Port], j, i, chain)
		case Fragment:
			adj := w.snap.FIB.Adjacency(v.Adjacency)
			w.rewrite(v, adj, p, &chain[0])
			w.fragment(w.slots[adj.Port], int(adj.MTU), p, chain)
		case Answer:
			w.answer(in, p, chain)
		case HandOver:
			w.handOver(in, j, chain)
		case Return:
			w.enqueue(w.slots[HostSlot], j, i, chain)
		default:
			if v.Error != icmp.None {
				w.sendError(v, p, in.info, &chain[0])
			}
			in.dropsIn[v.Reason] += uint64(j.segments)
			w.pool.FreeAll(chain)
		}
	}
}

// Action is what becomes of a packet.
type Action uint8

// The actions.
const (
	Drop     Action = iota // it dies of Verdict.Reason; Verdict.Error, if any, is sent to its source
	Forward                // it leaves by Verdict.Adjacency
	Fragment               // the same, in fragments of the adjacency's MTU
	Answer                 // the data plane is its destination: ARP, neighbour discovery, ping of the gateway
	Return                 // it is the node's own: back as it came, by the host port to where the uplink's packets enter the kernel
	Wait                   // a fragment whose datagram's first has not come yet
	HandOver               // it belongs to a session, or a datagram, of the worker Verdict.Owner
)

// Translation is how a packet's addresses change before it goes its way.
type Translation uint8

// The translations. Verdict.Action is what follows; a packet with a Reason is not translated.
const (
	NoTranslation    Translation = iota
	TranslateOut                 // the source becomes the node's, by Verdict.View
	TranslateIn                  // the destination becomes the pod's, by Verdict.View
	TranslateHairpin             // both: from a pod to another by the node's address. Where it leads is known only afterwards
	TrackFragment                // neither, but others of its datagram will ask
	MakePin                      // neither, but replies go back to the node's kernel, which translated the packet: pin.go
)

// Verdict is the decision on one packet, and what translation said on the way to it.
type Verdict struct {
	Decision
	View     snat.View         // set by TranslateOut, TranslateIn and TranslateHairpin
	Fragment snat.FragmentView // set if Decision.Fragmented
}

// Decision is what becomes of one packet.
type Decision struct {
	Adjacency uint32 // index in the snapshot's FIB; Forward and Fragment
	Action    Action
	Reason    drop.Reason // Drop
	Error     icmp.Error  // Drop: the ICMP error its source deserves, or icmp.None
	Decrement bool        // the packet is routed here: its TTL or hop limit goes down by one
	MTU       uint16      // Drop: the MTU to tell with fragment needed and packet too big

	Translation Translation
	Fragmented  bool  // Verdict.Fragment says what the fragment is part of
	Owner       uint8 // HandOver: index of the worker
}

// Decide decides on a packet that came in from a port: side-effect free, so that the same code forwards, explains and replays. t is asked about sessions; nil: nothing is
// translated. p was parsed from frame, the packet's first buffer; ports that a fragment lacks are filled in. size is the length of the largest IP packet the frame stands
// for: its own, or that of a GSO frame's segments. The decision is overwritten.
func Decide(s *Snapshot, t *snat.Translator, in *PortInfo, p *packet.Packet, frame []byte, size uint32, v *Verdict) {
	v.Decision = Decision{}
	if p.Reason != drop.None {
		v.Reason = p.Reason
		return
	}
	if p.EthDst != s.ethernetAddress(in) || p.Kind == packet.KindARP || p.Flags&(packet.FlagND|packet.FlagMulticast) != 0 {
		decideLink(s, in, p, v)
		return
	}

	dst := p.Dst
	if in.Kind == PortUplink && t != nil && s.isNode(dst) {
		if decideInbound(s, t, p, frame, v); v.Translation == TranslateIn {
			dst = v.View.Addr
		} else if v.Action != Drop || v.Reason != drop.None {
			return
		}
	}

	if v.Translation != TranslateIn && (in.Kind != PortPod || p.Src != in.Addr4 && p.Src != in.Addr6) {
		if v.Reason = sourceAllowed(s, t, in, p); v.Reason != drop.None {
			if linkLocal(p.Src) {
				decideLink(s, in, p, v)
			}
			return
		}
	}

	if t != nil && in.Kind != PortHost && v.Translation == NoTranslation && t.MayBePinned(p, frame) && decidePinned(s, t, in, p, frame, size, v) {
		return
	}

	route := s.FIB.Lookup(dst)
	switch route.Kind() {
	case fib.Pod:
	case fib.Node:
		if in.Kind == PortUplink { // we are the owner of our blocks, not a way to others'
			v.Reason = drop.HairpinUplink
			return
		}
	case fib.Host:
		if in.Kind == PortHost {
			v.Reason = drop.DestinationNotOurs
			return
		}
		if in.Kind == PortPod && t != nil && s.isNode(dst) {
			if decideHairpin(t, in, p, frame, v); v.Translation == TranslateHairpin || v.Reason != drop.None || v.Action != Drop {
				return
			}
		}
	case fib.Member:
		if in.Kind == PortUplink || in.Kind == PortHost && s.FIB.Lookup(p.Src).Kind() != fib.Pod {
			v.Reason = drop.DestinationNotOurs
			return
		}
		if t != nil && in.Kind == PortPod && !s.NoSNAT && s.SNAT.Translate(dst) {
			if decideOutbound(s, t, in, p, frame, v); v.Reason != drop.None || v.Action != Drop {
				return
			}
		}
	case fib.Outside:
		if decideOutside(s, t, in, p, frame, v); v.Reason != drop.None || v.Action != Drop {
			return
		}
	default:
		v.Reason, v.Error = drop.Unreachable, icmp.HostUnreachable
		return
	}

	// The host's kernel and the data plane are one router: what one hands to the other was or will be counted as a hop by one of them.
	if in.Kind != PortHost && route.Kind() != fib.Host {
		if p.TTL <= 1 {
			v.Reason, v.Error = drop.HopLimitExceeded, icmp.TimeExceeded
			return
		}
		v.Decrement = true
	}

	if v.Adjacency = route.Adjacency(); !decideSize(s, p, size, v) {
		return
	}
	if !policyAllows(s, in, p) {
		v.Action, v.Reason, v.Error = Drop, drop.PolicyDenied, icmp.AdminProhibited
		return
	}
	if in.Kind == PortHost && t != nil && needsPin(s, t, p) && decideOwner(t, t.OwnerPin(p), v) {
		v.Translation = MakePin
	}
}

// decideSize lets a packet go by Verdict.Adjacency, in fragments if need be, and reports whether it may.
func decideSize(s *Snapshot, p *packet.Packet, size uint32, v *Verdict) bool {
	v.Action = Forward
	if mtu := s.FIB.Adjacency(v.Adjacency).MTU; size > uint32(mtu) {
		if p.Flags&packet.FlagDF != 0 || size != p.Length { // a GSO frame's sender chose the size of its segments and knows how to choose another
			v.Action, v.Reason, v.Error, v.MTU = Drop, drop.TooBig, icmp.PacketTooBig, mtu
			return false
		}
		v.Action = Fragment
	}
	return true
}

// isNode reports whether the address is one of those that pods' packets leave the cluster with.
func (s *Snapshot) isNode(a packet.Addr) bool { return a == s.Node4 || a == s.Node6 }

// ethernetAddress is what frames received from the port must be addressed to.
func (s *Snapshot) ethernetAddress(in *PortInfo) packet.MAC {
	if in.Kind == PortUplink {
		return in.MAC
	}
	return s.GatewayMAC
}

// sourceAllowed says what is wrong with the packet's source, if anything. Pods may send only from their own addresses, the host only from its
// own unless it is a service's flow, and others by the uplink only what the route back to them would return to the same Ethernet address (RFC 3704, strict reverse path): other nodes,
// and who outside the cluster sees pods' own addresses.
func sourceAllowed(s *Snapshot, t *snat.Translator, in *PortInfo, p *packet.Packet) drop.Reason {
	switch in.Kind {
	case PortPod: // Decide has compared the addresses
		return drop.SourceNotPods
	case PortUplink:
		back := s.FIB.Lookup(p.Src)
		if k := back.Kind(); (k == fib.Node || k == fib.Member || k == fib.Outside && (s.NoSNAT || !s.SNAT.Translate(p.Src))) &&
			s.FIB.Adjacency(back.Adjacency()).Dst == p.EthSrc {
			return drop.None
		}
		return drop.SourceNotMember
	default:
		if s.FIB.Lookup(p.Src).Kind() == fib.Host || t != nil && serviceFlow(s, p) {
			return drop.None
		}
		return drop.SourceNotHosts
	}
}

// decideOutside decides on a packet for an address that is nobody's in the cluster. It leaves Reason and Action alone if the packet may leave.
func decideOutside(s *Snapshot, t *snat.Translator, in *PortInfo, p *packet.Packet, frame []byte, v *Verdict) {
	switch {
	case in.Kind != PortPod && !linkLocal(p.Dst):
		v.Reason = drop.DestinationNotOurs
	case linkLocal(p.Dst):
		decideLink(s, in, p, v)
	case s.NoSNAT:
	case t == nil:
		v.Reason, v.Error = drop.OutsideNoSNAT, icmp.AdminProhibited
	default:
		decideOutbound(s, t, in, p, frame, v)
	}
}

// decideOutbound decides how a pod's packet leaves the cluster: with the node's address, unless the rules let it go as it is and no session says otherwise. It leaves
// Reason and Action alone if the packet may leave.
func decideOutbound(s *Snapshot, t *snat.Translator, in *PortInfo, p *packet.Packet, frame []byte, v *Verdict) {
	plain := !s.SNAT.Translate(p.Dst)
	if p.Flags&packet.FlagFragment != 0 {
		if plain || !decideFragment(t, in.Pod, p, v) {
			return
		}
	}
	if !decideOwner(t, t.OwnerOut(p, frame), v) {
		return
	}
	t.Outbound(p, frame, in.Pod, &v.View)
	switch {
	case v.View.Action == snat.Translate, v.View.Action == snat.Create && !plain:
		v.Translation = TranslateOut
	case plain:
	case v.View.Action == snat.Refuse:
		v.Reason = v.View.Reason
		if v.View.Unreachable {
			v.Error = icmp.AdminProhibited
		}
	default: // a pinned flow's reply, which Decide has asked about before
		v.Reason = drop.NATNoSession
	}
}

// decideInbound decides on a packet from the uplink for the node's own address: to a pod if a session says so, to the kernel if it is none of ours. It leaves Reason and
// Action alone if the packet is translated, or comes from another node's pod and goes on as any of those.
func decideInbound(s *Snapshot, t *snat.Translator, p *packet.Packet, frame []byte, v *Verdict) {
	if t.MayBePinned(p, frame) && s.fromCluster(p) {
		return // to the kernel, pinned or not: Decide asks
	}
	if p.Flags&packet.FlagFragment != 0 && !s.fromCluster(p) && !decideFragment(t, snat.NoPod, p, v) {
		if v.Action == Drop { // too many are under way: it may be the kernel's, which has limits of its own
			v.Action, v.Reason = Return, drop.None
		}
		return
	}
	if !decideOwner(t, t.OwnerIn(p, frame), v) {
		return
	}
	t.Inbound(p, frame, &v.View)
	switch v.View.Action {
	case snat.Translate:
		v.Translation = TranslateIn
	case snat.Refuse:
		v.Reason = v.View.Reason
	default:
		if !s.fromCluster(p) {
			v.Action = Return
			if v.Fragmented {
				v.Translation = TrackFragment
			}
		}
	}
}

// fromCluster reports whether a packet from the uplink says that it comes from another node's pod.
func (s *Snapshot) fromCluster(p *packet.Packet) bool { return s.FIB.Lookup(p.Src).Kind() == fib.Node }

// decideHairpin decides on a packet from a pod for the node's address: to an external port it goes to the pod behind that, as if it had been outside meanwhile (RFC 4787
// REQ-9), all else is the kernel's, and Reason and Translation are left alone.
func decideHairpin(t *snat.Translator, in *PortInfo, p *packet.Packet, frame []byte, v *Verdict) {
	if p.Flags&packet.FlagFragment != 0 {
		return
	}
	ours := t.Ours(p.Proto, p.DstPort)
	if (ours || isICMPError(p)) && !decideOwner(t, t.OwnerOut(p, frame), v) {
		return
	}
	switch {
	case (p.Proto == packet.ProtoTCP || p.Proto == packet.ProtoUDP) && ours:
		t.Outbound(p, frame, in.Pod, &v.View)
		if v.View.Action == snat.Refuse {
			v.Reason = v.View.Reason
			return
		}
		v.Translation = TranslateHairpin
	case isICMPError(p): // about what came by hairpin, perhaps
		if t.Outbound(p, frame, in.Pod, &v.View); v.View.Action == snat.Translate && v.View.IsError() {
			v.Translation = TranslateHairpin
		}
	}
}

// isICMPError reports whether the packet is an ICMP error, in the range of types that all of them are in.
func isICMPError(p *packet.Packet) bool {
	return p.Proto == packet.ProtoICMP && p.ICMPType >= 3 && p.ICMPType <= 12 && p.ICMPType != 8 || p.Proto == packet.ProtoICMPv6 && p.ICMPType >= 1 && p.ICMPType <= 4
}

// decideOwner reports whether a session is this worker's. If not, the packet goes to its owner, a fragment after it was tracked here.
func decideOwner(t *snat.Translator, owner int, v *Verdict) bool {
	if owner == t.Worker() {
		return true
	}
	v.Action, v.Owner = HandOver, uint8(owner)
	if v.Fragmented {
		v.Translation = TrackFragment
	}
	return false
}

// decideFragment asks which datagram a fragment belongs to, and reports whether its ports are known. If not, it waits, or dies of Reason.
func decideFragment(t *snat.Translator, pod int, p *packet.Packet, v *Verdict) bool {
	if p.Flags&packet.FlagCompleted != 0 {
		return true // another worker knew
	}
	if owner := t.OwnerOfFragment(p); owner != t.Worker() {
		v.Action, v.Owner = HandOver, uint8(owner)
		return false
	}
	v.Fragmented = true
	t.Fragment(p, pod, &v.Fragment)
	switch v.Fragment.Action {
	case snat.FragmentPass:
		return true
	case snat.FragmentHold:
		v.Action, v.Translation = Wait, TrackFragment
	default:
		v.Reason, v.Fragmented = v.Fragment.Reason, false
	}
	return false
}

// decideLink decides on what does not leave its link: ARP, neighbour discovery, link-local and multicast destinations, frames that are not for us.
func decideLink(s *Snapshot, in *PortInfo, p *packet.Packet, v *Verdict) {
	toGateway := p.Dst == s.Gateway4 || p.Dst == s.Gateway6
	echo := p.Flags&packet.FlagL4 != 0 && (p.Proto == packet.ProtoICMP && p.ICMPType == 8 || p.Proto == packet.ProtoICMPv6 && p.ICMPType == 128)
	switch {
	case in.Kind == PortUplink: // the steering program sends us none of it
		v.Reason = drop.EthNotForUs
	case p.Kind == packet.KindARP || p.Flags&packet.FlagND != 0:
		v.Action, v.Reason = Answer, drop.None
	case p.Flags&packet.FlagMulticast != 0:
		v.Reason = drop.IPMulticast
	case p.EthDst != s.GatewayMAC:
		v.Reason = drop.EthNotForUs
	case toGateway && echo:
		v.Action, v.Reason = Answer, drop.None
	default:
		v.Reason = drop.LinkLocal
	}
}

// linkLocal reports whether the address is in 169.254.0.0/16 (RFC 3927) or fe80::/10 (RFC 4291).
func linkLocal(a packet.Addr) bool {
	if a.Is4() {
		return a.V4()>>16 == 0xa9fe
	}
	return a.Hi>>54 == 0xfe80>>6
}

// policyAllows is where network policy will be asked. It allows everything.
func policyAllows(*Snapshot, *PortInfo, *packet.Packet) bool { return true }
