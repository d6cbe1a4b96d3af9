package syncclient

import (
	"errors"
	"fmt"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// table is what a node was told. Immutable once made.
type table struct {
	// common is what all nodes are told: routes to the node itself are in it, own blocks are not. Its digest is that of its entries.
	common *controlv1.NodeState
	own    []*controlv1.OwnBlock
}

// newTable splits what the controller's digest covers.
func newTable(all *controlv1.NodeState) *table {
	t := &table{own: all.GetOwnBlocks(), common: &controlv1.NodeState{
		Node: all.GetNode(), Version: all.GetVersion(), Pools: all.GetPools(), Members: all.GetMembers(), Routes: all.GetRoutes(), Snat: all.GetSnat(),
	}}
	t.common.Digest, t.common.EntryCount = api.Digest(t.common)
	return t
}

// version is nil if there is no table.
func (t *table) version() *controlv1.Version {
	if t == nil {
		return nil
	}
	return t.common.GetVersion()
}

// digest and the number of entries, as the controller counts.
func (t *table) digest() (digest uint64, entries uint32) {
	if t == nil {
		return 0, 0
	}
	digest, entries = t.common.GetDigest(), t.common.GetEntryCount()+uint32(len(t.own))
	for _, b := range t.own {
		digest ^= b.GetHash()
	}
	return digest, entries
}

// all is the table as one message: what is kept on disk.
func (t *table) all() *controlv1.NodeState {
	digest, entries := t.digest()
	c := t.common
	return &controlv1.NodeState{
		Node: c.GetNode(), Version: c.GetVersion(), Digest: digest, EntryCount: entries,
		Pools: c.GetPools(), OwnBlocks: t.own, Members: c.GetMembers(), Routes: c.GetRoutes(), Snat: c.GetSnat(),
	}
}

// state is the node's desired state: the table less the routes to the node itself.
func (t *table) state() *controlv1.NodeState {
	out := t.all()
	out.Routes = make([]*controlv1.Route, 0, len(t.common.GetRoutes()))
	for _, r := range t.common.GetRoutes() {
		if r.GetNode() == out.GetNode() {
			out.Digest ^= r.GetHash()
			out.EntryCount--
			continue
		}
		out.Routes = append(out.Routes, r)
	}
	return out
}

// Removals that a group may make without the controller's declared intent: a share of the table, but always a few.
const (
	DefaultRemovalPercent = 20
	minRemovals           = 10
)

// rejection is why a group is not taken.
type rejection struct {
	kind controlv1.Rejection
	err  error
}

func (r *rejection) Error() string { return r.err.Error() }

func reject(kind controlv1.Rejection, format string, args ...any) error {
	return &rejection{kind, fmt.Errorf(format, args...)}
}

// group is batches that belong together, merged.
type group struct {
	all     *controlv1.SyncResponse // the last batch, with the entries of all
	batches int
}

// add takes a batch in and reports whether the group is complete.
func (g *group) add(b *controlv1.SyncResponse) (complete bool, err error) {
	if g.batches > 0 {
		before := g.all
		if b.GetNonce() != before.GetNonce()+1 || b.GetSnapshot() != before.GetSnapshot() || !api.EqualVersions(b.GetVersion(), before.GetVersion()) {
			return false, reject(controlv1.Rejection_REJECTION_DIGEST, "batch %d of version %s does not follow batch %d of version %s",
				b.GetNonce(), api.FormatVersion(b.GetVersion()), before.GetNonce(), api.FormatVersion(before.GetVersion()))
		}
		b.UpsertPools = append(before.UpsertPools, b.UpsertPools...)
		b.UpsertMembers = append(before.UpsertMembers, b.UpsertMembers...)
		b.UpsertRoutes = append(before.UpsertRoutes, b.UpsertRoutes...)
		b.RemovePools = append(before.RemovePools, b.RemovePools...)
		b.RemoveMembers = append(before.RemoveMembers, b.RemoveMembers...)
		b.RemoveRoutes = append(before.RemoveRoutes, b.RemoveRoutes...)
		if b.UpsertSnat == nil {
			b.UpsertSnat = before.UpsertSnat
		}
		b.RemoveSnat = b.RemoveSnat || before.RemoveSnat
	}
	g.all = b
	g.batches++
	return b.GetLast(), nil
}

// next is what the group makes of the table, which is nil if there is none. percent is the share of the table that may be removed.
func (g *group) next(node string, have *table, percent int, shared *Shared) (*table, error) {
	b := g.all
	same := have != nil && have.version().GetIncarnation() == b.GetVersion().GetIncarnation()
	if same && b.GetVersion().GetRevision() < have.version().GetRevision() {
		return nil, reject(controlv1.Rejection_REJECTION_REGRESSION, "version %s is older than %s, which this node has",
			api.FormatVersion(b.GetVersion()), api.FormatVersion(have.version()))
	}
	next := &table{own: b.GetOwnBlocks()}
	var err error
	switch {
	case b.GetSnapshot():
		next.common, err = snapshot(node, b)
	case !same:
		err = reject(controlv1.Rejection_REJECTION_DIGEST, "a difference to a table that this node does not have")
	case api.EqualVersions(have.version(), b.GetVersion()):
		err = reject(controlv1.Rejection_REJECTION_REGRESSION, "a difference that leads to version %s, which this node has", api.FormatVersion(b.GetVersion()))
	case shared != nil:
		next.common, err = shared.delta(have.common, b)
	default:
		next.common, err = delta(have.common, b)
	}
	if err != nil {
		return nil, err
	}
	digest, entries := next.digest()
	if digest != b.GetDigest() || entries != b.GetEntryCount() {
		return nil, &rejection{controlv1.Rejection_REJECTION_DIGEST,
			&api.DigestMismatchError{Digest: digest, WantDigest: b.GetDigest(), Entries: entries, WantEntries: b.GetEntryCount()}}
	}
	if have == nil {
		return next, nil
	}
	before, count := have.digest()
	if same && b.GetVersion().GetRevision() == have.version().GetRevision() && (digest != before || entries != count) {
		return nil, reject(controlv1.Rejection_REJECTION_REGRESSION, "version %s has other contents than it had", api.FormatVersion(b.GetVersion()))
	}
	removed := missing(have.own, next.own, (*controlv1.OwnBlock).GetCidr)
	if b.GetSnapshot() {
		removed += removals(have.common, next.common)
	} else {
		removed += len(b.GetRemovePools()) + len(b.GetRemoveMembers()) + len(b.GetRemoveRoutes())
		if b.GetRemoveSnat() {
			removed++
		}
	}
	return next, guard(removed, int(count), b.GetIntendedRemovals(), percent)
}

func snapshot(node string, b *controlv1.SyncResponse) (*controlv1.NodeState, error) {
	if len(b.GetRemovePools())+len(b.GetRemoveMembers())+len(b.GetRemoveRoutes()) > 0 || b.GetRemoveSnat() {
		return nil, reject(controlv1.Rejection_REJECTION_DIGEST, "a snapshot that removes")
	}
	out := &controlv1.NodeState{
		Node: node, Version: b.GetVersion(), Pools: b.GetUpsertPools(), Members: b.GetUpsertMembers(), Routes: b.GetUpsertRoutes(), Snat: b.GetUpsertSnat(),
	}
	out.Digest, out.EntryCount = api.Digest(out)
	return out, nil
}

func delta(common *controlv1.NodeState, b *controlv1.SyncResponse) (*controlv1.NodeState, error) {
	out, err := api.Apply(common, &controlv1.StatePatch{
		Node: common.GetNode(), Base: common.GetVersion(), Version: b.GetVersion(),
		UpsertPools: b.GetUpsertPools(), UpsertMembers: b.GetUpsertMembers(), UpsertRoutes: b.GetUpsertRoutes(), UpsertSnat: b.GetUpsertSnat(),
		RemovePools: b.GetRemovePools(), RemoveMembers: b.GetRemoveMembers(), RemoveRoutes: b.GetRemoveRoutes(), RemoveSnat: b.GetRemoveSnat(),
	})
	if err != nil {
		return nil, &rejection{controlv1.Rejection_REJECTION_DIGEST, err}
	}
	return out, nil
}

// guard refuses a table that lacks too much of what there was.
func guard(removed, before int, intended uint32, percent int) error {
	limit := max(before*percent/100, minRemovals)
	if removed <= max(limit, int(intended)) {
		return nil
	}
	return reject(controlv1.Rejection_REJECTION_REMOVALS, "%d of %d entries would be removed: at most %d without the controller's word that it means it (%d): "+
		"overplane converge --allow-removals %d, if it is right", removed, before, limit, intended, removed)
}

// removals is how many entries of have are not in next, by key.
func removals(have, next *controlv1.NodeState) int {
	n := missing(have.GetPools(), next.GetPools(), (*controlv1.Pool).GetCidr)
	n += missing(have.GetMembers(), next.GetMembers(), (*controlv1.Member).GetName)
	n += missing(have.GetRoutes(), next.GetRoutes(), (*controlv1.Route).GetPrefix)
	if have.GetSnat() != nil && next.GetSnat() == nil {
		n++
	}
	return n
}

func missing[E any](have, next []E, key func(E) string) (n int) {
	if len(have) == 0 {
		return 0
	}
	there := make(map[string]struct{}, len(next))
	for _, e := range next {
		there[key(e)] = struct{}{}
	}
	for _, e := range have {
		if _, ok := there[key(e)]; !ok {
			n++
		}
	}
	return n
}

// Failures are entries that could not be programmed, where the others were: what apply may return.
type Failures []*controlv1.EntryFailure

// Error implements error.
func (f Failures) Error() string {
	var errs []error
	for _, e := range f {
		errs = append(errs, fmt.Errorf("%s %s: %s", e.GetKind(), e.GetKey(), e.GetReason()))
	}
	return errors.Join(errs...).Error()
}
