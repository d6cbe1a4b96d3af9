package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/snat"
)

// desired is a node's desired state in the types the builder works with, parsed once when it arrives.
type desired struct {
	raw     *controlv1.NodeState
	pools   []pool
	own     []netip.Prefix
	members []member
	routes  []route
	noSNAT  bool
	rules   *snat.Rules

	rulesConfig snat.RulesConfig // what rules were made of
	snat        snatSettings
}

type pool struct {
	cidr netip.Prefix
	bits int // prefix length of a block
}

type member struct {
	name         string
	addr4, addr6 netip.Addr // invalid: none
	mac          packet.MAC // zero: not reported
}

// routeTarget is what a route of the desired state leads to.
type routeTarget uint8

const (
	toMember routeTarget = iota
	toHost
	toNowhere
)

type route struct {
	prefix netip.Prefix
	target routeTarget
	member int // index into members, for toMember
}

// parseDesired converts a state that api.Validate has passed. What Validate leaves open is an error here.
func parseDesired(s *controlv1.NodeState) (*desired, error) {
	d := &desired{raw: s, noSNAT: s.GetSnat().GetDisabled()}
	var errs []error
	prefix := func(what, text string) netip.Prefix {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %q: %w", what, text, err))
		}
		return p
	}
	addr := func(what, text string) netip.Addr {
		if text == "" {
			return netip.Addr{}
		}
		a, err := netip.ParseAddr(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: address %q: %w", what, text, err))
		}
		return a
	}
	for _, p := range s.GetPools() {
		d.pools = append(d.pools, pool{cidr: prefix("pool", p.GetCidr()), bits: int(p.GetBlockPrefixLength())})
	}
	for _, b := range s.GetOwnBlocks() {
		d.own = append(d.own, prefix("own block", b.GetCidr()))
	}
	index := make(map[string]int, len(s.GetMembers()))
	d.members = make([]member, 0, len(s.GetMembers()))
	for _, m := range s.GetMembers() {
		out := member{name: m.GetName()}
		out.addr4 = addr("member "+m.GetName(), m.GetIpv4())
		out.addr6 = addr("member "+m.GetName(), m.GetIpv6())
		if m.GetMac() != "" {
			mac, err := parseMAC(m.GetMac())
			if err != nil {
				errs = append(errs, fmt.Errorf("member %s: %w", m.GetName(), err))
			}
			out.mac = mac
		}
		index[out.name] = len(d.members)
		d.members = append(d.members, out)
	}
	d.routes = make([]route, 0, len(s.GetRoutes()))
	for _, r := range s.GetRoutes() {
		out := route{prefix: prefix("route", r.GetPrefix())}
		switch {
		case r.GetHost():
			out.target = toHost
		case r.GetUnreachable():
			out.target = toNowhere
		default:
			i, ok := index[r.GetNode()]
			if !ok {
				errs = append(errs, fmt.Errorf("route %s leads to node %q, which is no member", r.GetPrefix(), r.GetNode()))
				continue
			}
			out.member = i
		}
		d.routes = append(d.routes, out)
	}
	if err := d.parseRules(s.GetSnat()); err != nil {
		errs = append(errs, err)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return d, nil
}

// podCIDRs are the pools' ranges.
func (d *desired) podCIDRs() []netip.Prefix {
	if d == nil {
		return nil
	}
	out := make([]netip.Prefix, 0, len(d.pools))
	for _, p := range d.pools {
		out = append(out, p.cidr)
	}
	return out
}

// checkPodAddresses says why a pod may not have the addresses, or nil. Valid ones lie in an own block, are not the block's first
// address (the subnet's own, RFC 4291 section 2.6.1 and RFC 1812 section 4.2.3.1), nor an IPv4 block's last (its directed broadcast), and have the same
// index within their blocks: the data plane finds both families' pod by one small number.
func (d *desired) checkPodAddresses(a4, a6 netip.Addr) error {
	index4, index6 := uint64(0), uint64(0)
	if !a4.IsValid() && !a6.IsValid() {
		return errors.New("a pod needs an IPv4 or an IPv6 address")
	}
	var err error
	if a4.IsValid() {
		if index4, err = d.indexInBlock(a4); err != nil {
			return err
		}
	}
	if a6.IsValid() {
		if index6, err = d.indexInBlock(a6); err != nil {
			return err
		}
	}
	if a4.IsValid() && a6.IsValid() && index4 != index6 {
		return fmt.Errorf("%s is address %d of its block and %s address %d: both must have the same index", a4, index4, a6, index6)
	}
	return nil
}

// indexInBlock is the address's number within the own block that contains it.
func (d *desired) indexInBlock(a netip.Addr) (uint64, error) {
	if d == nil || len(d.own) == 0 {
		return 0, fmt.Errorf("address %s: this node owns no block yet", a)
	}
	for _, block := range d.own {
		if !block.Contains(a) {
			continue
		}
		i, ok := hostIndex(a, block.Bits())
		switch {
		case !ok:
			return 0, fmt.Errorf("address %s: its index within block %s does not fit 32 bits", a, block)
		case i == 0 && block.Bits() < a.BitLen():
			return 0, fmt.Errorf("address %s: the first address of block %s is the subnet's own", a, block)
		case a.Is4() && block.Bits() < 31 && i == uint64(1)<<(32-block.Bits())-1:
			return 0, fmt.Errorf("address %s: the last address of block %s is its broadcast address", a, block)
		}
		return i, nil
	}
	return 0, fmt.Errorf("address %s is in none of this node's blocks %v", a, d.own)
}

// hostIndex is the value of the address's bits behind a prefix of the given length, if it fits 32 bits.
func hostIndex(a netip.Addr, bits int) (uint64, bool) {
	b := a.AsSlice()
	var v uint64
	for i, x := range b {
		for bit := range 8 {
			pos := i*8 + bit
			if pos < bits {
				continue
			}
			if v>>31 != 0 {
				return 0, false
			}
			v = v<<1 | uint64(x>>(7-bit)&1)
		}
	}
	return v, true
}

func parseMAC(s string) (packet.MAC, error) {
	hw, err := net.ParseMAC(s)
	if err != nil || len(hw) != 6 {
		return packet.MAC{}, fmt.Errorf("%q is no 48-bit Ethernet address", s)
	}
	return packet.MAC(hw), nil
}

func formatMAC(m packet.MAC) string {
	if m == (packet.MAC{}) {
		return ""
	}
	return net.HardwareAddr(m[:]).String()
}
