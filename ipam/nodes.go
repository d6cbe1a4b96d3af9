package ipam

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
)

// Facts are what a node says of itself when it joins.
type Facts struct {
	Name          string
	IPv4, IPv6    netip.Addr // its primary underlay addresses; at least one is valid
	MAC           string     // its uplink's; empty on a routed underlay
	DaemonVersion string
}

// InUseError says that another node has one of a node's addresses.
type InUseError struct {
	Node, Other string
	Address     string
}

// Error implements error.
func (e *InUseError) Error() string {
	return fmt.Sprintf("node %s has the address %s, which is node %s's: if %s is dead, release it: overplane node release %s --fenced", e.Node, e.Address, e.Other, e.Other, e.Other)
}

// ReleasedError says that a node was released and may not join.
type ReleasedError struct{ Node string }

// Error implements error.
func (e *ReleasedError) Error() string {
	return fmt.Sprintf("node %s was drained and released: to let it join again: overplane node drain %s --undo", e.Node, e.Node)
}

// Register makes a node a member, or takes over what changed of it, and sees that it has a block of every family unless it is draining. The table
// at the revision that it returns has all of it.
//
// If a family has no block left and the node has none at all, the error is an *ExhaustedError and nothing was changed.
func (a *Allocator) Register(ctx context.Context, f Facts) (revision int64, err error) {
	return a.commit(ctx, func(t *Table, tx *Tx) error {
		if err := t.checkFacts(f); err != nil {
			return err
		}
		before := t.Node(f.Name)
		n := &Node{Name: f.Name, Joined: a.cfg.Now().UTC()}
		var revision int64
		if before != nil {
			*n = *before
			revision = before.Revision
			if n.Gone && n.Draining {
				return &ReleasedError{Node: f.Name}
			}
		}
		n.IPv4, n.IPv6, n.MAC, n.DaemonVersion, n.Gone = f.IPv4, f.IPv6, f.MAC, f.DaemonVersion, false
		if before == nil || *n != *before {
			tx.put(n)
		}
		if !n.Draining {
			if err := a.claim(t, tx, f.Name); err != nil {
				return err
			}
		}
		// Also where the node's record stays: the blocks are claimed for a node that is not being released meanwhile.
		tx.must(n.key(), revision)
		return nil
	})
}

// claim adds the claims of the blocks that a node lacks. A block whose release it never acknowledged is still its own, and stays so now that the release was
// taken back.
func (a *Allocator) claim(t *Table, tx *Tx, node string) error {
	has := make(map[Family]bool)
	for _, b := range t.Owned(node) {
		if b.State == Releasing {
			a.move(tx, b, Allocated, false)
		}
		if b.Held() {
			has[FamilyOf(b.CIDR)] = true
		}
	}
	var blocks []*Block
	var exhausted error
	for _, f := range t.Families() {
		if has[f] {
			continue
		}
		pool, cidr, before := t.pick(f, node)
		if pool == nil {
			exhausted = errors.Join(exhausted, t.exhausted(f, node))
			continue
		}
		b := &Block{CIDR: cidr, Pool: pool.CIDR, State: Allocated, Owner: node, Since: a.cfg.Now().UTC()}
		if before != nil {
			b.Revision = before.Revision
		}
		blocks = append(blocks, b)
	}
	if exhausted != nil && len(has) == 0 {
		return exhausted
	}
	for _, b := range blocks {
		tx.must(b.key(), b.Revision)
		tx.put(b)
	}
	return nil
}

// checkFacts says why a node cannot be a member with these facts.
func (t *Table) checkFacts(f Facts) error {
	var errs []error
	if !f.IPv4.IsValid() && !f.IPv6.IsValid() {
		errs = append(errs, fmt.Errorf("node %s has no address", f.Name))
	}
	for _, a := range []netip.Addr{f.IPv4, f.IPv6} {
		if !a.IsValid() {
			continue
		}
		for _, p := range t.pools {
			if p.CIDR.Contains(a) {
				errs = append(errs, fmt.Errorf("node %s has the address %s, which is inside pod range %s: pod and node ranges must not overlap one another", f.Name, a, p.CIDR))
			}
		}
		for _, s := range t.settings.Ranges.Services {
			if s.Contains(a) {
				errs = append(errs, fmt.Errorf("node %s has the address %s, which is inside service range %s: service and node ranges must not overlap one another", f.Name, a, s))
			}
		}
		if r := t.routes[netip.PrefixFrom(a, a.BitLen())]; r != nil {
			errs = append(errs, fmt.Errorf("node %s has the address %s, which is static route %s: members are reached directly, so remove the route", f.Name, a, r.Prefix))
		}
		if other := t.address[a]; other != "" && other != f.Name {
			errs = append(errs, &InUseError{f.Name, other, a.String()})
		}
	}
	if other := t.mac[f.MAC]; f.MAC != "" && other != "" && other != f.Name {
		errs = append(errs, &InUseError{f.Name, other, f.MAC})
	}
	return errors.Join(errs...)
}

