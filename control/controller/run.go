package controller

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/control/server"
	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

// stopTimeout is how long calls may take to end when the controller stops.
const stopTimeout = 3 * time.Second

// Run is the controller's life: it returns nil after ctx ended and everything is closed.
func Run(ctx context.Context, cfg Config, version string, log *slog.Logger) error {
	ranges, err := cfg.Ranges()
	if err != nil {
		return err
	}
	files := pki.Files{CA: cfg.CAFile, Cert: cfg.CertFile, Key: cfg.KeyFile}
	forNodes, err := files.Server(pki.Node)
	if err != nil {
		return fmt.Errorf("%w (overplane-controller pki init, pki issue controller make them)", err)
	}
	forAdmins, err := files.Server(pki.Admin)
	if err != nil {
		return err
	}
	st, err := OpenStore(ctx, cfg, log)
	if err != nil {
		return err
	}
	defer func() {
		if err := st.Close(); err != nil {
			log.Warn("closing the store", "error", err)
		}
	}()
	v := server.New(st, server.Config{
		Name: cfg.Name, Version: version, Ranges: ranges, SNAT: cfg.snat(), AckTimeout: cfg.AckTimeout, Log: log,
		IPAM: ipam.Config{Cooldown: max(cfg.Cooldown, 1), Deadline: cfg.CooldownDeadline},
	})
	h := server.NewHealth(v)
	nodes, admin := v.NodeServer(forNodes, h), v.AdminServer(forAdmins, h)
	g, gctx := errgroup.WithContext(ctx)
	if err := serveGRPC(g, "nodes", cfg.Listen, nodes, log); err != nil {
		return err
	}
	if err := serveGRPC(g, "operators", cfg.AdminListen, admin, log); err != nil {
		nodes.Stop()
		return err
	}
	web, err := serveMetrics(g, cfg.MetricsListen, v, version, log)
	if err != nil {
		nodes.Stop()
		admin.Stop()
		return err
	}
	g.Go(func() error { return v.Run(gctx) })
	g.Go(func() error { return feedWatchdog(gctx, st) })
	g.Go(func() error {
		<-gctx.Done()
		notify(daemon.SdNotifyStopping)
		v.EndStreams()
		t := time.AfterFunc(stopTimeout, func() { nodes.Stop(); admin.Stop() })
		defer t.Stop()
		nodes.GracefulStop()
		admin.GracefulStop()
		if web != nil {
			_ = web.Close() // nothing there is worth waiting for
		}
		return nil
	})
	notify(daemon.SdNotifyReady + "\nSTATUS=serving nodes on " + cfg.Listen)
	err = g.Wait()
	log.Info("overplane-controller ends")
	return err
}

// OpenStore opens the store that the configuration names.
func OpenStore(ctx context.Context, cfg Config, log *slog.Logger) (*store.Store, error) {
	c := store.Config{
		Dir: cfg.StateDir, Endpoints: cfg.EtcdEndpoints, Prefix: cfg.EtcdPrefix, Username: cfg.EtcdUsername, Password: cfg.EtcdPassword,
		Quota: cfg.EtcdQuota << 20, Log: log,
	}
	if cfg.EtcdCA != "" || cfg.EtcdCert != "" {
		c.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
		if cfg.EtcdCA != "" {
			text, err := os.ReadFile(cfg.EtcdCA)
			if err != nil {
				return nil, err
			}
			c.TLS.RootCAs = x509.NewCertPool()
			if !c.TLS.RootCAs.AppendCertsFromPEM(text) {
				return nil, fmt.Errorf("%s has no certificate", cfg.EtcdCA)
			}
		}
		if cfg.EtcdCert != "" {
			pair, err := tls.LoadX509KeyPair(cfg.EtcdCert, cfg.EtcdKey)
			if err != nil {
				return nil, err
			}
			c.TLS.Certificates = []tls.Certificate{pair}
		}
	}
	return store.Open(ctx, c)
}

func serveGRPC(g *errgroup.Group, whom, address string, s *grpc.Server, log *slog.Logger) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("listening for %s: %w", whom, err)
	}
	log.Info("listening", "for", whom, "address", l.Addr())
	g.Go(func() error { return s.Serve(l) })
	return nil
}

func serveMetrics(g *errgroup.Group, address string, v *server.Server, version string, log *slog.Logger) (*http.Server, error) {
	if address == none {
		return nil, nil
	}
	r := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "overplane_controller_info", Help: "The controller's version.", ConstLabels: prometheus.Labels{"version": version},
	})
	info.Set(1)
	r.MustRegister(v.Metrics(), info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if !v.Leading() {
			http.Error(w, "this controller does not lead", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening for metrics: %w", err)
	}
	log.Info("listening", "for", "metrics", "address", l.Addr())
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	g.Go(func() error {
		if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	return s, nil
}

// notify tells the service manager, if there is one (sd_notify(3)). One that does not listen is no reason to stop.
func notify(state string) { _, _ = daemon.SdNotify(false, state) }

// feedWatchdog tells the service manager that the store can be read, as often as it wants to hear.
func feedWatchdog(ctx context.Context, st *store.Store) error {
	every, err := daemon.SdWatchdogEnabled(false)
	if err != nil || every == 0 {
		return nil
	}
	t := time.NewTicker(every / 3)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if st.Read(ctx, 0, func(*ipam.Table) {}) == nil {
			notify(daemon.SdNotifyWatchdog)
		}
	}
}
