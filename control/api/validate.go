package api

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// maxProblems is how many problems Validate spells out; the others it counts.
const maxProblems = 100

// Validate returns everything that is wrong with a desired state, joined (errors.Join), or nil. Each problem names the entry, the field, its
// value and what is allowed; where two entries contradict each other, both and the rule. s is not changed.
//
// A state without hashes, digest and entry count passes: see [Complete]. Whether it is for the right node, and newer than the last one, is
// for the reader to say.
//
// The rules for prefixes, which keep one meaning to every address:
//   - Every pool, block and route is written in canonical form, and no key stands twice.
//   - Pools do not overlap each other, nor addresses that no pod can have (loopback, link-local, multicast).
//   - No member's address is inside a pool.
//   - An own block is one whole block of a pool, and the only one of that pool.
//   - No route is inside an own block, or a member's own address.
//   - Inside a pool, a route to a node is one whole block or part of one, since a node owns one block of a pool; no route to the host is there.
//   - Outside the pools, routes are free: the longest match decides, but a pool is never reached by a shorter route than itself.
func Validate(s *controlv1.NodeState) error {
	v := &validator{state: s}
	if s == nil {
		return errors.New("there is no state")
	}
	if err := ValidateNodeName(s.GetNode()); err != nil {
		v.addf("node: %w", err)
	}
	v.version()
	v.pools()
	v.ownBlocks()
	v.members()
	v.routes()
	v.snat()
	v.hashes()
	return v.err()
}

// ValidateNodeName says what is wrong with a node's name, or nil: it is a lower-case DNS name, as in Kubernetes (RFC 1123 section 2.1).
func ValidateNodeName(name string) error {
	if name == "" {
		return errors.New("the name is empty")
	}
	ok := len(name) <= MaxNameLength
	for label := range strings.SplitSeq(name, ".") {
		ok = ok && len(label) > 0 && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-' &&
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
	}
	if !ok {
		return fmt.Errorf("name %q: want labels of lower-case letters, digits and '-' (not first or last; at most 63 each), joined by '.', at most %d bytes",
			name, MaxNameLength)
	}
	return nil
}

// validator collects problems, and what the later checks need from the earlier ones.
type validator struct {
	state    *controlv1.NodeState
	problems []error
	more     int // problems beyond maxProblems

	pool      []poolRange         // pools that parsed
	own       []netip.Prefix      // own blocks that parsed
	names     map[string]struct{} // members
	addresses map[netip.Addr]string
}

// poolRange is a pool in the types that rules are checked with.
type poolRange struct {
	cidr  netip.Prefix
	block int // prefix length of a block; the pool's own if the given one was wrong
}

func (v *validator) addf(format string, args ...any) {
	if len(v.problems) == maxProblems {
		v.more++
		return
	}
	v.problems = append(v.problems, fmt.Errorf(format, args...))
}

func (v *validator) err() error {
	if v.more > 0 {
		v.problems = append(v.problems, fmt.Errorf("and %d more problems", v.more))
	}
	return errors.Join(v.problems...)
}

// label names an entry in problems: by its key, or by its place if the key is empty.
type label struct {
	kind kind
	key  string
	i    int
}

// String implements fmt.Stringer.
func (l label) String() string {
	if l.key == "" {
		return fmt.Sprintf("%s number %d", l.kind, l.i+1)
	}
	return fmt.Sprintf("%s %q", l.kind, l.key)
}

func (v *validator) version() {
	inc := v.state.GetVersion().GetIncarnation()
	ok := len(inc) <= MaxIncarnationLength
	for i := range len(inc) {
		ok = ok && inc[i] > ' ' && inc[i] < 0x7f
	}
	if !ok {
		v.addf("version: incarnation %q: want at most %d visible ASCII characters, e.g. a UUID", inc, MaxIncarnationLength)
	}
}

// parsePrefix reads a prefix in canonical form.
func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case s == "":
		return p, errors.New(`it is empty: want a prefix, e.g. "10.244.0.0/16"`)
	case err != nil:
		return p, errors.New(`not a prefix: want an address and a length, e.g. "10.244.0.0/16"`)
	case p.Addr().Is4In6():
		return netip.Prefix{}, errors.New("an IPv4 address mapped into IPv6: want it as IPv4")
	case p.Masked().String() != s:
		return netip.Prefix{}, fmt.Errorf("not in canonical form: want %q", p.Masked())
	}
	return p, nil
}

// parseAddress reads a node's address in canonical form. family is 4 or 6.
func parseAddress(s string, family int) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil || a.Is4() != (family == 4) || a.Zone() != "" || a.Is4In6():
		return netip.Addr{}, fmt.Errorf("want an IPv%d address without zone", family)
	case a.String() != s:
		return netip.Addr{}, fmt.Errorf("not in canonical form: want %q", a)
	case a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a == limitedBroadcast:
		return netip.Addr{}, errors.New("want a unicast address that other nodes can reach: not unspecified, loopback, link-local, multicast or broadcast")
	}
	return a, nil
}

var limitedBroadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255}) // RFC 919 section 7

// checkMAC says what is wrong with a station's Ethernet address, or nil.
func checkMAC(s string) error {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 || hw.String() != s {
		return errors.New(`want six bytes in lower-case hexadecimal, e.g. "02:00:0a:f0:00:0b"`)
	}
	if hw[0]&1 != 0 || [6]byte(hw) == [6]byte{} {
		return errors.New("want the unicast address of a station (lowest bit of the first byte 0, not all zero)")
	}
	return nil
}

