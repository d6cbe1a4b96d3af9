package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
	"github.com/overplane/overplane/test/lab/sim"
)

const (
	podCIDR = "10.0.0.0/11" // 8,192 blocks
	// patience is how long anything may take before it is given up.
	patience = 3 * time.Minute
	// reopen is after how long a client that never reads comes back.
	reopen = 25 * time.Second
)

// watched is a revision that is waited for by many nodes.
type watched struct {
	revision uint64
	start    time.Time

	mu   sync.Mutex
	took []time.Duration
	all  chan struct{} // closed when as many as are waited for have it
	want int
}

// nodes are the simulated ones.
type nodes struct {
	stop context.CancelFunc
	done sync.WaitGroup
	now  atomic.Pointer[watched]
	have []atomic.Uint64 // revision by node
}

// run starts one node.
func (n *nodes) run(ctx context.Context, i int, c *sim.Cluster, address string, shared *syncclient.Shared) error {
	f := sim.NodeFacts(i)
	f.IPv6 = ""
	client, err := syncclient.New(syncclient.Config{
		Node: sim.NodeName(i), Addresses: []string{address}, TLS: c.Files(sim.NodeName(i)), Shared: shared,
		Facts: func() (syncclient.Facts, error) { return f, nil },
	})
	if err != nil {
		return err
	}
	n.done.Go(func() {
		_ = client.Run(ctx, func(_ context.Context, s *controlv1.NodeState) error { // returns nil, at the end
			before, now := n.have[i].Load(), s.GetVersion().GetRevision()
			n.have[i].Store(now)
			if w := n.now.Load(); w != nil && before < w.revision && now >= w.revision {
				w.mu.Lock()
				defer w.mu.Unlock()
				if w.took = append(w.took, time.Since(w.start)); len(w.took) == w.want {
					close(w.all)
				}
			}
			return nil
		})
	})
	return nil
}

// watch has the nodes note when they forward by the revision. Those that do already count at once.
func (n *nodes) watch(revision uint64, start time.Time) *watched {
	w := &watched{revision: revision, start: start, all: make(chan struct{}), want: len(n.have)}
	n.now.Store(w)
	return w
}

func measureCluster(ctx context.Context, o Options, r *Result) (err error) {
	c, err := sim.NewCluster(o.Dir, o.Binaries)
	if err != nil {
		return err
	}
	v, err := c.NewController("controller")
	if err != nil {
		return err
	}
	// Thousands of nodes in one process are slower than thousands of machines: who takes long is not stuck.
	v.Env = []string{"POD_CIDRS=" + podCIDR, "LOG_LEVEL=error", "COOLDOWN=1s", "ACK_TIMEOUT=2m"}
	o.Log("a store with %d nodes, and their certificates", o.Nodes+o.Stuck)
	if err := prepare(ctx, c, v, o); err != nil {
		return err
	}
	if err := v.Start(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Kill()) }()

	ctx, cancel := context.WithCancel(ctx)
	all := &nodes{stop: cancel, have: make([]atomic.Uint64, o.Nodes)}
	defer all.done.Wait()
	defer cancel()
	for i := range o.Stuck {
		name := sim.NodeName(o.Nodes + i)
		all.done.Go(func() { neverRead(ctx, c, name, o.Nodes+i, v.Address) })
	}

	o.Log("cold start")
	cpu, own := cpuTime(v.Pid()), cpuTime(os.Getpid())
	start := time.Now()
	w := all.watch(1, start)
	shared := syncclient.NewShared()
	for i := range o.Nodes {
		if err := all.run(ctx, i, c, v.Address, shared); err != nil {
			return err
		}
	}
	if err := w.wait(ctx); err != nil {
		return fmt.Errorf("cold start: %w", err)
	}
	if _, err := converged(ctx, v, o.Nodes, start); err != nil {
		return fmt.Errorf("cold start: %w", err)
	}
	r.ColdStart = seconds(time.Since(start))
	r.ColdStartCPU, r.ColdStartNodesCPU = seconds(cpuTime(v.Pid())-cpu), seconds(cpuTime(os.Getpid())-own)
	o.Log("cold start: %.1f s, controller's CPU %.1f s, nodes' %.1f s", r.ColdStart, r.ColdStartCPU, r.ColdStartNodesCPU)

	cpu = cpuTime(v.Pid())
	var took []time.Duration
	for i := range o.Changes {
		t, acknowledged, err := change(ctx, c, v, all, o, o.Nodes+o.Stuck+i)
		if err != nil {
			return fmt.Errorf("change %d: %w", i+1, err)
		}
		took = append(took, t...)
		r.Acknowledged = append(r.Acknowledged, seconds(acknowledged))
	}
	r.ChangeCPU = seconds(cpuTime(v.Pid())-cpu) / float64(o.Changes)
	slices.Sort(took)
	r.ChangeP50, r.ChangeP99, r.ChangeMax = seconds(took[len(took)/2]), seconds(took[len(took)*99/100]), seconds(took[len(took)-1])
	r.PeakResident, r.Resident = memory(v.Pid(), "VmHWM"), memory(v.Pid(), "VmRSS")
	o.Log("%d changes: p50 %.3f s, p99 %.3f s, worst %.3f s; controller's memory %d MiB", o.Changes, r.ChangeP50, r.ChangeP99, r.ChangeMax, r.PeakResident>>20)
	return nil
}

