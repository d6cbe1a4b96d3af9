package agent

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"
)

// followUplink keeps the agent up to date with the kernel. It returns when ctx ends.
func (a *Agent) followUplink(ctx context.Context) {
	for ctx.Err() == nil {
		err := a.plat.WatchUplink(ctx, a.cfg.Uplink, func(f Facts) {
			_ = a.do(ctx, func() { a.uplinkChanged(f) })
		})
		if ctx.Err() != nil {
			return
		}
		a.log.Error("the uplink cannot be watched", "interface", a.cfg.Uplink, "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// uplinkChanged takes over new facts about the uplink.
func (a *Agent) uplinkChanged(f Facts) {
	old := a.facts
	if f.Gone {
		if !old.Gone {
			a.log.Error("the uplink is gone", "interface", a.cfg.Uplink)
			a.facts.Gone, a.facts.Up = true, false
			a.publish()
		}
		return
	}
	a.facts = f
	if f.Up != old.Up {
		if f.Up {
			a.log.Info("the uplink is up", "interface", f.Name)
		} else {
			a.log.Error("the uplink is down", "interface", f.Name)
		}
	}
	if f.MAC != old.MAC {
		a.log.Warn("the uplink's Ethernet address changed; other nodes reach this one once their desired state says so",
			"interface", f.Name, "old", formatMAC(old.MAC), "new", formatMAC(f.MAC))
	}
	if f.GatewayMAC4 != old.GatewayMAC4 || f.GatewayMAC6 != old.GatewayMAC6 || f.Gateway4 != old.Gateway4 || f.Gateway6 != old.Gateway6 {
		a.log.Info("gateways", "ipv4", f.Gateway4, "mac4", formatMAC(f.GatewayMAC4), "ipv6", f.Gateway6, "mac6", formatMAC(f.GatewayMAC6))
	}
	switch {
	case f.Index != old.Index:
		a.restart(fmt.Sprintf("uplink %s was replaced by another interface of that name", f.Name))
		return
	case a.uplink.Port != nil && f.MTU > a.openMTU:
		a.restart(fmt.Sprintf("the MTU of uplink %s grew from %d to %d", f.Name, a.openMTU, f.MTU))
		return
	case a.uplink.Port != nil && f.Queues != old.Queues && strings.HasPrefix(a.uplink.Rung, ModeXDP):
		a.restart(fmt.Sprintf("uplink %s has %d receive queues now, not %d", f.Name, f.Queues, old.Queues)) // a socket is bound to each
		return
	case f.MTU != old.MTU:
		a.log.Info("the uplink's MTU changed", "interface", f.Name, "old", old.MTU, "new", f.MTU)
	}
	if a.uplink.Port == nil && f.Up {
		a.openUplink() // publishes
	}
	a.sync.tell(a.syncFacts())
	if a.uplink.Port == nil || !f.equal(old) {
		a.publish()
	}
	a.updatePodMTUs()
}

// restart asks for a new life of the data plane.
func (a *Agent) restart(why string) {
	a.uplinkProblem = "the data plane starts again: " + why
	select {
	case a.again <- why:
	default: // asked already
	}
}

// openUplink opens the uplink that could not be opened before.
func (a *Agent) openUplink() {
	grant, err := a.plat.OpenUplink(a.facts, a.steering, a.pools)
	if err != nil {
		problem := fmt.Sprintf("uplink %s cannot be opened: %v", a.facts.Name, err)
		if problem != a.uplinkProblem {
			a.log.Error("the uplink cannot be opened", "interface", a.facts.Name, "error", err)
		}
		a.uplinkProblem = problem
		return
	}
	a.uplink, a.uplinkProblem, a.openMTU = grant, "", a.facts.MTU
	a.log.Info("uplink opened", "interface", a.facts.Name, "rung", grant.Rung, "queues", grant.Port.NumQueues())
	a.publish()
	a.updatePodMTUs()
}

// updatePodMTUs gives every pod's device the MTU of now.
func (a *Agent) updatePodMTUs() {
	_, mtu := a.mtus()
	for _, p := range a.pods {
		if p.dev.MTU == mtu || p.port == nil {
			continue
		}
		p.dev.MTU = mtu
		if err := a.plat.SetPodMTU(p.dev); err != nil {
			a.log.Error("a pod's MTU cannot be changed", "pod", p.rec.Name, "mtu", mtu, "error", err)
		}
	}
}

func (f Facts) equal(o Facts) bool {
	same := slices.Equal(f.Addresses, o.Addresses)
	f.Addresses, o.Addresses = nil, nil
	return same && reflect.DeepEqual(f, o)
}
