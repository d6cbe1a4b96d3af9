// Package api is what stands beside the messages of overplane.control.v1: what a desired state means, in plain functions without a
// network or a clock.
//
// A state comes to a node as a file, over the local API or from the controller, and every time takes the same way:
//
//	ReadFile / ReplaceState ─> Complete (hashes, if it came without) ─> Validate (all problems at once) ─> the agent programs it
//	PatchState ─> Apply (base checked, digest kept up to date) ─> Validate ─> the agent programs it ─> WriteFile
//
// # Immutability
//
// States are shared between goroutines once they are complete. Only [Seal], [Complete], [Sort] and [StripHashes] change their argument; [Apply]
// returns a new state that shares unchanged entries with the old one, so neither may be changed afterwards.
//
// # Hashes
//
// An entry's hash is opaque to its reader: whoever keeps the store chooses the function. This package's, used where a state comes without,
// is the first eight bytes, read as a big-endian number, of the SHA-256 of the entry's kind and fields, each written as a netstring
// (decimal length, ':', bytes, ','), in this order, numbers in decimal, truth values as 0 and 1, lists as their length followed by
// their elements:
//
//	pool       cidr, block_prefix_length
//	own_block  cidr
//	member     name, ipv4, ipv6, mac
//	route      prefix, then "node" and the name, or "host" and the value, or "unreachable" and the value, or "" if there is no target
//	snat       disabled, no_masquerade_cidrs, translate_nodes, mapping, port_choice, filtering, first_port, last_port
//
// A result of 0 becomes 1, since 0 means "no hash". A cryptographic hash costs a fraction of a microsecond an entry and rids the XOR
// over all entries of the cancellations that simple multiplicative hashes have when two entries swap values.
package api

// Bounds of a state, and of what carries one.
const (
	MaxPoolsPerFamily    = 8       // pools of one address family
	MaxBlockBits         = 16      // a block's prefix is at most so many bits longer than its pool's
	MaxMembers           = 65_535  // nodes of a cluster
	MaxRoutes            = 262_144 // routes of a state
	MaxNoMasqueradeCIDRs = 1024    // destinations that see pod addresses
	MaxNameLength        = 253     // bytes of a node's name (RFC 1123 section 2.1 by way of Kubernetes)
	MaxIncarnationLength = 64      // bytes of a version's incarnation; a UUID has 36

	// MaxMessageBytes bounds a state file, and the messages of the local API in both directions. The largest state that Validate
	// passes is about half as long.
	MaxMessageBytes = 64 << 20
)
