// Package store keeps a cluster's records in etcd, embedded or external, and what it knows of them in memory.
//
//	Commit ─> one etcd transaction: the caller's conditions, the leader's fence, the writes
//	etcd's watch ─> Table (one goroutine writes it) ─> Read, Follow
//
// Nobody but this package's one watch reads etcd while the controller runs: nodes are answered from memory.
//
// Leading rests on a key with a lease. Its create revision is the fence: a transaction goes through only while the key is the one that this process
// made, so that whoever lost the lead without knowing it cannot write.
//
// Memory is the same without etcd, for tests; one suite tests all.
package store
