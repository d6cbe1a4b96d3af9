package syncclient

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

var (
	descConnected  = prometheus.NewDesc("overplane_control_connected", "1 if the node has a stream to a controller.", nil, nil)
	descStale      = prometheus.NewDesc("overplane_control_stale_seconds", "For how long the node has not had a stream to a controller; 0 while it has.", nil, nil)
	descAccepted   = prometheus.NewDesc("overplane_control_accepted_revision", "The revision of the desired state that was accepted last.", nil, nil)
	descProgrammed = prometheus.NewDesc("overplane_control_programmed_revision", "The revision of the desired state that the node forwards by.", nil, nil)
	descRefused    = prometheus.NewDesc("overplane_control_refused", "1 if the controller's last table was refused.", nil, nil)
)

// collector shows a client's status to Prometheus.
type collector struct {
	c       *Client
	started time.Time
}

// Collector is the client's status as metrics, to be registered.
func (c *Client) Collector() prometheus.Collector { return &collector{c, time.Now()} }

// Describe implements prometheus.Collector.
func (m *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descConnected, descStale, descAccepted, descProgrammed, descRefused} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *collector) Collect(ch chan<- prometheus.Metric) {
	s := m.c.Status()
	truth := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	stale := 0.0
	if !s.Connected {
		since := s.Since
		if since.IsZero() {
			since = m.started
		}
		stale = time.Since(since).Seconds()
	}
	for d, v := range map[*prometheus.Desc]float64{
		descConnected: truth(s.Connected), descStale: stale, descRefused: truth(s.Refused != ""),
		descAccepted: float64(s.Accepted.GetRevision()), descProgrammed: float64(s.Programmed.GetRevision()),
	} {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v)
	}
}
