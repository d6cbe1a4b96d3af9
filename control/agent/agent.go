package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
)

// Forwarder is the data plane as the agent uses it; *dataplane.Dataplane is one.
type Forwarder interface {
	Start()
	Stop(ctx context.Context) error
	Publish(*dataplane.Snapshot) uint64
	Quiesce(ctx context.Context, generation uint64) error
	Stats(ctx context.Context) ([]dataplane.WorkerStats, error)
	Ask(ctx context.Context, worker int, f func(*snat.Translator, *dataplane.WorkerStats)) error
}

// settleTimeout is how long a change waits for the workers to pass it. A worker that takes longer hangs; what waits for it
// is then put aside and tried again.
const settleTimeout = 5 * time.Second

// tickPatience is how long the regular second look waits for a worker that hangs: the API must stay answered meanwhile.
const tickPatience = 20 * time.Millisecond

// Agent is one node's agent. Everything below the line belongs to the goroutine of loop.
type Agent struct {
	cfg     Config
	log     *slog.Logger
	plat    Platform
	dp      Forwarder
	pools   []*port.Pool
	cpus    []int // by worker, -1: not pinned
	version string
	started time.Time

	commands chan func()
	stopped  chan struct{} // closed when loop has returned
	again    chan string   // why the data plane must start again
	store    podStore
	saver    *stateSaver
	sync     *controller // nil: another source of desired state

	// ----
	facts       Facts
	steering    Steering
	plan        SteeringPlan // as the steering program has it
	uplink      UplinkGrant
	host        port.Port
	translation *translation // nil: not made yet
	hostDev     HostDevice   // as the kernel has it

	state      *desired // in force; nil: none yet
	programmed *desired // all workers forward by it
	built      Built    // last published
	generation uint64

	pods    map[string]*pod
	slots   slotTable
	retired []retired // waiting for workers that hang
	hung    bool      // a worker did not stop
	openMTU int       // the uplink's when its sockets were opened

	seen fileStamp // of the state file as it was read at start

	masq       masqFiles
	saturation saturation

	flowsLost, flowsFailed atomic.Bool // steering was not told of all flows that ended; it was told, and refused

	stateProblem    string // about the state's source
	steeringProblem string
	hostProblem     string
	uplinkProblem   string
	storeProblem    string
}

// pod is one attached pod.
type pod struct {
	rec    PodRecord
	dev    PodDevice
	slot   int
	port   port.Port // nil: no device
	reason string    // why there is no device
}

// retired is a port that left the table but may still be in use by a worker that has not moved on.
type retired struct {
	generation uint64
	slot       int
	port       port.Port
	then       func()
}

// newAgent puts an agent together; start brings the machine into shape and loop runs it.
func newAgent(cfg Config, version string, log *slog.Logger, plat Platform) *Agent {
	return &Agent{
		cfg: cfg, version: version, log: log, plat: plat, started: time.Now(),
		commands: make(chan func()), stopped: make(chan struct{}), again: make(chan string, 1),
		store: podStore{path: filepath.Join(cfg.StateDir, "pods.json"), node: cfg.NodeName},
		pods:  make(map[string]*pod),
	}
}

// errStopped answers commands that come too late.
var errStopped = errors.New("the daemon is stopping")

// do runs f on the agent's goroutine and waits for it. f runs even if ctx ends meanwhile.
func (a *Agent) do(ctx context.Context, f func()) error {
	var panicked any
	done := make(chan struct{})
	command := func() {
		defer close(done)
		defer func() { panicked = recover() }()
		f()
	}
	select {
	case a.commands <- command:
	case <-a.stopped:
		return errStopped
	case <-ctx.Done():
		return ctx.Err()
	}
	<-done
	if panicked != nil {
		panic(panicked) // on the caller's goroutine, where the API's recovery reports it
	}
	return nil
}

