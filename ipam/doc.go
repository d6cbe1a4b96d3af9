// Package ipam gives the blocks of a cluster's pools to its nodes, and takes them back so that no address has two owners.
//
//	Register, Drain, Release, OwnerAcked, Tick, AddPool     what happened
//	        │  plan: a function of the Table and the clock
//	        v
//	       Tx: conditions and writes ─> Store.Commit ─> the store's watch ─> Table
//
// A block's life, each arrow one transaction:
//
//	FREE ──Register──> ALLOCATED ──Release──> RELEASING ──the owner acknowledged, or is fenced──> COOLDOWN ──its time passed, and the
//	connected nodes have withdrawn its routes, or the deadline passed──> FREE
//
// A node that registers again keeps the block it has, and gets the one back that it had, from COOLDOWN or FREE, as long as nobody else has it.
//
// What is true rests on the transactions: each checks that every record it was planned on is still the one it was, so that of two racing claims
// of a block one fails and is planned anew. Which address or range belongs to whom across records (no two nodes with one address, no pool
// over a node) is checked at planning only, and rests on there being one leader, which Store.Commit's fence makes sure of.
//
// Time is the clock's monotonic reading since this process saw the block in its state. So a jump of the clock, or a restart, may make a cooldown longer,
// never shorter.
package ipam
