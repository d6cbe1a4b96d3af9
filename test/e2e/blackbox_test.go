package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// turnServer runs coturn outside, on two addresses of each family, until the test ends.
func turnServer(t *testing.T, l *lab.Lab) {
	t.Helper()
	dir := t.TempDir()
	argv := []string{"-n", "--no-auth", "--no-tls", "--no-dtls", "--no-tcp", "--no-cli", "--log-file", "stdout", "--pidfile", dir + "/pid", "--db", dir + "/db"}
	for _, family := range families {
		for _, a := range []netip.Addr{l.ExtEnd().Addr(family), farAddresses(t, l, family, 1)[0]} {
			argv = append(argv, "-L", a.String())
		}
	}
	var said strings.Builder
	cmd := exec.Command(tool(t, "turnserver"), argv...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &said, &said
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	started := make(chan error, 1)
	over := make(chan struct{})
	go func() {
		// The thread that starts it must live as long as it: that is what its death signal watches.
		_ = lab.InNetns(l.Ext(), func() error {
			started <- cmd.Start()
			<-over
			return nil
		})
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		close(over)
	})
	require.NoError(t, <-started)
	require.Eventually(t, func() bool {
		listeners, err := tryExec(t, l.Ext(), "ss", "-Hlun", "sport", "=", "3479")
		return err == nil && strings.Count(listeners, ":3479") >= 4
	}, 15*time.Second, 50*time.Millisecond, "turnserver listens on four addresses")
}

// What coturn's prober finds out about mapping and filtering (RFC 5780) is what is configured.
func TestNATDiscovery(t *testing.T) {
	const (
		edm, eim      = controlv1.SnatMapping_SNAT_MAPPING_ADDRESS_AND_PORT_DEPENDENT, controlv1.SnatMapping_SNAT_MAPPING_ENDPOINT_INDEPENDENT
		both, address = controlv1.SnatFiltering_SNAT_FILTERING_ADDRESS_AND_PORT_DEPENDENT, controlv1.SnatFiltering_SNAT_FILTERING_ADDRESS_DEPENDENT
		none          = controlv1.SnatFiltering_SNAT_FILTERING_ENDPOINT_INDEPENDENT
	)
	tool(t, "turnserver")
	tool(t, "turnutils_natdiscovery")
	l := newLab(t, lab.Options{Nodes: 1, Pods: 1})
	turnServer(t, l)
	n1 := l.Nodes[0]
	cases := []struct {
		mapping    controlv1.SnatMapping
		filtering  controlv1.SnatFiltering
		maps, lets string
	}{
		{edm, both, "Address and Port Dependent Mapping", "Address and Port Dependent Filtering"},
		{eim, both, "Endpoint Independent Mapping", "Address and Port Dependent Filtering"},
		{eim, address, "Endpoint Independent Mapping", "Address Dependent Filtering"},
		{eim, none, "Endpoint Independent Mapping", "Endpoint Independent Filtering"},
	}
	if !full() {
		cases = append(cases[:1], cases[3]) // the prober waits for seconds in the others
	}
	for _, c := range cases {
		t.Run(c.maps+"/"+c.lets, func(t *testing.T) {
			require.NoError(t, n1.Stop())
			l.Snat = &controlv1.SnatRules{Mapping: c.mapping, Filtering: c.filtering}
			require.NoError(t, l.WriteStates())
			require.NoError(t, start(t, n1))
			// The prober waits for answers that must not come: both families at once.
			type result struct {
				out string
				err error
			}
			var results [2]chan result
			for i, family := range families {
				results[i] = make(chan result, 1)
				go func() {
					cmd := exec.CommandContext(testContext(t), tool(t, "turnutils_natdiscovery"), "-m", "-f", l.ExtEnd().Addr(family).String())
					var out strings.Builder
					cmd.Stdout, cmd.Stderr = &out, &out
					err := lab.InNetns(n1.Pods[0].Netns(), cmd.Start)
					if err == nil {
						err = cmd.Wait()
					}
					results[i] <- result{out.String(), err}
				}()
			}
			for i, family := range families {
				r := <-results[i]
				require.NoError(t, r.err, r.out)
				require.Contains(t, r.out, "NAT with "+c.maps+"!")
				require.Contains(t, r.out, "NAT with "+c.lets+"!")
				require.NotContains(t, r.out, "ALG detected", "mapped addresses arrive as they were sent")
				require.Contains(t, r.out, "UDP reflexive addr: "+n1.Addr(family).String()+":")
			}
		})
	}
}