// loop runs commands until ctx ends.
func (a *Agent) loop(ctx context.Context) {
	defer close(a.stopped)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-a.commands:
			f()
		case <-tick.C:
			a.sweep(tickPatience)
			a.retry()
			a.followMasq()
			a.followTranslation()
			a.followFlows(ctx)
			a.watchSaturation(ctx, time.Now())
			a.buryDead()
		}
	}
}

// mtus are the largest IP packets, bytes, of the uplink and of pods and host port.
func (a *Agent) mtus() (uplink, pods int) {
	uplink = a.facts.MTU
	if a.uplink.Port != nil {
		if most := a.uplink.Port.Caps().MaxFrame - ethernetHeader; most > 0 && most < uplink {
			uplink = most
		}
	}
	pods = uplink
	if a.cfg.MTU != 0 && a.cfg.MTU < pods {
		pods = a.cfg.MTU
	}
	return uplink, pods
}

const ethernetHeader = 14

// publish builds a snapshot of what is, gives it to the workers and waits until they all have passed it. Steering and the host's routes are changed
// around it in the order in which no frame of an established path is lost: first what is added, last what goes.
func (a *Agent) publish() {
	uplinkMTU, podMTU := a.mtus()
	in := Input{
		Node: a.cfg.NodeName, Routed: a.cfg.Routed(), Facts: a.facts,
		Node4: a.cfg.Node4(), Node6: a.cfg.Node6(), state: a.state, rules: a.rules(),
		Uplink: a.uplink.Port, UplinkMTU: uplinkMTU,
		Host: a.host, HostName: a.cfg.HostPort, PodMTU: podMTU,
		Pods: make([]PodPort, 0, len(a.pods)),
	}
	if a.facts.Gone || !a.facts.Up {
		in.Uplink = nil // packets for it die of port_down at once, instead of waiting in its ring for the link to come back
	}
	for _, p := range a.pods {
		in.Pods = append(in.Pods, PodPort{
			Slot: p.slot, Name: p.rec.Name, MAC: p.dev.MAC, Addr4: p.rec.IPv4, Addr6: p.rec.IPv6, Port: p.port,
		})
	}
	plan := a.steeringPlan()
	a.applySteering(union(a.plan, plan))
	a.configureHost(podMTU)
	a.built = Build(in)
	a.generation = a.dp.Publish(a.built.Snapshot)
	if a.settled() {
		a.programmed = a.state
	}
	a.applySteering(plan)
	a.acknowledgeAnew()
}

// settled waits until every worker forwards by the last published snapshot, but not for ever.
func (a *Agent) settled() bool {
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	if err := a.dp.Quiesce(ctx, a.generation); err != nil {
		a.log.Error("a worker has not taken over the new snapshot", "generation", a.generation, "error", err)
		return false
	}
	return true
}

// retire closes a port that the last published snapshot no longer has, frees its slot (if it is a pod's), and then runs then: now, or once
// the workers have passed that snapshot.
func (a *Agent) retire(slot int, p port.Port, then func()) {
	a.retired = append(a.retired, retired{generation: a.generation, slot: slot, port: p, then: then})
	a.sweep(settleTimeout)
}

