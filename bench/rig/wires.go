package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/test/lab"
)

// The address plan is the lab's.
const (
	gatewayAddr    = "10.240.0.1"
	extGateway     = "198.51.100.1"
	extAddr        = "198.51.100.10"
	podGateway     = "169.254.1.1"
	nodePort       = "v" // the node's end of pod j's pair is vj
	uplink         = "eth0"
	podDevice      = "eth0"
	vxlanOverhead  = 50
	defaultMTU     = 1500
	bridge         = "br0"
	gatewayMACText = "02:4f:56:ff:00:01"
)

func nodeAddr(n int) string   { return fmt.Sprintf("10.240.0.%d", 10+n) }
func podAddr(n, p int) string { return fmt.Sprintf("10.244.%d.%d", n, 1+p) }
func nodeMAC(n int) string    { return fmt.Sprintf("02:4f:56:00:00:%02x", n) }
func podMAC(n, p int) string  { return fmt.Sprintf("02:50:00:%02x:%02x:01", n, p) }
func portMAC(n, p int) string { return fmt.Sprintf("02:50:00:%02x:%02x:02", n, p) }

func mustMAC(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// pod makes pod p of node n: a veth pair to the node, and a default route by the node's end.
func (s *space) pod(n, p, mtu int) load.Endpoint {
	node, pod := s.ns(fmt.Sprintf("n%d", n)), s.add(fmt.Sprintf("n%d-p%d", n, p), false)
	port := fmt.Sprint(nodePort, p)
	s.run("ip -n %s link add %s address %s mtu %d type veth peer name %s address %s mtu %d netns %s", node, port, portMAC(n, p), mtu, podDevice, podMAC(n, p), mtu, pod)
	s.run("ip -n %s link set %s up", node, port)
	s.run("ip -n %s link set %s up", pod, podDevice)
	s.run("ip -n %s addr add %s/32 dev %s", pod, podAddr(n, p), podDevice)
	s.run("ip -n %s route add %s dev %s scope link", pod, podGateway, podDevice)
	s.run("ip -n %s route add default via %s", pod, podGateway)
	s.run("ip -n %s neigh replace %s lladdr %s dev %s nud permanent", pod, podGateway, portMAC(n, p), podDevice)
	return load.Endpoint{Netns: pod, Device: podDevice, Addr: netip.MustParseAddr(podAddr(n, p)), MAC: mustMAC(podMAC(n, p)), Next: mustMAC(portMAC(n, p))}
}

// routePod has the node's kernel route to its pod.
func (s *space) routePod(n, p int) {
	node, port := s.ns(fmt.Sprintf("n%d", n)), fmt.Sprint(nodePort, p)
	s.run("ip -n %s addr add %s/32 dev %s", node, podGateway, port)
	s.run("ip -n %s route add %s dev %s", node, podAddr(n, p), port)
	s.run("ip -n %s neigh replace %s lladdr %s dev %s nud permanent", node, podAddr(n, p), podMAC(n, p), port)
}

// underlay makes the gw namespace with a bridge, and wires nodes to it.
func (s *space) underlay(nodes int, link Link) {
	gw := s.add("gw", true)
	s.run("ip -n %s link add %s address %s type bridge mcast_snooping 0", gw, bridge, gatewayMACText)
	s.run("ip -n %s link set %s up", gw, bridge)
	s.fail(lab.InNetns(gw, lab.NoBridgeNetfilter))
	s.run("ip -n %s addr add %s/24 dev %s", gw, gatewayAddr, bridge)
	for n := 1; n <= nodes; n++ {
		node, port := s.ns(fmt.Sprintf("n%d", n)), fmt.Sprintf("n%d", n)
		s.run("ip -n %s link add %s type veth peer name %s address %s netns %s", gw, port, uplink, nodeMAC(n), node)
		s.run("ip -n %s link set %s master %s up", gw, port, bridge)
		s.run("ip -n %s link set %s up", node, uplink)
		s.run("ip -n %s addr add %s/24 dev %s", node, nodeAddr(n), uplink)
		s.run("ip -n %s route add default via %s", node, gatewayAddr)
		s.run("ip -n %s neigh replace %s lladdr %s dev %s nud permanent", node, gatewayAddr, gatewayMACText, uplink)
		s.run("ip -n %s neigh replace %s lladdr %s dev %s nud permanent", gw, nodeAddr(n), nodeMAC(n), bridge)
	}
	s.fail(setLink(s, gw, nodes, func(n int) string { return s.ns(fmt.Sprintf("n%d", n)) }, link))
}

// outside makes the ext namespace behind the router.
func (s *space) outside(link Link) (to load.Endpoint, exit *load.Endpoint) {
	gw, ext := s.ns("gw"), s.add("ext", false)
	s.run("ip -n %s link add ext address 02:4f:56:ff:00:02 type veth peer name %s address 02:4f:56:ff:00:03 netns %s", gw, uplink, ext)
	s.run("ip -n %s link set ext up", gw)
	s.run("ip -n %s link set %s up", ext, uplink)
	s.run("ip -n %s addr add %s/24 dev ext", gw, extGateway)
	s.run("ip -n %s addr add %s/24 dev %s", ext, extAddr, uplink)
	s.run("ip -n %s route add default via %s", ext, extGateway)
	setOffloads(s, gw, "ext", link)
	setOffloads(s, ext, uplink, link)
	return extEndpoint(ext), exitEndpoint(gw)
}

func extEndpoint(ns string) load.Endpoint {
	return load.Endpoint{Netns: ns, Device: uplink, Addr: netip.MustParseAddr(extAddr)}
}

// exitEndpoint is the underlay's end of node 1's uplink.
func exitEndpoint(gw string) *load.Endpoint { return &load.Endpoint{Netns: gw, Device: "n1"} }

// setLink sets the offloads of the underlay's devices: the bridge's ports in gw, and the nodes' uplinks.
func setLink(s *space, gw string, nodes int, node func(int) string, link Link) error {
	for n := 1; n <= nodes; n++ {
		setOffloads(s, gw, fmt.Sprintf("n%d", n), link)
		setOffloads(s, node(n), uplink, link)
	}
	if link == Virtual {
		s.run("ip netns exec %s ethtool -K %s tx on sg on tso on gso on", gw, bridge)
	}
	return s.err()
}

func setOffloads(s *space, ns, dev string, link Link) {
	if link == Virtual {
		s.run("ip netns exec %s ethtool -K %s tx on sg on tso on gso on", ns, dev)
		return
	}
	s.run("ip netns exec %s ethtool -K %s tso off gso off tx off gro on", ns, dev)
}

// receiveFrames has a veth device receive XDP frames: it does while GRO is on.
func (s *space) receiveFrames(ns, dev string) {
	s.run("ip netns exec %s ethtool -K %s gro on", ns, dev)
}

// finishedFrames has a pod finish its checksums and cut its segments itself, as what stands behind an AF_XDP socket needs.
func (s *space) finishedFrames(pod load.Endpoint) {
	s.run("ip netns exec %s ethtool -K %s tx off tso off gso off", pod.Netns, pod.Device)
}

// Bare is two namespaces with a wire between them and nothing else: what a generator and a sink cost by themselves.
func Bare(ctx context.Context, e *Env) (from, to load.Endpoint, done func() error, err error) {
	s := e.space(ctx)
	a, b := s.add("a", false), s.add("b", false)
	s.run("ip -n %s link add %s address %s type veth peer name %s address %s netns %s", a, podDevice, podMAC(1, 1), podDevice, podMAC(1, 2), b)
	s.run("ip -n %s link set %s up", a, podDevice)
	s.run("ip -n %s link set %s up", b, podDevice)
	s.receiveFrames(b, podDevice)
	from = load.Endpoint{Netns: a, Device: podDevice, Addr: netip.MustParseAddr(podAddr(1, 1)), MAC: mustMAC(podMAC(1, 1)), Next: mustMAC(podMAC(1, 2))}
	to = load.Endpoint{Netns: b, Device: podDevice, Addr: netip.MustParseAddr(podAddr(1, 2)), MAC: mustMAC(podMAC(1, 2)), Next: mustMAC(podMAC(1, 1))}
	if err := s.err(); err != nil {
		return from, to, nil, errors.Join(err, s.close())
	}
	return from, to, s.close, nil
}
