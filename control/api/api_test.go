package api

import (
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// cluster is a valid state of node n1 of three, dual stack, without hashes.
func cluster() *controlv1.NodeState {
	return &controlv1.NodeState{
		Node:    "n1",
		Version: &controlv1.Version{Incarnation: "2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11", Revision: 7},
		Pools: []*controlv1.Pool{
			{Cidr: "10.244.0.0/16", BlockPrefixLength: 24},
			{Cidr: "fd12:3456:789a::/64", BlockPrefixLength: 80},
		},
		OwnBlocks: []*controlv1.OwnBlock{{Cidr: "10.244.1.0/24"}, {Cidr: "fd12:3456:789a:0:1::/80"}},
		Members: []*controlv1.Member{
			{Name: "n1", Ipv4: "10.240.0.11", Ipv6: "fd00:240::11", Mac: "02:00:0a:f0:00:0b"},
			{Name: "n2", Ipv4: "10.240.0.12", Ipv6: "fd00:240::12", Mac: "02:00:0a:f0:00:0c"},
			{Name: "n3", Ipv4: "10.240.0.13", Mac: "02:00:0a:f0:00:0d"},
		},
		Routes: []*controlv1.Route{
			toNode("10.244.2.0/24", "n2"),
			toNode("10.244.3.0/24", "n3"),
			toNode("fd12:3456:789a:0:2::/80", "n2"),
			toHost("10.0.0.0/16"),
			toNowhere("10.244.7.0/24"),
		},
		Snat: &controlv1.SnatRules{NoMasqueradeCidrs: []string{"10.0.0.0/8"}},
	}
}

func toNode(prefix, node string) *controlv1.Route {
	return &controlv1.Route{Prefix: prefix, Target: &controlv1.Route_Node{Node: node}}
}

func toHost(prefix string) *controlv1.Route {
	return &controlv1.Route{Prefix: prefix, Target: &controlv1.Route_Host{Host: true}}
}

func toNowhere(prefix string) *controlv1.Route {
	return &controlv1.Route{Prefix: prefix, Target: &controlv1.Route_Unreachable{Unreachable: true}}
}

// The values were computed by an independent program from the package's comment. They may not change: another control plane may
// compute them too.
func TestHashesAreThoseOfTheDocumentation(t *testing.T) {
	require.Equal(t, uint64(0x358a000d7ce207e7), hashPool(&controlv1.Pool{Cidr: "10.244.0.0/16", BlockPrefixLength: 24}))
	require.Equal(t, uint64(0x83533cc1e0bfd430), hashOwnBlock(&controlv1.OwnBlock{Cidr: "10.244.1.0/24"}))
	require.Equal(t, uint64(0x4265e1da7d9a0ab2), hashMember(cluster().Members[0]))
	require.Equal(t, uint64(0x5afd015b8588122d), hashRoute(toNode("10.244.2.0/24", "n2")))
	require.Equal(t, uint64(0xa545166c681a57ee), hashRoute(toHost("10.0.0.0/16")))
	require.Equal(t, uint64(0xb3f94f8da954365a), hashRoute(toNowhere("10.9.0.0/16")))
	require.Equal(t, uint64(0xf080574811022484), hashRoute(&controlv1.Route{Prefix: "10.9.0.0/16"}))
	require.Equal(t, uint64(0x6511450fc3e81df5), hashSNAT(&controlv1.SnatRules{
		Disabled: true, NoMasqueradeCidrs: []string{"10.0.0.0/8", "fd00::/8"},
		Mapping:    controlv1.SnatMapping_SNAT_MAPPING_ENDPOINT_INDEPENDENT,
		PortChoice: controlv1.SnatPortChoice_SNAT_PORT_CHOICE_PRESERVE,
		Filtering:  controlv1.SnatFiltering_SNAT_FILTERING_ENDPOINT_INDEPENDENT,
		FirstPort:  20000, LastPort: 20999,
	}))
}

func TestDigestSeesTwoRoutesSwapTheirNodes(t *testing.T) {
	a, b := cluster(), cluster()
	b.Routes[0].Target, b.Routes[1].Target = b.Routes[1].Target, b.Routes[0].Target
	Seal(a)
	Seal(b)
	require.NotEqual(t, a.Digest, b.Digest)
}

func TestSealCompleteAndStrip(t *testing.T) {
	s := cluster()
	require.False(t, Sealed(s))
	Complete(s)
	require.True(t, Sealed(s))
	require.Equal(t, uint32(13), s.EntryCount)
	require.NotZero(t, s.Digest)
	require.NoError(t, Validate(s))

	// Hashes are opaque: another control plane's stay as they are.
	s.Digest ^= s.Pools[0].Hash ^ 42
	s.Pools[0].Hash = 42
	Complete(s)
	require.Equal(t, uint64(42), s.Pools[0].Hash)
	require.NoError(t, Validate(s))

	Seal(s)
	require.NotEqual(t, uint64(42), s.Pools[0].Hash)

	StripHashes(s)
	require.False(t, Sealed(s))
	requireSame(t, cluster(), s)

	empty := &controlv1.NodeState{Node: "n1"}
	Seal(empty)
	require.False(t, Sealed(empty))
}

// requireSame compares two states as messages, the order of entries included.
func requireSame(t require.TestingT, want, got *controlv1.NodeState) {
	if proto.Equal(want, got) {
		return
	}
	require.Equal(t, prototext.Format(want), prototext.Format(got))
	require.Fail(t, "the states differ") // in something that the text does not show
}
