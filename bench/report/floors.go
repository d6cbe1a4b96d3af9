package report

import (
	"fmt"
	"io"
	"strings"

	"github.com/overplane/overplane/bench/result"
)

// Floor is a figure that Overplane is to reach beside a peer, in the same run.
type Floor struct {
	Figure                 string
	Scenario, Case, Metric string
	// Ours begin the names of the systems of which the best one counts.
	Ours []string
	// Peer is whom the ratio is to; empty: the figure itself counts.
	Peer        string
	Floor, Goal float64
	AtMost      bool // less is better
}

// Floors are the figures that the project has set itself.
var Floors = []Floor{
	{"64 B forwarding, veth pods, against Open vSwitch on AF_XDP", "pps", "same-node/frame=64/flows=1", "flooded", []string{"overplane veth"}, "ovs-afxdp", 2.0, 3.0, false},
	{"64 B forwarding, veth pods, against VPP", "pps", "same-node/frame=64/flows=1", "flooded", []string{"overplane veth"}, "vpp", 1.5, 2.5, false},
	{"64 B, veth pod to outside with SNAT, against Open vSwitch ct+nat", "pps", "outside/frame=64/flows=1000", "flooded", []string{"overplane veth"}, "ovs-afxdp", 2.2, 4.0, false},
	{"the same, against kernel masquerade, packets per CPU-second", "pps", "outside/frame=64/flows=1000", "per CPU-second at 100 kpps", []string{"overplane"}, "kernel+nft", 1.2, 2.0, false},
	{"TCP, same node, TAP pods, against kernel routing", "tcp", "same-node/streams=1", "throughput", []string{"overplane tap"}, "kernel", 0.75, 1.0, false},
	{"TCP, two nodes, wire, best rung, against VXLAN", "tcp", "two-nodes/wire/streams=1", "throughput", []string{"overplane"}, "vxlan", 1.0, 1.5, false},
	{"TCP, two nodes, wire, best rung, against kernel direct routes (GRO on)", "tcp", "two-nodes/wire/streams=1", "throughput", []string{"overplane"}, "kernel", 0.6, 1.0, false},
	{"TCP, two nodes, virtual, best rung, against VXLAN", "tcp", "two-nodes/virtual/streams=1", "throughput", []string{"overplane"}, "vxlan", 0.75, 1.2, false},
	{"UDP from a pod's socket, two nodes, against kernel direct routes", "udp", "two-nodes/wire/frame=64", "received", []string{"overplane"}, "kernel", 1.3, 2.0, false},
	{"UDP from a pod's socket, two nodes, against VXLAN", "udp", "two-nodes/wire/frame=64", "received", []string{"overplane"}, "vxlan", 2.0, 3.0, false},
	{"TCP request/response, same node, against kernel routing, p50", "tcp", "same-node/request-response", "p50", []string{"overplane"}, "kernel", 1.1, 0.9, true},
	{"TCP request/response, same node, against kernel routing, p99", "tcp", "same-node/request-response", "p99", []string{"overplane"}, "kernel", 1.3, 1.0, true},
	{"idle daemon with 50 pods, % of a core", "idle", "pods=50", "CPU", []string{"overplane tap"}, "", 1.0, 0.2, true},
}

// Outcome is how a floor came out.
type Outcome struct {
	Floor
	System string // the best of ours; empty if nothing was measured
	Value  result.Summary
	Met    bool
}

// Judge finds the best system of a floor and whether it is met.
func Judge(r *result.Run, f Floor) Outcome {
	o := Outcome{Floor: f}
	for _, s := range r.Series {
		if s.Scenario != f.Scenario || s.Case != f.Case || s.Metric != f.Metric || !hasPrefix(s.System, f.Ours) {
			continue
		}
		values := s.Values
		if f.Peer != "" {
			values = result.Ratios(s, r.Find(result.Key{Scenario: f.Scenario, Case: f.Case, System: f.Peer, Metric: f.Metric}))
		}
		if len(values) == 0 {
			continue
		}
		sum := result.Summarize(values)
		if o.System == "" || (sum.Median < o.Value.Median) == f.AtMost {
			o.System, o.Value = s.System, sum
		}
	}
	o.Met = o.System != "" && (f.AtMost && o.Value.Median <= f.Floor || !f.AtMost && o.Value.Median >= f.Floor)
	return o
}

func hasPrefix(s string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}

// WriteFloors writes the floors that a run can say anything of.
func WriteFloors(w io.Writer, r *result.Run) error {
	measured := map[string]bool{}
	for _, s := range r.Series {
		measured[s.Scenario] = true
	}
	begun := false
	for _, f := range Floors {
		if !measured[f.Scenario] {
			continue
		}
		if !begun {
			fmt.Fprint(w, "| figure | floor | goal | measured | range | by | |\n|---|---|---|---|---|---|---|\n")
			begun = true
		}
		o := Judge(r, f)
		unit, least := " ×", "at least "
		if f.Peer == "" {
			unit = ""
		}
		if f.AtMost {
			least = "at most "
		}
		limits := fmt.Sprintf("%s%s%s | %s%s", least, result.Number(f.Floor), unit, result.Number(f.Goal), unit)
		switch {
		case o.System == "":
			fmt.Fprintf(w, "| %s | %s | – | – | – | not measured |\n", f.Figure, limits)
		default:
			verdict := "**below the floor**"
			switch {
			case o.Met && (f.AtMost && o.Value.Median <= f.Goal || !f.AtMost && o.Value.Median >= f.Goal):
				verdict = "goal reached"
			case o.Met:
				verdict = "holds"
			}
			fmt.Fprintf(w, "| %s | %s | %s%s | %s–%s | %s | %s |\n", f.Figure, limits, result.Number(o.Value.Median), unit, result.Number(o.Value.Min), result.Number(o.Value.Max), o.System, verdict)
		}
	}
	if begun {
		_, err := fmt.Fprintln(w)
		return err
	}
	return nil
}
