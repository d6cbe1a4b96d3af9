package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
	"github.com/overplane/overplane/dataplane/packet"
)

// controller is the state source of that name: the client, and what the agent and it tell each other. A nil one is a node without a controller.
type controller struct {
	client *syncclient.Client
	// changed tells the client that facts has something new.
	changed chan struct{}

	// The rest belongs to the agent's goroutine.
	told  syncclient.Facts
	acked []*controlv1.EntryFailure // in the last acknowledgement
	busy  bool                      // a table is being taken over, and acknowledged after that
}

// errNoFacts says that the uplink has no address yet, or is gone.
var errNoFacts = errors.New("the uplink has no address yet")

// newController makes the client. It connects to nobody before followController runs it.
func newController(a *Agent) (*controller, error) {
	c := &controller{changed: make(chan struct{}, 1)}
	cfg := &a.cfg
	client, err := syncclient.New(syncclient.Config{
		Node: cfg.NodeName, Addresses: cfg.SyncAddresses, ServerName: cfg.SyncServerName, Version: a.version,
		TLS:          pki.Files{CA: cfg.TLSCA, Cert: cfg.TLSCert, Key: cfg.TLSKey},
		FactsChanged: c.changed, Dir: cfg.StateDir, RemovalPercent: cfg.SyncRemovalPercent,
		Check: func(s *controlv1.NodeState) error {
			_, err := checkState(cfg.NodeName, s)
			return err
		},
		Facts: func() (f syncclient.Facts, err error) {
			derr := a.do(context.Background(), func() {
				f, err = a.syncFacts()
				if err == nil {
					c.told = f
				}
			})
			return f, errors.Join(derr, err)
		},
		Log: a.log,
	})
	c.client = client
	return c, err
}

// followController programs what the controller says until ctx ends.
func (a *Agent) followController(ctx context.Context) {
	if err := a.sync.client.Run(ctx, a.applyTable); err != nil {
		a.log.Error("the controller is not followed any more", "error", err)
	}
}

// syncFacts is what the node says of itself. On a routed underlay frames for it go to the gateway, and its Ethernet address is nobody's business.
func (a *Agent) syncFacts() (syncclient.Facts, error) {
	a4, a6 := primaryAddresses(a.facts, a.cfg.Node4(), a.cfg.Node6())
	f := syncclient.Facts{IPv4: addrText(a4), IPv6: addrText(a6)}
	if !a.cfg.Routed() {
		f.MAC = formatMAC(a.facts.MAC)
	}
	if a.facts.Gone || f.IPv4 == "" && f.IPv6 == "" || !a.cfg.Routed() && a.facts.MAC == (packet.MAC{}) {
		return syncclient.Facts{}, fmt.Errorf("%w: %s", errNoFacts, a.cfg.Uplink)
	}
	return f, nil
}

