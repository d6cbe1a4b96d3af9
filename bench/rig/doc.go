// Package rig builds what is measured: Overplane in a lab, and its peers in topologies of the same shape and addresses, each in network namespaces of its own. Peers are
// set up with the machine's own tools (ip, ethtool, nft, ovs-vsctl), as their users would.
//
//	same-node             two-nodes                                outside
//	p1 ── n1 ── p2        p1 ── n1 ── gw (bridge) ── n2 ── p2      p1 ── n1 ── gw (router) ── ext
//
// Pods are n1-p1 (10.244.1.2) and so on, nodes 10.240.0.11 and .12, outside is 198.51.100.10. Everything of a run has its names begin with the run's prefix, so that the
// next run finds what a crash has left.
package rig

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/test/lab"
)

// Topology is between which two endpoints load runs.
type Topology string

// The topologies.
const (
	SameNode Topology = "same-node"
	TwoNodes Topology = "two-nodes"
	Outside  Topology = "outside"
	PodsOnly Topology = "pods-only" // one node with a number of pods, and no endpoints
)

// Link is how frames cross the underlay.
type Link string

const (
	// Wire has tso, gso and tx checksum offload off and gro on, on the underlay's devices: MTU-size frames with finished checksums cross it, as behind a NIC
	// without TSO.
	Wire Link = "wire"
	// Virtual has them all on: 64 KiB frames cross it whole, which no real wire does, but which is how the kernel hands frames to a NIC with TSO and gets
	// them from one with hardware GRO.
	Virtual Link = "virtual"
)

// Spec is what a system is built for.
type Spec struct {
	Topology Topology
	Link     Link
	Pods     int // of the node, with PodsOnly
	Workers  int // forwarding threads of a node, where the system has such
	// Frames: the load is XDP frames, which the pods' far ends must be able to receive.
	Frames bool
}

// System is a data plane with two endpoints that reach each other through it. It is for one goroutine at a time.
type System struct {
	Name     string
	From, To load.Endpoint
	// Exit is where frames to outside leave the node, if that is not nil: the underlay's end of its uplink. Counting and dropping them there leaves the switch and the router beyond
	// out, which are no part of any system and whose work would be done on the core that transmits.
	Exit *load.Endpoint
	// Placement says which cores do what, in words.
	Placement string
	// Drops counts by name what the system, and the devices and queues along the way, dropped since they were made.
	Drops func(context.Context) (map[string]uint64, error)
	// TAP: the sending endpoint's device is a TAP, which takes no note of most frames that it has no room for. What it handed on is [Taken].
	TAP bool
	// ChangeRoutes changes a hundred routes that the load does not take, back or forth by the step's parity, and returns when that is done; ChangePods takes another pod away and
	// attaches it again. Sessions counts translated flows. nil where a system has no such thing.
	ChangeRoutes func(ctx context.Context, step int) error
	ChangePods   func(ctx context.Context) error
	Sessions     func(ctx context.Context) (int, error)
	// Lab is the lab that Overplane is in; nil for peers.
	Lab *lab.Lab
	// Pids are the system's processes; the kernel has none.
	Pids []int

	pause, resume func() error
	close         []func() error
}

// Sink is where a generator's frames are counted.
func (s *System) Sink() load.Endpoint {
	if s.Exit != nil {
		return *s.Exit
	}
	return s.To
}

// Pause stops systems that turn on a core when there is nothing to do, and Resume has them go on. A system is made resumed.
func (s *System) Pause() error { return call(s.pause) }

// Resume undoes Pause.
func (s *System) Resume() error { return call(s.resume) }

func call(f func() error) error {
	if f == nil {
		return nil
	}
	return f()
}

// Close takes everything down, in the reverse order of its making.
func (s *System) Close() error {
	_ = s.Resume()
	var errs []error
	for _, f := range slices.Backward(s.close) {
		errs = append(errs, f())
	}
	s.close = nil
	return errors.Join(errs...)
}

// Env is what systems are built in.
type Env struct {
	Prefix string // of all names: 1 to 6 lower-case letters and digits
	Dir    string // of all files; made and removed by the caller
	Self   string // path of overplane-bench, which is its own helper
	Bin    string // folder of overplaned
	Log    func(format string, args ...any)

	serial int
}

// Kind is a system that can be built.
type Kind struct {
	Name  string
	About string // one line for the report
	// Topologies and Links it can be built in; no links is all.
	Topologies []Topology
	Links      []Link
	// FramesOnly: it is of interest, or of use, for frames alone.
	FramesOnly bool
	// Missing says what the machine lacks for it and which command installs that; empty if nothing.
	Missing func() (what, install string)
	Build   func(context.Context, *Env, Spec) (*System, error)
}

// Fits reports whether the kind can be built for the spec.
func (k *Kind) Fits(s Spec) bool {
	return slices.Contains(k.Topologies, s.Topology) && (s.Frames || !k.FramesOnly) && (len(k.Links) == 0 || s.Topology == SameNode || slices.Contains(k.Links, s.Link))
}

// ForwardCore is the core that the single forwarding thread of a system is pinned to, and LoadCore that of the generator and of the softirq work that it
// causes. With one core they are the same.
func ForwardCore() int { return min(1, runtime.NumCPU()-1) }

// LoadCore is the generators' core.
func LoadCore() int { return 0 }

// Lacking returns the kinds that the machine lacks something for, as one line each.
func Lacking(kinds []*Kind) map[string]string {
	lacking := map[string]string{}
	for _, k := range kinds {
		if k.Missing == nil {
			continue
		}
		if what, install := k.Missing(); what != "" {
			lacking[k.Name] = fmt.Sprintf("%s. To measure it too: %s", what, install)
		}
	}
	return lacking
}

// Delta is what counters grew by; names that did not grow are left out.
func Delta(now, before map[string]uint64) map[string]uint64 {
	d := maps.Clone(now)
	for name, n := range before {
		d[name] -= min(n, d[name])
	}
	maps.DeleteFunc(d, func(_ string, n uint64) bool { return n == 0 })
	return d
}
