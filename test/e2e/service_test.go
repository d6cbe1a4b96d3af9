package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// Rules like those kube-proxy makes in the node's kernel: what is for a service gets a pod's address; what comes from outside the pod CIDR, or by a node port, also gets the node's, so
// that the reply comes back to this node, unless the service wants to see clients' addresses and the pod is here.
const serviceRules = `
table inet services
delete table inet services
table inet services {
	chain prerouting { type nat hook prerouting priority dstnat; jump services; }
	chain output { type nat hook output priority -100; jump services; }
	chain postrouting {
		type nat hook postrouting priority srcnat;
		meta mark & 0x8000 != 0 meta l4proto { tcp, udp } masquerade to :12000-12999
		meta mark & 0x4000 != 0 masquerade fully-random
	}
	chain services {
%s	}
}
`

const (
	backendPort     = 8080
	servicePort     = 80
	masquerade      = 0x4000
	masqueradeRange = 0x8000 // with a port that pods' translated packets have, too
)

var serviceCIDRs = []string{"10.96.0.0/16", "fd00:96::/112"}

// serviceAddr is the cluster address of a service, by its number.
func serviceAddr(number, family int) netip.Addr {
	if family == 4 {
		return netip.AddrFrom4([4]byte{10, 96, 0, byte(number)})
	}
	return netip.MustParseAddr(fmt.Sprintf("fd00:96::%x", number))
}

// rules collects the lines of a node's chain.
type rules struct{ strings.Builder }

func (r *rules) add(format string, args ...any) {
	fmt.Fprintf(&r.Builder, "\t\t"+format+"\n", args...)
}

func ipOf(a netip.Addr) string {
	if a.Is4() {
		return "ip"
	}
	return "ip6"
}

// cluster leads a cluster address to a backend.
func (r *rules) cluster(number int, to netip.Addr, port int) {
	family, pods := 4, "10.244.0.0/16"
	if to.Is6() {
		family, pods = 6, "fd12:3456:789a::/64"
	}
	ip, at := ipOf(to), serviceAddr(number, family)
	r.add("%s daddr %s %s saddr != %s meta mark set meta mark | %#x", ip, at, ip, pods, masquerade)
	r.add("%s daddr %s %s saddr %s meta mark set meta mark | %#x", ip, at, ip, to, masquerade)
	for _, proto := range []string{"tcp", "udp"} {
		r.add("%s daddr %s %s dport %d dnat %s to %s", ip, at, proto, servicePort, ip, netip.AddrPortFrom(to, uint16(port)))
	}
}

// node leads a port of the node to a backend.
func (r *rules) node(port int, to netip.Addr, mark int) {
	for _, proto := range []string{"tcp", "udp"} {
		mine := fmt.Sprintf("meta nfproto %s fib daddr type local %s dport %d", map[bool]string{true: "ipv4", false: "ipv6"}[to.Is4()], proto, port)
		if mark != 0 {
			r.add("%s meta mark set meta mark | %#x", mine, mark)
		}
		r.add("%s dnat %s to %s", mine, ipOf(to), netip.AddrPortFrom(to, backendPort))
	}
}

// install puts the rules into a node's kernel.
func (r *rules) install(t *testing.T, n *lab.Node) {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), tool(t, "nft"), "-f", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(serviceRules, r.String()))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	require.NoError(t, lab.InNetns(n.Netns(), cmd.Start))
	require.NoError(t, cmd.Wait(), "%s\n%s", out.String(), r.String())
}

// backend serves the backends' port of an end, TCP and UDP: whoever sends it a message of at least one byte is told the address he comes from and the message's length.
func backend(t *testing.T, e lab.End, family, port int) {
	t.Helper()
	at := netip.AddrPortFrom(e.Addr(family), uint16(port))
	var l *net.TCPListener
	var u *net.UDPConn
	require.NoError(t, lab.InNetns(e.Netns, func() (err error) {
		if l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at)); err == nil {
			u, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		}
		return err
	}))
	t.Cleanup(func() { l.Close(); u.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				n, _ := io.Copy(io.Discard, c)
				fmt.Fprintf(c, "%s %d", c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr(), n)
			}()
		}
	}()
	go func() {
		b := make([]byte, 65536)
		for {
			n, from, err := u.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			answer := fmt.Sprintf("%s %d", from.Addr(), n)
			_, _ = u.WriteToUDPAddrPort(append([]byte(answer), make([]byte, max(0, n-len(answer)))...), from)
		}
	}()
}

