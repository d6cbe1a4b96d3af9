package bench

import (
	"context"
	"fmt"

	"github.com/overplane/overplane/bench/rig"
)

var rungsScenario = Scenario{
	Name: "rungs", Short: "Side by side: every rung of the uplink, every kind of pod port, 1 and 2 workers",
	Long: `Two nodes, wire link: one TCP stream, and 64-byte frames as fast as they come, for every rung of the uplink that this machine's devices have, pods on TAP and
on veth, one worker a node and two.`,
	All: true, Run: runRungs,
}

func runRungs(ctx context.Context, r *Runner) error {
	for _, workers := range []int{1, 2} {
		if workers > r.Result.Machine.Cores {
			r.note("rungs: %d workers a node want as many cores, which this machine has not.", workers)
			continue
		}
		for _, ports := range []string{"tap", "veth"} {
			var kinds []*rig.Kind
			for _, rung := range []string{"xdp-copy", "tun", "plain"} {
				kinds = append(kinds, rig.Overplane(ports, rung))
			}
			spec := rig.Spec{Topology: rig.TwoNodes, Link: rig.Wire, Workers: workers, Frames: true}
			err := r.with(ctx, "rungs", r.kinds(rig.Kinds(kinds...)...), spec, func(systems []*rig.System) error {
				name := fmt.Sprintf("workers=%d/pods=%s", workers, ports)
				if err := r.streamsAs(ctx, "rungs", name+"/streams=1", 1, systems); err != nil {
					return err
				}
				return r.floodAs(ctx, "rungs", name+"/frame=64", ppsCase{64, 1000}, systems)
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}
