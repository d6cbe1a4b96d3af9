package agent

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/drop"
)

// metricsAddress is where a test's daemon listens.
func metricsAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

// get asks the daemon's listener, which may come up a little after the daemon is ready.
func get(t *testing.T, address, path string) (code int, body string) {
	t.Helper()
	require.Eventually(t, func() bool {
		r, err := http.Get("http://" + address + path)
		if err != nil {
			return false
		}
		defer r.Body.Close()
		text, err := io.ReadAll(r.Body)
		code, body = r.StatusCode, string(text)
		return err == nil
	}, 10*time.Second, 10*time.Millisecond)
	return code, body
}

func scrape(t *testing.T, address string) map[string]*dto.MetricFamily {
	t.Helper()
	code, body := get(t, address, "/metrics")
	require.Equal(t, http.StatusOK, code, body)
	p := expfmt.NewTextParser(model.UTF8Validation)
	families, err := p.TextToMetricFamilies(strings.NewReader(body))
	require.NoError(t, err)
	return families
}

// value is that of the series of a family with exactly these labels: name, value, name, value...
func value(t *testing.T, families map[string]*dto.MetricFamily, name string, labels ...string) float64 {
	t.Helper()
	f := families[name]
	require.NotNil(t, f, "no metric %s", name)
	for _, m := range f.GetMetric() {
		var have []string
		for _, l := range m.GetLabel() {
			have = append(have, l.GetName(), l.GetValue())
		}
		if slices.Equal(have, labels) {
			return m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	t.Fatalf("metric %s has no series %v: %v", name, labels, f)
	return 0
}

func TestMetricsOfANode(t *testing.T) {
	address := metricsAddress(t)
	n := startNode(t, testConfig(t, "OVERPLANE_METRICS_LISTEN="+address), newFakePlatform())

	code, body := get(t, address, "/readyz")
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Contains(t, body, "waiting for one to be pushed")
	code, _ = get(t, address, "/livez")
	require.Equal(t, http.StatusOK, code)
	m := scrape(t, address)
	require.Zero(t, value(t, m, "overplane_ready"))
	require.Equal(t, 1.0, value(t, m, "overplane_problems"))

	n.push(threeNodes())
	code, body = get(t, address, "/readyz")
	require.Equal(t, http.StatusOK, code, body)
	m = scrape(t, address)
	for name, want := range map[string]float64{
		"overplane_ready": 1, "overplane_problems": 0, "overplane_state_desired_revision": 5, "overplane_state_programmed_revision": 5, "overplane_members": 3,
		"overplane_uplink_up": 1, "overplane_uplink_mtu_bytes": 1500,
	} {
		require.Equal(t, want, value(t, m, name), name)
	}
	require.Equal(t, 1.0, value(t, m, "overplane_build_info", "goversion", m["go_info"].GetMetric()[0].GetLabel()[0].GetValue(), "version", "test"))
	require.Equal(t, 1.0, value(t, m, "overplane_uplink_rung", "rung", "xdp-copy"))
	require.Zero(t, value(t, m, "overplane_uplink_rung", "rung", "xdp-zerocopy"))
	require.Equal(t, 1.0, value(t, m, "overplane_steering_packets_total", "action", "ours"))
	for _, w := range []string{"0", "1"} {
		require.Equal(t, 1.0, value(t, m, "overplane_worker_up", "worker", w))
	}
	require.NotZero(t, value(t, m, "overplane_snat_ports", "protocol", "tcp"))
	require.Zero(t, value(t, m, "overplane_snat_pod_ports_max_ratio", "protocol", "udp"))

	// Everything that is documented is there, and nothing else.
	var documented, have []string
	for _, i := range Metrics() {
		documented = append(documented, i.Name)
	}
	for name := range m {
		if strings.HasPrefix(name, "overplane_") {
			have = append(have, name)
		}
	}
	require.ElementsMatch(t, documented, have)

	// Every reason of every kind and direction is there from the start, so that rates are right from its first packet on.
	require.Len(t, m["overplane_drops_total"].GetMetric(), 3*2*(int(drop.NumReasons)-1))

	// A new life of the daemon serves again.
	require.NoError(t, n.stop())
	_, err := http.Get("http://" + address + "/metrics")
	require.Error(t, err)
}

func TestMetricsFollowPrometheusNaming(t *testing.T) {
	address := metricsAddress(t)
	startNode(t, testConfig(t, "OVERPLANE_METRICS_LISTEN="+address), newFakePlatform())
	_, body := get(t, address, "/metrics")
	problems, err := promlint.New(strings.NewReader(body)).Lint()
	require.NoError(t, err)
	require.Empty(t, problems)
}

func TestMetricNamesAreAContract(t *testing.T) {
	var b strings.Builder
	for _, m := range Metrics() {
		fmt.Fprintln(&b, m.Name, strings.Join(m.Labels, " "))
	}
	golden, err := os.ReadFile("testdata/metrics.txt")
	require.NoError(t, err)
	require.Equal(t, string(golden), b.String(), "dashboards and alerts know these names: a change belongs into the changelog under Check")
}

// The number of series must not grow with the pods, and counters must not go back when one leaves.
func TestMetricsDoNotDependOnTheNumberOfPods(t *testing.T) {
	address := metricsAddress(t)
	plat := newFakePlatform()
	n := startNode(t, testConfig(t, "OVERPLANE_METRICS_LISTEN="+address), plat)
	n.push(threeNodes())
	series := func() (count int) {
		for name, f := range scrape(t, address) {
			if strings.HasPrefix(name, "overplane_") {
				count += len(f.GetMetric())
			}
		}
		return count
	}
	before := series()
	for i := 10; i < 15; i++ {
		plat.netns[fmt.Sprintf("/run/netns/p%d", i)] = fmt.Sprint(i)
		_, err := n.attach(fmt.Sprintf("p%d", i), fmt.Sprintf("/run/netns/p%d", i), fmt.Sprintf("10.244.1.%d", i), "")
		require.NoError(t, err)
	}
	m := scrape(t, address)
	require.Equal(t, 5.0, value(t, m, "overplane_pods", "state", "ready"))
	require.Equal(t, before, series())
}

func TestAnAddressThatIsTakenDoesNotStopTheDaemon(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	n := startNode(t, testConfig(t, "OVERPLANE_METRICS_LISTEN="+l.Addr().String()), newFakePlatform())
	n.push(threeNodes())
	require.True(t, n.status().GetReady())
	l.Close()
}