// Drain says that a node gets no more blocks, or with undo that it does again.
func (a *Allocator) Drain(ctx context.Context, node string, undo bool) (revision int64, err error) {
	return a.commit(ctx, func(t *Table, tx *Tx) error {
		n := t.Node(node)
		if n == nil {
			return &UnknownNodeError{node}
		}
		return a.setDraining(n, tx, !undo)
	})
}

func (a *Allocator) setDraining(n *Node, tx *Tx, draining bool) error {
	if n.Draining != draining {
		c := *n
		c.Draining = draining
		tx.put(&c)
	}
	tx.must(n.key(), n.Revision)
	return nil
}

// Release takes a node's blocks away. Unless fenced, the node is drained, and its blocks are RELEASING until OwnerAcked. fenced says that it is known to be
// dead: its blocks are in COOLDOWN at once, it is no member any more, and it may join again.
func (a *Allocator) Release(ctx context.Context, node string, fenced bool) (revision int64, err error) {
	return a.commit(ctx, func(t *Table, tx *Tx) error {
		n := t.Node(node)
		if n == nil {
			return &UnknownNodeError{node}
		}
		for _, b := range t.Owned(node) {
			switch {
			case fenced && b.Held():
				a.move(tx, b, Cooldown, true)
			case b.State == Allocated:
				a.move(tx, b, Releasing, false)
			}
		}
		if !fenced {
			return a.setDraining(n, tx, true)
		}
		if !n.Gone {
			c := *n
			c.Gone, c.Left = true, a.cfg.Now().UTC()
			tx.put(&c)
		}
		tx.must(n.key(), n.Revision)
		return nil
	})
}

// move adds a block's change of state.
func (a *Allocator) move(tx *Tx, b *Block, to State, fenced bool) {
	c := *b
	c.State, c.Fenced, c.Since = to, fenced, a.cfg.Now().UTC()
	tx.must(b.key(), b.Revision)
	tx.put(&c)
}

// OwnerAcked says that a node forwards by a table of the given revision: what was RELEASING at it is withdrawn, and goes to COOLDOWN.
func (a *Allocator) OwnerAcked(ctx context.Context, node string, programmed int64) (revision int64, err error) {
	return a.commit(ctx, func(t *Table, tx *Tx) error {
		for _, b := range t.Owned(node) {
			if b.State == Releasing && b.Revision <= programmed {
				a.move(tx, b, Cooldown, false)
			}
		}
		return nil
	})
}

// SetRoute adds a static route or changes its target.
func (a *Allocator) SetRoute(ctx context.Context, r StaticRoute) (revision int64, err error) {
	return a.commit(ctx, func(t *Table, tx *Tx) error {
		if err := t.checkRoute(r); err != nil {
			return err
		}
		var revision int64
		if before := t.routes[r.Prefix]; before != nil {
			if before.Node == r.Node && before.Host == r.Host {
				return nil
			}
			revision = before.Revision
		}
		tx.put(&r)
		tx.must(r.key(), revision)
		return nil
	})
}

func (t *Table) checkRoute(r StaticRoute) error {
	if !r.Prefix.IsValid() || r.Prefix.Masked() != r.Prefix || r.Prefix.Addr().Is4In6() {
		return fmt.Errorf("static route %s: want a prefix in canonical form", r.Prefix)
	}
	if r.Node != "" {
		if n := t.Node(r.Node); n == nil || n.Gone {
			return &UnknownNodeError{r.Node}
		}
	}
	for _, u := range unusable {
		if u.cidr.Bits() <= r.Prefix.Bits() && u.cidr.Contains(r.Prefix.Addr()) && !u.cidr.Addr().IsLinkLocalUnicast() {
			return fmt.Errorf("static route %s is %s: want one that is routed", r.Prefix, u.what)
		}
	}
	for _, p := range t.pools {
		if p.CIDR.Overlaps(r.Prefix) && p.CIDR.Bits() <= r.Prefix.Bits() {
			return fmt.Errorf("static route %s overlaps pod range %s: pools are routed by their blocks", r.Prefix, p.CIDR)
		}
	}
	for _, s := range t.settings.Ranges.Services {
		if s == r.Prefix {
			return fmt.Errorf("static route %s is service range %s, which leads to the host", r.Prefix, s)
		}
	}
	if other := t.address[r.Prefix.Addr()]; r.Prefix.IsSingleIP() && other != "" {
		return fmt.Errorf("static route %s is the address of node %s: members are reached directly", r.Prefix, other)
	}
	return nil
}

// RemoveRoute removes a static route. One that is not there is removed already.
func (a *Allocator) RemoveRoute(ctx context.Context, p netip.Prefix) (existed bool, revision int64, err error) {
	revision, err = a.commit(ctx, func(t *Table, tx *Tx) error {
		r := t.routes[p]
		if existed = r != nil; existed {
			tx.must(r.key(), r.Revision)
			tx.Delete = append(tx.Delete, r.key())
		}
		return nil
	})
	return existed, revision, err
}
