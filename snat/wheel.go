package snat

// Time is counted in ticks of 2^28 ns, 268 ms: coarse, and a shift away from nanoseconds. A timer never fires early, and at most one
// tick late unless the wheel is behind.
const tickShift = 28

// tickOf is the tick that time now, in nanoseconds, lies in.
func tickOf(now int64) uint32 { return uint32(now >> tickShift) }

// tickAfter is the first tick that begins at or after time at.
func tickAfter(at int64) uint32 { return uint32((at + 1<<tickShift - 1) >> tickShift) }

const (
	wheelSlots = 256
	noBucket   = 2 * wheelSlots
)

// wheel is a hierarchical timer wheel of two levels (Varghese and Lauck, 1987): 256 ticks, 69 s, and 256 times as much, 4.9 h. Records hang in
// doubly linked lists by their numbers. A record whose time was extended stays where it is and is put where it belongs when its slot
// comes up, so that a packet that refreshes a session writes one word.
type wheel struct {
	heads []uint32 // wheelSlots of each level
	cur   uint32   // tick up to which everything was done
}

// link puts a record into the slot of its expiry.
func (w *wheel) link(recs []record, n uint32) {
	r := &recs[n-1]
	at := r.expires
	if int32(at-w.cur) <= 0 {
		at = w.cur + 1
	}
	var b uint32
	switch d := at - w.cur; {
	case d <= wheelSlots: // the slot of cur itself is done, and comes up again in wheelSlots ticks
		b = at & (wheelSlots - 1)
	case d < wheelSlots*(wheelSlots-1):
		b = wheelSlots + at>>8&(wheelSlots-1)
	default:
		b = wheelSlots + (w.cur>>8+wheelSlots-1)&(wheelSlots-1)
	}
	first := w.heads[b]
	r.bucket, r.prev, r.next = uint16(b), 0, first
	if first != 0 {
		recs[first-1].prev = n
	}
	w.heads[b] = n
}

// unlink takes a record out of its slot.
func (w *wheel) unlink(recs []record, n uint32) {
	r := &recs[n-1]
	if r.prev != 0 {
		recs[r.prev-1].next = r.next
	} else {
		w.heads[r.bucket] = r.next
	}
	if r.next != 0 {
		recs[r.next-1].prev = r.prev
	}
}

// expire ends every session whose time is over by tick now, but looks at no more than budget records and slots. It returns what is
// left of the budget.
func (t *Translator) expireTable(tb *table, now uint32, budget int) int {
	w := &tb.wheel
	for int32(now-w.cur) > 0 && budget > 0 {
		next := w.cur + 1
		if next&(wheelSlots-1) == 0 {
			if budget = t.drain(tb, wheelSlots+next>>8&(wheelSlots-1), now, budget); budget <= 0 {
				return 0
			}
		}
		if budget = t.drain(tb, next&(wheelSlots-1), now, budget); budget <= 0 {
			return 0
		}
		w.cur = next
		budget--
	}
	return budget
}

// drain empties a slot, that of tick cur+1: what is over ends, what was extended moves to its new place. That is never the same slot: in the lower level
// it would be cur+1+wheelSlots, which belongs to the upper; in the upper, a tick of the same block, which belongs to the lower.
func (t *Translator) drain(tb *table, slot, now uint32, budget int) int {
	w := &tb.wheel
	for budget > 0 {
		n := w.heads[slot]
		if n == 0 {
			return budget
		}
		budget--
		if r := &tb.recs[n-1]; int32(r.expires-now) <= 0 {
			t.end(tb, n, true)
			tb.counts.Expired++
		} else {
			w.unlink(tb.recs, n)
			w.link(tb.recs, n)
		}
	}
	return 0
}