// callTCP sends a message to a service and returns whom the backend saw.
func callTCP(ctx context.Context, from lab.End, at netip.AddrPort, size int) (string, error) {
	c, err := lab.DialTCP(ctx, from, at)
	if err != nil {
		return "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.Write(make([]byte, size)); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// callUDP is callTCP with a datagram. The socket is connected, so that an answer from another address than the service's is none.
func callUDP(from lab.End, at netip.AddrPort, size int) (string, error) {
	var c *net.UDPConn
	if err := lab.InNetns(from.Netns, func() (err error) {
		c, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(at))
		return err
	}); err != nil {
		return "", err
	}
	defer c.Close()
	b := make([]byte, 65536)
	var err error
	for range 4 { // the first fragments wait for neighbours to be found
		if _, err = c.Write(make([]byte, size)); err != nil {
			continue
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		var n int
		if n, err = c.Read(b); err == nil {
			return strings.TrimRight(string(b[:n]), "\x00"), nil
		}
	}
	return "", err
}

// withServices writes desired states in which service addresses are the nodes' kernels'.
func withServices(t *testing.T, l *lab.Lab) {
	t.Helper()
	l.Revision++
	for _, n := range l.Nodes {
		s := l.State(n)
		for _, c := range serviceCIDRs {
			s.Routes = append(s.Routes, &controlv1.Route{Prefix: c, Target: &controlv1.Route_Host{Host: true}})
		}
		require.NoError(t, l.WriteState(n, s))
	}
	require.NoError(t, l.WaitProgrammed(testContext(t)))
}

// A kube-proxy in the node's kernel translates for services; replies find back through it. Everything by TCP and by UDP, in one packet, in fragments and in bulk.
func TestServicesOfTheKernel(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Uplink: "xdp-copy"}, {Uplink: "xdp-copy", Workers: 2}, {Uplink: "tun"}, {Uplink: "tun", Workers: 2}} {
		t.Run(fmt.Sprintf("%s/workers=%d", o.Uplink, max(1, o.Workers)), func(t *testing.T) {
			o.Nodes, o.Pods, o.IPForward = 2, 2, 1
			l := newLab(t, o)
			withServices(t, l)
			n1, n2 := l.Nodes[0], l.Nodes[1]
			for _, n := range l.Nodes {
				require.NoError(t, lab.SetSysctl(n.Netns(), "net/ipv4/conf/all/rp_filter", "1"))
			}
			client, local, remote, node, ext := n1.Pods[0].End(), n1.Pods[1].End(), n2.Pods[0].End(), n1.End(), l.ExtEnd()
			var r rules
			for _, family := range families {
				r.cluster(10, local.Addr(family), backendPort)
				r.cluster(11, remote.Addr(family), backendPort)
				r.cluster(12, client.Addr(family), backendPort)
				r.cluster(13, n2.Addr(family), backendPort)
				r.cluster(14, n1.Addr(family), backendPort)
				r.node(30080, local.Addr(family), masquerade)
				r.node(30081, remote.Addr(family), masquerade)
				r.node(30082, local.Addr(family), 0)
				r.node(30083, local.Addr(family), masqueradeRange)
				r.node(30084, remote.Addr(family), masqueradeRange)
				r.node(8081, client.Addr(family), 0)
				for _, e := range []lab.End{client, local, remote, n1.End(), n2.End()} {
					backend(t, e, family, backendPort)
				}
			}
			r.install(t, n1)
			eachFamily(t, func(t *testing.T, family int) {
				cluster := func(number int) netip.AddrPort { return netip.AddrPortFrom(serviceAddr(number, family), servicePort) }
				port := func(p uint16) netip.AddrPort { return netip.AddrPortFrom(n1.Addr(family), p) }
				for _, c := range []struct {
					name string
					from lab.End
					at   netip.AddrPort
					seen lab.End
				}{
					{"cluster address, pod to local pod", client, cluster(10), client},
					{"cluster address, pod to remote pod", client, cluster(11), client},
					{"cluster address, pod to itself", client, cluster(12), node},
					{"cluster address, node to local pod", node, cluster(10), node},
					{"cluster address, node to remote pod", node, cluster(11), node},
					{"cluster address, pod to another node", client, cluster(13), client},
					{"cluster address, pod to its node", client, cluster(14), client},
					{"node port, outside to local pod", ext, port(30080), node},
					{"node port, outside to remote pod", ext, port(30081), node},
					{"node port, outside to local pod, local policy", ext, port(30082), ext},
					{"node port, another node, local policy", n2.End(), port(30082), n2.End()},
					{"node port, remote pod, local policy", remote, port(30082), remote},
					{"node port, local pod, local policy", client, port(30082), client},
					{"node port, local pod to remote pod", client, port(30081), node},
					{"node port, masqueraded with a port of the range, local", ext, port(30083), node},
					{"node port, masqueraded with a port of the range, remote", ext, port(30084), node},
					{"host port", ext, port(8081), ext},
				} {
					t.Run(c.name, func(t *testing.T) {
						for _, size := range []int{1, 1 << 20} {
							got, err := callTCP(testContext(t), c.from, c.at, size)
							require.NoError(t, err, "TCP, %d bytes", size)
							require.Equal(t, fmt.Sprint(c.seen.Addr(family), " ", size), got)
						}
						for _, size := range []int{100, 4000} {
							got, err := callUDP(c.from, c.at, size)
							require.NoError(t, err, "UDP, %d bytes", size)
							require.Equal(t, fmt.Sprint(c.seen.Addr(family), " ", size), got)
						}
					})
				}
			})
			// Connections by the kernel outlive the daemon.
			var flows []net.Conn
			for _, at := range []netip.AddrPort{netip.AddrPortFrom(serviceAddr(11, 4), servicePort), netip.AddrPortFrom(serviceAddr(10, 6), servicePort)} {
				c, err := lab.DialTCP(testContext(t), client, at)
				require.NoError(t, err)
				defer c.Close()
				flows = append(flows, c)
			}
			require.NoError(t, n1.Kill())
			require.NoError(t, start(t, n1))
			for i, c := range flows {
				_ = c.SetDeadline(time.Now().Add(15 * time.Second))
				_, err := c.Write([]byte("x"))
				require.NoError(t, err)
				require.NoError(t, c.(*net.TCPConn).CloseWrite())
				b, err := io.ReadAll(c)
				require.NoError(t, err, "flow %d", i)
				require.True(t, strings.HasSuffix(string(b), " 1"), string(b))
			}
		})
	}
}
