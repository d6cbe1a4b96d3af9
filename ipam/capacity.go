package ipam

import (
	"fmt"
	"net/netip"
)

// warnPercent is the share of a family's blocks from which on its use is worth a warning.
const warnPercent = 80

// Usage is how much of a pool is used, in blocks.
type Usage struct {
	Pool                           *Pool
	Total                          int
	Allocated, Releasing, Cooldown int
}

// Free is how many blocks can be given out.
func (u *Usage) Free() int { return u.Total - u.Allocated - u.Releasing - u.Cooldown }

// String is the usage for people.
func (u *Usage) String() string {
	s := fmt.Sprintf("pool %s fits %s, %d used", u.Pool.CIDR, nodes(u.Total), u.Allocated+u.Releasing)
	if u.Cooldown > 0 {
		s += fmt.Sprintf(", %d cooling down", u.Cooldown)
	}
	return s
}

func nodes(n int) string {
	if n == 1 {
		return "1 node"
	}
	return fmt.Sprintf("%d nodes", n)
}

// Usage is the use of every pool, by their order.
func (t *Table) Usage() []Usage {
	out := make([]Usage, len(t.pools))
	for i, p := range t.pools {
		out[i] = Usage{Pool: p, Total: p.Blocks()}
		for _, b := range t.inPool[p.CIDR] {
			switch b.State {
			case Allocated:
				out[i].Allocated++
			case Releasing:
				out[i].Releasing++
			case Cooldown:
				out[i].Cooldown++
			}
		}
	}
	return out
}

// Families are those that there are pools of, IPv4 first.
func (t *Table) Families() (out []Family) {
	for _, f := range []Family{IPv4, IPv6} {
		for _, p := range t.pools {
			if FamilyOf(p.CIDR) == f {
				out = append(out, f)
				break
			}
		}
	}
	return out
}

// Warnings are sentences for operators about pools that run out.
func (t *Table) Warnings() (out []string) {
	for _, f := range t.Families() {
		used, total := t.used(f)
		switch {
		case used == total:
			out = append(out, fmt.Sprintf("%s: all %d blocks are in use, so no node can join: %s", f, total, t.addPool(f)))
		case used*100 >= total*warnPercent:
			out = append(out, fmt.Sprintf("%s: %d of %d blocks are in use (%d %%): %s", f, used, total, used*100/total, t.addPool(f)))
		}
	}
	return out
}

func (t *Table) used(f Family) (used, total int) {
	for _, u := range t.Usage() {
		if FamilyOf(u.Pool.CIDR) == f {
			used, total = used+u.Total-u.Free(), total+u.Total
		}
	}
	return used, total
}

// addPool is the command that helps a family that runs out.
func (t *Table) addPool(f Family) string {
	bits := DefaultBlockBits(f)
	for _, p := range t.pools {
		if FamilyOf(p.CIDR) == f {
			bits = p.BlockBits
		}
	}
	return fmt.Sprintf("add a pool: overplane pools add CIDR --block %d", bits)
}

// ExhaustedError says that no pool of a family has a block left.
type ExhaustedError struct {
	Family Family
	Node   string
	text   string
}

// Error implements error.
func (e *ExhaustedError) Error() string { return e.text }

func (t *Table) exhausted(f Family, node string) error {
	e := &ExhaustedError{Family: f, Node: node, text: fmt.Sprintf("there is no %s block left for node %s", f, node)}
	for _, u := range t.Usage() {
		if FamilyOf(u.Pool.CIDR) == f {
			e.text += "; " + u.String()
		}
	}
	e.text += "; " + t.addPool(f)
	return e
}

// pick finds the block that a node gets of a family: its own of earlier, else one that was never used, else the one that is free longest. before is its
// record, nil if it has none.
func (t *Table) pick(f Family, node string) (p *Pool, block netip.Prefix, before *Block) {
	for _, b := range t.Owned(node) {
		if FamilyOf(b.CIDR) == f && !b.Held() {
			if p := t.Pool(b.Pool); p != nil && (before == nil || b.State == Cooldown) {
				before = b
			}
		}
	}
	if before != nil {
		return t.Pool(before.Pool), before.CIDR, before
	}
	for _, p := range t.pools {
		if FamilyOf(p.CIDR) != f {
			continue
		}
		known := t.inPool[p.CIDR]
		if len(known) < p.Blocks() {
			for i := range p.Blocks() {
				if known[i] == nil {
					return p, p.Block(i), nil
				}
			}
		}
		for _, b := range known {
			if b.State == Free && (before == nil || b.Revision < before.Revision || b.Revision == before.Revision && comparePrefixes(b.CIDR, before.CIDR) < 0) {
				before = b
			}
		}
		if before != nil {
			return p, before.CIDR, before
		}
	}
	return nil, netip.Prefix{}, nil
}
