package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

var ppsScenario = Scenario{
	Name: "pps", Short: "Packets: rates, loss and latency of frames of 64 to 1514 bytes, 1 to 100,000 flows",
	Long: `Frames from one pod's device to another's on one node: what arrives when the sender sends as fast as it can; the highest rate at which nothing is lost
(bisection, RFC 2544 section 26.1; --loss is what counts as nothing); loss and age on arrival over a range of rates; packets per CPU-second at a rate
that all can take. Frames are made by the kernel (BPF_PROG_RUN, live frames) on core 0 and dropped by a tc program at the receiving device.`,
	All: true, Quick: true, Run: runPPS,
}

// paced is the rate, in packets a second, at which CPU time is measured: all systems take it.
const paced = 100e3

type ppsCase struct{ size, flows int }

func (c ppsCase) String() string { return fmt.Sprintf("frame=%d/flows=%d", c.size, c.flows) }

func runPPS(ctx context.Context, r *Runner) error {
	cases := []ppsCase{{64, 1}, {64, 1000}, {64, 100000}, {256, 1}, {512, 1}, {1024, 1}, {1514, 1}}
	if r.Quick {
		cases = []ppsCase{{64, 1}, {64, 1000}, {1514, 1}}
	}
	kinds := r.kinds(rig.Kinds(overplaneVeth, overplaneTAP)...)
	spec := rig.Spec{Topology: rig.SameNode, Frames: true}
	return r.with(ctx, "pps", kinds, spec, func(systems []*rig.System) error {
		for _, c := range cases {
			if err := r.flood(ctx, "same-node/"+c.String(), c, systems); err != nil {
				return err
			}
		}
		if err := r.cpuCost(ctx, "same-node/"+cases[0].String(), cases[0], systems); err != nil {
			return err
		}
		return r.noLoss(ctx, "same-node/"+cases[0].String(), cases[0], systems)
	})
}

// shot is one measurement: frames of a case sent for a while at a rate, 0 as fast as can be.
type shot struct {
	offered  uint64
	took     time.Duration
	received load.Tally
	busy     time.Duration
}

// rate is what arrived, packets a second.
func (s shot) rate() float64 { return float64(s.received.Packets) / s.took.Seconds() }

// sent is what was offered, packets a second: with a busy machine less than was asked for.
func (s shot) sent() float64 { return float64(s.offered) / s.took.Seconds() }

func (s shot) loss() float64 {
	if s.offered == 0 {
		return 1
	}
	return max(0, 1-float64(s.received.Packets)/float64(s.offered))
}

// shoot sends frames through a system and balances the books.
func (r *Runner) shoot(ctx context.Context, name string, c ppsCase, s *rig.System, rate float64, span time.Duration) (shot, error) {
	var m shot
	sink, err := load.NewSink(s.To)
	if err != nil {
		return m, err
	}
	defer sink.Close()
	gen, err := load.NewLive(s.From, s.To, c.size, c.flows, rig.LoadCore())
	if err != nil {
		return m, err
	}
	defer gen.Close()
	before, err := openBooks(ctx, s)
	if err != nil {
		return m, err
	}
	cpu, err := load.ReadCPU()
	if err != nil {
		return m, err
	}
	if m.offered, m.took, err = gen.Run(ctx, rate, span); err != nil {
		return m, err
	}
	if m.received, err = sink.Settle(); err != nil {
		return m, err
	}
	after, err := load.ReadCPU()
	if err != nil {
		return m, err
	}
	m.busy = after.Busy(cpu)
	if m.received.Packets == 0 {
		return m, fmt.Errorf("nothing arrived of %d frames", m.offered)
	}
	return m, r.reconcile(ctx, "pps", name, s, m.offered, m.received.Packets, before)
}

// flood measures what arrives when the sender sends as fast as it can.
func (r *Runner) flood(ctx context.Context, name string, c ppsCase, systems []*rig.System) error {
	return r.rounds(ctx, "pps "+name+", flood", systems, func(ctx context.Context, round int, s *rig.System) error {
		m, err := r.shoot(ctx, name, c, s, 0, r.Span)
		if err != nil {
			return err
		}
		r.Result.Add(result.Key{Scenario: "pps", Case: name, System: s.Name, Metric: "flooded"}, "Mpps", false, round, m.rate()/1e6)
		return nil
	})
}

