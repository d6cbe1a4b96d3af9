// Package sim is the control plane without data planes: a real controller process and simulated nodes that follow it over real TCP with mTLS. Tests of faults
// and the benchmark of the control plane are made of it. It needs neither root nor namespaces.
//
//	Cluster (an authority, a folder) ─> Controller: the built program, its ports, its store; killed, stopped, started again
//	                                └─> Node: the real client of package syncclient, with a data plane that remembers what it was told
//	                                └─> Ledger: who forwards by which block; two at once is what must never be
//	Proxy stands between any two of them and cuts them off from each other.
package sim
