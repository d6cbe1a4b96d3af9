package rig

import (
	"context"
	"fmt"
	"net"
	"strings"

	"github.com/overplane/overplane/bench/load"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// Overplane is the kind with one sort of pod ports and one rung of the uplink. Where the topology has no uplink in it the rung does not matter.
func Overplane(podPort, rung string, env ...string) *Kind {
	name := "overplane " + podPort
	if rung != "" {
		name += "/" + rung
	}
	for _, e := range env {
		name += " " + e
	}
	k := &Kind{
		Name: name, About: "Overplane with pods on " + podPort + map[bool]string{true: " and the uplink by " + rung}[rung != ""],
		Topologies: []Topology{SameNode, TwoNodes, Outside, PodsOnly},
		Build: func(ctx context.Context, e *Env, spec Spec) (*System, error) {
			return buildOverplane(ctx, e, spec, name, podPort, rung, env)
		},
	}
	if rung == "xdp-copy" {
		k.Links = []Link{Wire} // an AF_XDP receiver has no place for 64 KiB frames
	}
	return k
}

func buildOverplane(ctx context.Context, e *Env, spec Spec, name, podPort, rung string, env []string) (*System, error) {
	e.serial++
	o := lab.Options{
		Name: fmt.Sprintf("%s%d", e.Prefix, e.serial), Nodes: 1, Pods: 1, Uplink: rung, PodPort: podPort, Workers: max(1, spec.Workers), State: lab.StateFile,
		Binaries: e.Bin, Log: func(string, ...any) {}, Env: env,
	}
	sys := &System{Name: name, TAP: podPort == "tap"}
	switch spec.Topology {
	case SameNode:
		o.Pods = 3 // the third for churn
	case TwoNodes:
		o.Nodes = 2
	case PodsOnly:
		o.Pods = spec.Pods
	}
	if o.Nodes == 1 && o.Workers == 1 {
		o.Env = append(o.Env, fmt.Sprintf("OVERPLANE_CPUS=%d", ForwardCore()))
		sys.Placement = fmt.Sprintf("worker pinned to core %d", ForwardCore())
	} else {
		sys.Placement = fmt.Sprintf("%d workers a node, dealt out round the cores from core 0 on", o.Workers)
	}
	l, err := lab.Up(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	sys.close = append(sys.close, l.Down)
	n1 := l.Nodes[0]
	var names []string
	for _, n := range l.Nodes {
		names = append(names, n.Netns())
		for _, p := range n.Pods {
			names = append(names, p.Netns())
		}
		sys.Pids = append(sys.Pids, n.Pid())
	}
	names = append(names, l.Gateway(), l.Ext())
	sys.Lab = l
	if spec.Topology == PodsOnly {
		return sys, nil
	}
	if sys.From, err = podEndpoint(ctx, n1.Pods[0]); err != nil {
		return nil, fail(sys, err)
	}
	switch spec.Topology {
	case SameNode:
		sys.To, err = podEndpoint(ctx, n1.Pods[1])
	case TwoNodes:
		sys.To, err = podEndpoint(ctx, l.Nodes[1].Pods[0])
	case Outside:
		sys.To, sys.Exit = extEndpoint(l.Ext()), exitEndpoint(l.Gateway())
	}
	if err != nil {
		return nil, fail(sys, err)
	}
	s := &space{env: e, name: l.Name, ctx: ctx}
	if spec.Topology != SameNode {
		err = setLink(s, l.Gateway(), len(l.Nodes), func(n int) string { return l.Nodes[n-1].Netns() }, spec.Link)
		setOffloads(s, l.Gateway(), "ext", spec.Link)
		setOffloads(s, l.Ext(), uplink, spec.Link)
		if err != nil || s.err() != nil {
			return nil, fail(sys, s.err())
		}
	}
	churnOverplane(sys, l)
	sys.Drops = spaceDrops(names, func(netns, device string) bool {
		// A pod's TAP counts one of each burst that it has no room for: reconciliation looks at what it handed on instead.
		return strings.HasPrefix(device, "ovp") && !strings.HasPrefix(device, "ovpv") || podPort == "tap" && strings.Contains(netns, "-p") && !strings.HasSuffix(netns, "-p1")
	}, func(ctx context.Context, into map[string]uint64) error { return daemonDrops(ctx, l, into) })
	return sys, nil
}

// podEndpoint is a pod's device as its daemon made it.
func podEndpoint(ctx context.Context, p *lab.Pod) (load.Endpoint, error) {
	e := load.Endpoint{Netns: p.Netns(), Device: podDevice, Addr: p.IPv4()}
	pods, err := p.Node().AttachedPods(ctx)
	if err != nil {
		return e, err
	}
	for _, a := range pods {
		if a.GetName() != p.Name() {
			continue
		}
		if e.MAC, err = net.ParseMAC(a.GetMac()); err != nil {
			return e, err
		}
		e.Next, err = net.ParseMAC(a.GetGatewayMac())
		return e, err
	}
	return e, fmt.Errorf("%s is not attached", p.Name())
}

// daemonDrops adds the daemons' named drops, and what their steering had no room for.
func daemonDrops(ctx context.Context, l *lab.Lab, into map[string]uint64) error {
	for _, n := range l.Nodes {
		drops, err := n.Drops(ctx)
		if err != nil {
			return err
		}
		for _, d := range drops {
			into[fmt.Sprintf("%s %s %s", n.Name(), d.GetReason(), d.GetDirection())] += d.GetPackets()
		}
		var st *controlv1.GetStatusResponse
		if st, err = n.Status(ctx); err != nil {
			return err
		}
		for name, count := range st.GetUplink().GetSteering() {
			if name == "socket_full" || name == "dropped_stale" {
				into[n.Name()+" steering "+name] += count
			}
		}
	}
	return nil
}
