package agent

import (
	"context"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/icmp"
	"github.com/overplane/overplane/snat"
)

//go:generate go run ./genmetrics ../../docs/reference/metrics.md

// Metrics are counted per kind of port, and per pod nowhere: the number of series does not grow with the pods. `overplane drops` and `overplane
// counters` have them by pod.

// MetricInfo describes one metric of the daemon, for its documentation.
type MetricInfo struct {
	Name, Help string
	Type       prometheus.ValueType
	Labels     []string
}

// metric is one of the daemon's metrics.
type metric struct {
	info MetricInfo
	desc *prometheus.Desc
}

var allMetrics []*metric

func newMetric(t prometheus.ValueType, name, help string, labels ...string) *metric {
	name = "overplane_" + name
	m := &metric{MetricInfo{name, help, t, labels}, prometheus.NewDesc(name, help, labels, nil)}
	allMetrics = append(allMetrics, m)
	return m
}

func counter(name, help string, labels ...string) *metric {
	return newMetric(prometheus.CounterValue, name, help, labels...)
}

func gauge(name, help string, labels ...string) *metric {
	return newMetric(prometheus.GaugeValue, name, help, labels...)
}

// Metrics lists what /metrics answers beside Go's, the process's and, with the state source controller, the control client's own metrics.
func Metrics() (out []MetricInfo) {
	for _, m := range allMetrics {
		out = append(out, m.info)
	}
	return out
}

var (
	metricBuild    = gauge("build_info", "The daemon's version; always 1.", "version", "goversion")
	metricReady    = gauge("ready", "1 if the node is ready: `overplane status` says why it is not.")
	metricProblems = gauge("problems", "What keeps the node from being ready, in number.")

	metricSource     = gauge("state_source_info", "Where the desired state comes from; always 1.", "source")
	metricDesired    = gauge("state_desired_revision", "The revision of the desired state; 0 if there is none.")
	metricProgrammed = gauge("state_programmed_revision", "The revision of the desired state that all workers forward by; 0 if there is none.")
	metricEntries    = gauge("state_entries", "Entries of the desired state.")
	metricMembers    = gauge("members", "Nodes of the cluster, this one included.")
	metricRoutes     = gauge("routes", "Entries of the forwarding table.")
	metricPods       = gauge("pods", "Attached pods, by whether they have a device.", "state")

	metricUplink     = gauge("uplink_info", "The uplink; always 1.", "interface", "underlay")
	metricRung       = gauge("uplink_rung", "1 for the rung by which the uplink is driven, 0 for the others.", "rung")
	metricUplinkUp   = gauge("uplink_up", "1 if the uplink is there, up and has a carrier.")
	metricMTU        = gauge("uplink_mtu_bytes", "The uplink's MTU.")
	metricQueues     = gauge("uplink_queues", "Queues by which the uplink is driven.")
	metricSteering   = counter("steering_packets_total", "Packets that the steering program on the uplink saw, by what it did with them, and those that its sockets lost.", "action")
	metricPackets    = counter("port_packets_total", "Packets that crossed ports of a kind; a GSO frame counts as its segments. in: received from the port.", "kind", "direction")
	metricFrames     = counter("port_frames_total", "Frames that crossed ports of a kind; a GSO frame is one.", "kind", "direction")
	metricBytes      = counter("port_bytes_total", "Ethernet bytes of the frames that crossed ports of a kind.", "kind", "direction")
	metricDrops      = counter("drops_total", "Dropped packets by reason. in: received from a port of the kind and dropped before they reached another; out: dropped at the port where they were to leave.", "kind", "direction", "reason")
	metricAnswered   = counter("answered_packets_total", "Packets that the data plane answered itself, or had to ignore.", "what")
	metricICMP       = counter("icmp_errors_total", "ICMP errors sent.", "error")
	metricICMPBudget = counter("icmp_errors_refused_total", "ICMP errors not sent: beyond their budget, or because none may answer the packet.")
	metricGenerated  = counter("generated_packets_total", "Packets that the data plane made: ICMP errors, answers, fragments beyond the first.")

	metricWorkerUp    = gauge("worker_up", "1 if the worker answered; 0: it hangs, and its other metrics are missing.", "worker")
	metricPolls       = counter("worker_polls_total", "Turns of the worker's loop, by whether they found packets.", "worker", "found")
	metricParks       = counter("worker_parks_total", "How often the worker went to sleep for want of packets.", "worker")
	metricHandedOver  = counter("worker_handed_over_packets_total", "Packets that the worker handed to the one that owns their session.", "worker")
	metricGeneration  = gauge("worker_snapshot_generation", "The snapshot of the tables that the worker forwards by: workers that differ for long hang.", "worker")
	metricMemory      = gauge("worker_frames", "Frame memory of the worker by size: ordinary frames, large ones of 64 KiB.", "worker", "size")
	metricMemoryFree  = gauge("worker_frames_free", "Frame memory of the worker that is not in use. Frames in the rings of ports are in use.", "worker", "size")
	metricSessions    = gauge("snat_sessions", "Sessions of address translation.", "family")
	metricSessionsMax = gauge("snat_sessions_max", "Sessions that there is room for.", "family")
	metricHalfOpen    = gauge("snat_sessions_half_open", "Sessions that only one side has sent packets of.", "family")
	metricSessionRate = counter("snat_session_events_total", "Sessions by what became of them: created, expired, ended (by the flow itself), host_port (the host took their port), flushed (the node's address changed), saturated (created when most ports towards their destination were taken).", "event")
	metricSNATErrors  = counter("snat_icmp_errors_total", "ICMP errors translated. in: towards pods.", "direction")
	metricFragments   = gauge("snat_fragments_held", "Fragments that wait for the first of their datagram.")
	metricPorts       = gauge("snat_ports", "Ports (ICMP: identifiers) of the range that may be leased to pods.", "protocol")
	metricPortsLeased = gauge("snat_ports_leased", "Ports leased to pods.", "protocol")
	metricFullest     = gauge("snat_pod_ports_max_ratio", "Of all pods the greatest share of its limit of ports that a pod holds; at 1 its next block of ports is refused.", "protocol")
)

