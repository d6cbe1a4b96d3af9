package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/port"
)

// Options is what Run needs beside the configuration.
type Options struct {
	Version  string
	Log      *slog.Logger     // nil: slog.Default()
	Platform Platform         // nil: this machine
	Reload   <-chan os.Signal // each value asks for the desired state to be read again; nil: never
	Getenv   func(string) string
	// Ready, if not nil, is called once the daemon forwards and answers.
	Ready func()
}

// Run is the daemon: it returns nil after ctx ended and everything is in order, or the error that kept it from starting. Pods, their
// devices, the host port, routes and the pinned steering program stay for the next daemon to take over.
func Run(ctx context.Context, cfg Config, o Options) error {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	if o.Getenv == nil {
		o.Getenv = os.Getenv
	}
	if o.Platform == nil {
		o.Platform = NewPlatform(cfg, o.Log)
	}
	claim, err := claimNode(cfg.StateDir)
	if err != nil {
		return err
	}
	defer claim.Close()
	n := newNotifier(o.Getenv)
	for {
		var again *restartError
		if err := run(ctx, cfg, o, n); !errors.As(err, &again) {
			return err
		}
		o.Log.Warn("the data plane starts again", "why", again.why)
		n.Reloading()
	}
}

// restartError ends a run of the data plane in favour of a new one in the same process. Frames that a socket's kernel side holds are lost with
// their pool, so sockets are replaced together with all else.
type restartError struct{ why string }

func (e *restartError) Error() string { return "the data plane must start again: " + e.why }

// run is one life of the data plane.
func run(ctx context.Context, cfg Config, o Options, n notifier) (err error) {
	var cleanup cleanups
	defer func() { cleanup.run() }()
	listener, err := listenLocal(cfg.Socket, os.FileMode(cfg.SocketMode))
	if err != nil {
		return err
	}
	cleanup.add(func() {
		listener.Close()
		_ = os.Remove(cfg.Socket)
	})
	a, err := start(cfg, o, &cleanup)
	if err != nil {
		return err
	}
	server := newServer(a)

	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { a.loop(running) })
	wg.Go(func() { a.followUplink(running) })
	fileReload := make(chan chan error)
	switch cfg.StateSource {
	case SourceFile:
		wg.Go(func() { a.followFile(running, a.seen, fileReload) })
	case SourceController:
		wg.Go(func() { a.followController(running) })
	}
	wg.Go(func() { a.feedWatchdog(running, n) })
	wg.Go(func() { a.serveMetrics(running) })
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	n.Ready(fmt.Sprintf("forwarding on %s (%s)", a.cfg.Uplink, a.uplink.Rung))
	a.log.Info("overplaned is ready", "node", cfg.NodeName, "version", o.Version, "socket", cfg.Socket)
	if o.Ready != nil {
		o.Ready()
	}

	for done := false; !done; {
		select {
		case <-ctx.Done():
			done = true
			n.Stopping()
			a.log.Info("overplaned stops; pods, routes and steering stay for the next start")
		case err = <-served:
			err = fmt.Errorf("the local API stopped: %w", err)
			done = true
		case why := <-a.again:
			err = &restartError{why: why}
			done = true
		case <-o.Reload:
			n.Reloading()
			a.reload(running, fileReload)
			n.Ready("reloaded")
		}
	}
	stopServer(server)
	cancel()
	wg.Wait()
	return err
}

// reload reads the desired state again, if it is a file.
func (a *Agent) reload(ctx context.Context, file chan<- chan error) {
	if a.cfg.StateSource != SourceFile {
		a.log.Info("reload: the desired state is not a file; there is nothing to read")
		return
	}
	answer := make(chan error, 1)
	select {
	case file <- answer:
	case <-ctx.Done():
		return
	}
	select {
	case <-answer:
	case <-ctx.Done():
	}
}

// stopServer lets calls finish, but not for long: a client that does not go must not hold up a restart.
func stopServer(s *grpc.Server) {
	done := make(chan struct{})
	go func() {
		s.GracefulStop()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(2 * time.Second):
		s.Stop()
		<-done
	}
}

// cleanups run in reverse order.
type cleanups []func()

func (c *cleanups) add(f func()) { *c = append(*c, f) }

func (c *cleanups) run() {
	for _, f := range slices.Backward(*c) {
		f()
	}
}

