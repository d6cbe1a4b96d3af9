package server

import (
	"context"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/overplane/overplane/ipam"
)

// metrics are the controller's, for Prometheus.
type metrics struct {
	v       *Server
	streams atomic.Int64

	batches, snapshots, slow, laggards prometheus.Counter
	registrations, rejections          *prometheus.CounterVec
	program                            prometheus.Histogram
}

const namespace = "overplane_controller"

func newMetrics(v *Server) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help})
	}
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: name, Help: help}, []string{label})
	}
	return &metrics{
		v:             v,
		batches:       counter("batches_sent_total", "Batches sent to nodes."),
		snapshots:     counter("snapshots_sent_total", "Whole tables sent to nodes, rather than differences."),
		slow:          counter("slow_nodes_total", "Streams that were ended because the node did not accept in time."),
		laggards:      counter("cooldown_laggards_total", "Nodes that had not withdrawn a block's route when its deadline passed."),
		registrations: vec("registrations_total", "Hellos of nodes, by what became of them.", "result"),
		rejections:    vec("rejections_total", "Tables that nodes did not take, by the kind of reason.", "reason"),
		program: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Name: "convergence_seconds", Help: "From the first version that a node lacked until it had programmed the newest.",
			Buckets: prometheus.ExponentialBuckets(0.005, 2, 14),
		}),
	}
}

var (
	descNodes    = prometheus.NewDesc(namespace+"_nodes", "Nodes, by state.", []string{"state"}, nil)
	descBlocks   = prometheus.NewDesc(namespace+"_blocks", "Blocks of a pool, by state.", []string{"pool", "state"}, nil)
	descLeading  = prometheus.NewDesc(namespace+"_leading", "1 if this controller leads.", nil, nil)
	descRevision = prometheus.NewDesc(namespace+"_revision", "The newest revision that nodes are told.", nil, nil)
)

func (m *metrics) parts() []prometheus.Collector {
	return []prometheus.Collector{m.batches, m.snapshots, m.slow, m.laggards, m.registrations, m.rejections, m.program}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, p := range m.parts() {
		p.Describe(ch)
	}
	for _, d := range []*prometheus.Desc{descNodes, descBlocks, descLeading, descRevision} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, p := range m.parts() {
		p.Collect(ch)
	}
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	leading := 0.0
	if m.v.Leading() {
		leading = 1
	}
	gauge(descLeading, leading)
	newest := m.v.graph.version()
	gauge(descRevision, float64(newest.GetRevision()))
	connected, converged, known := 0, 0, 0
	_ = m.v.store.Read(context.Background(), 0, func(t *ipam.Table) {
		for _, u := range t.Usage() {
			for state, n := range map[string]int{"allocated": u.Allocated, "releasing": u.Releasing, "cooldown": u.Cooldown, "free": u.Free()} {
				gauge(descBlocks, float64(n), u.Pool.CIDR.String(), state)
			}
		}
		for _, n := range t.Nodes() {
			if n.Gone {
				continue
			}
			known++
			p := m.v.progress.get(n.Name)
			if p.stream != nil {
				connected++
			}
			if p.converged(newest) {
				converged++
			}
		}
	})
	gauge(descNodes, float64(known), "known")
	gauge(descNodes, float64(connected), "connected")
	gauge(descNodes, float64(converged), "converged")
}

// Metrics are the controller's metrics, to be registered.
func (v *Server) Metrics() prometheus.Collector { return v.metrics }
