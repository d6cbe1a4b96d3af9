package bench

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	away := []ppsCase{{64, 1000}, {64, 1}, {64, 10000}}
	if r.Quick {
		cases = []ppsCase{{64, 1}, {64, 1000}, {1514, 1}}
		away = []ppsCase{{64, 1000}}
	}
	stages := []struct {
		name  string
		spec  rig.Spec
		kinds []*rig.Kind
		cases []ppsCase
	}{
		{"same-node", rig.Spec{Topology: rig.SameNode, Frames: true}, rig.Kinds(overplaneVeth, overplaneTAP), cases},
		{"outside", rig.Spec{Topology: rig.Outside, Link: rig.Wire, Frames: true}, rig.Kinds(outside(r.Quick)...), away},
	}
	for _, st := range stages {
		err := r.with(ctx, "pps", r.kinds(st.kinds...), st.spec, func(systems []*rig.System) error {
			for _, c := range st.cases {
				if err := r.flood(ctx, st.name+"/"+c.String(), c, systems); err != nil {
					return err
				}
			}
			first := st.cases[0]
			name := st.name + "/" + first.String()
			if err := r.cpuCost(ctx, name, first, systems); err != nil {
				return err
			}
			if err := r.noLoss(ctx, name, first, systems); err != nil || r.Quick {
				return err
			}
			if err := r.sweep(ctx, name, first, systems); err != nil || st.spec.Topology != rig.SameNode {
				return err
			}
			return r.xsk(ctx, st.name+"/frame=64/by=af_xdp", systems)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// sweepRates are the loads of a curve, packets a second.
var sweepRates = []float64{25e3, 50e3, 100e3, 200e3, 300e3, 400e3, 500e3, 600e3, 800e3, 1e6, 1.25e6, 1.5e6}

// sweep measures loss and age over a range of rates, once for each system.
func (r *Runner) sweep(ctx context.Context, name string, c ppsCase, systems []*rig.System) error {
	r.Log("  pps %s: loss and age over %d rates", name, len(sweepRates))
	for _, s := range systems {
		curve := &result.Curve{Scenario: "pps", Case: name, System: s.Name}
		err := s.Resume()
		for _, rate := range sweepRates {
			var m shot
			if err == nil {
				m, err = r.shoot(ctx, name, c, s, rate, r.Span)
			}
			if err != nil {
				break
			}
			curve.Points = append(curve.Points, result.Point{Offered: m.sent(), Received: m.rate(), Loss: m.loss(),
				P50: m.received.Quantile(0.5), P99: m.received.Quantile(0.99), P999: m.received.Quantile(0.999)})
			if m.sent() < 0.8*rate {
				break // the generator has no more
			}
		}
		err = errors.Join(err, s.Pause())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			r.failed(ctx, "pps "+name+", sweep", s.Name, err)
		}
		r.Result.Curves = append(r.Result.Curves, curve)
	}
	return nil
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

func (r *Runner) shoot(ctx context.Context, name string, c ppsCase, s *rig.System, rate float64, span time.Duration) (shot, error) {
	return r.shootAs(ctx, "pps", name, c, s, rate, span)
}

// shootAs sends frames through a system and balances the books.
func (r *Runner) shootAs(ctx context.Context, scenario, name string, c ppsCase, s *rig.System, rate float64, span time.Duration) (shot, error) {
	var m shot
	sink, err := load.NewSink(s.Sink())
	if err != nil {
		return m, err
	}
	defer sink.Close()
	gen, err := load.NewLive(s.From, s.To, load.Shape{Size: c.size, Flows: c.flows}, rig.LoadCore())
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
	return m, r.reconcile(ctx, scenario, name, s, m.offered, m.received.Packets, before)
}

// flood measures what arrives when the sender sends as fast as it can.
func (r *Runner) flood(ctx context.Context, name string, c ppsCase, systems []*rig.System) error {
	return r.floodAs(ctx, "pps", name, c, systems)
}

func (r *Runner) floodAs(ctx context.Context, scenario, name string, c ppsCase, systems []*rig.System) error {
	return r.rounds(ctx, scenario+" "+name+", flood", systems, func(ctx context.Context, round int, s *rig.System) error {
		m, err := r.shootAs(ctx, scenario, name, c, s, 0, r.Span)
		if err != nil {
			return err
		}
		r.Result.Add(result.Key{Scenario: scenario, Case: name, System: s.Name, Metric: "flooded"}, "Mpps", false, round, m.rate()/1e6)
		return nil
	})
}

// cpuCost measures packets per second of CPU time at a rate that all can take: busy time less that of the generator alone. The generator is the same for all, so its median over systems and rounds is
// taken: right after some systems it costs half as much again, which would be their successors' gain.
func (r *Runner) cpuCost(ctx context.Context, name string, c ppsCase, systems []*rig.System) error {
	type cost struct {
		system   string
		round    int
		busy     time.Duration
		received uint64
	}
	var costs []cost
	var alone []time.Duration
	err := r.rounds(ctx, "pps "+name+", CPU time", systems, func(ctx context.Context, round int, s *rig.System) error {
		generator, err := r.generatorOnly(ctx, c, s)
		if err != nil {
			return err
		}
		m, err := r.shoot(ctx, name, c, s, paced, r.Span)
		if err != nil {
			return err
		}
		r.checkPace("pps "+name, s.Name, m, paced)
		alone = append(alone, generator)
		costs = append(costs, cost{s.Name, round, m.busy, m.received.Packets})
		for metric, q := range map[string]float64{"age p50 at 100 kpps": 0.5, "age p99 at 100 kpps": 0.99, "age p99.9 at 100 kpps": 0.999} {
			r.Result.Add(result.Key{Scenario: "pps", Case: name, System: s.Name, Metric: metric}, "µs", true, round, float64(m.received.Quantile(q).Nanoseconds())/1e3)
		}
		return nil
	})
	if len(alone) == 0 {
		return err
	}
	slices.Sort(alone)
	for _, k := range costs {
		// What costs less than a hundredth of the generator cannot be told from nothing.
		busy := max(k.busy-alone[len(alone)/2], alone[len(alone)/2]/100)
		r.Result.Add(result.Key{Scenario: "pps", Case: name, System: k.system, Metric: "per CPU-second at 100 kpps"}, "M/s", false, k.round, float64(k.received)/busy.Seconds()/1e6)
	}
	return err
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
	gen, err := load.NewLive(from, to, load.Shape{Size: c.size, Flows: c.flows}, rig.LoadCore())
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

// xsk measures a flood again that another generator makes: an AF_XDP socket in the sending pod.
func (r *Runner) xsk(ctx context.Context, name string, systems []*rig.System) error {
	generators := map[*rig.System]*load.XSK{}
	defer func() {
		for _, g := range generators {
			_ = g.Close()
		}
	}()
	return r.rounds(ctx, "pps "+name+", flood", systems, func(ctx context.Context, round int, s *rig.System) error {
		if generators[s] == nil {
			g, err := load.NewXSK(s.From, s.To, load.MinFrame, rig.LoadCore())
			if err != nil {
				return err
			}
			generators[s] = g
		}
		a, err := arrivals(ctx, s, func() (uint64, time.Duration, error) { return generators[s].Run(ctx, r.Span) })
		if err != nil {
			return err
		}
		r.Result.Add(result.Key{Scenario: "pps", Case: name, System: s.Name, Metric: "flooded"}, "Mpps", false, round, float64(a.received)/a.took.Seconds()/1e6)
		return r.reconcile(ctx, "pps", name, s, a.sent, a.received, a.before)
	})
}

// arrived is what came of what a generator sent.
type arrived struct {
	sent, received uint64
	took           time.Duration
	before         books
}

// arrivals runs a generator that sends to a system's far end, and counts there.
func arrivals(ctx context.Context, s *rig.System, send func() (sent uint64, took time.Duration, err error)) (a arrived, err error) {
	sink, err := load.NewSink(s.Sink())
	if err != nil {
		return a, err
	}
	defer sink.Close()
	if a.before, err = openBooks(ctx, s); err != nil {
		return a, err
	}
	if a.sent, a.took, err = send(); err != nil {
		return a, err
	}
	got, err := sink.Settle()
	if err != nil {
		return a, err
	}
	if a.received = got.Packets; a.received == 0 {
		return a, fmt.Errorf("nothing arrived of %d packets", a.sent)
	}
	return a, nil
}
