package agent

import (
	"context"
	"time"

	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/snat"
)

const (
	// saturationPause is how often destinations are looked for that pods' ports run short towards.
	saturationPause = 10 * time.Second
	// saturationForgotten is how long a destination must have had ports enough to be worth another warning.
	saturationForgotten = 10 * time.Minute
)

// saturation is what was warned of.
type saturation struct {
	count  uint64 // the translators' sum when it was last looked at
	at     time.Time
	busy   bool
	warned map[snat.Destination]time.Time // counts left out; when it was last seen
}

// due returns those destinations that were not warned of, and keeps in mind that all were seen at now.
func (s *saturation) due(found []snat.Destination, now time.Time) (out []snat.Destination) {
	if s.warned == nil {
		s.warned = map[snat.Destination]time.Time{}
	}
	for k, at := range s.warned {
		if now.Sub(at) > saturationForgotten {
			delete(s.warned, k)
		}
	}
	for _, d := range found {
		k := d
		k.Ports, k.Limit = 0, 0
		if _, known := s.warned[k]; !known {
			out = append(out, d)
		}
		s.warned[k] = now
	}
	return out
}

// watchSaturation warns, once each, of destinations towards which a pod has most of its ports in use: connections are refused soon. Sessions are listed only if a translator says that it has to
// search for ports, and not on the agent's goroutine.
func (a *Agent) watchSaturation(ctx context.Context, now time.Time) {
	s, t := &a.saturation, a.translation
	if t == nil || s.busy || now.Sub(s.at) < saturationPause {
		return
	}
	s.at = now
	workers, names := len(a.pools), map[int]string{}
	for _, p := range a.pods {
		names[p.slot-dataplane.FirstPodSlot] = p.rec.Name
	}
	last := s.count
	s.busy = true
	go func() {
		count := uint64(0)
		var found []snat.Destination
		for w := range workers {
			if a.dp.Ask(ctx, w, func(t *snat.Translator, _ *dataplane.WorkerStats) { count += t.Counts().Saturated }) != nil {
				count = last
				break
			}
		}
		if count != last {
			var list []snat.Session
			if a.eachSession(ctx, workers, func(_ int, x *snat.Session) bool { list = append(list, *x); return true }) == nil {
				found = snat.Saturation(list, t.alloc, saturatedShare)
			}
		}
		_ = a.do(ctx, func() {
			s.busy, s.count = false, count
			for _, d := range s.due(found, now) {
				a.log.Warn("a pod has most of its ports towards a destination in use; more connections to it will be refused", "pod", names[d.Pod], "protocol", protocolName(d.Proto),
					"destination", endpoint(d.Remote, d.Port), "ports", d.Ports, "limit", d.Limit)
			}
		})
	}()
}

// onFlows tells steering which flows of protocols without translated ports began or ended. A worker calls it.
func (a *Agent) onFlows(events []snat.FlowEvent, lost bool) {
	if lost {
		a.flowsLost.Store(true)
	}
	if err := a.steering.Flows(events); err != nil && !a.flowsFailed.Swap(true) {
		a.log.Error("replies by SCTP, ESP or GRE may not find back to pods", "error", err)
	}
}

// adoptFlows tells steering of the sessions that an earlier daemon left, before workers run.
func (a *Agent) adoptFlows(t *translation) {
	for _, tr := range t.translators {
		tr.Events() // there may be more than it keeps
	}
	if live := flowsOf(t.list()); len(live) > 0 {
		a.onFlows(live, false)
	}
	a.sweepFlows(func() ([]snat.Session, error) { return t.list(), nil })
}

// followFlows takes flows out of steering whose end a worker had no room to tell.
func (a *Agent) followFlows(ctx context.Context) {
	if a.translation == nil || !a.flowsLost.Swap(false) {
		return
	}
	a.sweepFlows(func() (list []snat.Session, err error) {
		err = a.eachSession(ctx, len(a.pools), func(_ int, x *snat.Session) bool { list = append(list, *x); return true })
		return list, err
	})
}

// sweepFlows takes flows out of steering that have no session.
func (a *Agent) sweepFlows(list func() ([]snat.Session, error)) {
	known, err := a.steering.KnownFlows()
	if err != nil || len(known) == 0 {
		if err != nil {
			a.log.Error("flows cannot be swept out of the steering", "error", err)
		}
		return
	}
	sessions, err := list() // after known: what begins meanwhile is not in it
	if err != nil {
		return
	}
	live := map[snat.FlowEvent]bool{}
	for _, f := range flowsOf(sessions) {
		live[f] = true
	}
	var over []snat.FlowEvent
	for _, f := range known {
		if !live[f] {
			f.Began = false
			over = append(over, f)
		}
	}
	a.onFlows(over, false)
}

// flowsOf are the sessions that steering must know.
func flowsOf(list []snat.Session) (out []snat.FlowEvent) {
	for i := range list {
		if x := &list[i]; !x.Pin {
			if _, ported := snat.ClassOf(x.Proto); !ported {
				out = append(out, snat.FlowEvent{Began: true, Proto: x.Proto, Remote: x.Remote, RemotePort: x.RemotePort, NodePort: x.ExternalPort})
			}
		}
	}
	return out
}

// list is all sessions of translators that no worker has yet.
func (t *translation) list() (list []snat.Session) {
	for _, tr := range t.translators {
		for at := (snat.Cursor{}); !at.Done; {
			list, at = tr.Snapshot(list, at, 1<<20)
		}
	}
	return list
}
