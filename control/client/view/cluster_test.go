package view

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func TestClusterTables(t *testing.T) {
	now := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-d)) }
	v := func(r uint64) *controlv1.Version { return &controlv1.Version{Incarnation: "2c1e", Revision: r} }
	var out strings.Builder
	require.NoError(t, Nodes(&out, []*controlv1.Node{
		{Name: "n1", Ipv4: "10.240.0.11", Mac: "02:00:0a:f0:00:0b", Connected: true, Since: ago(time.Hour), Blocks: []string{"10.244.0.0/24", "fd12::/80"}, DaemonVersion: "v0.1.0"},
		{Name: "n2", Ipv6: "fd00:240::12", Draining: true},
	}, now))
	require.NoError(t, Blocks(&out, []*controlv1.Block{
		{Cidr: "10.244.0.0/24", Pool: "10.244.0.0/16", State: controlv1.BlockState_BLOCK_STATE_ALLOCATED, Owner: "n1", Since: ago(time.Minute)},
		{Cidr: "10.244.1.0/24", Pool: "10.244.0.0/16", State: controlv1.BlockState_BLOCK_STATE_COOLDOWN, Owner: "n2", Since: ago(18 * time.Second),
			Remaining: durationpb.New(42 * time.Second), WaitsFor: []string{"n1", "n3", "n4", "n5", "n6", "n7"}},
	}, now))
	require.NoError(t, Pools(&out, &controlv1.ListPoolsResponse{Warnings: []string{"IPv4: little is left"}, Pools: []*controlv1.PoolUsage{
		{Cidr: "10.244.0.0/16", BlockPrefixLength: 24, Nodes: 256, Allocated: 204, Cooldown: 1, Free: 51},
	}}))
	require.NoError(t, Convergence(&out, &controlv1.GetConvergenceResponse{Issued: v(12), Connected: 1, Converged: 1, Nodes: []*controlv1.NodeConvergence{
		{Node: "n1", Connected: true, Accepted: v(12), Programmed: v(12)},
		{Node: "n2", Accepted: v(11), Behind: ago(3 * time.Second), Problem: "too many removals", Failures: []*controlv1.EntryFailure{{Kind: "route", Key: "10.9.0.0/24", Reason: "no room"}}},
	}}, now))
	require.NoError(t, StaticRoutes(&out, []*controlv1.Route{{Prefix: "10.9.0.0/24", Target: &controlv1.Route_Node{Node: "n1"}}, {Prefix: "10.8.0.0/24", Target: &controlv1.Route_Host{Host: true}}}))
	require.Equal(t, `NODE  STATE          SINCE  IPV4         IPV6          MAC                BLOCKS                   VERSION
n1    connected      1h0m   10.240.0.11  -             02:00:0a:f0:00:0b  10.244.0.0/24,fd12::/80  v0.1.0
n2    away,draining  -      -            fd00:240::12  -                  -                        -
BLOCK          STATE      OWNER  FOR   POOL           WAITS FOR
10.244.0.0/24  allocated  n1     1m0s  10.244.0.0/16  -
10.244.1.0/24  cooldown   n2     18s   10.244.0.0/16  42s,n1,n3,n4,n5,n6,and 1 more
  ! IPv4: little is left
POOL           BLOCK  FITS NODES  ALLOCATED  RELEASING  COOLDOWN  FREE  USED
10.244.0.0/16  /24           256        204          0         1    51   80%
version 2c1e/12 issued; 1 of 2 nodes connected, 1 converged
NODE  STATE      PROGRAMMED  ACCEPTED  BEHIND FOR  PROBLEM
n1    connected          12        12  -           -
n2    away                -        11  3s          too many removals; route 10.9.0.0/24: no room
PREFIX       KIND  TARGET
10.9.0.0/24  node  n1
10.8.0.0/24  host  -
`, out.String())
}

func TestSelectBlocks(t *testing.T) {
	blocks := []*controlv1.Block{
		{Owner: "n1", State: controlv1.BlockState_BLOCK_STATE_FREE}, {Owner: "n1", State: controlv1.BlockState_BLOCK_STATE_ALLOCATED},
		{Owner: "n2", State: controlv1.BlockState_BLOCK_STATE_ALLOCATED},
	}
	require.Len(t, SelectBlocks(blocks, "n1", nil), 2)
	require.Len(t, SelectBlocks(blocks, "", []string{"allocated"}), 2)
	require.Len(t, SelectBlocks(blocks, "n1", []string{"allocated", "cooldown"}), 1)
	require.Len(t, SelectBlocks(blocks, "", nil), 3)
}
