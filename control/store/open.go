package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
)

// Config says where the records are.
type Config struct {
	// Dir is the embedded etcd's directory; used if there are no Endpoints.
	Dir string
	// Endpoints are an external etcd's, e.g. https://10.0.0.5:2379. TLS is for them; nil: none.
	Endpoints          []string
	TLS                *tls.Config
	Username, Password string
	// Prefix is where the cluster's keys are in an external etcd; empty: DefaultPrefix.
	Prefix string
	// Quota is the most that the embedded etcd may store, bytes; 0: DefaultQuota.
	Quota int64
	// Log; nil: none.
	Log *slog.Logger
}

// Defaults of Config. A cluster of 5,000 nodes takes a few megabytes; what is compacted away counts until it is reused.
const (
	DefaultPrefix = "/overplane/"
	DefaultQuota  = 512 << 20

	// compactAfter is how long the embedded etcd keeps old revisions, which only a watch that broke off asks for.
	compactAfter = "5m"
	startTimeout = 60 * time.Second
)

// Open opens the store that cfg names: it is read when Open returns.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Prefix == "" {
		cfg.Prefix = DefaultPrefix
	}
	var b *etcd
	var err error
	if len(cfg.Endpoints) > 0 {
		b, err = dial(ctx, cfg)
	} else {
		b, err = start(ctx, cfg)
	}
	if err != nil {
		return nil, err
	}
	s, err := open(ctx, b, cfg.Log)
	if err != nil {
		return nil, errors.Join(err, b.close())
	}
	return s, nil
}

// dial connects to an external etcd.
func dial(ctx context.Context, cfg Config) (*etcd, error) {
	c, err := clientv3.New(clientv3.Config{
		Endpoints: cfg.Endpoints, TLS: cfg.TLS, Username: cfg.Username, Password: cfg.Password,
		DialTimeout: opTimeout, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithDisableServiceConfig()},
		Logger:      zap.NewNop(),
	})
	if err != nil {
		return nil, fmt.Errorf("etcd %v: %w", cfg.Endpoints, err)
	}
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	if _, err := c.Get(ctx, cfg.Prefix, clientv3.WithCountOnly()); err != nil {
		return nil, errors.Join(fmt.Errorf("etcd %v does not answer: %w", cfg.Endpoints, err), c.Close())
	}
	return &etcd{c: c, prefix: cfg.Prefix, closes: c.Close}, nil
}

// start starts the embedded etcd: one member, without listeners.
func start(ctx context.Context, cfg Config) (*etcd, error) {
	if cfg.Quota == 0 {
		cfg.Quota = DefaultQuota
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, err
	}
	e := embed.NewConfig()
	e.Name = "overplane"
	e.Dir = filepath.Join(cfg.Dir, "etcd")
	e.ListenClientUrls, e.ListenPeerUrls = nil, nil // nobody but this process speaks to it
	e.InitialCluster = e.InitialClusterFromName(e.Name)
	e.QuotaBackendBytes = cfg.Quota
	e.AutoCompactionMode, e.AutoCompactionRetention = embed.CompactorModePeriodic, compactAfter
	e.MaxTxnOps = 512
	e.TickMs, e.ElectionMs = 100, 500 // alone, it elects itself
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(zapCore(cfg.Log)))
	server, err := embed.StartEtcd(e)
	if err != nil {
		return nil, fmt.Errorf("the embedded etcd in %s does not start: %w", e.Dir, err)
	}
	t := time.NewTimer(startTimeout)
	defer t.Stop()
	select {
	case <-server.Server.ReadyNotify():
	case err = <-server.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-t.C:
		err = fmt.Errorf("it is not ready after %v", startTimeout)
	}
	if err != nil {
		server.Server.HardStop()
		server.Close()
		return nil, fmt.Errorf("the embedded etcd in %s does not start: %w", e.Dir, err)
	}
	c := v3client.New(server.Server)
	if err := makeRoom(ctx, server, c, cfg.Quota); err != nil && cfg.Log != nil {
		cfg.Log.Error("the store is full, and no room could be made: it can be read, but not written", "error", err)
	}
	return &etcd{c: c, prefix: DefaultPrefix, sole: true, closes: func() error {
		err := c.Close()
		server.Close()
		if errors.Is(err, context.Canceled) {
			err = nil // what Close of a client without connection says
		}
		return err
	}}, nil
}

// makeRoom ends the alarm of an embedded etcd that was full: what is compacted away is given back, and the quota may be another now.
func makeRoom(ctx context.Context, server *embed.Etcd, c *clientv3.Client, quota int64) error {
	ctx, cancel := context.WithTimeout(ctx, 4*opTimeout)
	defer cancel()
	alarms, err := c.AlarmList(ctx)
	if err != nil || len(alarms.Alarms) == 0 {
		return err
	}
	now, err := c.Get(ctx, DefaultPrefix, clientv3.WithCountOnly())
	if err != nil {
		return err
	}
	if _, err := c.Compact(ctx, now.Header.GetRevision(), clientv3.WithCompactPhysical()); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
		return err
	}
	if err := server.Server.Backend().Defrag(); err != nil {
		return err
	}
	if size := server.Server.Backend().Size(); size >= quota*9/10 {
		return fmt.Errorf("%d bytes are stored, of at most %d", size, quota)
	}
	_, err = c.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	return err
}

// zapCore writes what etcd has to say of warnings and worse to a slog.Logger.
func zapCore(log *slog.Logger) zapcore.Core {
	if log == nil {
		return zapcore.NewNopCore()
	}
	enc := zapcore.NewConsoleEncoder(zapcore.EncoderConfig{MessageKey: "m", LineEnding: " "})
	return zapcore.NewCore(enc, zapcore.AddSync(logWriter{log}), zapcore.ErrorLevel)
}

type logWriter struct{ log *slog.Logger }

func (w logWriter) Write(p []byte) (int, error) {
	w.log.Warn("etcd", "message", string(p))
	return len(p), nil
}
