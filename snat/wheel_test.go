package snat

import "testing"

// Whatever the tick a session was linked at and however far its time was extended before its slot came up, it ends at its time, and each
// call of Expire comes to an end.
func TestWheelEndsSessionsOnTime(t *testing.T) {
	w := newWorld(t, AllocatorConfig{}, Config{Sessions4: 16, Sessions6: 16})
	tb := w.tr.v4
	step := uint32(13)
	if testing.Short() {
		step = 101
	}
	for start := uint32(65536 - 700); start < 65536+700; start += step {
		for _, first := range []uint32{1, 2, 255, 256, 257, 511, 512, 513} {
			for _, later := range []uint32{0, 1, 254, 255, 256, 257, 258, 511, 512, 513, 65278, 65279, 65280, 65281, 70000} {
				w.tr.SetNow(int64(start) << tickShift)
				tb.wheel.cur = start
				w.mustOut(0, w.to(0, udp, 4000, 0, 53))
				r := &tb.recs[0]
				tb.wheel.unlink(tb.recs, 1)
				r.expires = start + first
				tb.wheel.link(tb.recs, 1)
				r.expires += later
				at := r.expires
				for tick := start; tick < at; tick = min(tick+max(1, (at-start)/50), at) {
					if w.tr.Expire(int64(tick)<<tickShift, 1<<18) {
						t.Fatalf("start %d, first %d, later %d: Expire has more to do at %d", start, first, later, tick)
					}
					if tb.used != 1 {
						t.Fatalf("start %d, first %d, later %d: over at %d of %d", start, first, later, tick, at)
					}
				}
				if w.tr.Expire(int64(at)<<tickShift, 1<<18) {
					t.Fatalf("start %d, first %d, later %d: Expire has more to do at %d", start, first, later, at)
				}
				if tb.used != 0 {
					t.Fatalf("start %d, first %d, later %d: not over at %d", start, first, later, at)
				}
			}
		}
	}
}
