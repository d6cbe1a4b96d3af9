package bench

import (
	"context"
	"fmt"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

var tcpScenario = Scenario{
	Name: "tcp", Short: "TCP between pods: throughput of 1, 4 and 16 streams, and request/response",
	Long: `TCP between pods of one node, of two nodes, and from a pod to outside: throughput of 1, 4 and 16 streams as the receivers see it, and the time
of 64-byte requests and responses. Between nodes over two kinds of links: wire (MTU-size frames cross it, GRO on) and virtual (64 KiB frames cross it whole).
Congestion control is cubic. Sending and receiving threads are not pinned.`,
	All: true, Quick: true, Run: runTCP,
}

// tcpStage is a topology with those who are measured in it.
type tcpStage struct {
	name  string
	spec  rig.Spec
	kinds []*rig.Kind
}

func tcpStages(quick bool) []tcpStage {
	two := []*rig.Kind{overplaneXDP, overplaneTUN, overplanePlain, overplaneVethXDP, overplaneVethTUN}
	if quick {
		two = two[:2]
	}
	return []tcpStage{
		{"same-node", rig.Spec{Topology: rig.SameNode}, rig.Kinds(overplaneTAP, overplaneVeth)},
		{"two-nodes/wire", rig.Spec{Topology: rig.TwoNodes, Link: rig.Wire}, rig.Kinds(two...)},
		{"two-nodes/virtual", rig.Spec{Topology: rig.TwoNodes, Link: rig.Virtual}, rig.Kinds(overplaneTUN, overplaneVethTUN)},
		{"outside/wire", rig.Spec{Topology: rig.Outside, Link: rig.Wire}, rig.Kinds(outside(quick)...)},
		{"outside/virtual", rig.Spec{Topology: rig.Outside, Link: rig.Virtual}, rig.Kinds(overplaneTUN)},
	}
}

func runTCP(ctx context.Context, r *Runner) error {
	streams := []int{1, 4, 16}
	if r.Quick {
		streams = []int{1, 4}
	}
	for _, st := range tcpStages(r.Quick) {
		err := r.with(ctx, "tcp", r.kinds(st.kinds...), st.spec, func(systems []*rig.System) error {
			for _, n := range streams {
				if err := r.streams(ctx, st.name, n, systems); err != nil {
					return err
				}
			}
			if err := r.roundTrips(ctx, st.name, systems); err != nil || r.Quick || st.spec.Topology != rig.SameNode {
				return err
			}
			return r.iperf(ctx, st.name, systems)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *Runner) streams(ctx context.Context, stage string, n int, systems []*rig.System) error {
	return r.streamsAs(ctx, "tcp", fmt.Sprintf("%s/streams=%d", stage, n), n, systems)
}

// streamsAs measures the throughput of n streams for a scenario.
func (r *Runner) streamsAs(ctx context.Context, scenario, name string, n int, systems []*rig.System) error {
	return r.rounds(ctx, scenario+" "+name, systems, func(ctx context.Context, round int, s *rig.System) error {
		bits, err := load.Streams(ctx, s.From, s.To, n, r.Span)
		if err != nil {
			return err
		}
		r.Result.Add(result.Key{Scenario: scenario, Case: name, System: s.Name, Metric: "throughput"}, "Gbit/s", false, round, bits/1e9)
		return nil
	})
}

func (r *Runner) roundTrips(ctx context.Context, stage string, systems []*rig.System) error {
	name := stage + "/request-response"
	return r.rounds(ctx, "tcp "+name, systems, func(ctx context.Context, round int, s *rig.System) error {
		trips, err := load.Ping(ctx, s.From, s.To, r.Span)
		if err != nil {
			return err
		}
		if len(trips) == 0 {
			return fmt.Errorf("no exchange ended within %v", r.Span)
		}
		for metric, q := range map[string]float64{"p50": 0.5, "p99": 0.99} {
			r.Result.Add(result.Key{Scenario: "tcp", Case: name, System: s.Name, Metric: metric}, "µs", true, round, float64(trips.Quantile(q).Nanoseconds())/1e3)
		}
		return nil
	})
}

// iperf measures one stream again with somebody else's tool, so that nobody need believe ours.
func (r *Runner) iperf(ctx context.Context, stage string, systems []*rig.System) error {
	if !load.IperfInstalled() {
		r.Result.Missing["iperf3"] = "iperf3 is not installed; streams are measured by the harness's own sockets alone. To have both: apt-get install iperf3"
		return nil
	}
	name := stage + "/streams=1/iperf3"
	return r.rounds(ctx, "tcp "+name, systems, func(ctx context.Context, round int, s *rig.System) error {
		bits, err := load.Iperf(ctx, s.From, s.To, r.Span)
		if err != nil {
			return err
		}
		r.Result.Add(result.Key{Scenario: "tcp", Case: name, System: s.Name, Metric: "throughput"}, "Gbit/s", false, round, bits/1e9)
		return nil
	})
}
