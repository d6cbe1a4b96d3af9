package snat

import (
	"time"

	"github.com/overplane/overplane/dataplane/packet"
)

// Session is a copy of one session, for people.
type Session struct {
	Proto                    uint8
	Pin                      bool        // not translated: its replies go to the host port
	Inside, Remote, External packet.Addr // External is zero for pins
	InsidePort, RemotePort   uint16
	ExternalPort             uint16
	Pod                      int // index, or NoPod
	State                    string
	Age, Left                time.Duration // since it was made; until it ends if nothing comes
	PacketsOut, PacketsIn    uint32        // wrapping; a GSO frame counts once
}

var stateNames = [numTimers]string{timerUDP: "active", timerICMP: "active", timerTCPOpening: "opening", timerTCPEstablished: "established",
	timerTCPClosing: "closing", timerTCPReset: "reset", timerOther: "active"}

func (t *Translator) describe(tb *table, node packet.Addr, n uint32) Session {
	r, k := &tb.recs[n-1], tb.tupleOf(n)
	s := Session{Proto: r.proto, Pin: r.flags&flagPin != 0, Inside: k.inside, Remote: k.remote, External: node, InsidePort: k.inPort,
		RemotePort: k.remPort, ExternalPort: k.extPort, Pod: int(r.pod), State: stateNames[min(r.class, numTimers-1)],
		Age: time.Duration(t.tick-r.created) << tickShift, PacketsOut: r.out, PacketsIn: r.in}
	if left := int32(r.expires - t.tick); left > 0 {
		s.Left = time.Duration(left) << tickShift
	}
	if s.Pin {
		s.External = packet.Addr{}
	}
	if s.Pod == len(t.pods)-1 {
		s.Pod = NoPod
	}
	return s
}

// Cursor is a place in the listing of sessions. The zero Cursor is its beginning.
type Cursor struct {
	v6   bool
	next uint32
	Done bool // the listing is complete
}

// Snapshot appends sessions to list, looking at no more than max records from the cursor on, and returns where to go on. Somebody who wants
// the whole list asks the worker's goroutine for a piece at a time, between polls, each time with room of its own, so that no session is read
// while it changes. Sessions made or ended meanwhile may be missed; none is listed twice unless its record was used again.
func (t *Translator) Snapshot(list []Session, c Cursor, max int) ([]Session, Cursor) {
	for max > 0 && !c.Done {
		tb, node := t.v4, t.node4
		if c.v6 {
			tb, node = t.v6, t.node6
		}
		if c.next >= *tb.high {
			c.Done, c.v6, c.next = c.v6, true, 0
			continue
		}
		c.next++
		max--
		if r := &tb.recs[c.next-1]; r.flags&flagLive != 0 && r.flags&flagMapping == 0 && !t.over(r) {
			list = append(list, t.describe(tb, node, c.next))
		}
	}
	return list, c
}

// Stats is how a translator stands.
type Stats struct {
	Sessions4, Sessions6         int // in use, mappings and pins included
	Capacity4, Capacity6         int
	HalfOpen4, HalfOpen6         int
	Pins                         int
	Fragmented, Held             int   // datagrams in pieces; fragments that wait
	PodSessions4, PodSessions6   []int // by pod index; the last is for flows without a pod
	SessionLimit4, SessionLimit6 int   // of any one pod at the moment
}

// Stats is a copy of how the translator stands. It allocates.
func (t *Translator) Stats() Stats {
	s := Stats{Sessions4: t.v4.used, Sessions6: t.v6.used, Capacity4: len(t.v4.recs), Capacity6: len(t.v6.recs), HalfOpen4: t.v4.half.used,
		HalfOpen6: t.v6.half.used, Pins: t.v4.pins + t.v6.pins, Fragmented: t.frags.share.used, Held: t.frags.heldShare.used,
		SessionLimit4: t.v4.share.limit(), SessionLimit6: t.v6.share.limit()}
	for i := range t.pods {
		s.PodSessions4 = append(s.PodSessions4, int(t.v4.pods[i].sessions))
		s.PodSessions6 = append(s.PodSessions6, int(t.v6.pods[i].sessions))
	}
	return s
}

// Pod is what the translator knows of the pod of that index: its addresses, zero for none, and whether it is attached, or was removed and has sessions that Expire still ends.
func (t *Translator) Pod(index int) (addr4, addr6 packet.Addr, attached, leaving bool) {
	if index < 0 || index >= len(t.pods)-1 {
		return packet.Addr{}, packet.Addr{}, false, false
	}
	p := &t.pods[index]
	return p.addr4, p.addr6, p.attached, p.leaving
}

// MaxPods is the number of pods that may be attached: indices are below it.
func (t *Translator) MaxPods() int { return len(t.pods) - 1 }

// Ours is Allocator.Ours.
func (t *Translator) Ours(proto uint8, port uint16) bool { return t.alloc.Ours(proto, port) }

// Destination is how much of a pod's ports towards one destination is in use.
type Destination struct {
	Pod    int
	Proto  uint8
	Remote packet.Addr
	Port   uint16
	Ports  int // in use
	Limit  int // that the pod may hold in all
}

// Saturation counts, over listed sessions, the ports in use by pod and destination, and returns the pairs that use at least the share of
// what the pod may have at the moment (0.8, say), in no order. It is for the listing's reader, not the worker.
func Saturation(list []Session, a *Allocator, share float64) []Destination {
	type key struct {
		pod    int
		proto  uint8
		remote packet.Addr
		port   uint16
	}
	counts := map[key]int{}
	for i := range list {
		s := &list[i]
		if _, ok := ClassOf(s.Proto); ok && !s.Pin {
			counts[key{s.Pod, s.Proto, s.Remote, s.RemotePort}]++
		}
	}
	var limits [NumClasses][]int
	for c := range limits {
		limits[c] = a.Usage(Class(c)).Limit
	}
	var out []Destination
	for k, n := range counts {
		class, _ := ClassOf(k.proto)
		if k.pod < 0 || k.pod >= len(limits[class]) {
			continue
		}
		limit := limits[class][k.pod]
		if float64(n) >= share*float64(limit) {
			out = append(out, Destination{k.pod, k.proto, k.remote, k.port, n, limit})
		}
	}
	return out
}

// FlowEvent says that a flow of a protocol without translated ports (SCTP, ESP, GRE) began or ended, for the program that steers packets to the
// workers: it recognises such packets by this tuple alone.
type FlowEvent struct {
	Began                bool
	Proto                uint8
	Remote               packet.Addr
	RemotePort, NodePort uint16 // SCTP
}

const maxEvents = 64

func (t *Translator) event(tb *table, n uint32, began bool) {
	if t.nEvent == len(t.events) {
		t.lost = true
		return
	}
	k := tb.tupleOf(n)
	t.events[t.nEvent] = FlowEvent{began, k.proto, k.remote, k.remPort, k.extPort}
	t.nEvent++
}

// HasEvents reports whether Events has something to tell.
func (t *Translator) HasEvents() bool { return t.nEvent > 0 || t.lost }

// Events returns what began and ended since the last call, to be used before the next call of any method. lost means that there was more than
// fits: then the listing of sessions says what there is.
func (t *Translator) Events() (events []FlowEvent, lost bool) {
	events, lost = t.events[:t.nEvent], t.lost
	t.nEvent, t.lost = 0, false
	return events, lost
}