func (v *validator) members() {
	list := v.state.GetMembers()
	if len(list) > MaxMembers {
		v.addf("members: there are %d: want at most %d", len(list), MaxMembers)
		list = list[:MaxMembers]
	}
	v.names = make(map[string]struct{}, len(list))
	v.addresses = make(map[netip.Addr]string, 2*len(list))
	macs := make(map[string]string, len(list))
	for i, m := range list {
		name := m.GetName()
		who := label{kindMember, name, i}
		if err := ValidateNodeName(name); err != nil {
			v.addf("%s: %w", who, err)
		}
		if _, twice := v.names[name]; twice && name != "" {
			v.addf("%s: there are two members of this name: want each name once", who)
		}
		v.names[name] = struct{}{}

		if m.GetIpv4() == "" && m.GetIpv6() == "" {
			v.addf("%s: ipv4 and ipv6 are both empty: want at least one address", who)
		}
		v.memberAddress(who, name, "ipv4", m.GetIpv4(), 4)
		v.memberAddress(who, name, "ipv6", m.GetIpv6(), 6)
		if mac := m.GetMac(); mac != "" {
			if err := checkMAC(mac); err != nil {
				v.addf("%s: mac %q: %w", who, mac, err)
			} else if other, twice := macs[mac]; twice {
				v.addf("%s: mac %q is member %q's as well: want a different one for each node", who, mac, other)
			} else {
				macs[mac] = name
			}
		}
	}
	if _, ok := v.names[v.state.GetNode()]; !ok && len(list) > 0 {
		v.addf("members: this node, %q, is not among them: want every node of the cluster, this one included", v.state.GetNode())
	}
}

func (v *validator) memberAddress(who label, name, field, text string, family int) {
	if text == "" {
		return
	}
	a, err := parseAddress(text, family)
	if err != nil {
		v.addf("%s: %s %q: %w", who, field, text, err)
		return
	}
	if other, twice := v.addresses[a]; twice {
		v.addf("%s: %s %q is member %q's as well: want a different one for each node", who, field, text, other)
	}
	v.addresses[a] = name
	for _, p := range v.pool {
		if p.cidr.Contains(a) {
			v.addf("%s: %s %q is inside pool %q: node addresses and pod ranges must not overlap", who, field, text, p.cidr)
		}
	}
}

func (v *validator) snat() {
	s := v.state.GetSnat()
	if s == nil {
		return
	}
	cidrs := s.GetNoMasqueradeCidrs()
	if len(cidrs) > MaxNoMasqueradeCIDRs {
		v.addf("snat: no_masquerade_cidrs: there are %d: want at most %d", len(cidrs), MaxNoMasqueradeCIDRs)
		cidrs = cidrs[:MaxNoMasqueradeCIDRs]
	}
	seen := make(map[string]struct{}, len(cidrs))
	for _, c := range cidrs {
		if _, err := parsePrefix(c); err != nil {
			v.addf("snat: no_masquerade_cidrs %q: %w", c, err)
		} else if _, twice := seen[c]; twice {
			v.addf("snat: no_masquerade_cidrs %q stands twice: want each once", c)
		}
		seen[c] = struct{}{}
	}
	known := func(field string, value int32, names map[int32]string) {
		if _, ok := names[value]; !ok {
			v.addf("snat: %s %d: unknown: want 0 (the default) to %d", field, value, len(names)-1)
		}
	}
	known("mapping", int32(s.GetMapping()), controlv1.SnatMapping_name)
	known("port_choice", int32(s.GetPortChoice()), controlv1.SnatPortChoice_name)
	known("filtering", int32(s.GetFiltering()), controlv1.SnatFiltering_name)
	first, last := s.GetFirstPort(), s.GetLastPort()
	if (first != 0 || last != 0) && (first < 1024 || last > 65535 || first > last) {
		v.addf("snat: first_port %d, last_port %d: want 1024 <= first_port <= last_port <= 65535, or both 0 for the default", first, last)
	}
}

// hashes checks what only fits as a whole: that a sealed state is complete and is what its sender had.
func (v *validator) hashes() {
	s := v.state
	if !Sealed(s) {
		return
	}
	missing := 0
	for i, e := range s.GetPools() {
		missing += v.hash(kindPool, e.GetCidr(), i, e.GetHash())
	}
	for i, e := range s.GetOwnBlocks() {
		missing += v.hash(kindOwnBlock, e.GetCidr(), i, e.GetHash())
	}
	for i, e := range s.GetMembers() {
		missing += v.hash(kindMember, e.GetName(), i, e.GetHash())
	}
	for i, e := range s.GetRoutes() {
		missing += v.hash(kindRoute, e.GetPrefix(), i, e.GetHash())
	}
	if s.GetSnat() != nil && s.GetSnat().GetHash() == 0 {
		v.addf("snat: hash 0: %s", hashRule)
		missing++
	}
	if missing > 0 {
		return // the digest cannot fit
	}
	if digest, entries := Digest(s); digest != s.GetDigest() || entries != s.GetEntryCount() {
		v.addf("digest and entry_count are not those of the entries: %w",
			&DigestMismatchError{Digest: digest, WantDigest: s.GetDigest(), Entries: entries, WantEntries: s.GetEntryCount()})
	}
}

const hashRule = "want one in every entry, or neither hash nor digest nor entry_count anywhere"

func (v *validator) hash(k kind, key string, i int, hash uint64) int {
	if hash != 0 {
		return 0
	}
	v.addf("%s: hash 0: %s", label{k, key, i}, hashRule)
	return 1
}
