// Package control measures the control plane: one controller process with the embedded etcd, and thousands of simulated nodes in this process, which are the real
// client over real TCP with mTLS in front of a data plane that only takes note. Both share the machine's first two cores.
//
//	store with every node's block ─> controller ─> 50 clients that say hello and never read
//	                                     └──────> all nodes at once: cold start
//	                                     └──────> a node joins: until everybody forwards to it, and everybody's acknowledgement is in; many times
//	table of 5,000 routes ─> agent.Build ─> a worker that forwards all the while: how long it takes, and the longest poll meanwhile
//
// What the nodes take is part of the wall-clock times, and is not part of the controller's CPU time and memory. The nodes share what is the same for all of them,
// which thousands of machines would not have to; see syncclient.Shared.
package control
