// Package server is the controller: what it says to nodes and to operators.
//
//	store.Follow ─> graph: one table for all nodes, its digest, the last changes ─┬─> cursor of node n1 ─> batches ─> n1's stream
//	                                                                             ├─> cursor of node n2 ─> ...
//	hello ─> ipam.Allocator.Register                                             └─> ...
//	acknowledgements ─> who has programmed what ─> ipam.Allocator.OwnerAcked, Tick
//
// The table is the same for all nodes but for each one's own blocks, so an entry is encoded once when it changes, a difference once for all nodes that are equally
// far behind, the whole once a version. A stream's cursor is the version that its node accepted last; one group of batches is under way at a time, and when it
// is accepted, the next one is the difference to whatever is newest by then. So a slow node skips versions, a node that stops
// reading costs what is in its own socket, and nobody waits for another.
package server
