// Package xdp drives an interface from user space through AF_XDP sockets, and steers to them what is the data plane's.
//
//	          wire                                     wire
//	           |                                         ^
//	     steering program --- not ours --> kernel        |
//	           | ours                                    |
//	FILL -> [kernel] -> RX                    TX -> [kernel] -> COMPLETION
//	 ^                   |                     ^                   |
//	 |   chunks          | frames              | frames            | chunks
//	 |                   v                     |                   v
//	Pool             Receive -> worker -> Transmit, Flush         Pool
//
// There is one socket ([Queue]) a receive queue, because a socket receives only from the queue it is bound to. A socket's memory (UMEM) is
// the chunk part of its worker's [port.Pool]; queues of one worker register the same memory several times, each with a FILL and a COMPLETION ring
// of its own, so that a frame moves between them, and to ports of other kinds, without a copy. [Memory] is where pools live: a memfd, so that a process can
// leave its frames to the next.
//
// Whether the kernel copies depends on the driver ([Mode], [Port.ZeroCopy]). Copy mode transmits in system calls of at most 32
// packets (XDP_MAX_TX_SKB_BUDGET changes that from Linux 6.17 on); its receive side needs none.
//
// [AttachSteering] puts the program on the interface, pinned, so that it outlives the process: while no socket is there, or its
// worker stopped beating, frames that are ours are dropped rather than given to a kernel that would answer them. bpf/steer.h says which frames are
// ours.
//
// [OpenVeth] drives the node's end of a pod's veth pair in the same way, but with a small UMEM for each queue and a copy between it and the pool: with
// hundreds of pods, the pool as everybody's UMEM would cost gigabytes ([VethPort] says more).
//
// Limits: frames that carry a VLAN tag are never ours. A frame received from a device of this machine (veth) whose sender leaves its
// checksum to the device has an unfinished one, and nothing says so: turn tx checksum offload off at the sender. Sockets share no queue with
// another program's.
package xdp