// tell has the client say hello again if the facts are not those that it said last. While they are not known it says nothing: what others
// know stays right for as long as the uplink comes back as it was.
func (c *controller) tell(f syncclient.Facts, err error) {
	if c == nil || err != nil || f == c.told {
		return
	}
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// applyTable makes a table of the controller's the desired state and returns when all workers forward by it.
func (a *Agent) applyTable(ctx context.Context, s *controlv1.NodeState) error {
	d, err := checkState(a.cfg.NodeName, s)
	if err != nil {
		return err
	}
	if derr := a.do(ctx, func() { err = a.takeTable(d) }); derr != nil {
		return derr
	}
	return err
}

// takeTable makes d the desired state. Its entries that could not be programmed are the error, if nothing else is wrong.
func (a *Agent) takeTable(d *desired) error {
	a.sync.busy = true
	defer func() { a.sync.busy = false }()
	if have := a.state; have != nil && have.raw.GetDigest() == d.raw.GetDigest() && have.raw.GetEntryCount() == d.raw.GetEntryCount() {
		// The same entries under another version: there is nothing to build.
		a.state, a.stateProblem = d, ""
		if a.programmed == have {
			a.programmed = d
		}
		a.log.Debug("the desired state has a new version and the same entries", "version", api.FormatVersion(d.raw.GetVersion()))
	} else {
		a.setState(d)
	}
	if a.programmed != a.state {
		return errors.New("a worker has not taken over the desired state")
	}
	a.sync.acked = a.failures()
	if len(a.sync.acked) > 0 {
		return syncclient.Failures(a.sync.acked)
	}
	return nil
}

// failures are what is to be acknowledged as not programmed.
func (a *Agent) failures() []*controlv1.EntryFailure {
	return append(a.keptBlocks(), a.built.Failures...)
}

// acknowledgeAnew tells the controller that other entries than before are not programmed, since a pod left or the uplink changed.
func (a *Agent) acknowledgeAnew() {
	if a.sync == nil || a.sync.busy || a.state == nil {
		return
	}
	if !slices.EqualFunc(a.failures(), a.sync.acked, func(x, y *controlv1.EntryFailure) bool {
		return x.GetKind() == y.GetKind() && x.GetKey() == y.GetKey() && x.GetReason() == y.GetReason()
	}) {
		a.sync.client.Again()
	}
}

// keptBlocks are the blocks that the node does not own any more but whose addresses pods still have: they are not free for another node.
func (a *Agent) keptBlocks() (out []*controlv1.EntryFailure) {
	pods := make(map[netip.Prefix][]string)
	for _, p := range a.podsInOrder() {
		for _, addr := range []netip.Addr{p.rec.IPv4, p.rec.IPv6} {
			if block := a.state.strayBlock(addr); block.IsValid() {
				pods[block] = append(pods[block], p.rec.Name)
			}
		}
	}
	for block, names := range pods {
		out = append(out, &controlv1.EntryFailure{Kind: "own_block", Key: block.String(), Reason: "pods have addresses of it: " + someOf(names)})
	}
	slices.SortFunc(out, func(x, y *controlv1.EntryFailure) int { return strings.Compare(x.GetKey(), y.GetKey()) })
	return out
}

// strayBlock is the block of a pool that the address is in if it is none of the node's; invalid: it is, or there is no such pool.
func (d *desired) strayBlock(a netip.Addr) netip.Prefix {
	if !a.IsValid() || slices.ContainsFunc(d.own, func(b netip.Prefix) bool { return b.Contains(a) }) {
		return netip.Prefix{}
	}
	for _, p := range d.pools {
		if p.cidr.Contains(a) {
			return netip.PrefixFrom(a, p.bits).Masked()
		}
	}
	return netip.Prefix{}
}

// refused is a problem: the node does not do what its controller says, and will not by itself.
func (c *controller) refused() string {
	if c == nil {
		return ""
	}
	if r := c.client.Status().Refused; r != "" {
		return "the controller's last table is refused, the one before it stays in force: " + r
	}
	return ""
}

// waiting says what a node without a desired state waits for.
func (c *controller) waiting() string {
	s := c.client.Status()
	switch {
	case s.Problem != "":
		return s.Problem
	case s.Connected:
		return "waiting for the table of controller " + s.Address
	}
	return "waiting for a controller"
}

// fillStatus adds how the node stands with its controller. A controller that is away is a warning where there is a table to forward by: nobody needs to
// be moved off a node that forwards.
func (c *controller) fillStatus(m *controlv1.GetStatusResponse, started time.Time, forwarding bool) {
	if c == nil {
		return
	}
	s := c.client.Status()
	since := s.Since
	if since.IsZero() {
		since = started
	}
	m.Controller = &controlv1.ControllerStatus{
		Connected: s.Connected, Address: s.Address, Since: timestamppb.New(since), Accepted: cloneVersion(s.Accepted), Problem: s.Problem, Refused: s.Refused,
	}
	if !s.Connected && forwarding {
		why := s.Problem
		if why == "" {
			why = "not tried yet"
		}
		m.Warnings = append(m.Warnings, fmt.Sprintf("no controller for %s; the node forwards by the last table: %s", time.Since(since).Round(time.Second), why))
	}
}
