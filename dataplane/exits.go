package dataplane

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
)

// sendError sends the source of a packet the ICMP error its verdict names, within the budget. The packet is borrowed and dies with its own reason.
func (w *Worker) sendError(v *Verdict, p *packet.Packet, in *PortInfo, f *port.Frame) {
	s := w.snap
	back := s.FIB.Lookup(p.Src)
	if in.Kind == PortHost { // also about what the kernel sent for others: it knows whom to tell
		back = s.hostRoute(p.Kind)
	}
	switch back.Kind() {
	case fib.Pod, fib.Node, fib.Member, fib.Host:
	case fib.Outside: // about a packet that was for a pod by the node's address
		if in.Kind != PortUplink {
			w.icmpRefused++
			return
		}
	default:
		w.icmpRefused++
		return
	}
	source := s.Node4
	if p.Kind == packet.KindIPv6 {
		source = s.Node6
	}
	if in.Kind == PortHost { // the kernel takes no packet from its own address; the unreachable destination itself has a route back
		source = p.Dst
	}
	if source == (packet.Addr{}) || !w.limiter.Allow(w.now, p.Src) {
		w.icmpRefused++
		return
	}
	e, ok := w.pool.Alloc()
	if !ok {
		w.icmpRefused++
		return
	}
	n, ok := icmp.Build(w.pool.Buffer(&e), v.Error, int(v.MTU), source, p, w.pool.Bytes(f))
	if !ok {
		w.icmpRefused++
		w.pool.Free(e)
		return
	}
	e.Len = uint32(n)
	adj := s.FIB.Adjacency(back.Adjacency())
	b := w.pool.Bytes(&e)
	*(*packet.MAC)(b[0:6]), *(*packet.MAC)(b[6:12]) = adj.Dst, adj.Src
	w.icmpErrors[v.Error]++
	w.sendMade(w.slots[adj.Port], e)
}

// answer replies to what was for the data plane itself: ARP, neighbour discovery and ping for the gateway. The request is consumed.
func (w *Worker) answer(in *slot, p *packet.Packet, chain []port.Frame) {
	s, request := w.snap, w.pool.Bytes(&chain[0])
	counter := &w.answers.Echo
	reply, ok := w.pool.Alloc()
	if !ok {
		w.dropIn(in, drop.NoFrame, chain)
		return
	}
	n, buffer := 0, w.pool.Buffer(&reply)
	switch {
	case p.Kind == packet.KindARP:
		counter = &w.answers.ARP
		n, ok = packet.ARPReply(buffer, request, p, s.Gateway4, s.GatewayMAC)
	case p.Flags&packet.FlagND != 0:
		counter = &w.answers.ND
		n, ok = packet.NDReply(buffer, request, p, s.Gateway6, s.GatewayMAC)
	case len(chain) == 1:
		n, ok = packet.EchoReply(buffer, request, p)
	default:
		ok = false
	}
	if !ok {
		w.pool.Free(reply)
		if p.Reason != drop.None {
			w.dropIn(in, p.Reason, chain)
			return
		}
		w.answers.Ignored++
		w.pool.FreeAll(chain)
		return
	}
	w.pool.FreeAll(chain)
	*counter++
	reply.Len = uint32(n)
	w.sendMade(in, reply)
}

// sendMade queues a packet that the worker made itself.
func (w *Worker) sendMade(out *slot, f port.Frame) {
	w.generated++
	w.made[0] = f
	if out.tx == nil {
		w.dropOut(out, drop.PortDown, w.made[:1], 1)
		return
	}
	w.push(out, w.made[:1])
}

// dropIn ends a packet of one segment that never got as far as a port.
func (w *Worker) dropIn(in *slot, reason drop.Reason, chain []port.Frame) {
	in.dropsIn[reason]++
	w.pool.FreeAll(chain)
}
