// Package syncclient keeps a node's desired state up to date from the controller: the node's end of ControlService.Sync.
//
//	the last table on disk ─────────────────────────┐
//	                                                v
//	hello ─> batches ─> group ─> checks ─> table ─> apply (the data plane) ─> disk
//	                      │                  │        │
//	                      └─ REJECTED        │        └─ PROGRAMMED, with what failed
//	                                         └─ ACCEPTED
//
// What a group of batches makes of the table is worked out aside, and takes the table's place only if its digest is the controller's, its version is not
// older, it does not remove more than it may, and it is a valid state. So an answer that is cut short, empty, old or mixed up changes nothing.
//
// While apply works on one table, newer ones are accepted, and the newest is applied next. Without a controller the node forwards by what it
// has for as long as it takes; Status says for how long.
package syncclient
