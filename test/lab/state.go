package lab

import (
	"crypto/rand"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func newIncarnation() string {
	var b [16]byte
	_, _ = rand.Read(b[:])
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Version is the version of the desired state last written.
func (l *Lab) Version() *controlv1.Version {
	return &controlv1.Version{Incarnation: l.Incarnation, Revision: l.Revision}
}

// State is the desired state of one node as the lab's record says.
func (l *Lab) State(n *Node) *controlv1.NodeState {
	s := &controlv1.NodeState{
		Node:    n.Name(),
		Version: l.Version(),
		Pools: []*controlv1.Pool{
			{Cidr: poolIPv4, BlockPrefixLength: blockBitsIPv4},
			{Cidr: poolIPv6, BlockPrefixLength: blockBitsIPv6},
		},
		OwnBlocks: []*controlv1.OwnBlock{
			{Cidr: blockIPv4(n.Block).String()},
			{Cidr: blockIPv6(n.Block).String()},
		},
		Snat: &controlv1.SnatRules{},
	}
	if l.Snat != nil {
		s.Snat = proto.Clone(l.Snat).(*controlv1.SnatRules)
	}
	for _, m := range l.Nodes {
		if m.Gone && m != n {
			continue
		}
		s.Members = append(s.Members, &controlv1.Member{Name: m.Name(), Ipv4: m.IPv4().String(), Ipv6: m.IPv6().String(), Mac: m.MAC})
		if m == n {
			continue
		}
		for _, block := range []string{blockIPv4(m.Block).String(), blockIPv6(m.Block).String()} {
			s.Routes = append(s.Routes, &controlv1.Route{Prefix: block, Target: &controlv1.Route_Node{Node: m.Name()}})
		}
	}
	return s
}

// WriteStates writes the desired state of every node under a new revision. Daemons notice by themselves, or by Reload.
func (l *Lab) WriteStates() error {
	l.Revision++
	for _, n := range l.Nodes {
		if err := l.WriteState(n, l.State(n)); err != nil {
			return err
		}
	}
	return l.save()
}

// WriteState replaces the file with one node's desired state.
func (l *Lab) WriteState(n *Node, s *controlv1.NodeState) error {
	api.Seal(s)
	if err := api.WriteFile(n.StatePath(), s); err != nil {
		return fmt.Errorf("%s: desired state: %w", n.Name(), err)
	}
	return nil
}
