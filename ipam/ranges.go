package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Family is an IP version: 4 or 6.
type Family int

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// FamilyOf is a prefix's family.
func FamilyOf(p netip.Prefix) Family {
	if p.Addr().Is4() {
		return IPv4
	}
	return IPv6
}

// String is "IPv4" or "IPv6".
func (f Family) String() string { return fmt.Sprintf("IPv%d", int(f)) }

// Bounds of pools and pods.
const (
	maxBlockBits    = 16 // a block's prefix is at most so many bits longer than its pool's
	maxPools        = 8  // of a family
	minPods         = 10
	maxPods         = 250
	cloudReserved   = 5 // addresses of a subnet that clouds keep: network, gateway, two for DNS, broadcast
	defaultBlock4   = 24
	defaultBlock6   = 80
	smallestService = 12  // an IPv4 service range is smaller than a /12
	largestService6 = 108 // an IPv6 service range is no larger than a /108
)

// DefaultBlockBits is the prefix length of a pool's blocks where none is given.
func DefaultBlockBits(f Family) int {
	if f == IPv4 {
		return defaultBlock4
	}
	return defaultBlock6
}

// PodRange is a pod CIDR and the prefix length of its blocks.
type PodRange struct {
	CIDR      netip.Prefix `json:"cidr"`
	BlockBits int          `json:"block_bits"`
}

// Ranges are all ranges of a cluster. They are validated as one set.
type Ranges struct {
	Families  []Family       `json:"families,omitempty"`  // in the order in which the other lists have them; empty: those of Pods
	Pods      []PodRange     `json:"pods,omitempty"`      // the first are one per family, in order; more may follow
	Services  []netip.Prefix `json:"services,omitempty"`  // none, or one per family
	DNS       []netip.Addr   `json:"dns,omitempty"`       // the DNS service's addresses: none, or one per service range
	Nodes     []netip.Prefix `json:"nodes,omitempty"`     // the nodes' subnets
	Connected []netip.Prefix `json:"connected,omitempty"` // ranges that are reached from here: peered networks
	Reserved  []netip.Prefix `json:"reserved,omitempty"`  // what pods and services may not touch; nil: DefaultReserved
	MaxPods   int            `json:"max_pods,omitempty"`  // pods of a node; 0: 250
	NodeCount int            `json:"node_count,omitempty"`
}

// DefaultReserved are ranges that clouds and container runtimes use themselves.
func DefaultReserved() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("172.30.0.0/16"),
		netip.MustParsePrefix("172.31.0.0/16"), netip.MustParsePrefix("192.0.2.0/24"),
	}
}

// unusable are addresses that no pod, service or node can have.
var unusable = []struct {
	cidr netip.Prefix
	what string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), `"this network" (RFC 1122)`},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback (RFC 1122)"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local (RFC 3927)"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast (RFC 1112)"},
	{netip.MustParsePrefix("255.255.255.255/32"), "the limited broadcast (RFC 919)"},
	{netip.MustParsePrefix("::/127"), "unspecified and loopback (RFC 4291)"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4-mapped (RFC 4291)"},
	{netip.MustParsePrefix("fe80::/10"), "link-local (RFC 4291)"},
	{netip.MustParsePrefix("ff00::/8"), "multicast (RFC 4291)"},
}

// named is one range with the word for what it is.
type named struct {
	kind string // "pod", "service", "node", "connected"
	cidr netip.Prefix
}

// Validate says everything that is wrong with the ranges (joined), and what is only doubtful. A problem with two ranges names both, and the rule.
func (r *Ranges) Validate() (warnings []string, err error) {
	v := &rangeCheck{r: r}
	families := r.Families
	if len(families) == 0 {
		for _, p := range r.Pods {
			if f := FamilyOf(p.CIDR); !slices.Contains(families, f) {
				families = append(families, f)
			}
		}
	}
	v.families(families)
	v.pods(families)
	v.services(families)
	v.overlaps()
	v.reserved()
	v.nodes()
	return v.warnings, errors.Join(v.problems...)
}

type rangeCheck struct {
	r        *Ranges
	warnings []string
	problems []error
	all      []named // what is well-formed
}

func (v *rangeCheck) addf(format string, args ...any) {
	v.problems = append(v.problems, fmt.Errorf(format, args...))
}

func (v *rangeCheck) warnf(format string, args ...any) {
	v.warnings = append(v.warnings, fmt.Sprintf(format, args...))
}

// add takes a range into the set that is compared, if it is well-formed.
func (v *rangeCheck) add(kind string, p netip.Prefix) bool {
	switch {
	case !p.IsValid():
		v.addf("%s range %s: not a prefix", kind, p)
		return false
	case p.Addr().Is4In6():
		v.addf("%s range %s: an IPv4 address mapped into IPv6: want it as IPv4", kind, p)
		return false
	case p.Masked() != p:
		v.addf("%s range %s: not in canonical form: want %s", kind, p, p.Masked())
		return false
	}
	for _, u := range unusable {
		if kind != "connected" && u.cidr.Overlaps(p) {
			v.addf("%s range %s overlaps %s, %s: no %s can have such an address", kind, p, u.cidr, u.what, kind)
			return false
		}
	}
	v.all = append(v.all, named{kind, p})
	return true
}

func (v *rangeCheck) families(families []Family) {
	ok := len(families) == 1 || len(families) == 2 && families[0] != families[1]
	for _, f := range families {
		ok = ok && (f == IPv4 || f == IPv6)
	}
	if !ok {
		v.addf("families %v: want one of them or both, each once", families)
	}
}

