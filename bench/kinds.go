package bench

import "github.com/overplane/overplane/bench/rig"

// Overplane's variants, as scenarios compare them.
var (
	overplaneTAP  = rig.Overplane("tap", "")
	overplaneVeth = rig.Overplane("veth", "")
	// Rungs of the uplink, pods on TAP.
	overplaneXDP   = rig.Overplane("tap", "xdp-copy")
	overplaneTUN   = rig.Overplane("tap", "tun")
	overplanePlain = rig.Overplane("tap", "plain")
	// Pods on veth.
	overplaneVethXDP = rig.Overplane("veth", "xdp-copy")
	overplaneVethTUN = rig.Overplane("veth", "tun")
)

// outside are those that are measured from a pod to outside the cluster.
func outside(quick bool) []*rig.Kind {
	if quick {
		return []*rig.Kind{overplaneVethXDP, overplaneTUN}
	}
	return []*rig.Kind{overplaneVethXDP, overplaneXDP, overplaneTUN}
}
