package view

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Nodes writes a table of the cluster's nodes.
func Nodes(w io.Writer, nodes []*controlv1.Node, now time.Time) error {
	if len(nodes) == 0 {
		_, err := io.WriteString(w, "no nodes\n")
		return err
	}
	t := newTable("NODE", "STATE", "SINCE", "IPV4", "IPV6", "MAC", "BLOCKS", "VERSION")
	for _, n := range nodes {
		state := "away"
		if n.GetConnected() {
			state = "connected"
		}
		if n.GetDraining() {
			state += ",draining"
		}
		since := ""
		if n.GetSince() != nil {
			since = age(now, n.GetSince().AsTime())
		}
		t.row(n.GetName(), state, since, n.GetIpv4(), n.GetIpv6(), n.GetMac(), strings.Join(n.GetBlocks(), ","), n.GetDaemonVersion())
	}
	return t.write(w)
}

// BlockStates are the states of blocks as people write them.
var BlockStates = []string{"free", "allocated", "releasing", "cooldown"}

// BlockState is a block's state as people write it.
func BlockState(s controlv1.BlockState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "BLOCK_STATE_"))
}

// SelectBlocks are the blocks of a node, if node is not empty, and in one of the states, if there are any.
func SelectBlocks(blocks []*controlv1.Block, node string, states []string) []*controlv1.Block {
	return slices.DeleteFunc(slices.Clone(blocks), func(b *controlv1.Block) bool {
		return node != "" && b.GetOwner() != node || len(states) > 0 && !slices.Contains(states, BlockState(b.GetState()))
	})
}

// Blocks writes a table of blocks.
func Blocks(w io.Writer, blocks []*controlv1.Block, now time.Time) error {
	if len(blocks) == 0 {
		_, err := io.WriteString(w, "no blocks\n")
		return err
	}
	t := newTable("BLOCK", "STATE", "OWNER", "FOR", "POOL", "WAITS FOR")
	for _, b := range blocks {
		var waits []string
		if d := b.GetRemaining().AsDuration(); d > 0 {
			waits = append(waits, d.Round(time.Second).String())
		}
		waits = append(waits, fewNames(b.GetWaitsFor())...)
		t.row(b.GetCidr(), BlockState(b.GetState()), b.GetOwner(), age(now, b.GetSince().AsTime()), b.GetPool(), strings.Join(waits, ","))
	}
	return t.write(w)
}

// fewNames are names, and how many more there are.
func fewNames(names []string) []string {
	const most = 5
	if len(names) <= most {
		return names
	}
	return append(slices.Clone(names[:most]), fmt.Sprintf("and %d more", len(names)-most))
}

// Pools writes a table of pools, warnings first.
func Pools(w io.Writer, r *controlv1.ListPoolsResponse) error {
	for _, warning := range r.GetWarnings() {
		if _, err := fmt.Fprintf(w, "  ! %s\n", warning); err != nil {
			return err
		}
	}
	if len(r.GetPools()) == 0 {
		_, err := io.WriteString(w, "no pools\n")
		return err
	}
	t := newTable("POOL", "BLOCK", ">FITS NODES", ">ALLOCATED", ">RELEASING", ">COOLDOWN", ">FREE", ">USED")
	for _, p := range r.GetPools() {
		used := uint64(p.GetNodes()-p.GetFree()) * 100 / uint64(max(p.GetNodes(), 1))
		t.row(p.GetCidr(), fmt.Sprintf("/%d", p.GetBlockPrefixLength()), number(p.GetNodes()), number(p.GetAllocated()), number(p.GetReleasing()),
			number(p.GetCooldown()), number(p.GetFree()), fmt.Sprintf("%d%%", used))
	}
	return t.write(w)
}

// Convergence writes what was issued against what every node has programmed.
func Convergence(w io.Writer, r *controlv1.GetConvergenceResponse, now time.Time) error {
	if _, err := fmt.Fprintf(w, "version %s issued; %d of %s connected, %d converged\n", api.FormatVersion(r.GetIssued()), r.GetConnected(),
		count(uint32(len(r.GetNodes())), "node"), r.GetConverged()); err != nil {
		return err
	}
	if len(r.GetNodes()) == 0 {
		return nil
	}
	t := newTable("NODE", "STATE", ">PROGRAMMED", ">ACCEPTED", "BEHIND FOR", "PROBLEM")
	for _, n := range r.GetNodes() {
		state, behind := "away", ""
		if n.GetConnected() {
			state = "connected"
		}
		if n.GetBehind() != nil {
			behind = age(now, n.GetBehind().AsTime())
		}
		problems := []string{}
		if n.GetProblem() != "" {
			problems = append(problems, n.GetProblem())
		}
		for _, f := range n.GetFailures() {
			problems = append(problems, strings.TrimSpace(f.GetKind()+" "+f.GetKey())+": "+f.GetReason())
		}
		t.row(n.GetNode(), state, revision(n.GetProgrammed()), revision(n.GetAccepted()), behind, strings.Join(problems, "; "))
	}
	return t.write(w)
}

func revision(v *controlv1.Version) string {
	if v == nil {
		return ""
	}
	return number(v.GetRevision())
}

// StaticRoutes writes a table of static routes.
func StaticRoutes(w io.Writer, routes []*controlv1.Route) error {
	if len(routes) == 0 {
		_, err := io.WriteString(w, "no static routes\n")
		return err
	}
	t := newTable("PREFIX", "KIND", "TARGET")
	for _, r := range routes {
		switch {
		case r.GetNode() != "":
			t.row(r.GetPrefix(), "node", r.GetNode())
		case r.GetHost():
			t.row(r.GetPrefix(), "host", "")
		default:
			t.row(r.GetPrefix(), "unreachable", "")
		}
	}
	return t.write(w)
}
