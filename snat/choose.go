package snat

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// leases is what a translator knows of the chunks of a class that its worker holds.
type leases struct {
	shift uint
	first uint16
	refs  []uint32 // ports in use, once for each session (or mapping) and family
	idle  []uint32 // tick since when refs is 0
	held  []bool
}

func newLeases(a *Allocator) leases {
	return leases{shift: a.shift, first: a.cfg.First, refs: make([]uint32, a.chunks), idle: make([]uint32, a.chunks), held: make([]bool, a.chunks)}
}

func (l *leases) chunkOf(port uint16) int { return int(port-l.first) >> l.shift }

// take notes a chunk just leased.
func (l *leases) take(c int, tick uint32) { l.held[c], l.refs[c], l.idle[c] = true, 0, tick }

// give notes a chunk returned.
func (l *leases) give(c int) { l.held[c] = false }

// hold keeps the chunk of a port that a session uses.
func (t *Translator) hold(class Class, port uint16) {
	l := &t.ports[class]
	l.refs[l.chunkOf(port)]++
}

// release is the reverse, and lets the port rest if it must.
func (t *Translator) release(class Class, port uint16, rest bool) {
	l := &t.ports[class]
	c := l.chunkOf(port)
	if l.refs[c]--; l.refs[c] == 0 {
		l.idle[c] = t.tick
	}
	if rest {
		t.alloc.portRest[class][port-l.first] = tickAfter(t.now+int64(t.cfg.Timers.PortRest)) | 1
	}
}

// checkChunks looks at n chunks and returns those that were not used for long, or that others want.
func (t *Translator) checkChunks(n int) {
	a := t.alloc
	for range n {
		if t.check++; t.check >= a.chunks*int(NumClasses) {
			t.check = 0
		}
		class, c := Class(t.check/a.chunks), t.check%a.chunks
		l := &t.ports[class]
		if !l.held[c] || l.refs[c] != 0 {
			continue
		}
		wanted := t.tick-a.short.Load() <= 4 && t.tick != l.idle[c]
		if !wanted && int64(t.tick-l.idle[c])<<tickShift < a.cfg.ChunkIdle {
			continue
		}
		pod := int(a.owners[class][c].Load() & 0xffff)
		list := t.pods[pod].chunks[class]
		for i, x := range list {
			if int(x) == c {
				list[i] = list[len(list)-1]
				t.pods[pod].chunks[class] = list[:len(list)-1]
				break
			}
		}
		l.give(c)
		a.giveBack(class, c, t.cfg.Worker, pod, t.tick)
	}
}

const (
	randomTries = 16 // before more ports are asked for
	queueTries  = 48 // for a port whose replies land on our queue
	leaseAhead  = 512
)

// saturated remembers that a pod has no port left towards a destination, for one tick, so that a flood pays the search only once.
type saturated struct {
	key  uint64
	tick uint32
}

// choosePort sets k.extPort to a port that the pod holds and that is free for the rest of k. With endpoint-independent mapping k is the
// mapping's, whose remote end is zero.
func (t *Translator) choosePort(tb *table, k *tuple, class Class, pod int) drop.Reason {
	a := t.alloc
	key := mum(k.remote.Hi^k.remote.Lo^tb.seed[1], uint64(k.remPort)<<32^uint64(k.proto)<<24^uint64(pod)^tb.seed[3])
	f := &t.full[key&uint64(len(t.full)-1)]
	if f.key == key && f.tick == t.tick {
		return drop.NATNoPort
	}
	list := &t.pods[pod].chunks[class]
	if t.cfg.Choice == ChoosePreserve && a.InRange(k.inPort) && t.preserve(tb, k, class, pod) {
		return drop.None
	}
	if len(*list) == 0 {
		t.lease(list, class, pod, max(1, leaseAhead>>a.shift))
	}
	if n := len(*list) << a.shift; n > 0 {
		tries := randomTries
		if t.cfg.RSS != nil {
			tries = queueTries
		}
		h := uint64(0)
		if t.cfg.Choice == ChooseHash {
			h = tb.hashOut(k) >> 8
		}
		for i := range tries {
			at := int(h+uint64(i)) % n
			if t.cfg.Choice != ChooseHash {
				at = t.below(n)
			}
			port := t.port(*list, at)
			if t.cfg.RSS != nil && i < queueTries-randomTries && !t.landsHere(k, port) {
				continue
			}
			if t.tryPort(tb, k, class, port) {
				return drop.None
			}
		}
		t.counts.Saturated++
	}
	// Most of what the pod holds is taken: more, or else the last few.
	had := len(*list)
	t.lease(list, class, pod, max(1, had/4))
	if fresh := *list; len(fresh) > had {
		n := (len(fresh) - had) << a.shift
		start := t.below(n)
		for i := range n {
			if t.tryPort(tb, k, class, t.port(fresh[had:], (start+i)%n)) {
				return drop.None
			}
		}
	}
	n := len(*list) << a.shift
	if n > 0 {
		start := t.below(n)
		for i := range n {
			at := start + i
			if at >= n {
				at -= n
			}
			if t.tryPort(tb, k, class, t.port(*list, at)) {
				return drop.None
			}
		}
	}
	f.key, f.tick = key, t.tick
	return drop.NATNoPort
}

