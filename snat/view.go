package snat

import (
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/packet"
)

// Action is what translation makes of a packet.
type Action uint8

// The actions.
const (
	Refuse    Action = iota // it dies of View.Reason
	Translate               // it belongs to a session: TranslateOut or TranslateIn
	Create                  // it would make a session: Translator.Create, then TranslateOut
	NotOurs                 // nothing to do with translation: the node's own
	ToHost                  // it belongs to a pin: untranslated to the host port, TranslateOut to keep the pin alive
)

// String is the action's name.
func (a Action) String() string {
	return [...]string{"refuse", "translate", "create", "not_ours", "to_host"}[a]
}

// View is what a translator would do with a packet. It is good until the translator's next Expire, SetNodeAddresses or RemovePod.
type View struct {
	Addr   packet.Addr // Translate: what the source (outbound) or the destination (inbound) becomes
	Port   uint16      // likewise; of an error: in the packet that it quotes
	Action Action
	Reason drop.Reason // Refuse
	// Unreachable asks for an ICMP error to the pod (RFC 5508 REQ-8): administratively prohibited, 3/13 and 1/1. Outbound refusals for want of ports or sessions.
	Unreachable bool
	// Hairpin: the destination is the node's own external address. After TranslateOut the packet is to be treated as one from outside.
	Hairpin bool
	Pod     int32 // Translate, inbound: index of the destination pod

	pod   int32  // Create
	n     uint32 // the record
	inner inner  // of an ICMP error
}

// IsError reports whether the view is about an ICMP error that belongs to a session by the packet it quotes.
func (v *View) IsError() bool { return v.inner.l3 != 0 }

// ICMP and ICMPv6 message types that are translated.
const (
	icmpEchoReply, icmpUnreachable, icmpQuench, icmpEcho = 0, 3, 4, 8
	icmpTimeExceeded, icmpParameter                      = 11, 12
	icmp6Unreachable, icmp6Parameter                     = 1, 4 // and those between
	icmp6Echo, icmp6EchoReply                            = 128, 129

	protoGRE = 47

	tcpFIN, tcpSYN, tcpRST, tcpACK = 0x01, 0x02, 0x04, 0x10
)

// message is what kind of ICMP message a packet is.
type message uint8

const (
	messageOther message = iota
	messageQuery
	messageReply
	messageError
)

func messageOf(p *packet.Packet) message {
	if p.Proto == packet.ProtoICMP {
		switch p.ICMPType {
		case icmpEcho:
			return messageQuery
		case icmpEchoReply:
			return messageReply
		case icmpUnreachable, icmpQuench, icmpTimeExceeded, icmpParameter:
			return messageError
		}
		return messageOther
	}
	switch t := p.ICMPType; {
	case t == icmp6Echo:
		return messageQuery
	case t == icmp6EchoReply:
		return messageReply
	case t >= icmp6Unreachable && t <= icmp6Parameter:
		return messageError
	}
	return messageOther
}

// isICMP reports whether the packet is ICMP of its own family.
func isICMP(p *packet.Packet) bool {
	return p.Proto == packet.ProtoICMP && p.Kind == packet.KindIPv4 || p.Proto == packet.ProtoICMPv6 && p.Kind == packet.KindIPv6
}

// Outbound says what becomes of a packet from a pod for a destination outside, or for an external port of the node (hairpin). p was parsed
// from frame, the packet's first buffer, without a Reason; a fragment's ports were completed by Fragment. pod is the sender's index. Nothing but *v is written.
func (t *Translator) Outbound(p *packet.Packet, frame []byte, pod int, v *View) {
	*v = View{pod: int32(pod)}
	tb, node := t.tableOf(p.Kind)
	var k tuple
	k.inside, k.remote, k.proto = p.Src, p.Dst, p.Proto
	switch p.Proto {
	case packet.ProtoTCP, packet.ProtoUDP:
		k.inPort, k.remPort = p.SrcPort, p.DstPort
	case packet.ProtoSCTP:
		k.inPort, k.remPort, k.extPort = p.SrcPort, p.DstPort, p.SrcPort
	case packet.ProtoESP, protoGRE:
	case packet.ProtoICMP, packet.ProtoICMPv6:
		if !isICMP(p) {
			v.Reason = drop.NATProtocol
			return
		}
		switch messageOf(p) {
		case messageQuery, messageReply: // a reply goes back only by a pin
			k.inPort = p.SrcPort
		case messageError:
			t.errorOutbound(tb, p, frame, v)
			return
		default:
			v.Reason = drop.NATICMPType
			return
		}
	default:
		v.Reason = drop.NATProtocol
		return
	}
	if n := tb.findOut(&k); n != 0 {
		r := &tb.recs[n-1]
		if !t.over(r) {
			v.n = n
			if r.flags&flagPin != 0 {
				v.Action = ToHost
				return
			}
			v.Action, v.Addr, v.Port, v.Hairpin = Translate, node, r.extPort, p.Dst == node
			return
		}
	}
	t.mayCreate(tb, node, p, &k, v)
}

