package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// icmpError builds an ICMP or ICMPv6 "destination unreachable" that quotes what it is given.
func (w *wire) icmpError(t *testing.T, src, dst netip.Addr, quote []byte) []byte {
	t.Helper()
	if src.Is4() {
		return w.frame(t, src, dst, layers.IPProtocolICMPv4,
			&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeDestinationUnreachable, layers.ICMPv4CodeHost)}, gopacket.Payload(quote))
	}
	return w.frame(t, src, dst, layers.IPProtocolICMPv6,
		&layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(layers.ICMPv6TypeDestinationUnreachable, layers.ICMPv6CodeAddressUnreachable)},
		gopacket.Payload(append(make([]byte, 4), quote...)))
}

// changed is a copy of a frame with one byte changed.
func changed(frame []byte, at int) []byte {
	f := slices.Clone(frame)
	f[at] ^= 0x55
	return f
}

// fragmentOf makes an IP packet a fragment that is not the first.
func fragmentOf(ip []byte) []byte {
	f := slices.Clone(ip)
	if f[0]>>4 == 4 {
		put16(f, 6, 10, 100)
		return f
	}
	header := []byte{f[6], 0, 0, 100 << 3 & 0xff, 0, 0, 0, 1}
	f[6] = byte(layers.IPProtocolIPv6Fragment)
	binary.BigEndian.PutUint16(f[4:], binary.BigEndian.Uint16(f[4:])+8)
	return slices.Concat(f[:40], header, f[40:])
}

// forged is something sent that should not be.
type forged struct {
	name   string
	frame  []byte
	reason string // that it dies of at the port it comes in by; empty: the node's kernel gets it, or the sender's peer
	pod    bool   // it reaches the pod
}

