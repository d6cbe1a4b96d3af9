package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// listenRetry is how often a listener that cannot be had is tried again. Packets are forwarded without it.
const listenRetry = 5 * time.Second

// serveMetrics answers scrapes and probes until ctx ends.
func (a *Agent) serveMetrics(ctx context.Context) {
	if a.cfg.MetricsListen == metricsNone {
		return
	}
	h, err := a.metricsHandler()
	if err != nil {
		a.log.Error("there are no metrics", "error", err)
		return
	}
	for said := false; ; {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a.cfg.MetricsListen)
		if err == nil {
			a.log.Info("listening for scrapes and probes", "address", l.Addr())
			s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 1 << 16}
			stop := context.AfterFunc(ctx, func() { _ = s.Close() }) // nothing there is worth waiting for
			err = s.Serve(l)
			stop()
			if errors.Is(err, http.ErrServerClosed) {
				return
			}
		}
		if ctx.Err() == nil && !said {
			a.log.Error("metrics cannot be served; trying again", "address", a.cfg.MetricsListen, "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(listenRetry):
		}
	}
}

func (a *Agent) metricsHandler() (http.Handler, error) {
	r := prometheus.NewPedanticRegistry()
	parts := []prometheus.Collector{&collector{a: a}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})}
	if a.sync != nil {
		parts = append(parts, a.sync.client.Collector())
	}
	for _, c := range parts {
		if err := r.Register(c); err != nil {
			return nil, err
		}
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4, ErrorLog: errorLog{a}}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), scrapePatience)
		defer cancel()
		if err := a.alive(ctx); err != nil {
			http.Error(w, "something hangs: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 2*scrapePatience)
		defer cancel()
		s, err := (&service{a: a}).GetStatus(ctx, &controlv1.GetStatusRequest{})
		if err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		if !s.GetReady() {
			w.WriteHeader(http.StatusServiceUnavailable)
			for _, p := range s.GetProblems() {
				fmt.Fprintln(w, p)
			}
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux, nil
}

// errorLog is where the handler of scrapes says what it could not send.
type errorLog struct{ a *Agent }

func (l errorLog) Println(v ...any) { l.a.log.Error("scrape", "error", fmt.Sprint(v...)) }
