package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

var udpScenario = Scenario{
	Name: "udp", Short: "UDP from a pod's own socket: what arrives, between nodes and on one node",
	Long: `Datagrams from one socket of a pod as fast as its thread, which is not pinned, can write them, one by one and many at a time (UDP_SEGMENT). The sender's
own stack is part of what is measured; what arrives is counted and dropped by a tc program at the receiving pod's device.`,
	All: true, Quick: true, Run: runUDP,
}

// unpinned leaves a thread to the scheduler: with a worker of one of two nodes on each core, every choice would be in the way of one.
const unpinned = -1

func runUDP(ctx context.Context, r *Runner) error {
	two := []*rig.Kind{overplaneTUN, overplaneXDP, overplanePlain}
	if r.Quick {
		two = two[:2]
	}
	stages := []tcpStage{
		{"two-nodes/wire", rig.Spec{Topology: rig.TwoNodes, Link: rig.Wire}, rig.Kinds(two...)},
		{"same-node", rig.Spec{Topology: rig.SameNode}, rig.Kinds(overplaneTAP, overplaneVeth)},
	}
	if r.Quick {
		stages = stages[:1]
	}
	type udpCase struct {
		size int
		gso  bool
	}
	cases := []udpCase{{64, false}, {1442, false}, {1442, true}} // what fits VXLAN's MTU, too
	if r.Quick {
		cases = cases[:1]
	}
	for _, st := range stages {
		err := r.with(ctx, "udp", r.kinds(st.kinds...), st.spec, func(systems []*rig.System) error {
			for _, c := range cases {
				name := fmt.Sprintf("%s/frame=%d", st.name, c.size)
				if c.gso {
					name += "/gso"
				}
				if err := r.udp(ctx, name, c.size, c.gso, systems); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *Runner) udp(ctx context.Context, name string, size int, gso bool, systems []*rig.System) error {
	return r.rounds(ctx, "udp "+name, systems, func(ctx context.Context, round int, s *rig.System) error {
		a, err := arrivals(ctx, s, func() (uint64, time.Duration, error) {
			return load.UDP(ctx, s.From, s.To, size, unpinned, gso, r.Span)
		})
		if err != nil {
			return err
		}
		for metric, n := range map[string]uint64{"received": a.received, "sent": a.sent} {
			r.Result.Add(result.Key{Scenario: "udp", Case: name, System: s.Name, Metric: metric}, "Mpps", false, round, float64(n)/a.took.Seconds()/1e6)
		}
		if gso && s.TAP { // it counts frames, and such a frame is many datagrams: its queue's share cannot be told
			a.before.taken, s.TAP = 0, false
			defer func() { s.TAP = true }()
		}
		return r.reconcile(ctx, "udp", name, s, a.sent, a.received, a.before)
	})
}
