// Package packet knows what is in a frame: it parses, rewrites, checks, cuts and joins packets.
//
// A frame's bytes lie in the pool of the worker that received it (package port). This package borrows them for the length of one call, except
// where a type says otherwise, and keeps what it learned in values without pointers. In the order of a packet's way:
//
//	Parse                 bytes -> Packet: addresses, ports, offsets, or the one reason why the packet is malformed
//	ARPReply, NDReply     answers to neighbours that ask for the gateway; EchoReply for those that ping it
//	DecrementTTL          hop limit and header checksum
//	Fragmenter            IPv4 packets into fragments of an MTU
//	SetEthernet           the next hop's Ethernet addresses; strips a VLAN tag
//	segment*.go           GSO frames into packets that fit the wire
//	coalesce*.go          trains of packets into GSO frames
//
// Malformed input is a value (Packet.Reason), not an error: each frame gets exactly one reason. Nothing here allocates, locks or reads a clock.
// All functions may be called from any goroutine on distinct memory; types with state belong to one worker.
//
// # Checksums
//
// Parse drops a bad IPv4 header checksum. L4 checksums are never verified on the way through: they are updated incrementally, so that a
// packet damaged before stays recognisably damaged, and are computed anew only where the sender left them unfinished. Sum, Fold and
// PseudoHeader are the pieces; partial sums are uint64 and are added with +.
//
// # What passes for malformed
//
// Parse is a router's parser: stricter than what an end system accepts, so that what it passes means the same to every later reader. In short:
// one VLAN tag at most; all headers in the first buffer; no source routes (IPv4 options, IPv6 routing type 0); at most eight
// extension headers; no addresses that belong to no wire; first fragments with whole L4 headers (RFC 1858, RFC 7112). Unknown L4 protocols pass.
package packet
