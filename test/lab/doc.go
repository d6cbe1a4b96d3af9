// Package lab is a cluster on one machine: network namespaces, veth pairs for wires, one real overplaned in each node's namespace, and a real
// overplane-controller, with embedded etcd and mTLS, in the router's. Nodes join it by themselves and get their blocks from it; with [StateFile]
// there is no controller, and the lab writes their state files.
// Newcomers (`overplane lab`), the end-to-end suites and the benchmarks use the same one. It needs root and nothing but this module's
// own programs.
//
//	       ovp-gw: bridge br0 and router, overplane-controller
//	 10.240.0.1/24, fd00:240::1/64      198.51.100.1/24, 2001:db8:100::1/64
//	    |n1          |n2         |n3              |ext
//	    |eth0        |eth0       |eth0            |eth0
//	 ovp-n1       ovp-n2      ovp-n3           ovp-ext
//	 10.240.0.11  .12         .13              198.51.100.10, 2001:db8:100::10
//	 fd00:240::11 ::12        ::13
//	 overplaned   overplaned  overplaned
//	  |      |
//	ovp-n1-p1 ovp-n1-p2 ...   pods: addresses 2, 3, ... of the node's blocks, eth0 made by the daemon
//
// Every namespace is a named one (`ip netns exec ovp-n1 ...` works). What belongs to a lab can be found from its name alone: namespaces
// by prefix, files under /run/overplane-lab/<name>, BPF pins under /sys/fs/bpf/overplane-lab/<name>, processes by the network namespace
// they live in; the controller, which may live on another lab's underlay, by its pid file. So [Down] cleans up after a crash too.
//
// A lab plays systemd's part for its daemons (sd_notify(3)): it waits for READY=1 and counts WATCHDOG=1 for as long as the process that
// started the daemon lives.
package lab