// Errors that routers outside send reach the pod: each hop is seen once, and a smaller MTU behind the node is found.
func TestTracesToOutside(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 2})
	n1, pod, ext := l.Nodes[0], l.Nodes[0].Pods[0], l.ExtEnd()
	router := map[int]string{4: "10.240.0.1", 6: "fd00:240::1"}
	for _, netns := range []string{l.Ext(), l.Gateway()} { // they answer each time they are asked
		require.NoError(t, lab.SetSysctl(netns, "net/ipv4/icmp_ratelimit", "0"))
		require.NoError(t, lab.SetSysctl(netns, "net/ipv6/icmp/ratelimit", "0"))
	}
	for name, method := range map[string]string{"UDP": "-U", "UDP, one port": "-UL", "ICMP": "-I", "TCP": "-T"} {
		t.Run("traceroute "+name, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, family int) {
				argv := []string{"traceroute", fmt.Sprintf("-%d", family), "-n", "-q", "2", "-w", "2", "-m", "6", method}
				if method == "-UL" {
					argv = append(argv[:len(argv)-1], "-U", "-p", "33434")
				}
				out := Exec(t, pod.Netns(), append(argv, ext.Addr(family).String())...)
				require.Equal(t, []string{n1.Addr(family).String(), router[family], ext.Addr(family).String()}, hopsOf(out), out)
			})
		})
	}
	const narrow = 1400
	require.NoError(t, lab.SetLinkMTU(l.Gateway(), "ext", narrow))
	t.Run("tracepath", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			out := Exec(t, pod.Netns(), "tracepath", fmt.Sprintf("-%d", family), "-n", "-m", "6", ext.Addr(family).String())
			require.Contains(t, out, fmt.Sprintf("pmtu %d", narrow), out)
			require.Contains(t, out, "reached")
			for _, hop := range []string{n1.Addr(family).String(), router[family], ext.Addr(family).String()} {
				require.Contains(t, out, hop)
			}
		})
	})
	t.Run("TCP finds the path MTU", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			_, err := lab.Transfer(testContext(t), l.Nodes[0].Pods[1].End(), ext, family, 8<<20)
			require.NoError(t, err)
		})
	})
}

