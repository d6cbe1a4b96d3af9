package agent

import (
	"errors"
	"math"
	"net/netip"
	"slices"

	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/packet"
)

// slotTable gives out the pods' slots in the snapshot's ports, lowest first so that the table stays short. A slot comes back only
// after every worker has passed a snapshot in which it was empty; Agent.retire sees to that.
type slotTable struct {
	used []bool // by slot - FirstPodSlot
}

var errNoSlot = errors.New("all port slots are in use")

func (t *slotTable) take() (int, error) {
	for i, used := range t.used {
		if !used {
			t.used[i] = true
			return i + dataplane.FirstPodSlot, nil
		}
	}
	if len(t.used)+dataplane.FirstPodSlot > math.MaxUint16 { // a slot is 16 bits of an adjacency
		return 0, errNoSlot
	}
	t.used = append(t.used, true)
	return len(t.used) - 1 + dataplane.FirstPodSlot, nil
}

func (t *slotTable) free(slot int) { t.used[slot-dataplane.FirstPodSlot] = false }

func (p SteeringPlan) equal(o SteeringPlan) bool {
	return p.UplinkMAC == o.UplinkMAC && slices.Equal(p.PodCIDRs, o.PodCIDRs) && slices.Equal(p.Members, o.Members) && slices.Equal(p.GatewayMACs, o.GatewayMACs) &&
		p.OutsideSeesPods == o.OutsideSeesPods && p.Node4 == o.Node4 && p.Node6 == o.Node6 && p.FirstPort == o.FirstPort && p.LastPort == o.LastPort &&
		slices.Equal(p.HostTCP, o.HostTCP) && slices.Equal(p.HostUDP, o.HostUDP)
}

// union is the plan that admits what either admits; for the time in which the workers move from one to the other.
func union(from, to SteeringPlan) SteeringPlan {
	out := SteeringPlan{UplinkMAC: to.UplinkMAC, Node4: to.Node4, Node6: to.Node6, FirstPort: to.FirstPort, LastPort: to.LastPort, HostTCP: to.HostTCP, HostUDP: to.HostUDP,
		OutsideSeesPods: from.OutsideSeesPods || to.OutsideSeesPods}
	out.PodCIDRs = append(slices.Clone(to.PodCIDRs), from.PodCIDRs...)
	slices.SortFunc(out.PodCIDRs, netip.Prefix.Compare)
	out.PodCIDRs = slices.Compact(out.PodCIDRs)
	out.Members = distinctMACs(slices.Concat(to.Members, from.Members)...)
	out.GatewayMACs = distinctMACs(slices.Concat(to.GatewayMACs, from.GatewayMACs)...)
	if len(out.PodCIDRs) == len(to.PodCIDRs) && len(out.Members) == len(to.Members) && len(out.GatewayMACs) == len(to.GatewayMACs) && out.OutsideSeesPods == to.OutsideSeesPods {
		return to // nothing goes: one step is enough
	}
	return out
}

// distinctMACs sorts, and leaves out repetitions and the zero address.
func distinctMACs(macs ...packet.MAC) []packet.MAC {
	out := slices.DeleteFunc(slices.Clone(macs), func(m packet.MAC) bool { return m == packet.MAC{} })
	slices.SortFunc(out, func(a, b packet.MAC) int { return slices.Compare(a[:], b[:]) })
	return slices.Compact(out)
}
