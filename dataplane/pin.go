package dataplane

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/snat"
)

// Services are translated by the node's kernel (kube-proxy's rules): a pod's packet to a service goes there by the host port, and comes back by it with another pod as its
// destination; so does what reaches a node port from outside. Its source is then not the node's, and the reply would go past the kernel, which alone can take the translation back:
//
//	pod ---- to a service ----> kernel ---- to a pod, with the first one's address ----> pod, here or on another node
//	    <-- from the service --        <--------------- pinned: not to the pod --------
//
// So the flow is pinned (package snat): its replies go to the host port, whatever their destination is. One that the kernel gave the node's address needs no pin, except
// with a port of the translated range.

// serviceFlow reports whether a packet from the host port, with a source that is not the node's, may be one that the kernel translated: it goes to a pod of this node,
// or comes from one, so that its reply comes by here.
func serviceFlow(s *Snapshot, p *packet.Packet) bool {
	return !linkLocal(p.Src) && (s.FIB.Lookup(p.Dst).Kind() == fib.Pod || s.FIB.Lookup(p.Src).Kind() == fib.Pod)
}

// needsPin reports whether the replies to a packet from the host port would not find back by themselves. A fragment without ports follows its first.
func needsPin(s *Snapshot, t *snat.Translator, p *packet.Packet) bool {
	if p.Flags&(packet.FlagFragment|packet.FlagFirst) == packet.FlagFragment {
		return false
	}
	if s.isNode(p.Src) {
		return t.Ours(p.Proto, p.SrcPort)
	}
	return s.FIB.Lookup(p.Src).Kind() != fib.Host
}

// decidePinned decides on a packet that may be the reply to a pinned flow. It reports whether that is all there is to decide: it goes to the kernel, to the worker that
// knows, waits, or died.
func decidePinned(s *Snapshot, t *snat.Translator, in *PortInfo, p *packet.Packet, frame []byte, size uint32, v *Verdict) bool {
	if p.Flags&packet.FlagFragment != 0 {
		pod := snat.NoPod
		if in.Kind == PortPod {
			pod = in.Pod
		}
		if !decideFragment(t, pod, p, v) {
			return true
		}
	}
	if !decideOwner(t, t.OwnerOut(p, frame), v) {
		return true
	}
	if t.Pinned(p, frame, &v.View); v.View.Action != snat.ToHost {
		if v.Fragmented {
			v.Translation = TrackFragment
		}
		return false
	}
	if in.Kind == PortUplink && s.FIB.Lookup(p.Src).Kind() == fib.Member {
		v.Translation, v.Action = TranslateOut, Return // the kernel's way to another node is the uplink: strict reverse path filtering wants it from there
		return true
	}
	host := s.hostRoute(p.Kind)
	if host.Kind() != fib.Host {
		v.Reason = drop.NATNoAddress
		return true
	}
	v.Translation, v.Adjacency = TranslateOut, host.Adjacency() // of a pin, which changes nothing but keeps it
	decideSize(s, p, size, v)
	return true
}

// hostRoute is the way to the node's kernel.
func (s *Snapshot) hostRoute(k packet.Kind) fib.Entry {
	if k == packet.KindIPv6 {
		return s.FIB.Lookup(s.Node6)
	}
	return s.FIB.Lookup(s.Node4)
}

// accountedPod is the pod that a flow from the host port counts against: the one it comes from, or goes to.
func (w *Worker) accountedPod(p *packet.Packet) int {
	for _, a := range [2]packet.Addr{p.Src, p.Dst} {
		if e := w.snap.FIB.Lookup(a); e.Kind() == fib.Pod {
			return w.snap.Ports[w.snap.FIB.Adjacency(e.Adjacency()).Port].Pod
		}
	}
	return snat.NoPod
}
