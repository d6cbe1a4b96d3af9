package rig

// Kinds are Overplane's variants and then all peers.
func Kinds(overplane ...*Kind) []*Kind {
	all := append([]*Kind(nil), overplane...)
	all = append(all, kernelKinds...)
	return append(all, OVS, asavie, vpp)
}
