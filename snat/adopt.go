package snat

import (
	"fmt"
	"os"

	"github.com/overplane/overplane/dataplane/packet"
)

// AdoptStats says what came over from another process.
type AdoptStats struct {
	Sessions int // that go on
	Pins     int // of them
	Over     int // whose time is over
	Orphans  int // whose pod there is no more, or whose port belongs to somebody else now
	Broken   int // half written when the other process died
}

// Adopt makes a translator that goes on with the sessions in a memfd that another process made, which must have ended or must not touch it any
// more. The file becomes the translator's, also if Adopt fails: then the sessions are lost and New makes empty tables. It fails if worker, number of workers, mapping,
// sizes or port range are not the same. pods are the pods there are, by index, with their addresses: a session belongs to the pod that has its
// inside address. They are attached as AddPod does. now is as in SetNow. The external addresses are those of the other process until
// SetNodeAddresses says otherwise.
//
// All indices are built anew, at about 200 ns a session.
func Adopt(cfg Config, a *Allocator, file *os.File, now int64, pods []AdoptedPod) (*Translator, AdoptStats, error) {
	var st AdoptStats
	cfg.setDefaults(a.cfg.MaxPods)
	if err := cfg.validate(); err != nil {
		file.Close()
		return nil, st, err
	}
	m, err := openMemory(&cfg, a, file)
	if err != nil {
		return nil, st, err
	}
	t := newTranslator(cfg, a, m)
	t.SetNow(now)
	t.node4, t.node6 = m.head.node4, m.head.node6
	byAddr := make(map[packet.Addr]int, 2*len(pods))
	for _, p := range pods {
		if err := t.AddPod(p.Index, p.Addr4, p.Addr6); err != nil {
			t.Close()
			return nil, st, fmt.Errorf("snat: adopting sessions: %w", err)
		}
		for _, addr := range []packet.Addr{p.Addr4, p.Addr6} {
			if addr != (packet.Addr{}) {
				byAddr[addr] = p.Index
			}
		}
	}
	t.adopt(t.v4, byAddr, &st)
	t.adopt(t.v6, byAddr, &st)
	return t, st, nil
}

// AdoptedPod is a pod that exists when sessions are adopted.
type AdoptedPod struct {
	Index        int
	Addr4, Addr6 packet.Addr
}

// adopt goes through a table's records. Mappings first: their sessions look for them, and must come after them in their pod's list.
func (t *Translator) adopt(tb *table, byAddr map[packet.Addr]int, st *AdoptStats) {
	tb.wheel.cur = t.tick
	kept := make([]uint64, (len(tb.recs)+63)/64)
	for pass := range 3 { // mappings, what admits addresses to them, sessions
		for n := uint32(1); n <= *tb.high; n++ {
			r := &tb.recs[n-1]
			if r.flags&flagLive == 0 || passOf(r) != pass {
				continue
			}
			if t.adoptRecord(tb, n, byAddr, kept, st) {
				kept[n/64] |= 1 << (n % 64)
			}
		}
	}
	for n := *tb.high; n > 0; n-- {
		r := &tb.recs[n-1]
		if kept[n/64]>>(n%64)&1 == 0 {
			retire(r)
			r.next, tb.free = tb.free, n
		} else if r.flags&flagMapping != 0 && r.mapping == 0 {
			t.dropParent(tb, n)
		}
	}
}

func passOf(r *record) int {
	switch {
	case r.flags&flagMapping == 0:
		return 2
	case r.out == 0:
		return 0
	}
	return 1
}

func (t *Translator) adoptRecord(tb *table, n uint32, byAddr map[packet.Addr]int, kept []uint64, st *AdoptStats) bool {
	r, k := &tb.recs[n-1], tb.tupleOf(n)
	isMapping := r.flags&flagMapping != 0
	class, ported := ClassOf(r.proto)
	if r.flags&flagPin != 0 {
		ported = false
	}
	if r.class >= numTimers || r.flags&flagPin == 0 && (ported && !t.alloc.InRange(k.extPort)) || tb.findOut(&k) != 0 ||
		r.flags&flagPin == 0 && tb.findIn(&k) != 0 {
		st.Broken++
		return false
	}
	if !isMapping && t.over(r) {
		st.Over++
		return false
	}
	pod, ok := byAddr[k.inside]
	if !ok && r.flags&flagPin == 0 {
		st.Orphans++
		return false
	}
	if !ok {
		pod = len(t.pods) - 1
	}
	if isMapping {
		r.mapping, r.in = 0, 0
		if p := r.out; p != 0 {
			if p > *tb.high || kept[p/64]>>(p%64)&1 == 0 {
				st.Broken++
				return false
			}
			tb.recs[p-1].mapping++
			ported = false // its mapping holds the port
		}
	} else if m := r.mapping; m != 0 {
		if m > *tb.high || kept[m/64]>>(m%64)&1 == 0 || tb.recs[m-1].extPort != k.extPort {
			st.Orphans++
			return false
		}
		tb.recs[m-1].mapping++
		ported = false
	}
	if ported {
		if !t.adoptPort(class, k.extPort, pod) {
			st.Orphans++
			return false
		}
		t.hold(class, k.extPort)
	}
	r.pod = uint16(pod)
	tb.index(n, &k, r.flags)
	if !isMapping {
		st.Sessions++
		if r.flags&flagPin != 0 {
			st.Pins++
		} else if _, ok := ClassOf(r.proto); !ok {
			t.event(tb, n, true)
		}
	}
	return true
}

// adoptPort leases the chunk of a session's port to its pod again.
func (t *Translator) adoptPort(class Class, port uint16, pod int) bool {
	c := t.ports[class].chunkOf(port)
	if worker, owner, held := t.alloc.Owner(class, port); held {
		return worker == t.cfg.Worker && owner == pod
	}
	if !t.alloc.adopt(class, c, t.cfg.Worker, pod) {
		return false
	}
	t.ports[class].take(c, t.tick)
	t.pods[pod].chunks[class] = append(t.pods[pod].chunks[class], uint16(c))
	return true
}
