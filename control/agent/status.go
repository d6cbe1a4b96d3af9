package agent

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/drop"
	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/icmp"
)

func (a *Agent) podsInOrder() []*pod {
	return slices.SortedFunc(maps.Values(a.pods), func(x, y *pod) int { return cmp.Compare(x.rec.Name, y.rec.Name) })
}

// problems are sentences about everything that keeps the node from being ready.
func (a *Agent) problems() []string {
	var out []string
	add := func(p string) {
		if p != "" {
			out = append(out, p)
		}
	}
	add(a.stateProblem)
	add(a.sync.refused())
	add(a.masq.problem)
	switch {
	case a.state == nil && a.sync != nil:
		add("there is no desired state yet: " + a.sync.waiting())
	case a.state == nil && a.cfg.StateSource == SourceAPI:
		add("there is no desired state yet: waiting for one to be pushed to " + a.cfg.Socket)
	case a.programmed != a.state:
		add("a worker has not taken over the desired state; if this stays, restart the daemon")
	}
	switch {
	case a.facts.Gone:
		add(fmt.Sprintf("uplink %s is gone; it is opened again once it is back", a.cfg.Uplink))
	case !a.facts.Up:
		add(fmt.Sprintf("uplink %s is down; other nodes cannot be reached", a.facts.Name))
	default:
		add(a.uplinkProblem)
	}
	add(a.steeringProblem)
	add(a.hostProblem)
	add(a.storeProblem)
	out = append(out, a.built.Problems...)
	for _, p := range a.podsInOrder() {
		if p.port == nil {
			add(fmt.Sprintf("pod %s has no device: %s", p.rec.Name, p.reason))
		} else if err := a.state.checkPodAddresses(p.rec.IPv4, p.rec.IPv6); err != nil && a.state != nil {
			add(fmt.Sprintf("pod %s: %v; other nodes do not send to it", p.rec.Name, err))
		}
	}
	if len(a.retired) > 0 {
		add(fmt.Sprintf("%d ports wait for a worker that hangs; restart the daemon", len(a.retired)))
	}
	return out
}

func (a *Agent) fillStatus(m *controlv1.GetStatusResponse) {
	m.Node, m.DaemonVersion, m.StartedAt = a.cfg.NodeName, a.version, timestamppb.New(a.started)
	m.Problems = a.problems()
	m.Ready = len(m.Problems) == 0
	m.StateSource = a.cfg.StateSource
	a.sync.fillStatus(m, a.started, a.state != nil)
	if a.state != nil {
		m.Desired = cloneVersion(a.state.raw.GetVersion())
		m.EntryCount = a.state.raw.GetEntryCount()
		m.MemberCount = uint32(len(a.state.members))
		for _, p := range a.state.pools {
			m.Pools = append(m.Pools, fmt.Sprintf("%s in blocks of /%d", p.cidr, p.bits))
		}
		for _, b := range a.state.own {
			m.OwnBlocks = append(m.OwnBlocks, b.String())
		}
	}
	if a.programmed != nil {
		m.Programmed = cloneVersion(a.programmed.raw.GetVersion())
	}
	m.PodCount, m.RouteCount = uint32(len(a.pods)), uint32(a.built.Routes)
	m.Uplink = a.uplinkMessage()
	_, podMTU := a.mtus()
	m.HostPort = &controlv1.HostPort{Interface: a.cfg.HostPort, Mac: formatMAC(HostMAC), Mtu: uint32(podMTU)}
}

func (a *Agent) uplinkMessage() *controlv1.Uplink {
	f := &a.facts
	node4, node6 := primaryAddresses(*f, a.cfg.Node4(), a.cfg.Node6())
	m := &controlv1.Uplink{
		Interface: f.Name, Mac: formatMAC(f.MAC), Mtu: uint32(f.MTU), Up: f.Up, Queues: uint32(f.Queues), Rung: a.uplink.Rung,
		Ipv4: addrText(node4), Ipv6: addrText(node6), GatewayIpv4: addrText(f.Gateway4), GatewayIpv6: addrText(f.Gateway6),
		GatewayMacIpv4: formatMAC(f.GatewayMAC4), GatewayMacIpv6: formatMAC(f.GatewayMAC6), Underlay: a.cfg.Underlay,
	}
	if a.uplink.Port != nil {
		m.Queues = uint32(a.uplink.Port.NumQueues())
	}
	for _, r := range a.uplink.Refused {
		m.WhyNotMore = append(m.WhyNotMore, &controlv1.RungRefusal{Rung: r.Rung, Reason: r.Reason})
	}
	if a.steering != nil {
		m.Steering, _ = a.steering.Counters() // a map that cannot be read leaves the counters out
	}
	if p, ok := a.uplink.Port.(interface{ Lost() map[string]uint64 }); ok && m.Steering != nil {
		maps.Copy(m.Steering, p.Lost()) // what the program let through and the socket had no room for
	}
	return m
}

func addrText(a netip.Addr) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