func (v *rangeCheck) pods(families []Family) {
	maxPodsWanted := v.r.MaxPods
	if maxPodsWanted == 0 {
		maxPodsWanted = maxPods
	}
	if maxPodsWanted < minPods || maxPodsWanted > maxPods {
		v.addf("max pods %d: want %d to %d", maxPodsWanted, minPods, maxPods)
	}
	if len(v.r.Pods) < len(families) {
		v.addf("pod ranges: there are %d for the families %v: want at least one per family, in their order", len(v.r.Pods), families)
	}
	count, fits := map[Family]int{}, map[Family]int{}
	for i, p := range v.r.Pods {
		if !v.add("pod", p.CIDR) {
			continue
		}
		f := FamilyOf(p.CIDR)
		if i < len(families) && families[i] != f {
			v.addf("pod range %s is %s, but family number %d is %s: want the lists in the families' order", p.CIDR, f, i+1, families[i])
		}
		if !slices.Contains(families, f) {
			v.addf("pod range %s is %s, which is not among the families %v", p.CIDR, f, families)
		}
		if count[f]++; count[f] == maxPools+1 {
			v.addf("pod ranges: more than %d of %s: want at most so many", maxPools, f)
		}
		bits := p.CIDR.Addr().BitLen()
		if most := min(p.CIDR.Bits()+maxBlockBits, bits); p.BlockBits < p.CIDR.Bits() || p.BlockBits > most {
			v.addf("pod range %s: blocks of /%d: want /%d to /%d", p.CIDR, p.BlockBits, p.CIDR.Bits(), most)
			continue
		}
		// The first address is the subnet's own, the last of IPv4 its broadcast address.
		if host := bits - p.BlockBits; host < 9 && 1<<host-2 < maxPodsWanted {
			v.addf("pod range %s: a block of /%d holds %d pods, but max pods is %d: want larger blocks or fewer pods", p.CIDR, p.BlockBits, max(1<<host-2, 0), maxPodsWanted)
		}
		fits[f] += 1 << (p.BlockBits - p.CIDR.Bits())
	}
	for _, f := range families {
		v.capacity(f, fits[f])
	}
}

// capacity compares how many nodes the pools fit with how many are expected.
func (v *rangeCheck) capacity(f Family, fits int) {
	n := v.r.NodeCount
	switch {
	case fits == 0 || n == 0:
	case n > fits:
		v.addf("the %s pod ranges fit %d nodes, but %d are expected: want a larger range, or several", f, fits, n)
	case n*5 >= fits*4:
		v.warnf("the %s pod ranges fit %d nodes, and %d are expected: little room to grow", f, fits, n)
	}
}

func (v *rangeCheck) services(families []Family) {
	list := v.r.Services
	if len(list) != 0 && len(list) != len(families) {
		v.addf("service ranges: there are %d for the families %v: want none, or one per family, in their order", len(list), families)
	}
	if len(v.r.DNS) != 0 && len(v.r.DNS) != len(list) {
		v.addf("DNS service addresses: there are %d for %d service ranges: want none, or one per range", len(v.r.DNS), len(list))
	}
	for i, p := range list {
		if !v.add("service", p) {
			continue
		}
		f := FamilyOf(p)
		if i < len(families) && families[i] != f {
			v.addf("service range %s is %s, but family number %d is %s: want the lists in the families' order", p, f, i+1, families[i])
		}
		if f == IPv4 && p.Bits() <= smallestService {
			v.addf("service range %s: want it smaller than a /%d", p, smallestService)
		}
		if f == IPv6 && p.Bits() < largestService6 {
			v.addf("service range %s: want it no larger than a /%d", p, largestService6)
		}
		if i >= len(v.r.DNS) {
			continue
		}
		if dns := v.r.DNS[i]; !p.Contains(dns) {
			v.addf("DNS service address %s is not in service range %s: want one of its addresses", dns, p)
		} else if dns == p.Addr() {
			v.addf("DNS service address %s is the first of service range %s: want another", dns, p)
		}
	}
}

// overlaps compares every range with every other one.
func (v *rangeCheck) overlaps() {
	for _, p := range v.r.Nodes {
		v.add("node", p)
	}
	for _, p := range v.r.Connected {
		v.add("connected", p)
	}
	for i, a := range v.all {
		for _, b := range v.all[:i] {
			if !a.cidr.Overlaps(b.cidr) || a.kind == "connected" && b.kind == "connected" {
				continue
			}
			v.addf("%s range %s overlaps %s range %s: pod, service, node and connected ranges must not overlap one another", a.kind, a.cidr, b.kind, b.cidr)
		}
	}
}

func (v *rangeCheck) reserved() {
	reserved := v.r.Reserved
	if reserved == nil {
		reserved = DefaultReserved()
	}
	for _, a := range v.all {
		for _, x := range reserved {
			switch {
			case !x.Overlaps(a.cidr):
			case a.kind == "pod" || a.kind == "service":
				v.addf("%s range %s overlaps reserved range %s: pods and services may not touch it", a.kind, a.cidr, x)
			case a.kind == "node":
				v.warnf("node range %s overlaps reserved range %s, which others may use", a.cidr, x)
			}
		}
	}
}

// nodes says whether the subnets hold the expected nodes.
func (v *rangeCheck) nodes() {
	for _, f := range []Family{IPv4} { // IPv6 subnets do not run out
		holds := 0
		for _, p := range v.r.Nodes {
			if FamilyOf(p) == f {
				holds += max(1<<min(32-p.Bits(), 30)-cloudReserved, 0)
			}
		}
		if holds > 0 && v.r.NodeCount > holds {
			v.addf("the %s node ranges hold %d nodes (clouds keep %d addresses of a subnet), but %d are expected: want larger ones", f, holds, cloudReserved, v.r.NodeCount)
		}
	}
}