// Scans of a node's address find what the node itself has, and nothing of its pods.
func TestScansFromOutside(t *testing.T) {
	tool(t, "nping")
	tool(t, "hping3")
	l := newLab(t, lab.Options{Nodes: 1, Pods: 1})
	n1, pod, ext := l.Nodes[0], l.Nodes[0].Pods[0], l.ExtEnd()
	router := device(t, l.Gateway(), "ext").HardwareAddr.String()
	own := device(t, l.Ext(), "eth0").HardwareAddr.String()
	scans, ports := []string{"syn"}, 60
	if full() {
		scans, ports = []string{"syn", "ack", "rst", "syn,ack", "fin,psh,urg"}, 400
	}
	silent := func() uint64 {
		return dropsOf(t, n1, "eth0", "nat_no_session") + dropsOf(t, n1, "eth0", "nat_filtered")
	}
	eachFamily(t, func(t *testing.T, family int) {
		// Connections of the pod, so that some of the scanned ports are in use; a port of the node.
		var flows []*flow
		first := 29999
		for range 30 {
			f := openFlow(t, pod.End(), ext, family)
			flows = append(flows, f)
			first = min(first, f.server.RemoteAddr().(*net.TCPAddr).Port)
		}
		listener, err := lab.ListenTCP(n1.End(), family)
		require.NoError(t, err)
		defer listener.Close()
		open := listener.Addr().(*net.TCPAddr).Port
		heard, err := lab.StartCapture(pod.Netns(), func(f []byte) bool {
			ip, ok := lab.ParseOuterIP(f)
			return ok && !carriesFlow(ip, flows)
		})
		require.NoError(t, err)
		defer heard.Stop()

		nping := func(argv ...string) (out string, sent, received int) {
			common := []string{"nping", fmt.Sprintf("-%d", family), "--delay", "2ms", "-c", "1"}
			if family == 6 { // through a raw socket it knows no source address, and computes checksums without
				common = append(common, "--send-eth", "--source-mac", own, "--dest-mac", router, "-S", ext.IPv6.String())
			}
			out = Exec(t, ext.Netns, append(append(common, argv...), n1.Addr(family).String())...)
			m := regexp.MustCompile(`Raw packets sent: (\d+).*Rcvd: (\d+)`).FindStringSubmatch(out)
			require.NotNil(t, m, out)
			sent, _ = strconv.Atoi(m[1])
			received, _ = strconv.Atoi(m[2])
			return out, sent, received
		}
		ours := fmt.Sprintf("%d-%d", first, min(first+ports-1, 29999))
		for _, flags := range scans {
			before := silent()
			out, sent, received := nping("--tcp", "--flags", flags, "-g", "4321", "-p", ours)
			require.Zero(t, received, "ports of pods are silent\n%s", out)
			require.GreaterOrEqual(t, silent()-before, uint64(sent), "each has its reason")
		}
		before := silent()
		out, sent, received := nping("--udp", "-g", "4321", "-p", ours)
		require.Zero(t, received, out)
		require.GreaterOrEqual(t, silent()-before, uint64(sent))
		// The node's own ports answer, open or closed.
		out, sent, received = nping("--tcp", "--flags", "syn", "-g", "4322", "-p", fmt.Sprintf("%d,81,9999,30000", open))
		require.Equal(t, sent, received, out)
		require.Regexp(t, fmt.Sprintf(`RCVD .*:%d > .* SA `, open), out)
		require.Regexp(t, `RCVD .*:81 > .* RA `, out)
		if family == 4 { // hping3 has no IPv6
			hping := func(argv ...string) string {
				out, _ := tryExec(t, ext.Netns, append([]string{"hping3", "-n", "-i", "u500"}, append(argv, n1.IPv4().String())...)...)
				return out
			}
			for _, kind := range []string{"-S", "-2"} {
				before := silent()
				require.Contains(t, hping(kind, "-c", strconv.Itoa(ports), "-p", "++"+strconv.Itoa(first)), fmt.Sprintf("%d packets transmitted, 0 packets received", ports))
				require.GreaterOrEqual(t, silent()-before, uint64(ports))
			}
			require.Contains(t, hping("-S", "-c", "1", "-p", strconv.Itoa(open)), "flags=SA")
		}
		require.Empty(t, heard.Stop(), "something of the scans reached the pod")
		for _, f := range flows {
			f.requireAlive(t, 5*time.Second)
		}
	})
}

// carriesFlow reports whether a packet from outside belongs to one of the connections.
func carriesFlow(ip lab.OuterIP, flows []*flow) bool {
	if ip.Protocol != unix.IPPROTO_TCP || len(ip.Payload) < 4 {
		return ip.Protocol == unix.IPPROTO_ICMPV6 && len(ip.Payload) > 0 && ip.Payload[0] >= 133 // neighbour discovery
	}
	from, to := uint16(ip.Payload[0])<<8|uint16(ip.Payload[1]), uint16(ip.Payload[2])<<8|uint16(ip.Payload[3])
	for _, f := range flows {
		if f.server.LocalAddr().(*net.TCPAddr).AddrPort().Port() == from && f.client.LocalAddr().(*net.TCPAddr).AddrPort().Port() == to {
			return true
		}
	}
	return false
}