func workerMessages(stats []dataplane.WorkerStats) []*controlv1.Worker {
	var out []*controlv1.Worker
	for i := range stats {
		w := &stats[i]
		m := &controlv1.Worker{
			Index: uint32(w.Index), Polls: w.Polls, BusyPolls: w.BusyPolls, Parks: w.Parks, Packets: w.Packets,
			FramesTotal: uint32(w.Chunks), FramesFree: uint32(w.ChunksFree), LargeTotal: uint32(w.Large), LargeFree: uint32(w.LargeFree),
			Snapshot: w.Generation,
		}
		if w.CPU >= 0 {
			m.Cpu = uint32(w.CPU)
		}
		for _, q := range w.UplinkQueues {
			m.UplinkQueues = append(m.UplinkQueues, uint32(q))
		}
		out = append(out, m)
	}
	return out
}

// portKinds are the names of the kinds of port in the API.
var portKinds = map[dataplane.PortKind]string{dataplane.PortUplink: "uplink", dataplane.PortHost: "host", dataplane.PortPod: "pod"}

func trafficMessage(t dataplane.Traffic) *controlv1.Traffic {
	return &controlv1.Traffic{Frames: t.Frames, Packets: t.Packets, Bytes: t.Bytes}
}

func counterMessage(stats []dataplane.WorkerStats) *controlv1.GetCountersResponse {
	out := &controlv1.GetCountersResponse{Answered: make(map[string]uint64), IcmpErrors: make(map[string]uint64)}
	for i := range stats {
		w := &stats[i]
		for j := range w.Slots {
			s := &w.Slots[j]
			m := &controlv1.PortCounters{
				Port: s.Name, Kind: portKinds[s.Kind], Worker: uint32(w.Index), In: trafficMessage(s.In), Out: trafficMessage(s.Out),
			}
			for r := range s.DropsIn {
				m.DroppedIn += s.DropsIn[r]
				m.DroppedOut += s.DropsOut[r]
			}
			out.Ports = append(out.Ports, m)
		}
		out.Answered["arp"] += w.Answers.ARP
		out.Answered["nd"] += w.Answers.ND
		out.Answered["echo"] += w.Answers.Echo
		for e := icmp.None + 1; e < icmp.NumErrors; e++ {
			out.IcmpErrors[e.String()] += w.ICMPErrors[e]
		}
	}
	return out
}

func dropMessages(stats []dataplane.WorkerStats) []*controlv1.DropCount {
	var out []*controlv1.DropCount
	for i := range stats {
		w := &stats[i]
		for j := range w.Slots {
			s := &w.Slots[j]
			for r := drop.None + 1; r < drop.NumReasons; r++ {
				for _, d := range []struct {
					direction string
					packets   uint64
				}{{"in", s.DropsIn[r]}, {"out", s.DropsOut[r]}} {
					if d.packets == 0 {
						continue
					}
					out = append(out, &controlv1.DropCount{
						Port: s.Name, Kind: portKinds[s.Kind], Direction: d.direction, Reason: r.String(), Description: r.Description(),
						Packets: d.packets, Worker: uint32(w.Index),
					})
				}
			}
		}
	}
	return out
}

// routesView is what ListRoutes is made of, taken on the agent's goroutine and read elsewhere: all of it is immutable.
type routesView struct {
	version  *controlv1.Version
	snapshot *dataplane.Snapshot
	state    *desired
}

func (a *Agent) routesView() routesView {
	v := routesView{snapshot: a.built.Snapshot, state: a.state}
	if a.programmed != nil {
		v.version = cloneVersion(a.programmed.raw.GetVersion())
	}
	return v
}

func (v routesView) messages() []*controlv1.ProgrammedRoute {
	if v.snapshot == nil {
		return nil
	}
	owners := make(map[netip.Prefix]string)
	if v.state != nil {
		for i := range v.state.routes {
			if r := &v.state.routes[i]; r.target == toMember {
				owners[r.prefix] = v.state.members[r.member].name
			}
		}
		for i := range v.state.members {
			m := &v.state.members[i]
			for _, a := range []netip.Addr{m.addr4, m.addr6} {
				if a.IsValid() {
					owners[netip.PrefixFrom(a, a.BitLen())] = m.name
				}
			}
		}
	}
	table := v.snapshot.FIB
	out := make([]*controlv1.ProgrammedRoute, 0, table.Len())
	for _, p := range table.Pools() {
		out = append(out, &controlv1.ProgrammedRoute{Prefix: p.CIDR.String(), Kind: fib.Unreachable.String()})
	}
	table.Walk(func(p netip.Prefix, e fib.Entry) bool {
		m := &controlv1.ProgrammedRoute{Prefix: p.String(), Kind: e.Kind().String()}
		if e.Kind() != fib.Unreachable {
			adj := table.Adjacency(e.Adjacency())
			m.Mac, m.Mtu = formatMAC(adj.Dst), uint32(adj.MTU)
			switch e.Kind() {
			case fib.Pod:
				m.Target = v.snapshot.Ports[adj.Port].Name
			case fib.Node, fib.Member:
				m.Target = owners[p]
			}
		}
		out = append(out, m)
		return true
	})
	return out
}