// collector shows the daemon to Prometheus. Scrapes are answered one after the other.
type collector struct {
	a  *Agent
	mu sync.Mutex
}

// scrapePatience is how long one worker, or the agent's goroutine, may keep a scrape waiting.
const scrapePatience = time.Second

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, m := range allMetrics {
		ch <- m.desc
	}
}

// sink is where one scrape's values go.
type sink chan<- prometheus.Metric

func (s sink) put(m *metric, v float64, labels ...string) {
	s <- prometheus.MustNewConstMetric(m.desc, m.info.Type, v, labels...)
}

func (s sink) count(m *metric, v uint64, labels ...string) { s.put(m, float64(v), labels...) }

func (s sink) truth(m *metric, v bool, labels ...string) {
	n := 0.0
	if v {
		n = 1
	}
	s.put(m, n, labels...)
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := sink(ch)
	s.put(metricBuild, 1, c.a.version, runtime.Version())
	st := &controlv1.GetStatusResponse{}
	var alloc *snat.Allocator
	pods := make(map[bool]int)
	up := false
	ctx, cancel := context.WithTimeout(context.Background(), scrapePatience)
	err := c.a.do(ctx, func() {
		c.a.fillStatus(st)
		if t := c.a.translation; t != nil {
			alloc = t.alloc
		}
		for _, p := range c.a.pods {
			pods[p.port != nil]++
		}
		up = c.a.facts.Up && !c.a.facts.Gone
	})
	cancel()
	if err == nil { // else the agent hangs or stops: what it knows is missing
		s.status(st, pods, up)
	}
	if alloc != nil {
		s.ports(alloc)
	}
	s.workers(c.a)
}

func (s sink) status(st *controlv1.GetStatusResponse, pods map[bool]int, up bool) {
	s.truth(metricReady, st.GetReady())
	s.put(metricProblems, float64(len(st.GetProblems())))
	s.put(metricSource, 1, st.GetStateSource())
	s.count(metricDesired, st.GetDesired().GetRevision())
	s.count(metricProgrammed, st.GetProgrammed().GetRevision())
	s.count(metricEntries, uint64(st.GetEntryCount()))
	s.count(metricMembers, uint64(st.GetMemberCount()))
	s.count(metricRoutes, uint64(st.GetRouteCount()))
	s.put(metricPods, float64(pods[true]), "ready")
	s.put(metricPods, float64(pods[false]), "failed")
	u := st.GetUplink()
	s.put(metricUplink, 1, u.GetInterface(), u.GetUnderlay())
	for _, r := range []string{ModeXDPZeroCopy, ModeXDPCopy, ModeTun, ModePlain} {
		s.truth(metricRung, u.GetRung() == r, r)
	}
	s.truth(metricUplinkUp, up)
	s.count(metricMTU, uint64(u.GetMtu()))
	s.count(metricQueues, uint64(u.GetQueues()))
	for action, n := range u.GetSteering() {
		s.count(metricSteering, n, action)
	}
}

func (s sink) ports(alloc *snat.Allocator) {
	for class := range snat.NumClasses {
		u, fullest := alloc.Usage(class), 0.0
		for i, n := range u.PerPod {
			if u.Limit[i] > 0 {
				fullest = max(fullest, float64(n)/float64(u.Limit[i]))
			}
		}
		s.put(metricPorts, float64(u.Ports), class.String())
		s.put(metricPortsLeased, float64(u.Leased), class.String())
		s.put(metricFullest, fullest, class.String())
	}
}

// workers asks each worker, and adds up what is not a worker's own.
func (s sink) workers(a *Agent) {
	var sum workerSums
	for i := range a.pools {
		var w dataplane.WorkerStats
		ctx, cancel := context.WithTimeout(context.Background(), scrapePatience)
		var mine workerSums // of this turn only, since an answer may come after nobody waits for it any more
		err := a.dp.Ask(ctx, i, func(t *snat.Translator, ws *dataplane.WorkerStats) {
			w = *ws
			if t != nil {
				mine.snat, mine.counts = t.Stats(), t.Counts()
			}
		})
		cancel()
		name := strconv.Itoa(i)
		s.truth(metricWorkerUp, err == nil, name)
		if err != nil {
			continue
		}
		s.worker(&w, name)
		sum.add(&w, &mine)
	}
	sum.send(s)
}