// mayCreate says whether a packet that belongs to no session may make one.
func (t *Translator) mayCreate(tb *table, node packet.Addr, p *packet.Packet, k *tuple, v *View) {
	v.Hairpin = p.Dst == node
	pod := int(v.pod)
	if pod < 0 || pod >= len(t.pods)-1 || !t.pods[pod].attached {
		v.Reason = drop.NATNoSession
		return
	}
	if node == (packet.Addr{}) {
		v.Reason = drop.NATNoAddress
		return
	}
	ported := k.proto == packet.ProtoTCP || k.proto == packet.ProtoUDP
	if ported && (k.inPort == 0 || k.remPort == 0) {
		v.Reason = drop.NATProtocol // port 0 names nobody who could answer
		return
	}
	if k.proto == packet.ProtoSCTP && t.alloc.HostPort(k.proto, k.extPort) {
		v.Reason, v.Unreachable = drop.NATPortTaken, true
		return
	}
	answer := k.proto == packet.ProtoTCP && p.TCPFlags&tcpACK != 0
	s := &tb.pods[pod]
	switch {
	case isICMP(p) && messageOf(p) == messageReply:
		v.Reason = drop.NATNoSession
	case k.proto == packet.ProtoTCP && p.TCPFlags&(tcpSYN|tcpRST|tcpFIN) != tcpSYN,
		// An answer to a connection from outside can only come through a mapping that let it in.
		answer && (t.cfg.Mapping != EndpointIndependent || tb.findOut(mappingKey(k)) == 0):
		v.Reason = drop.NATNoSYN
	case tb.share.used >= tb.share.capacity:
		v.Reason, v.Unreachable = drop.NATTableFull, true
	case !tb.share.allows(s.sessions):
		v.Reason, v.Unreachable = drop.NATSessionLimit, true
	case k.proto == packet.ProtoTCP && !tb.half.allows(s.halfOpen):
		v.Reason, v.Unreachable = drop.NATHalfOpenLimit, true
	default:
		v.Action = Create
	}
}

// mappingKey is the key of the endpoint-independent mapping of a flow.
func mappingKey(k *tuple) *tuple {
	m := *k
	m.remPort, m.remote = 0, packet.Addr{}
	return &m
}

// filterKey is the key of the record that says an address was sent to.
func filterKey(k *tuple) *tuple {
	m := *k
	m.remPort = 0
	return &m
}

// Inbound says what becomes of a packet to the node's external address: from the uplink, or from a pod by hairpin. p was parsed from frame
// without a Reason; a fragment's ports were completed by Fragment. Nothing but *v is written.
func (t *Translator) Inbound(p *packet.Packet, frame []byte, v *View) {
	*v = View{pod: NoPod, Action: NotOurs}
	tb, node := t.tableOf(p.Kind)
	if p.Dst != node {
		return
	}
	var k tuple
	k.remote, k.proto = p.Src, p.Proto
	switch p.Proto {
	case packet.ProtoTCP, packet.ProtoUDP:
		if !t.alloc.Ours(p.Proto, p.DstPort) {
			return
		}
		k.remPort, k.extPort = p.SrcPort, p.DstPort
	case packet.ProtoSCTP:
		k.remPort, k.extPort = p.SrcPort, p.DstPort
	case packet.ProtoESP, protoGRE:
	case packet.ProtoICMP, packet.ProtoICMPv6:
		if !isICMP(p) {
			return
		}
		switch messageOf(p) {
		case messageReply:
			k.extPort = p.DstPort
		case messageError:
			t.errorInbound(tb, node, p, frame, v)
			return
		default:
			return
		}
	default:
		return
	}
	if n := tb.findIn(&k); n != 0 && !t.over(&tb.recs[n-1]) && tb.recs[n-1].flags&flagMapping == 0 {
		v.Action, v.n, v.Addr, v.Port, v.Pod = Translate, n, tb.insideOf(n), tb.recs[n-1].inPort, int32(tb.recs[n-1].pod)
		return
	}
	if p.Proto != packet.ProtoTCP && p.Proto != packet.ProtoUDP {
		if t.cfg.Mapping == EndpointIndependent {
			t.admit(tb, p, &k, v)
		}
		return // without a session it is the host's: an echo reply's identifier tells nothing
	}
	v.Action, v.Reason = Refuse, drop.NATNoSession
	if t.cfg.Mapping == EndpointIndependent {
		t.admit(tb, p, &k, v)
	}
}

// admit says whether an endpoint-independent mapping lets in a packet that belongs to none of its sessions. Such a packet leaves no state
// behind, so that nobody outside can fill the table; the pod's answer makes the session.
func (t *Translator) admit(tb *table, p *packet.Packet, k *tuple, v *View) {
	n := tb.findIn(mappingKey(k))
	if n == 0 {
		return
	}
	switch t.cfg.Filtering {
	case FilterNone:
	case FilterAddress:
		if isICMP(p) || tb.findIn(filterKey(k)) == 0 {
			v.Action, v.Reason = Refuse, drop.NATFiltered
			return
		}
	default:
		v.Action, v.Reason = Refuse, drop.NATFiltered
		return
	}
	if p.Proto == packet.ProtoTCP && p.TCPFlags&(tcpSYN|tcpACK|tcpRST|tcpFIN) != tcpSYN {
		return
	}
	// Not the mapping itself but what it says: it may end before the packet is rewritten.
	v.Action, v.Reason, v.Addr, v.Port, v.Pod = Translate, drop.None, tb.insideOf(n), tb.recs[n-1].inPort, int32(tb.recs[n-1].pod)
}

// Explain describes the session behind a view, for people. ok is false if there is none.
func (t *Translator) Explain(p *packet.Packet, v *View) (Session, bool) {
	tb, node := t.tableOf(p.Kind)
	if v.n == 0 {
		return Session{}, false
	}
	return t.describe(tb, node, v.n), true
}
