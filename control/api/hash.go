package api

import (
	"crypto/sha256"
	"encoding/binary"
	"strconv"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// kind is which list of a state an entry is from; errors and hashes name it so.
type kind string

const (
	kindPool     kind = "pool"
	kindOwnBlock kind = "own_block"
	kindMember   kind = "member"
	kindRoute    kind = "route"
	kindSNAT     kind = "snat"
)

// entry is what all entries have.
type entry interface {
	comparable
	GetHash() uint64
}

// Seal computes the hash of every entry, the digest and the entry count of s, in place, whatever they were. For whoever makes states.
func Seal(s *controlv1.NodeState) {
	for _, p := range s.GetPools() {
		p.Hash = hashPool(p)
	}
	for _, b := range s.GetOwnBlocks() {
		b.Hash = hashOwnBlock(b)
	}
	for _, m := range s.GetMembers() {
		m.Hash = hashMember(m)
	}
	for _, r := range s.GetRoutes() {
		r.Hash = hashRoute(r)
	}
	if s.GetSnat() != nil {
		s.Snat.Hash = hashSNAT(s.Snat)
	}
	s.Digest, s.EntryCount = Digest(s)
}

// Sealed reports whether s carries hashes, a digest or an entry count. A state without entries counts as not sealed.
func Sealed(s *controlv1.NodeState) bool {
	if s.GetDigest() != 0 || s.GetEntryCount() != 0 {
		return true
	}
	return hashed(s.GetPools()) > 0 || hashed(s.GetOwnBlocks()) > 0 || hashed(s.GetMembers()) > 0 || hashed(s.GetRoutes()) > 0 ||
		s.GetSnat().GetHash() != 0
}

// Complete seals a state that came without hashes, digest and entry count, as a hand-written one may, and leaves any other as it is. For
// whoever receives states.
func Complete(s *controlv1.NodeState) {
	if !Sealed(s) {
		Seal(s)
	}
}

// StripHashes clears hashes, digest and entry count, in place, so that s may be edited by hand and completed again.
func StripHashes(s *controlv1.NodeState) {
	for _, p := range s.GetPools() {
		p.Hash = 0
	}
	for _, b := range s.GetOwnBlocks() {
		b.Hash = 0
	}
	for _, m := range s.GetMembers() {
		m.Hash = 0
	}
	for _, r := range s.GetRoutes() {
		r.Hash = 0
	}
	if s.GetSnat() != nil {
		s.Snat.Hash = 0
	}
	s.Digest, s.EntryCount = 0, 0
}

// Digest is the XOR of the hashes that the entries of s carry, and the number of entries. It does not depend on their order.
func Digest(s *controlv1.NodeState) (digest uint64, entries uint32) {
	digest = xor(s.GetPools()) ^ xor(s.GetOwnBlocks()) ^ xor(s.GetMembers()) ^ xor(s.GetRoutes()) ^ s.GetSnat().GetHash()
	entries = uint32(len(s.GetPools()) + len(s.GetOwnBlocks()) + len(s.GetMembers()) + len(s.GetRoutes()))
	if s.GetSnat() != nil {
		entries++
	}
	return digest, entries
}

func xor[E entry](list []E) (x uint64) {
	for _, e := range list {
		x ^= e.GetHash()
	}
	return x
}

// hashed is how many of the entries carry a hash.
func hashed[E entry](list []E) (n int) {
	for _, e := range list {
		if e.GetHash() != 0 {
			n++
		}
	}
	return n
}

func hashPool(p *controlv1.Pool) uint64 {
	return newHasher(kindPool).text(p.GetCidr()).number(int64(p.GetBlockPrefixLength())).sum()
}

func hashOwnBlock(b *controlv1.OwnBlock) uint64 {
	return newHasher(kindOwnBlock).text(b.GetCidr()).sum()
}

func hashMember(m *controlv1.Member) uint64 {
	return newHasher(kindMember).text(m.GetName()).text(m.GetIpv4()).text(m.GetIpv6()).text(m.GetMac()).sum()
}

func hashRoute(r *controlv1.Route) uint64 {
	h := newHasher(kindRoute).text(r.GetPrefix())
	switch t := r.GetTarget().(type) {
	case *controlv1.Route_Node:
		h.text("node").text(t.Node)
	case *controlv1.Route_Host:
		h.text("host").truth(t.Host)
	case *controlv1.Route_Unreachable:
		h.text("unreachable").truth(t.Unreachable)
	default:
		h.text("")
	}
	return h.sum()
}

func hashSNAT(s *controlv1.SnatRules) uint64 {
	h := newHasher(kindSNAT).truth(s.GetDisabled()).number(int64(len(s.GetNoMasqueradeCidrs())))
	for _, c := range s.GetNoMasqueradeCidrs() {
		h.text(c)
	}
	return h.truth(s.GetTranslateNodes()).number(int64(s.GetMapping())).number(int64(s.GetPortChoice())).number(int64(s.GetFiltering())).
		number(int64(s.GetFirstPort())).number(int64(s.GetLastPort())).sum()
}

// hasher collects what an entry's hash is made of.
type hasher struct{ buf []byte }

func newHasher(k kind) *hasher {
	h := &hasher{buf: make([]byte, 0, 128)}
	return h.text(string(k))
}

func (h *hasher) text(s string) *hasher {
	h.buf = strconv.AppendInt(h.buf, int64(len(s)), 10)
	h.buf = append(h.buf, ':')
	h.buf = append(h.buf, s...)
	h.buf = append(h.buf, ',')
	return h
}

func (h *hasher) number(n int64) *hasher { return h.text(strconv.FormatInt(n, 10)) }

func (h *hasher) truth(b bool) *hasher {
	if b {
		return h.number(1)
	}
	return h.number(0)
}

func (h *hasher) sum() uint64 {
	sum := sha256.Sum256(h.buf)
	if v := binary.BigEndian.Uint64(sum[:]); v != 0 {
		return v
	}
	return 1
}
