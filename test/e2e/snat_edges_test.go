package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// listenIP opens a raw socket of a protocol inside an end's namespace, on its address.
func listenIP(t *testing.T, e lab.End, family, proto int) *net.IPConn {
	t.Helper()
	var c *net.IPConn
	require.NoError(t, lab.InNetns(e.Netns, func() (err error) {
		c, err = net.ListenIP(fmt.Sprintf("ip%d:%d", family, proto), &net.IPAddr{IP: e.Addr(family).AsSlice()})
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// otherMessage is a message of a protocol, told apart by a number: SCTP's ports, ESP's index and the like come first.
func otherMessage(proto, from, to int, number byte) []byte {
	b := make([]byte, 40)
	switch proto {
	case unix.IPPROTO_SCTP:
		binary.BigEndian.PutUint16(b, uint16(from))
		binary.BigEndian.PutUint16(b[2:], uint16(to))
	case unix.IPPROTO_GRE:
		b[2] = 8 // IPv4 inside
	default:
		b[3] = 9
	}
	b[39] = number
	return b
}

// SCTP, ESP and GRE find back to pods: steered by their far end, also by the next daemon.
func TestProtocolsWithoutTranslatedPorts(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Uplink: "xdp-copy"}, {Uplink: "xdp-copy", Workers: 2}, {Uplink: "tun"}} {
		t.Run(fmt.Sprintf("%s/workers=%d", o.Uplink, max(1, o.Workers)), func(t *testing.T) {
			o.Nodes, o.Pods = 1, 2
			l := newLab(t, o)
			n1, ext := l.Nodes[0], l.ExtEnd()
			eachFamily(t, func(t *testing.T, family int) {
				for _, proto := range []int{unix.IPPROTO_SCTP, unix.IPPROTO_GRE, unix.IPPROTO_ESP} {
					t.Run(fmt.Sprint(proto), func(t *testing.T) {
						far, near := listenIP(t, ext, family, proto), listenIP(t, n1.Pods[0].End(), family, proto)
						round := func(number byte) error {
							b := make([]byte, 200)
							var err error
							for range 3 {
								if _, err = near.WriteToIP(otherMessage(proto, 2905, 2906, number), &net.IPAddr{IP: ext.Addr(family).AsSlice()}); err != nil {
									return err
								}
								_ = far.SetReadDeadline(time.Now().Add(time.Second))
								var from *net.IPAddr
								if _, from, err = far.ReadFromIP(b); err != nil {
									continue
								}
								if from.IP.String() != n1.Addr(family).String() {
									return fmt.Errorf("comes from %v", from)
								}
								if _, err = far.WriteToIP(otherMessage(proto, 2906, 2905, number), from); err != nil {
									return err
								}
								_ = near.SetReadDeadline(time.Now().Add(time.Second))
								var n int
								if n, err = near.Read(b); err == nil {
									if b[n-1] != number {
										return fmt.Errorf("message %d instead of %d", b[n-1], number)
									}
									return nil
								}
							}
							return err
						}
						require.NoError(t, round(1))
						require.NoError(t, n1.Kill())
						require.NoError(t, start(t, n1))
						// Only the far end speaks: the session, and what steering knows of it, is the daemon's before.
						_, err := far.WriteToIP(otherMessage(proto, 2906, 2905, 7), &net.IPAddr{IP: n1.Addr(family).AsSlice()})
						require.NoError(t, err)
						b := make([]byte, 200)
						_ = near.SetReadDeadline(time.Now().Add(2 * time.Second))
						n, err := near.Read(b)
						require.NoError(t, err)
						require.EqualValues(t, 7, b[n-1])
						require.NoError(t, round(2))
					})
				}
			})
		})
	}
}

// An IPv6 reply with options before its UDP header is a reply.
func TestRepliesWithExtensionHeaders(t *testing.T) {
	t.Parallel()
	for _, uplink := range []string{"xdp-copy", "tun"} {
		t.Run(uplink, func(t *testing.T) {
			l := newLab(t, lab.Options{Nodes: 1, Pods: 1, Uplink: uplink})
			pod, ext := l.Nodes[0].Pods[0].End(), l.ExtEnd()
			far, err := lab.ListenUDP(ext, 6)
			require.NoError(t, err)
			defer far.Close()
			near, err := lab.ListenUDP(pod, 6)
			require.NoError(t, err)
			defer near.Close()
			b := make([]byte, 100)
			var from netip.AddrPort
			require.Eventually(t, func() bool {
				_, _ = near.WriteToUDPAddrPort([]byte("there"), far.LocalAddr().(*net.UDPAddr).AddrPort())
				_ = far.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
				_, from, err = far.ReadFromUDPAddrPort(b)
				return err == nil
			}, 5*time.Second, time.Millisecond)
			raw, err := far.SyscallConn()
			require.NoError(t, err)
			const dstopts, hopopts = 59, 54 // of linux/in6.h
			for _, size := range []int{8, 64} {
				header := make([]byte, size) // one option to be skipped by who does not know it (RFC 8200 section 4.2, RFC 4727); the kernel fills in the first byte
				header[1], header[2], header[3] = byte(size/8-1), 0x1e, byte(size-4)
				for _, option := range []int{dstopts, hopopts} {
					require.NoError(t, raw.Control(func(fd uintptr) { err = unix.SetsockoptString(int(fd), unix.IPPROTO_IPV6, option, string(header)) }))
					require.NoError(t, err)
				}
				_, err = far.WriteToUDPAddrPort([]byte("back"), from)
				require.NoError(t, err)
				_ = near.SetReadDeadline(time.Now().Add(2 * time.Second))
				n, err := near.Read(b)
				require.NoError(t, err, "%d bytes of options", size)
				require.Equal(t, "back", string(b[:n]))
			}
		})
	}
}

// awaitSNAT waits until what a node says of its translation pleases.
func awaitSNAT(t *testing.T, n *lab.Node, ok func(*controlv1.GetSnatResponse) bool) {
	t.Helper()
	require.Eventually(t, func() bool {
		var r *controlv1.GetSnatResponse
		err := n.Call(testContext(t), func(ctx context.Context, c controlv1.LocalServiceClient) (err error) {
			r, err = c.GetSnat(ctx, &controlv1.GetSnatRequest{})
			return err
		})
		return err == nil && ok(r)
	}, 10*time.Second, 50*time.Millisecond)
}

// Whom an ip-masq-agent file names sees pods' own addresses and can answer; so does everybody with external SNAT. Where nothing says so, nobody outside reaches a pod.
func TestUntranslatedDestinations(t *testing.T) {
	t.Parallel()
	for _, uplink := range []string{"xdp-copy", "tun"} {
		t.Run(uplink, func(t *testing.T) {
			l := newLab(t, lab.Options{Nodes: 1, Pods: 1, Uplink: uplink})
			n1, pod, ext := l.Nodes[0], l.Nodes[0].Pods[0].End(), l.ExtEnd()
			for _, r := range []struct{ pods, node, gateway string }{{"10.244.0.0/16", n1.IPv4().String(), "198.51.100.1"}, {"fd12:3456:789a::/64", n1.IPv6().String(), "2001:db8:100::1"}} {
				require.NoError(t, lab.AddRoute(l.Gateway(), netip.MustParsePrefix(r.pods), "br0", netip.MustParseAddr(r.node)))
				require.NoError(t, lab.AddRoute(ext.Netns, netip.MustParsePrefix(r.pods), "eth0", netip.MustParseAddr(r.gateway)))
			}
			for _, family := range families {
				backend(t, ext, family, backendPort)
				backend(t, pod, family, backendPort)
			}
			requireSeen := func(seen lab.End) {
				t.Helper()
				for _, family := range families {
					at := netip.AddrPortFrom(ext.Addr(family), backendPort)
					got, err := callTCP(testContext(t), pod, at, 100)
					require.NoError(t, err, "TCP, IPv%d", family)
					require.Equal(t, fmt.Sprint(seen.Addr(family), " 100"), got)
					got, err = callUDP(pod, at, 4000)
					require.NoError(t, err, "UDP, IPv%d", family)
					require.Equal(t, fmt.Sprint(seen.Addr(family), " 4000"), got)
				}
			}
			requireReaches := func(reaches bool) {
				t.Helper()
				for _, family := range families {
					ctx, cancel := context.WithTimeout(testContext(t), time.Second)
					_, err := callTCP(ctx, ext, netip.AddrPortFrom(pod.Addr(family), backendPort), 100)
					cancel()
					require.Equal(t, reaches, err == nil, "IPv%d: %v", family, err)
				}
			}
			requireSeen(n1.End())
			requireReaches(false)

			file := filepath.Join(n1.MasqDir(), "config")
			require.NoError(t, os.MkdirAll(n1.MasqDir(), 0o755))
			write := func(text string) { require.NoError(t, os.WriteFile(file, []byte(text), 0o644)) }
			write("nonMasqueradeCIDRs:\n- 198.51.100.0/24\n- 2001:db8:100::/64\n")
			awaitSNAT(t, n1, func(r *controlv1.GetSnatResponse) bool { return len(r.GetNoMasqueradeCidrs()) == 4 })
			requireSeen(pod)
			requireReaches(true)

			write("nonMasqueradeCIDRs:\n- 198.51.100.0/24\n- 2001:db8:100::/640\n")
			require.NoError(t, n1.WaitStatus(testContext(t), "complaining", func(s *controlv1.GetStatusResponse) bool { return len(s.GetProblems()) > 0 }))
			require.Contains(t, status(t, n1).GetProblems()[0], file+":3: ")
			requireSeen(pod)

			require.NoError(t, os.Remove(file))
			awaitSNAT(t, n1, func(r *controlv1.GetSnatResponse) bool { return len(r.GetNoMasqueradeCidrs()) == 0 })
			requireSeen(n1.End())
			requireReaches(false)

			s := l.State(n1)
			l.Revision++
			s.Version = l.Version()
			s.Snat.Disabled = true
			require.NoError(t, l.WriteState(n1, s))
			require.NoError(t, l.WaitProgrammed(testContext(t)))
			requireSeen(pod)
		})
	}
}

// When the node's address changes, its sessions end, which is said, and new ones have the new address.
func TestNodeAddressChangeEndsSessions(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 1, Pods: 1})
	n1, pod, ext := l.Nodes[0], l.Nodes[0].Pods[0].End(), l.ExtEnd()
	for _, family := range families {
		backend(t, ext, family, backendPort)
	}
	for family, to := range map[int]string{4: "10.240.0.99/24", 6: "fd00:240::99/64"} {
		old := n1.Addr(family)
		f := openFlow(t, pod, ext, family)
		bits := map[int]string{4: "/24", 6: "/64"}[family]
		Exec(t, n1.Netns(), "ip", "addr", "del", old.String()+bits, "dev", "eth0") // first: IPv4's takes later ones of its subnet with it
		Exec(t, n1.Netns(), "ip", "addr", "add", to, "dev", "eth0", "nodad")
		gateway := map[int]string{4: "10.240.0.1", 6: "fd00:240::1"}[family]
		Exec(t, n1.Netns(), "ip", fmt.Sprint("-", family), "route", "replace", "default", "via", gateway, "dev", "eth0")
		now := netip.MustParsePrefix(to).Addr()
		awaitSNAT(t, n1, func(r *controlv1.GetSnatResponse) bool {
			return (r.GetIpv4() == now.String() || r.GetIpv6() == now.String()) && r.GetWorkers()[0].GetFlushed() > 0
		})
		log, err := os.ReadFile(n1.LogPath())
		require.NoError(t, err)
		require.Contains(t, string(log), "the node's address changed: its translated sessions ended")
		require.Error(t, f.exchange(time.Second), "the far end knows the old address")
		require.Eventually(t, func() bool {
			got, err := callTCP(testContext(t), pod, netip.AddrPortFrom(ext.Addr(family), backendPort), 10)
			return err == nil && got == fmt.Sprint(now, " 10")
		}, 20*time.Second, 100*time.Millisecond)
	}
}