// sweep closes what is retired and unused, waiting no longer than patience.
func (a *Agent) sweep(patience time.Duration) {
	if len(a.retired) == 0 && a.programmed == a.state {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var rest []retired
	for _, r := range a.retired {
		if err := a.dp.Quiesce(ctx, r.generation); err != nil {
			rest = append(rest, r)
			continue
		}
		if r.port != nil {
			if err := r.port.Close(); err != nil {
				a.log.Warn("closing a port", "port", r.port.Name(), "error", err)
			}
		}
		if r.slot >= dataplane.FirstPodSlot {
			a.slots.free(r.slot)
		}
		if r.then != nil {
			r.then()
		}
	}
	a.retired = rest
	if a.programmed != a.state && ctx.Err() == nil && a.dp.Quiesce(ctx, a.generation) == nil {
		a.programmed = a.state
	}
}

// steeringPlan is what steering should know.
func (a *Agent) steeringPlan() SteeringPlan {
	plan := SteeringPlan{UplinkMAC: a.facts.MAC, PodCIDRs: a.state.podCIDRs()}
	a.planTranslation(&plan)
	if a.cfg.Routed() {
		plan.GatewayMACs = distinctMACs(a.facts.GatewayMAC4, a.facts.GatewayMAC6)
		return plan
	}
	if a.state != nil {
		for i := range a.state.members {
			if m := &a.state.members[i]; m.name != a.cfg.NodeName {
				plan.Members = append(plan.Members, m.mac)
			}
		}
		plan.Members = distinctMACs(plan.Members...)
	}
	return plan
}

func (a *Agent) applySteering(plan SteeringPlan) {
	if a.steering == nil || plan.equal(a.plan) && a.steeringProblem == "" {
		return
	}
	if err := a.steering.Apply(plan); err != nil {
		if a.steeringProblem == "" {
			a.log.Error("steering cannot be programmed", "error", err)
		}
		a.steeringProblem = fmt.Sprintf("steering cannot be programmed: %v", err)
		return
	}
	a.plan, a.steeringProblem = plan, ""
}

// configureHost brings the host port's MTU, addresses and routes up to date.
func (a *Agent) configureHost(mtu int) {
	want := a.hostDevice(mtu)
	if a.host == nil || a.hostProblem == "" && want.equal(a.hostDev) {
		return
	}
	if err := a.plat.SetHost(want); err != nil {
		if a.hostProblem == "" {
			a.log.Error("the host port cannot be configured", "device", want.Name, "error", err)
		}
		a.hostProblem = fmt.Sprintf("the host port cannot be configured: %v", err)
		return
	}
	a.hostDev, a.hostProblem = want, ""
}

func (a *Agent) hostDevice(mtu int) HostDevice {
	node4, node6 := primaryAddresses(a.facts, a.cfg.Node4(), a.cfg.Node6())
	return HostDevice{Name: a.cfg.HostPort, MTU: mtu, Node4: node4, Node6: node6, PodCIDRs: a.state.podCIDRs()}
}

// retry tries again what failed and may work by now.
func (a *Agent) retry() {
	if a.steeringProblem != "" || a.hostProblem != "" {
		_, podMTU := a.mtus()
		a.configureHost(podMTU)
		a.applySteering(a.steeringPlan())
	}
	if a.uplink.Port == nil && a.facts.Up {
		a.openUplink()
	}
	if a.storeProblem != "" {
		_ = a.savePods()
	}
}

// stateSaver writes the last state to disk, off the agent's goroutine. Only the latest of several is written.
type stateSaver struct {
	path  string
	write func(path string, s *desired) error
	log   *slog.Logger
	next  chan *desired
	done  sync.WaitGroup
}

func newStateSaver(path string, log *slog.Logger, write func(string, *desired) error) *stateSaver {
	s := &stateSaver{path: path, write: write, log: log, next: make(chan *desired, 1)}
	s.done.Go(func() {
		for d := range s.next {
			if err := s.write(s.path, d); err != nil {
				s.log.Error("the desired state cannot be kept for the next start", "file", s.path, "error", err)
			}
		}
	})
	return s
}

// Save replaces what waits to be written. One goroutine calls it.
func (s *stateSaver) Save(d *desired) {
	select {
	case <-s.next:
	default:
	}
	s.next <- d
}

// Close writes what waits and returns when it is written.
func (s *stateSaver) Close() {
	close(s.next)
	s.done.Wait()
}

func (h HostDevice) equal(o HostDevice) bool {
	return h.Name == o.Name && h.MTU == o.MTU && h.Node4 == o.Node4 && h.Node6 == o.Node6 && equalPrefixes(h.PodCIDRs, o.PodCIDRs)
}

func equalPrefixes(a, b []netip.Prefix) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] {
			return false
		}
	}
	return true
}