// prepare makes the controller's store, in which every node has its block, and the nodes' certificates.
func prepare(ctx context.Context, c *sim.Cluster, v *sim.Controller, o Options) error {
	mem, err := store.NewMemory().Open(ctx)
	if err != nil {
		return err
	}
	defer mem.Close()
	if _, err := mem.Campaign(ctx, "bench"); err != nil {
		return err
	}
	a := ipam.NewAllocator(mem, ipam.Config{})
	if _, _, err := a.AddPool(ctx, ipam.PodRange{CIDR: netip.MustParsePrefix(podCIDR), BlockBits: 24}); err != nil {
		return err
	}
	for i := range o.Nodes + o.Stuck {
		f := sim.NodeFacts(i)
		if _, err := a.Register(ctx, ipam.Facts{Name: sim.NodeName(i), IPv4: netip.MustParseAddr(f.IPv4), MAC: f.MAC}); err != nil {
			return err
		}
	}
	for i := range o.Nodes + o.Stuck + o.Changes {
		if _, err := c.Issue(pki.Request{Role: pki.Node, Name: sim.NodeName(i)}); err != nil {
			return err
		}
	}
	text, _, err := store.Backup(ctx, mem)
	if err != nil {
		return err
	}
	disk, err := store.Open(ctx, store.Config{Dir: v.StateDir()})
	if err != nil {
		return err
	}
	_, err = disk.Campaign(ctx, "bench")
	if err == nil {
		err = store.Restore(ctx, disk, text)
	}
	return errors.Join(err, disk.Close())
}

// neverRead says hello as a node and takes nothing of what comes, again and again.
func neverRead(ctx context.Context, c *sim.Cluster, name string, number int, address string) {
	for ctx.Err() == nil {
		once, cancel := context.WithTimeout(ctx, reopen)
		s, conn, err := c.DialNode(once, name, address)
		if err == nil {
			err = s.Send(helloOf(number))
			<-once.Done()
			conn.Close()
		}
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
		cancel()
	}
}

func helloOf(number int) *controlv1.SyncRequest {
	f := sim.NodeFacts(number)
	return &controlv1.SyncRequest{Message: &controlv1.SyncRequest_Hello{Hello: &controlv1.Hello{Node: sim.NodeName(number), Ipv4: f.IPv4, Mac: f.MAC, Protocol: 1}}}
}

// change has a node join, and says how long it takes until each of the others forwards to it, and until the controller knows that of all.
func change(ctx context.Context, c *sim.Cluster, v *sim.Controller, all *nodes, o Options, number int) (took []time.Duration, acknowledged time.Duration, err error) {
	once, cancel := context.WithCancel(ctx)
	defer cancel()
	s, conn, err := c.DialNode(once, sim.NodeName(number), v.Address)
	if err != nil {
		return nil, 0, err
	}
	defer conn.Close()
	issued, err := gauge(ctx, v, `overplane_controller_revision`)
	if err != nil {
		return nil, 0, err
	}
	start := time.Now()
	w := all.watch(uint64(issued)+1, start)
	if err := s.Send(helloOf(number)); err != nil {
		return nil, 0, err
	}
	if err := w.wait(ctx); err != nil {
		return nil, 0, err
	}
	acknowledged, err = converged(ctx, v, o.Nodes, start)
	return w.took, acknowledged, err
}

func (w *watched) wait(ctx context.Context) error {
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-w.all:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		w.mu.Lock()
		defer w.mu.Unlock()
		return fmt.Errorf("after %v %d of %d nodes forward by revision %d", patience, len(w.took), w.want, w.revision)
	}
}

// converged waits until the controller has everybody's acknowledgement.
func converged(ctx context.Context, v *sim.Controller, want int, start time.Time) (time.Duration, error) {
	for {
		n, err := gauge(ctx, v, `overplane_controller_nodes{state="converged"}`)
		took := time.Since(start)
		if err == nil && int(n) >= want {
			return took, nil
		}
		if took > patience {
			return 0, errors.Join(fmt.Errorf("after %v the controller knows that %.0f of %d nodes have converged", patience, n, want), err)
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// gauge reads one of the controller's metrics.
func gauge(ctx context.Context, v *sim.Controller, name string) (float64, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+v.Metrics+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer r.Body.Close()
	text, err := io.ReadAll(r.Body)
	if err != nil {
		return 0, err
	}
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindSubmatch(text)
	if m == nil {
		return 0, fmt.Errorf("the controller has no metric %s", name)
	}
	return strconv.ParseFloat(string(m[1]), 64)
}

// cpuTime is what a process has spent so far, user and system; proc(5) has it in hundredths of a second, whatever the kernel's own tick.
func cpuTime(pid int) time.Duration {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var ticks int64
	for _, f := range fields[11:13] {
		n, _ := strconv.ParseInt(f, 10, 64) // the kernel writes numbers
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// memory is a line of /proc/<pid>/status, bytes.
func memory(pid int, name string) uint64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			n, _ := strconv.ParseUint(strings.Fields(rest)[0], 10, 64) // the kernel writes numbers
			return n << 10
		}
	}
	return 0
}