// Packets that lie end where they should, each for its reason, and harm nobody's sessions.
func TestForgedPackets(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 2})
	n1, pod, ext := l.Nodes[0], l.Nodes[0].Pods[0], l.ExtEnd()
	out, in := extWire(t, l), podWire(t, pod)
	eachFamily(t, func(t *testing.T, family int) {
		// A fabric that knows where the pods are.
		block := netip.PrefixFrom(pod.Addr(family), map[int]int{4: 24, 6: 80}[family]).Masked()
		require.NoError(t, lab.AddRoute(l.Gateway(), block, "br0", n1.Addr(family)))
		victim, bystander := openFlow(t, pod.End(), ext, family), openFlow(t, n1.Pods[1].End(), ext, family)
		// The victim's session as the world sees it, and as the pod does.
		peer := victim.server.LocalAddr().(*net.TCPAddr).AddrPort()
		seen := victim.server.RemoteAddr().(*net.TCPAddr).AddrPort()
		own := victim.client.LocalAddr().(*net.TCPAddr).AddrPort()
		node, far, me := n1.Addr(family), ext.Addr(family), pod.Addr(family)
		stranger := farAddresses(t, l, family, 1)[0]
		require.Equal(t, node, seen.Addr().Unmap())
		l3, l4 := 14, 14+map[int]int{4: 20, 6: 40}[family]
		ipLen := l4 - l3
		checksum := l4 + 2 // of ICMP

		tcp := func(w *wire, src, dst netip.Addr, sport, dport uint16, h layers.TCP) []byte {
			h.SrcPort, h.DstPort, h.Window = layers.TCPPort(sport), layers.TCPPort(dport), 1000
			return w.frame(t, src, dst, layers.IPProtocolTCP, &h)
		}
		ack := layers.TCP{ACK: true, Seq: 1, Ack: 1}
		sent := tcp(out, node, far, seen.Port(), peer.Port(), ack)[l3:]    // what the world can have seen of the session
		never := tcp(out, node, far, seen.Port(), peer.Port()+1, ack)[l3:] // and what it cannot
		received := tcp(in, far, me, peer.Port(), own.Port(), ack)[l3:]    // what the pod can have received
		unheard := tcp(in, far, me, peer.Port()+1, own.Port(), ack)[l3:]   // and what it cannot
		others := tcp(in, far, n1.Pods[1].Addr(family), 1, 2, ack)[l3:]    // what another pod may have
		gre := out.frame(t, node, far, layers.IPProtocolGRE, gopacket.Payload(make([]byte, 16)))[l3:]
		greOut := in.frame(t, me, far, layers.IPProtocolGRE, gopacket.Payload(make([]byte, 16)))
		otherICMP := layers.IPProtocolICMPv4
		other := gopacket.SerializableLayer(&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(layers.ICMPv4TypeTimestampRequest, 0)})
		if family == 6 {
			otherICMP, other = layers.IPProtocolICMPv6, &layers.ICMPv6{TypeCode: layers.CreateICMPv6TypeCode(200, 0)}
		}
		good := out.icmpError(t, far, node, sent)
		fromPod := in.icmpError(t, me, far, received)

		outside := []forged{
			{"an error about the session", good, "", true},
			{"an error about the session, from a router", out.icmpError(t, stranger, node, sent), "", true},
			{"an error about a port never sent to", out.icmpError(t, far, node, never), "", false},
			{"an error about somebody else's packet", out.icmpError(t, far, node, received), "", false},
			{"an error with a wrong checksum", changed(good, checksum), "nat_error_bad", false},
			{"an error that quotes four bytes of TCP", out.icmpError(t, far, node, sent[:ipLen+4]), "nat_error_truncated", false},
			{"an error that quotes half an IP header", out.icmpError(t, far, node, sent[:10]), "nat_error_truncated", false},
			{"an error that quotes nothing", out.icmpError(t, far, node, nil), "nat_error_truncated", false},
			{"an error that quotes another version", out.icmpError(t, far, node, changed(sent, 0)), "nat_error_bad", false},
			{"an error that quotes a fragment", out.icmpError(t, far, node, fragmentOf(sent)), "", false},
			{"an error that quotes GRE", out.icmpError(t, far, node, gre), "", false},
			{"a segment from a stranger", tcp(out, stranger, node, peer.Port(), seen.Port(), ack), "nat_no_session", false},
			{"a SYN from a stranger", tcp(out, stranger, node, 1234, seen.Port(), layers.TCP{SYN: true}), "nat_no_session", false},
			{"a segment from another port", tcp(out, far, node, peer.Port()+1, seen.Port(), ack), "nat_no_session", false},
			{"a RST to another port", tcp(out, far, node, peer.Port(), seen.Port()^1, layers.TCP{RST: true}), "nat_no_session", false},
			{"a segment from the node's own address", tcp(out, node, node, peer.Port(), seen.Port(), ack), "nat_no_session", false},
			{"a RST of a wrong sequence number", tcp(out, far, node, peer.Port(), seen.Port(), layers.TCP{RST: true, Seq: 12345}), "", true}, // for the pod to ignore
			{"a segment from a pod's address", tcp(out, n1.Pods[1].Addr(family), node, peer.Port(), seen.Port(), ack), "steering", false},
			{"a segment to a pod's address", tcp(out, far, me, peer.Port(), own.Port(), ack), "steering", false},
		}
		inside := []forged{
			{"an error about what was received", fromPod, "", false},
			{"an error about what was not", in.icmpError(t, me, far, unheard), "nat_no_session", false},
			{"an error about what another pod received", in.icmpError(t, me, far, others), "nat_error_mismatch", false},
			{"an error for somebody else than it is about", in.icmpError(t, me, stranger, received), "nat_error_mismatch", false},
			{"an error with a wrong checksum", changed(fromPod, checksum), "nat_error_bad", false},
			{"an error that quotes four bytes of TCP", in.icmpError(t, me, far, received[:ipLen+4]), "nat_error_truncated", false},
			{"a segment without a connection", tcp(in, me, far, 5, 6, ack), "nat_no_syn", false},
			{"another ICMP message", in.frame(t, me, far, otherICMP, other, gopacket.Payload(make([]byte, 16))), "nat_icmp_type", false},
			{"DCCP", in.frame(t, me, far, 33, gopacket.Payload(make([]byte, 24))), "nat_protocol", false},
			{"a neighbour's address", tcp(in, n1.Pods[1].Addr(family), far, own.Port(), peer.Port(), ack), "source_not_pods", false},
			{"the node's address", tcp(in, node, far, seen.Port(), peer.Port(), ack), "source_not_pods", false},
		}
		if family == 4 {
			outside = append(outside, forged{"an error that quotes a wrong IP checksum", out.icmpError(t, far, node, changed(sent, 10)), "nat_error_bad", false})
		}

		send := func(w *wire, port string, f forged) {
			arrived, err := lab.StartCapture(pod.Netns(), func(b []byte) bool {
				ip, ok := lab.ParseOuterIP(b)
				return ok && ip.Dst == me && (ip.Protocol == byte(layers.IPProtocolICMPv4) || ip.Protocol == byte(layers.IPProtocolICMPv6) && ip.Payload[0] < 128 ||
					ip.Protocol == byte(layers.IPProtocolTCP) || ip.Protocol == byte(layers.IPProtocolGRE))
			})
			require.NoError(t, err)
			defer arrived.Stop()
			count := func() uint64 {
				if f.reason == "steering" {
					return status(t, n1).Uplink.Steering["dropped_not_member"]
				}
				return dropsOf(t, n1, port, f.reason)
			}
			all := func() (sum uint64) {
				drops, err := n1.Drops(testContext(t))
				require.NoError(t, err)
				for _, d := range drops {
					if d.Reason != "ip_multicast" {
						sum += d.Packets
					}
				}
				return sum
			}
			const times = 3
			before, beforeAll := count(), all()
			for range times {
				require.NoError(t, w.send(f.frame))
			}
			switch {
			case f.reason != "":
				require.Eventually(t, func() bool { return count() >= before+times }, 3*time.Second, 5*time.Millisecond, "%s: not counted as %s", f.name, f.reason)
			case f.pod:
				require.Eventually(t, func() bool { return len(arrived.Frames()) >= times }, 3*time.Second, 5*time.Millisecond, "%s: did not reach the pod", f.name)
			default:
				time.Sleep(30 * time.Millisecond)
			}
			if f.reason == "" {
				require.Equal(t, beforeAll, all(), "%s: dropped", f.name)
			}
			if !f.pod {
				require.Empty(t, arrived.Frames(), "%s: reached the pod", f.name)
			}
		}
		for _, f := range outside {
			send(out, "eth0", f)
		}
		for _, f := range inside {
			send(in, pod.Name(), f)
		}
		// With a session of that kind, errors about GRE find the pod.
		require.NoError(t, in.send(greOut))
		time.Sleep(50 * time.Millisecond)
		send(out, "eth0", forged{"an error about GRE", out.icmpError(t, far, node, gre), "", true})

		for _, f := range []*flow{victim, bystander} {
			f.requireAlive(t, 5*time.Second)
		}
		requirePing(t, pod.End(), ext, family)
	})
}

