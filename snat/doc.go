// Package snat translates addresses: packets of pods leave the cluster with their node's address (RFC 2663's NAPT, RFC 4787, RFC 5382, RFC 5508, RFC
// 7857, RFC 6888 where it applies; IPv6 likewise).
//
// Every worker owns a [Translator], and with it a number of the node's external ports, which an [Allocator] leases in chunks. The worker asks
// what would become of a packet, and decides by the answer; then it has that done:
//
//	                 asking, without side effects            doing
//	from a pod       Outbound -> Translate                   TranslateOut, out by the uplink
//	                          -> Create                      Create, TranslateOut
//	                          -> ToHost                      TranslateOut, to the host port: a reply to a pinned flow
//	from the uplink  Inbound  -> Translate                   TranslateIn, to the pod
//	                          -> NotOurs                     the node's own
//	hairpin          Outbound with View.Hairpin              TranslateOut, then Inbound and TranslateIn
//	a fragment       Fragment first, see fragment.go         TrackFragment
//	from the host    -                                       Pin
//	once a poll      -                                       Expire, ExpiredFragment
//
// What a session is lies in one record of a table outside Go's heap (table.go), in a memfd that the next process adopts (memory.go, adopt.go). The record is found
// by both of the session's tuples, inside and outside; timers are one word in the record and a wheel (wheel.go). Which worker a packet belongs to says owner.go; who may have how
// many sessions, share.go; which port a session gets, choose.go and allocator.go; which destinations are translated at all, rules.go.
//
// Nothing here allocates, locks or reads a clock for a packet. The allocator's mutex is taken when a pod needs more ports, which comes with one
// session in many.
package snat