// lease asks the allocator for chunks.
func (t *Translator) lease(list *[]uint16, class Class, pod, want int) {
	had := len(*list)
	*list = t.alloc.lease(*list, class, t.cfg.Worker, pod, t.tick, want)
	for _, c := range (*list)[had:] {
		t.ports[class].take(int(c), t.tick)
	}
}

// port is number at of the ports in the chunks.
func (t *Translator) port(list []uint16, at int) uint16 {
	s := t.alloc.shift
	return t.alloc.cfg.First + list[at>>s]<<s + uint16(at&(1<<s-1))
}

// below is an unpredictable number in [0, n).
func (t *Translator) below(n int) int { return int(t.rand.Uint64() >> 33 * uint64(n) >> 31) }

// preserve tries the inside port, whose chunk it leases if nobody has it.
func (t *Translator) preserve(tb *table, k *tuple, class Class, pod int) bool {
	a := t.alloc
	worker, owner, held := a.Owner(class, k.inPort)
	if !held {
		if !a.leaseOf(class, k.inPort, t.cfg.Worker, pod, t.tick) {
			return false
		}
		c := t.ports[class].chunkOf(k.inPort)
		t.ports[class].take(c, t.tick)
		t.pods[pod].chunks[class] = append(t.pods[pod].chunks[class], uint16(c))
	} else if worker != t.cfg.Worker || owner != pod {
		return false
	}
	return t.tryPort(tb, k, class, k.inPort)
}

// tryPort sets k.extPort if the port is free for k. A session that stands in its way but is over ends now.
func (t *Translator) tryPort(tb *table, k *tuple, class Class, port uint16) bool {
	if t.alloc.excluded(class, port) {
		return false
	}
	if t.cfg.Mapping == EndpointIndependent {
		rest := &t.alloc.portRest[class][port-t.alloc.cfg.First]
		if *rest != 0 {
			if int32(*rest-t.tick) > 0 {
				return false
			}
			*rest = 0
		}
	}
	k.extPort = port
	n := tb.findIn(k)
	if n != 0 && tb.recs[n-1].flags&flagMapping == 0 && t.over(&tb.recs[n-1]) {
		t.end(tb, n, true)
		n = 0
	}
	return n == 0
}

// over reports whether a session's time is over, though Expire has not come by yet.
func (t *Translator) over(r *record) bool { return int32(r.expires-t.tick) <= 0 }

// landsHere reports whether the NIC delivers replies to this port to one of the worker's queues.
func (t *Translator) landsHere(k *tuple, port uint16) bool {
	node := t.node4
	if !node.Is4() || !k.remote.Is4() {
		node = t.node6
	}
	ports := k.proto == packet.ProtoTCP || k.proto == packet.ProtoUDP
	return t.cfg.RSS.Queue(k.remote, node, k.remPort, port, ports)%t.alloc.cfg.Workers == t.cfg.Worker
}
