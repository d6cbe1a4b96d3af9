// Package agent is the node's side of the control plane: it turns what the cluster wants (the desired state) and what the node is (kernel
// facts, attached pods) into the immutable snapshots that the data plane forwards by.
//
//	controller, file, API ───> desired ─┐
//	links, neighbours, addresses ─ Facts ┼─> Build ──> dataplane.Publish ──> workers
//	AttachPod, DetachPod ────────> pods ─┘      └────> steering maps, host routes
//
// One goroutine, Agent.loop, owns everything that changes and publishes every snapshot; the client of the controller, the local API, the watchers and the
// signals send it commands. It does things in the order in which nothing is lost: a device is opened before the snapshot that names it is
// published, and closed after every worker has passed the snapshot that does not; steering admits another node's address before
// frames from it can arrive and forgets it afterwards; a pod is on disk before its attachment is answered.
//
// What the agent needs of the machine is behind the Platform interface: platform_linux.go implements it with package kernel (netlink,
// namespaces) and the ports; tests implement it in memory.
package agent