// Fragments that contradict each other, or whose first never comes, are dropped by name, and whole datagrams still pass.
func TestForgedFragments(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 1})
	n1, pod, ext := l.Nodes[0], l.Nodes[0].Pods[0], l.ExtEnd()
	out, in := extWire(t, l), podWire(t, pod)
	eachFamily(t, func(t *testing.T, family int) {
		fragment := func(w *wire, src, dst netip.Addr, id uint16, first bool, ports byte) []byte {
			flood := fragmentFlood(t, w, []netip.Addr{src}, dst)
			f := slices.Clone(flood(int(id) * 2))
			if !first {
				f = slices.Clone(flood(int(id)*2 + 1))
			}
			if first {
				f[len(f)-32+1] = ports
			}
			return f
		}
		me, far, node := pod.Addr(family), ext.Addr(family), n1.Addr(family)
		conflicts, timeouts := dropsOf(t, n1, pod.Name(), "nat_fragment_conflict"), dropsOf(t, n1, "eth0", "nat_fragment_timeout")
		require.NoError(t, in.send(fragment(in, me, far, 7, true, 1)))
		require.NoError(t, in.send(fragment(in, me, far, 7, true, 2)))
		require.NoError(t, out.send(fragment(out, far, node, 8, false, 0)))
		require.Eventually(t, func() bool { return dropsOf(t, n1, pod.Name(), "nat_fragment_conflict") > conflicts }, 3*time.Second, 10*time.Millisecond)
		require.Eventually(t, func() bool { return dropsOf(t, n1, "eth0", "nat_fragment_timeout") > timeouts }, 6*time.Second, 10*time.Millisecond)
		p, err := lab.NewPinger(pod.Netns(), ext.Addr(family))
		require.NoError(t, err)
		defer p.Close()
		require.NoError(t, p.SetDF(false))
		require.NoError(t, once(t, p, 8000))
	})
}
