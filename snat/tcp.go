package snat

import "github.com/overplane/overplane/dataplane/packet"

// What was seen of a TCP connection: the state machine of RFC 6146 section 3.5.2 with RFC 7857 section 2, as bits.
//
//	opening      a SYN from one side, or both but no segment after them      TCPOpening
//	established  SYNs from both sides and a segment of the connection        TCPEstablished; also after one side's FIN
//	closing      FINs from both sides                                        TCPClosing, not extended any more
//	reset        a RST from either side                                      TCPReset; traffic that follows takes it back
const (
	tcpSynOut uint8 = 1 << iota
	tcpSynIn
	tcpFinOut
	tcpFinIn
	tcpReset
	tcpOpen // a segment followed the SYNs
)

// touch counts a packet of a session and gives the session the time that it earns.
func (t *Translator) touch(tb *table, n uint32, p *packet.Packet, out bool) {
	r := &tb.recs[n-1]
	if out {
		r.out++
	} else {
		r.in++
	}
	if r.proto != packet.ProtoTCP {
		if out || t.cfg.RefreshInbound || r.flags&flagPin != 0 {
			r.expires = tickAfter(t.now + t.timeouts[r.class])
		}
		return
	}
	if r.class == timerTCPEstablished && p.TCPFlags&(tcpSYN|tcpFIN|tcpRST) == 0 {
		r.expires = tickAfter(t.now + t.timeouts[timerTCPEstablished])
		return
	}
	t.touchTCP(tb, n, p.TCPFlags, out)
}

// touchTCP is touch for segments that may change a connection's state.
func (t *Translator) touchTCP(tb *table, n uint32, flags uint8, out bool) {
	r := &tb.recs[n-1]
	syn, fin := tcpSynOut, tcpFinOut
	if !out {
		syn, fin = tcpSynIn, tcpFinIn
	}
	if flags&tcpRST != 0 {
		// It shortens a session's life, never extends it: a RST may answer something unsolicited (RFC 7857 section 5), or be forged.
		r.tcp |= tcpReset
		t.setTimer(tb, n, timerTCPReset, min(r.expires, tickAfter(t.now+t.timeouts[timerTCPReset])))
		return
	}
	closed := r.tcp&tcpReset != 0 || r.tcp&(tcpFinOut|tcpFinIn) == tcpFinOut|tcpFinIn
	if flags&(tcpSYN|tcpACK) == tcpSYN && closed {
		r.tcp = syn // the connection's ends use their ports again
	} else {
		r.tcp &^= tcpReset
		if flags&tcpSYN != 0 {
			if r.tcp |= syn; flags&tcpACK != 0 {
				r.tcp |= tcpSynOut | tcpSynIn // it answers the other side's, which a mapping may have let in without a session
			}
		} else if r.tcp&(tcpSynOut|tcpSynIn) == tcpSynOut|tcpSynIn || r.flags&flagPin != 0 {
			r.tcp |= tcpOpen
		}
		if flags&tcpFIN != 0 {
			r.tcp |= fin
		}
	}
	switch both := tcpFinOut | tcpFinIn; {
	case r.tcp&both == both:
		if r.class != timerTCPClosing {
			t.setTimer(tb, n, timerTCPClosing, tickAfter(t.now+t.timeouts[timerTCPClosing]))
		}
	case r.tcp&tcpOpen != 0:
		t.setTimer(tb, n, timerTCPEstablished, tickAfter(t.now+t.timeouts[timerTCPEstablished]))
	case flags&tcpSYN != 0 || r.class != timerTCPOpening:
		t.setTimer(tb, n, timerTCPOpening, tickAfter(t.now+t.timeouts[timerTCPOpening]))
	}
}

// setTimer changes a TCP session's timer and time, and what is counted as half open.
func (t *Translator) setTimer(tb *table, n uint32, class timer, expires uint32) {
	r := &tb.recs[n-1]
	if half := class == timerTCPOpening && r.flags&flagPin == 0; half != (r.flags&flagHalfOpen != 0) {
		p := &tb.pods[r.pod]
		if half {
			tb.half.add(&p.halfOpen)
		} else {
			tb.half.sub(&p.halfOpen)
		}
		r.flags ^= flagHalfOpen
	}
	r.class = class
	earlier := int32(expires-r.expires) < 0
	r.expires = expires
	if earlier { // a later one is found out when its slot comes up
		tb.wheel.unlink(tb.recs, n)
		tb.wheel.link(tb.recs, n)
	}
}
