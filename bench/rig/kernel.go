package rig

import (
	"context"
	"fmt"

	"github.com/overplane/overplane/bench/load"
)

// Kernel is the kernel's own routing.
var Kernel = &Kind{
	Name: "kernel", About: "the kernel's own routing (ip_forward), direct routes between nodes, pods on veth; forwarding on the core that its softirq happens to run on",
	Topologies: []Topology{SameNode, TwoNodes}, Build: buildKernel("kernel", plainRoutes),
}

// Masquerade is the kernel's routing and translation.
var Masquerade = &Kind{
	Name: "kernel+nft", About: "the kernel's routing with an nftables masquerade rule",
	Topologies: []Topology{Outside}, Build: buildKernel("kernel+nft", masquerade),
}

// kernelKinds are the peers that the kernel itself is.
var kernelKinds = []*Kind{
	Kernel,
	{
		Name: "kernel+rps", About: "the same with receive packet steering to the other core, so that generator and forwarding do not share one",
		Topologies: []Topology{SameNode}, FramesOnly: true, Build: buildKernel("kernel+rps", plainRoutes),
	},
	{
		Name: "vxlan", About: "the kernel's routing into a VXLAN device between nodes, as overlay networks do; pods' MTU is 1450",
		Topologies: []Topology{TwoNodes}, Build: buildKernel("vxlan", vxlanRoutes),
	},
	Masquerade,
}

func buildKernel(name string, routes func(*space, int)) func(context.Context, *Env, Spec) (*System, error) {
	return func(ctx context.Context, env *Env, spec Spec) (*System, error) {
		s := env.space(ctx)
		sys := &System{Name: name, close: []func() error{s.close}, Placement: "forwarding in the kernel's softirq on whichever core it is raised"}
		mtu, nodes := defaultMTU, 1
		if name == "vxlan" {
			mtu -= vxlanOverhead
		}
		if spec.Topology == TwoNodes {
			nodes = 2
		}
		for n := 1; n <= nodes; n++ {
			s.add(fmt.Sprintf("n%d", n), true)
		}
		pod := func(n, p int) load.Endpoint {
			e := s.pod(n, p, mtu)
			s.routePod(n, p)
			if spec.Frames {
				s.receiveFrames(s.ns(fmt.Sprintf("n%d", n)), fmt.Sprint(nodePort, p))
			}
			return e
		}
		sys.From = pod(1, 1)
		switch spec.Topology {
		case SameNode:
			sys.To = pod(1, 2)
		case TwoNodes:
			s.underlay(nodes, spec.Link)
			sys.To = pod(2, 1)
			routes(s, nodes)
		case Outside:
			s.underlay(nodes, spec.Link)
			sys.To, sys.Exit = s.outside(spec.Link)
			routes(s, nodes)
		}
		if name == "kernel+rps" {
			sys.Placement = fmt.Sprintf("forwarding in the kernel's softirq, by RPS on core %d", ForwardCore())
			for p := 1; p <= 2; p++ {
				s.exec([]string{"ip", "netns", "exec", s.ns("n1"), "sh", "-c", fmt.Sprintf("echo %x > /sys/class/net/%s%d/queues/rx-0/rps_cpus", 1<<ForwardCore(), nodePort, p)}, "")
			}
		}
		churnKernel(sys, s)
		sys.Drops = spaceDrops(s.netns, nil, nil)
		if err := s.err(); err != nil {
			return nil, fail(sys, err)
		}
		return sys, nil
	}
}

// fail closes what was half built and returns why.
func fail(sys *System, err error) error {
	if cerr := sys.Close(); cerr != nil {
		return fmt.Errorf("%s: %w (and cleaning up: %v)", sys.Name, err, cerr)
	}
	return fmt.Errorf("%s: %w", sys.Name, err)
}

func plainRoutes(s *space, nodes int) {
	for n := 1; n <= nodes; n++ {
		for m := 1; m <= nodes; m++ {
			if n != m {
				s.run("ip -n %s route add 10.244.%d.0/24 via %s", s.ns(fmt.Sprintf("n%d", n)), m, nodeAddr(m))
				s.run("ip -n %s neigh replace %s lladdr %s dev %s nud permanent", s.ns(fmt.Sprintf("n%d", n)), nodeAddr(m), nodeMAC(m), uplink)
			}
		}
	}
}

func vxlanRoutes(s *space, nodes int) {
	const device = "vx"
	mac := func(n int) string { return fmt.Sprintf("02:56:58:00:00:%02x", n) }
	for n := 1; n <= nodes; n++ {
		ns := s.ns(fmt.Sprintf("n%d", n))
		s.run("ip -n %s link add %s address %s mtu %d type vxlan id 42 dstport 4789 local %s dev %s nolearning", ns, device, mac(n), defaultMTU-vxlanOverhead, nodeAddr(n), uplink)
		s.run("ip -n %s link set %s up", ns, device)
		for m := 1; m <= nodes; m++ {
			if n != m {
				s.run("bridge -n %s fdb append %s dev %s dst %s", ns, mac(m), device, nodeAddr(m))
				s.run("ip -n %s neigh replace 10.244.%d.0 lladdr %s dev %s nud permanent", ns, m, mac(m), device)
				s.run("ip -n %s route add 10.244.%d.0/24 via 10.244.%d.0 dev %s onlink", ns, m, m, device)
				s.run("ip -n %s neigh replace %s lladdr %s dev %s nud permanent", ns, nodeAddr(m), nodeMAC(m), uplink)
			}
		}
	}
}

func masquerade(s *space, _ int) {
	s.exec([]string{"ip", "netns", "exec", s.ns("n1"), "nft", "-f", "-"},
		`table ip nat { chain post { type nat hook postrouting priority 100; oifname "`+uplink+`" masquerade
}
}
`)
}