// start brings up everything but the local API and the watchers: when it returns, packets are forwarded. It runs before the loop, which
// takes over all it set.
func start(cfg Config, o Options, cleanup *cleanups) (*Agent, error) {
	plat, log := o.Platform, o.Log
	facts, err := plat.Uplink()
	if err != nil {
		return nil, err
	}
	cfg.Uplink = facts.Name
	allowed, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	workers := cfg.Workers
	if workers == 0 {
		workers = max(1, min(len(allowed), facts.Queues))
	}
	cpus, err := assignCPUs(cfg.CPUs, allowed, workers)
	if err != nil {
		return nil, err
	}
	if err := plat.Preflight(uint64(workers) * frameMemory(&cfg)); err != nil {
		return nil, err
	}
	// Threads that are locked to workers still count: leave room for the agent, the API and the collector.
	runtime.GOMAXPROCS(max(runtime.GOMAXPROCS(0), workers+2))

	a := newAgent(cfg, o.Version, log, plat)
	a.facts = facts
	a.seen = stampOf(cfg.StateFile)
	if cfg.StateSource == SourceController {
		if a.sync, err = newController(a); err != nil {
			return nil, err
		}
	}
	a.state, a.stateProblem = loadInitial(&cfg)
	if a.stateProblem != "" {
		log.Error("desired state", "problem", a.stateProblem, "forwarding_by_last_state", a.state != nil)
	}
	a.startMasq()
	remembered, err := a.store.Load()
	if err != nil {
		return nil, err
	}

	pools, release, err := plat.Pools(workers)
	if err != nil {
		return nil, err
	}
	a.pools = pools
	cleanup.add(func() {
		if !a.hung {
			release()
		}
	})
	if a.steering, err = plat.AttachSteering(cfg.Uplink, workers); err != nil {
		return nil, err
	}
	cleanup.add(func() { a.closeAll() })
	a.openMTU = facts.MTU
	if a.uplink, err = plat.OpenUplink(facts, a.steering, a.pools); err != nil {
		if facts.Up {
			return nil, err
		}
		// A socket cannot be bound to an interface that is down. That may change; retry sees to it.
		a.uplinkProblem = fmt.Sprintf("uplink %s cannot be opened: %v", facts.Name, err)
		log.Error("the uplink is down", "interface", facts.Name, "error", err)
	} else {
		log.Info("uplink opened", "interface", facts.Name, "rung", a.uplink.Rung, "queues", a.uplink.Port.NumQueues(), "mtu", facts.MTU, "workers", workers, "cpus", cpus)
		for _, r := range a.uplink.Refused {
			log.Info("a better rung was not granted", "rung", r.Rung, "reason", r.Reason)
		}
	}
	_, podMTU := a.mtus()
	dev := a.hostDevice(podMTU)
	if a.host, err = plat.OpenHost(dev, a.pools); err != nil {
		return nil, err
	}
	a.hostDev = dev
	if err := a.steering.AttachHost(dev.Name); err != nil {
		log.Error("fragments, ICMP errors and echo replies for the node itself are lost: the data plane cannot give them back", "error", err)
	}
	pods, stopWatching := context.WithCancel(context.Background())
	cleanup.add(stopWatching)
	plat.WatchPods(pods, func(pod string) { a.podGone(pods, pod) })
	a.readopt(remembered)
	if a.translation, err = a.makeTranslation(workers); err != nil {
		return nil, err
	}
	a.adoptFlows(a.translation)
	if err := a.makeDataplane(cpus); err != nil {
		return nil, err
	}

	a.dp.Start()
	cleanup.add(func() { a.stopWorkers() })
	a.publish()
	if a.state != nil {
		log.Info("desired state programmed", "pools", len(a.state.pools), "members", len(a.state.members), "table", a.built.Routes)
	}
	for _, p := range a.built.Problems {
		log.Warn("desired state cannot be programmed in full", "problem", p)
	}
	a.updatePodMTUs()
	if cfg.StateSource != SourceController { // whose client keeps its own table
		a.saver = newStateSaver(filepath.Join(cfg.StateDir, lastState), log, saveState)
		cleanup.add(func() { a.saver.Close() })
	}
	if a.state != nil && a.stateProblem == "" && cfg.StateSource == SourceFile {
		a.saver.Save(a.state)
	}
	return a, nil
}

// makeDataplane makes the workers.
func (a *Agent) makeDataplane(cpus []int) error {
	cfg := dataplane.Config{Logger: a.log}
	for i, p := range a.pools {
		cfg.Workers = append(cfg.Workers, dataplane.WorkerConfig{Pool: p, CPU: cpus[i], Heartbeat: a.steering.Heartbeat(i), Translator: a.translation.translators[i], Flows: a.onFlows})
	}
	dp, err := dataplane.New(cfg)
	if err != nil {
		return err
	}
	a.dp, a.cpus = dp, cpus
	return nil
}

// stopWorkers ends forwarding. A worker that does not stop keeps its ports: the process is about to end anyway.
func (a *Agent) stopWorkers() {
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	if err := a.dp.Stop(ctx); err != nil {
		a.log.Error("a worker does not stop", "error", err)
		a.hung = true
	}
}

// closeAll closes what workers used. Pods and the host keep their devices.
func (a *Agent) closeAll() {
	if a.hung {
		return
	}
	var errs []error
	closePort := func(p port.Port) {
		if p != nil {
			errs = append(errs, p.Close())
		}
	}
	for _, p := range a.pods {
		closePort(p.port)
	}
	for _, r := range a.retired {
		closePort(r.port)
	}
	closePort(a.host)
	closePort(a.uplink.Port)
	if a.translation != nil {
		a.translation.close()
	}
	errs = append(errs, a.steering.Close())
	if err := errors.Join(errs...); err != nil {
		a.log.Warn("closing", "error", err)
	}
}

// feedWatchdog tells the service manager that the daemon works: only after the agent's goroutine and every worker have answered.
func (a *Agent) feedWatchdog(ctx context.Context, n notifier) {
	if n.watchdog == 0 {
		return
	}
	tick := time.NewTicker(n.watchdog / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		short, cancel := context.WithTimeout(ctx, n.watchdog/3)
		err := a.alive(short)
		cancel()
		if err == nil {
			n.Watchdog()
		} else if ctx.Err() == nil {
			a.log.Error("the watchdog is not fed: something hangs", "error", err)
		}
	}
}

// alive returns nil once the agent's goroutine and every worker have answered.
func (a *Agent) alive(ctx context.Context) error {
	if err := a.do(ctx, func() {}); err != nil {
		return err
	}
	_, err := a.dp.Stats(ctx)
	return err
}

// chunkSize is the size of an ordinary frame. 4 KiB leaves room for an MTU of some 3,500 bytes in one frame, whatever the driver.
const chunkSize = 4096

// frameMemory is one worker's, bytes.
func frameMemory(cfg *Config) uint64 {
	return uint64(poolConfig(cfg).Size())
}

func poolConfig(cfg *Config) port.PoolConfig {
	return port.PoolConfig{Chunks: cfg.Frames, ChunkSize: chunkSize, LargeBuffers: cfg.LargeFrames}
}