func (s sink) worker(w *dataplane.WorkerStats, name string) {
	s.count(metricPolls, w.BusyPolls, name, "packets")
	s.count(metricPolls, w.Polls-w.BusyPolls, name, "nothing")
	s.count(metricParks, w.Parks, name)
	s.count(metricHandedOver, w.HandedOver, name)
	s.count(metricGeneration, w.Generation, name)
	s.count(metricMemory, uint64(w.Chunks), name, "ordinary")
	s.count(metricMemory, uint64(w.Large), name, "large")
	s.count(metricMemoryFree, uint64(w.ChunksFree), name, "ordinary")
	s.count(metricMemoryFree, uint64(w.LargeFree), name, "large")
}

// workerSums are sums over workers.
type workerSums struct {
	kinds                  [dataplane.NumPortKinds]dataplane.SlotStats
	answers                dataplane.Answers
	icmp                   [icmp.NumErrors]uint64
	icmpRefused, generated uint64
	snat                   snat.Stats
	counts                 snat.Counts
}

func (t *workerSums) add(w *dataplane.WorkerStats, mine *workerSums) {
	for i := range w.Slots {
		t.kinds[w.Slots[i].Kind].Add(&w.Slots[i])
	}
	for k := range w.Left {
		t.kinds[k].Add(&w.Left[k])
	}
	t.answers.ARP += w.Answers.ARP
	t.answers.ND += w.Answers.ND
	t.answers.Echo += w.Answers.Echo
	t.answers.Ignored += w.Answers.Ignored
	for e := range w.ICMPErrors {
		t.icmp[e] += w.ICMPErrors[e]
	}
	t.icmpRefused += w.ICMPErrorsRefused
	t.generated += w.Generated
	a, b := &t.snat, &mine.snat
	a.Sessions4, a.Sessions6 = a.Sessions4+b.Sessions4, a.Sessions6+b.Sessions6
	a.Capacity4, a.Capacity6 = a.Capacity4+b.Capacity4, a.Capacity6+b.Capacity6
	a.HalfOpen4, a.HalfOpen6 = a.HalfOpen4+b.HalfOpen4, a.HalfOpen6+b.HalfOpen6
	a.Held += b.Held
	c, d := &t.counts, &mine.counts
	c.Created, c.Expired, c.Ended = c.Created+d.Created, c.Expired+d.Expired, c.Ended+d.Ended
	c.HostPort, c.Flushed, c.Saturated = c.HostPort+d.HostPort, c.Flushed+d.Flushed, c.Saturated+d.Saturated
	c.ErrorsIn, c.ErrorsOut = c.ErrorsIn+d.ErrorsIn, c.ErrorsOut+d.ErrorsOut
}

func (t *workerSums) send(s sink) {
	for kind, name := range portKinds {
		k := &t.kinds[kind]
		for direction, traffic := range map[string]*dataplane.Traffic{"in": &k.In, "out": &k.Out} {
			s.count(metricPackets, traffic.Packets, name, direction)
			s.count(metricFrames, traffic.Frames, name, direction)
			s.count(metricBytes, traffic.Bytes, name, direction)
		}
		for r := drop.None + 1; r < drop.NumReasons; r++ {
			s.count(metricDrops, k.DropsIn[r], name, "in", r.String())
			s.count(metricDrops, k.DropsOut[r], name, "out", r.String())
		}
	}
	for what, n := range map[string]uint64{"arp": t.answers.ARP, "nd": t.answers.ND, "echo": t.answers.Echo, "ignored": t.answers.Ignored} {
		s.count(metricAnswered, n, what)
	}
	for e := icmp.None + 1; e < icmp.NumErrors; e++ {
		s.count(metricICMP, t.icmp[e], e.String())
	}
	s.count(metricICMPBudget, t.icmpRefused)
	s.count(metricGenerated, t.generated)
	for family, v := range map[string][3]int{
		"ipv4": {t.snat.Sessions4, t.snat.Capacity4, t.snat.HalfOpen4}, "ipv6": {t.snat.Sessions6, t.snat.Capacity6, t.snat.HalfOpen6},
	} {
		s.put(metricSessions, float64(v[0]), family)
		s.put(metricSessionsMax, float64(v[1]), family)
		s.put(metricHalfOpen, float64(v[2]), family)
	}
	for event, n := range map[string]uint64{
		"created": t.counts.Created, "expired": t.counts.Expired, "ended": t.counts.Ended,
		"host_port": t.counts.HostPort, "flushed": t.counts.Flushed, "saturated": t.counts.Saturated,
	} {
		s.count(metricSessionRate, n, event)
	}
	s.count(metricSNATErrors, t.counts.ErrorsIn, "in")
	s.count(metricSNATErrors, t.counts.ErrorsOut, "out")
	s.put(metricFragments, float64(t.snat.Held))
}
