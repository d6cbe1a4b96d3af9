package api

import (
	"errors"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// BaseMismatchError says that a patch is for another version of the state than the one there is: read the state and try again.
type BaseMismatchError struct {
	Have *controlv1.Version // the state's; nil if it has none
	Base *controlv1.Version // what the patch is for
}

// Error implements error.
func (e *BaseMismatchError) Error() string {
	return fmt.Sprintf("the patch is for version %s, but the state is version %s: read it again", FormatVersion(e.Base), FormatVersion(e.Have))
}

// DigestMismatchError says that a state is not the one its sender has: the digest or the number of entries differ.
type DigestMismatchError struct {
	Digest, WantDigest   uint64
	Entries, WantEntries uint32
}

// Error implements error.
func (e *DigestMismatchError) Error() string {
	return fmt.Sprintf("digest %#016x over %d entries, want %#016x over %d", e.Digest, e.Entries, e.WantDigest, e.WantEntries)
}

// FormatVersion is a version as people read it.
func FormatVersion(v *controlv1.Version) string {
	switch {
	case v.GetIncarnation() == "" && v.GetRevision() == 0:
		return "none"
	case v.GetIncarnation() == "":
		return fmt.Sprintf("%d", v.GetRevision())
	}
	return fmt.Sprintf("%s/%d", v.GetIncarnation(), v.GetRevision())
}

// EqualVersions reports whether two versions are the same. No version (nil) equals the zero one.
func EqualVersions(a, b *controlv1.Version) bool {
	return a.GetIncarnation() == b.GetIncarnation() && a.GetRevision() == b.GetRevision()
}

// Apply returns what the patch makes of the state. Neither is changed, and the result shares entries with both: see the package's
// comment. Entries that stay keep their order, new ones follow; the result is sealed whether or not the state was. Hashes that upserts come
// without are computed.
//
// The error is a *BaseMismatchError if the state is of another version, a *DigestMismatchError if the result is not what the patch
// says, else about the patch itself, all problems at once. The result's entries are not validated: call [Validate].
//
// The cost is one map lookup for each entry of a list that the patch changes, and hashing for those upserts only that come without.
func Apply(state *controlv1.NodeState, patch *controlv1.StatePatch) (*controlv1.NodeState, error) {
	if patch.GetNode() != state.GetNode() {
		return nil, fmt.Errorf("the patch is for node %q, but the state is node %q's", patch.GetNode(), state.GetNode())
	}
	if !EqualVersions(state.GetVersion(), patch.GetBase()) {
		return nil, &BaseMismatchError{Have: state.GetVersion(), Base: patch.GetBase()}
	}
	var errs []error
	if patch.GetVersion().GetIncarnation() != patch.GetBase().GetIncarnation() || patch.GetVersion().GetRevision() <= patch.GetBase().GetRevision() {
		errs = append(errs, fmt.Errorf("version %s does not follow base %s: want the same incarnation and a higher revision",
			FormatVersion(patch.GetVersion()), FormatVersion(patch.GetBase())))
	}
	if !Sealed(state) {
		state = proto.CloneOf(state)
		Seal(state)
	}

	out := &controlv1.NodeState{Node: state.GetNode(), Version: patch.GetVersion(), Digest: state.GetDigest()}
	var err [5]error
	out.Pools, err[0] = applyList(kindPool, state.GetPools(), patch.GetUpsertPools(), patch.GetRemovePools(), poolOps, &out.Digest)
	out.OwnBlocks, err[1] = applyList(kindOwnBlock, state.GetOwnBlocks(), patch.GetUpsertOwnBlocks(), patch.GetRemoveOwnBlocks(), ownBlockOps, &out.Digest)
	out.Members, err[2] = applyList(kindMember, state.GetMembers(), patch.GetUpsertMembers(), patch.GetRemoveMembers(), memberOps, &out.Digest)
	out.Routes, err[3] = applyList(kindRoute, state.GetRoutes(), patch.GetUpsertRoutes(), patch.GetRemoveRoutes(), routeOps, &out.Digest)
	out.Snat, err[4] = applySNAT(state.GetSnat(), patch, &out.Digest)
	if err := errors.Join(append(errs, err[:]...)...); err != nil {
		return nil, err
	}
	out.EntryCount = uint32(len(out.Pools) + len(out.OwnBlocks) + len(out.Members) + len(out.Routes))
	if out.Snat != nil {
		out.EntryCount++
	}
	if (patch.GetDigest() != 0 || patch.GetEntryCount() != 0) && (patch.GetDigest() != out.Digest || patch.GetEntryCount() != out.EntryCount) {
		return nil, &DigestMismatchError{Digest: out.Digest, WantDigest: patch.GetDigest(), Entries: out.EntryCount, WantEntries: patch.GetEntryCount()}
	}
	return out, nil
}

// ops is what Apply needs to know about one kind of entry.
type ops[E entry] struct {
	key  func(E) string
	seal func(E) E // a copy with its hash
}

var (
	poolOps = ops[*controlv1.Pool]{(*controlv1.Pool).GetCidr, func(p *controlv1.Pool) *controlv1.Pool {
		p = proto.CloneOf(p)
		p.Hash = hashPool(p)
		return p
	}}
	ownBlockOps = ops[*controlv1.OwnBlock]{(*controlv1.OwnBlock).GetCidr, func(b *controlv1.OwnBlock) *controlv1.OwnBlock {
		b = proto.CloneOf(b)
		b.Hash = hashOwnBlock(b)
		return b
	}}
	memberOps = ops[*controlv1.Member]{(*controlv1.Member).GetName, func(m *controlv1.Member) *controlv1.Member {
		m = proto.CloneOf(m)
		m.Hash = hashMember(m)
		return m
	}}
	routeOps = ops[*controlv1.Route]{(*controlv1.Route).GetPrefix, func(r *controlv1.Route) *controlv1.Route {
		r = proto.CloneOf(r)
		r.Hash = hashRoute(r)
		return r
	}}
)

// applyList returns the list with the upserts in place of what they replace, new ones at the end, and without the removed. It moves digest on by
// the hashes that come and go. A nil entry is one with the empty key: Validate refuses it.
func applyList[E entry](k kind, list, upserts []E, removals []string, o ops[E], digest *uint64) ([]E, error) {
	if len(upserts) == 0 && len(removals) == 0 {
		return list, nil
	}
	var errs []error
	// change is what the patch does to a key: the index of its upsert, or removal.
	const removal = -1
	change := make(map[string]int, len(upserts)+len(removals))
	for i, e := range upserts {
		key := o.key(e)
		if _, ok := change[key]; ok {
			errs = append(errs, fmt.Errorf("upsert of %s %q: the key stands twice in the patch", k, key))
		}
		change[key] = i
	}
	for _, key := range removals {
		if i, ok := change[key]; ok && i != removal {
			errs = append(errs, fmt.Errorf("removal of %s %q: the patch also upserts it", k, key))
		}
		change[key] = removal
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}

	upserts = slices.Clone(upserts)
	for i, e := range upserts {
		if e.GetHash() == 0 {
			upserts[i] = o.seal(e)
		}
		*digest ^= upserts[i].GetHash()
	}
	out := make([]E, 0, len(list)+len(upserts))
	placed := make([]bool, len(upserts))
	for _, e := range list {
		i, ok := change[o.key(e)]
		if !ok {
			out = append(out, e)
			continue
		}
		*digest ^= e.GetHash()
		if i != removal && !placed[i] {
			out = append(out, upserts[i])
			placed[i] = true
		}
	}
	for i, e := range upserts {
		if !placed[i] {
			out = append(out, e)
		}
	}
	return out, nil
}

func applySNAT(have *controlv1.SnatRules, patch *controlv1.StatePatch, digest *uint64) (*controlv1.SnatRules, error) {
	want := patch.GetUpsertSnat()
	switch {
	case want != nil && patch.GetRemoveSnat():
		return nil, errors.New("removal of snat: the patch also upserts it")
	case patch.GetRemoveSnat():
	case want == nil:
		return have, nil
	case want.GetHash() == 0:
		want = proto.CloneOf(want)
		want.Hash = hashSNAT(want)
	}
	*digest ^= have.GetHash() ^ want.GetHash()
	return want, nil
}
