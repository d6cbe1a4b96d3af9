package syncclient

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/pki"
)

// Config is what a Client needs to know.
type Config struct {
	// Node is the node's name: that in its certificate.
	Node string
	// Addresses are the controllers', host:port. They are tried in turn.
	Addresses []string
	// TLS are the authority's certificates, the node's, and its key; they are read again when they change.
	TLS pki.Files
	// ServerName is the name that the controllers' certificates must have; empty: the host that is dialled.
	ServerName string
	// Version is the daemon's, for people.
	Version string
	// Facts are what the node says of itself; asked for at every hello. Facts may return an error while they are not known.
	Facts func() (Facts, error)
	// FactsChanged, if not nil, says that Facts has something new.
	FactsChanged <-chan struct{}
	// Dir is where the last table is kept; empty: nowhere.
	Dir string
	// RemovalPercent is the share of the table that may be removed at once without the controller's intent; 0: DefaultRemovalPercent.
	RemovalPercent int
	// Check says what is wrong with a state before it is accepted; nil: api.Validate, or nothing in simulations.
	Check func(*controlv1.NodeState) error
	// Shared, if not nil, is for simulations; see there.
	Shared *Shared
	// MinBackoff and MaxBackoff bound the pause before the next attempt; 0: half a second, ten seconds.
	MinBackoff, MaxBackoff time.Duration
	Log                    *slog.Logger
}

// Facts are what a node says of itself. An address that it does not have is empty; so is the MAC on a routed underlay.
type Facts struct{ IPv4, IPv6, MAC string }

// ApplyFunc makes the data plane forward by a state, which it may keep but not change, and returns when it does. If single entries could not be
// programmed it returns Failures. With any other error nothing was changed, and it is called again.
type ApplyFunc func(ctx context.Context, s *controlv1.NodeState) error

const (
	defaultMinBackoff = 500 * time.Millisecond
	defaultMaxBackoff = 10 * time.Second
	// steady is how long a stream must have stood for the pauses to start anew.
	steady = 10 * time.Second
	// saveEvery is how often the table is written at most.
	saveEvery = time.Second
	// applyRetry is the pause after apply failed.
	applyRetry = time.Second
	// maxFailures are named in an acknowledgement.
	maxFailures = 100
)

// Client keeps one node up to date. Status may be called at any time, by anybody.
type Client struct {
	cfg Config
	log *slog.Logger

	mu         sync.Mutex
	table      *table // accepted last
	programmed *controlv1.Version
	failures   []*controlv1.EntryFailure
	more       uint32
	status     Status
	session    *session // the stream that stands, or nil

	news  chan struct{} // table was replaced
	again chan struct{} // the table that was applied is to be applied once more
}

// Status is how a node stands with its controller.
type Status struct {
	Connected bool
	Address   string // of the controller, if connected
	// Since is when it connected, or since when it is not; zero: it never did.
	Since time.Time
	// Accepted and Programmed are versions of the desired state; nil: none.
	Accepted, Programmed *controlv1.Version
	// Problem is what is wrong, for people; empty: nothing.
	Problem string
	// Refused is why the last table was not taken; empty: it was.
	Refused string
}

// New checks a configuration and makes a client of it.
func New(cfg Config) (*Client, error) {
	if err := api.ValidateNodeName(cfg.Node); err != nil {
		return nil, err
	}
	if len(cfg.Addresses) == 0 {
		return nil, errors.New("no controller is named")
	}
	if cfg.Facts == nil {
		return nil, errors.New("the node's facts are missing")
	}
	if cfg.RemovalPercent == 0 {
		cfg.RemovalPercent = DefaultRemovalPercent
	}
	if cfg.MinBackoff == 0 {
		cfg.MinBackoff = defaultMinBackoff
	}
	if cfg.MaxBackoff == 0 {
		cfg.MaxBackoff = defaultMaxBackoff
	}
	if cfg.Check == nil && cfg.Shared == nil {
		cfg.Check = api.Validate
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Client{cfg: cfg, log: cfg.Log, news: make(chan struct{}, 1), again: make(chan struct{}, 1)}, nil
}

// Status is how the node stands now.
func (c *Client) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.status
	s.Accepted, s.Programmed = c.table.version(), c.programmed
	return s
}

// Again has the table that was applied last applied and acknowledged once more: what failed then may not now. It does not wait.
func (c *Client) Again() {
	select {
	case c.again <- struct{}{}:
	default:
	}
}

