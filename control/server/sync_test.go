package server_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func TestNodesThatJoinReachEachOther(t *testing.T) {
	c := newCluster(t, dualStack(), nil)
	n1, n2, n3 := c.join(1, nil), c.join(2, nil), c.join(3, nil)
	c.converged(n1, n2, n3)
	owners := make(map[string]string)
	for _, n := range []*node{n1, n2, n3} {
		require.Len(t, n.own(), 2, "a block per family")
		for _, b := range n.own() {
			require.Empty(t, owners[b], "block %s has two owners", b)
			owners[b] = n.name
		}
	}
	for _, n := range []*node{n1, n2, n3} {
		s := n.now()
		require.Len(t, s.GetMembers(), 3)
		require.Len(t, s.GetPools(), 2)
		routed := map[string]string{}
		for _, r := range s.GetRoutes() {
			if r.GetNode() != "" {
				routed[r.GetPrefix()] = r.GetNode()
			} else {
				require.True(t, r.GetHost())
			}
		}
		for b, owner := range owners {
			if owner != n.name {
				require.Equal(t, owner, routed[b])
				delete(routed, b)
			}
		}
		require.Empty(t, routed)
	}
	nodes, err := c.admin().ListNodes(t.Context(), &controlv1.ListNodesRequest{})
	require.NoError(t, err)
	require.Len(t, nodes.GetNodes(), 3)
}