// cpuCost measures packets per second of CPU time at a rate that all can take: busy time less that of the generator alone.
func (r *Runner) cpuCost(ctx context.Context, name string, c ppsCase, systems []*rig.System) error {
	return r.rounds(ctx, "pps "+name+", CPU time", systems, func(ctx context.Context, round int, s *rig.System) error {
		alone, err := r.generatorOnly(ctx, c, s)
		if err != nil {
			return err
		}
		m, err := r.shoot(ctx, name, c, s, paced, r.Span)
		if err != nil {
			return err
		}
		r.checkPace("pps "+name, s.Name, m, paced)
		if busy := m.busy - alone; busy > 0 {
			r.Result.Add(result.Key{Scenario: "pps", Case: name, System: s.Name, Metric: "per CPU-second at 100 kpps"}, "M/s", false, round, float64(m.received.Packets)/busy.Seconds()/1e6)
		}
		for metric, q := range map[string]float64{"age p50 at 100 kpps": 0.5, "age p99 at 100 kpps": 0.99, "age p99.9 at 100 kpps": 0.999} {
			r.Result.Add(result.Key{Scenario: "pps", Case: name, System: s.Name, Metric: metric}, "µs", true, round, float64(m.received.Quantile(q).Nanoseconds())/1e3)
		}
		return nil
	})
}

// checkPace notes, once for each case, when the generator did not get to send at the rate that a figure's name says.
func (r *Runner) checkPace(name, system string, m shot, rate float64) {
	if m.sent() > 0.9*rate {
		return
	}
	key := name + ": the generator did not keep its pace"
	if !r.noted[key] {
		r.noted[key] = true
		r.note("%s (%s: %.0f of %.0f packets a second): the machine is busy with something else, or the generator's core with forwarding.", key, system, m.sent(), rate)
	}
}

// generatorOnly is the busy time of the generator sending to nobody at the same rate: into a pair of its own whose far end drops.
func (r *Runner) generatorOnly(ctx context.Context, c ppsCase, s *rig.System) (time.Duration, error) {
	if err := s.Pause(); err != nil {
		return 0, err
	}
	defer s.Resume()
	from, to, done, err := rig.Bare(ctx, r.Env)
	if err != nil {
		return 0, err
	}
	defer done()
	sink, err := load.NewSink(to)
	if err != nil {
		return 0, err
	}
	defer sink.Close()
	gen, err := load.NewLive(from, to, c.size, c.flows, rig.LoadCore())
	if err != nil {
		return 0, err
	}
	defer gen.Close()
	cpu, err := load.ReadCPU()
	if err != nil {
		return 0, err
	}
	if _, _, err := gen.Run(ctx, paced, r.Span); err != nil {
		return 0, err
	}
	if _, err := sink.Settle(); err != nil {
		return 0, err
	}
	after, err := load.ReadCPU()
	return after.Busy(cpu), err
}

// noLoss searches the highest rate without loss.
func (r *Runner) noLoss(ctx context.Context, name string, c ppsCase, systems []*rig.System) error {
	return r.rounds(ctx, "pps "+name+", no loss", systems, func(ctx context.Context, round int, s *rig.System) error {
		top, err := r.shoot(ctx, name, c, s, 0, r.Span/2)
		if err != nil {
			return err
		}
		// Nobody passes on without loss much more than what gets through of a flood.
		most := top.rate() * 1.2
		best := 0.0 // what was really offered, which is less than asked for where the generator shares its core
		_, err = result.Search(most, r.Loss, 1.0/32, func(rate float64) (float64, error) {
			m, err := r.shoot(ctx, name, c, s, rate, r.Span/2)
			if err == nil && m.loss() <= r.Loss {
				best = max(best, m.sent())
			}
			return m.loss(), err
		})
		if err != nil {
			return err
		}
		r.Result.Add(result.Key{Scenario: "pps", Case: name, System: s.Name, Metric: "no loss"}, "Mpps", false, round, best/1e6)
		return nil
	})
}