// Run applies the last table from disk, then follows the controller until ctx ends. A controller that is away, or refuses, is tried again for ever.
func (c *Client) Run(ctx context.Context, apply ApplyFunc) error {
	if c.cfg.Dir != "" {
		last, err := load(c.cfg.Dir, c.cfg.Node)
		if err != nil {
			c.log.Warn("the last table cannot be used; waiting for the controller", "error", err)
		}
		if last != nil {
			c.log.Info("the last table is used until the controller answers", "version", api.FormatVersion(last.GetVersion()))
			c.setTable(newTable(last))
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { c.applyTables(ctx, apply) })
	defer wg.Wait()
	failed := 0
	for i := 0; ; i++ {
		address := c.cfg.Addresses[i%len(c.cfg.Addresses)]
		start := time.Now()
		err := c.connect(ctx, address)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(start) > steady {
			failed = 0
		}
		c.disconnected(address, err)
		// All addresses are tried before the pauses grow.
		pause := min(c.cfg.MinBackoff<<min(failed, 16), c.cfg.MaxBackoff)
		if (i+1)%len(c.cfg.Addresses) == 0 {
			failed++
		}
		t := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
	}
}

func (c *Client) disconnected(address string, err error) {
	st := status.Convert(err)
	problem := fmt.Sprintf("controller %s: %s", address, st.Message())
	if st.Code() == codes.PermissionDenied || st.Code() == codes.Unauthenticated {
		problem += " (certificate " + c.cfg.TLS.Cert + ")"
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.status.Connected {
		c.status.Since = time.Now()
	}
	if c.status.Problem != problem {
		c.log.Warn("no connection to the controller; forwarding goes on", "controller", address, "error", st.Message(), "code", st.Code())
	}
	c.status.Connected, c.status.Address, c.status.Problem = false, "", problem
}

func (c *Client) connected(address string, s *session) *controlv1.Ack {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log.Info("connected to the controller", "controller", address)
	c.session = s
	c.status.Connected, c.status.Address, c.status.Since, c.status.Problem = true, address, time.Now(), ""
	if c.programmed == nil {
		return nil
	}
	// What was programmed since the hello.
	return &controlv1.Ack{Level: controlv1.Ack_LEVEL_PROGRAMMED, Version: c.programmed, Failures: c.failures, MoreFailures: c.more}
}

func (c *Client) setTable(t *table) {
	c.mu.Lock()
	c.table = t
	c.mu.Unlock()
	select {
	case c.news <- struct{}{}:
	default:
	}
}

// applyTables applies the newest table, one at a time, and keeps it on disk.
func (c *Client) applyTables(ctx context.Context, apply ApplyFunc) {
	var saved, applied *table
	var last time.Time
	anew := false
	retry := time.NewTimer(0)
	if !retry.Stop() {
		<-retry.C
	}
	for {
		select {
		case <-ctx.Done():
			if applied != nil && applied != saved {
				c.save(applied)
			}
			return
		case <-c.news:
		case <-retry.C:
		case <-c.again:
			anew = true
		}
		c.mu.Lock()
		t := c.table
		c.mu.Unlock()
		if t == nil {
			continue
		}
		if t != applied || anew {
			if !c.program(ctx, apply, t) {
				retry.Reset(applyRetry)
				continue
			}
			applied, anew = t, false
		}
		switch rest := saveEvery - time.Since(last); {
		case applied == saved:
		case rest > 0:
			retry.Reset(rest)
		default:
			c.save(applied)
			saved, last = applied, time.Now()
		}
	}
}

func (c *Client) save(t *table) {
	if c.cfg.Dir == "" {
		return
	}
	if err := save(c.cfg.Dir, t.all()); err != nil {
		c.log.Error("the table cannot be kept on disk; a restart without the controller would come up with an older one", "error", err)
	}
}

// program applies a table and says so. It returns false if nothing was changed.
func (c *Client) program(ctx context.Context, apply ApplyFunc, t *table) bool {
	err := apply(ctx, c.stateOf(t))
	if ctx.Err() != nil {
		return false
	}
	var failures Failures
	done := err == nil || errors.As(err, &failures)
	if !done {
		c.log.Error("a desired state could not be programmed; it is tried again", "version", api.FormatVersion(t.version()), "error", err)
		failures = Failures{{Reason: err.Error()}}
	}
	c.mu.Lock()
	c.failures, c.more = failures, 0
	if len(failures) > maxFailures {
		c.failures, c.more = failures[:maxFailures], uint32(len(failures)-maxFailures)
	}
	if done {
		c.programmed = t.version()
	}
	ack := &controlv1.Ack{Level: controlv1.Ack_LEVEL_PROGRAMMED, Version: t.version(), Failures: c.failures, MoreFailures: c.more}
	s := c.session
	c.mu.Unlock()
	if s != nil {
		s.send(&controlv1.SyncRequest{Message: &controlv1.SyncRequest_Ack{Ack: ack}})
	}
	return done
}

// stateOf is what apply gets.
func (c *Client) stateOf(t *table) *controlv1.NodeState {
	if c.cfg.Shared != nil {
		return t.all()
	}
	return t.state()
}
