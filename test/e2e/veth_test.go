package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/gopacket"
	"github.com/google/gopacket/layers"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// newVethLab is newLab with veth pods.
func newVethLab(t *testing.T, o lab.Options) *lab.Lab {
	t.Helper()
	o.PodPort = "veth"
	return newLab(t, o)
}

// attachAs gives a pod a port of another kind.
func attachAs(t *testing.T, p *lab.Pod, kind string) {
	t.Helper()
	require.NoError(t, p.Detach(testContext(t)))
	p.Kind = kind
	pod, err := p.Attach(testContext(t))
	require.NoError(t, err)
	require.Equal(t, kind, pod.GetKind())
}

// kindsOf are the kinds of a node's pods by name.
func kindsOf(t *testing.T, n *lab.Node) map[string]string {
	t.Helper()
	pods, err := n.AttachedPods(testContext(t))
	require.NoError(t, err)
	kinds := make(map[string]string)
	for _, p := range pods {
		kinds[p.GetName()] = p.GetKind()
	}
	return kinds
}

// Every proof, from and to pods of both kinds on each node, and the node itself.
func TestVethPodsForward(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ workers, mtu int }{{1, 1500}, {2, 1500}, {2, 9000}} {
		t.Run(fmt.Sprintf("workers=%d/mtu=%d", c.workers, c.mtu), func(t *testing.T) {
			workersPossible(t, c.workers)
			l := newVethLab(t, lab.Options{Nodes: 2, Pods: 3, Workers: c.workers, MTU: c.mtu, IPForward: 1})
			for _, n := range l.Nodes {
				attachAs(t, n.Pods[1], "tap")
				require.Equal(t, map[string]string{n.Pods[0].Name(): "veth", n.Pods[1].Name(): "tap", n.Pods[2].Name(): "veth"}, kindsOf(t, n))
			}
			require.NoError(t, l.WaitProgrammed(testContext(t)))
			frames := freeFrames(t, l)
			requireProofs(t, l)
			eachFamily(t, func(t *testing.T, family int) {
				for _, to := range l.Nodes[0].Pods[1:] { // bulk to a TAP pod and to a veth pod of the node
					d, err := lab.Transfer(testContext(t), l.Nodes[0].Pods[0].End(), to.End(), family, bulk(64<<20))
					require.NoError(t, err)
					t.Logf("veth to %s: %.2f Gbit/s", kindsOf(t, l.Nodes[0])[to.Name()], float64(bulk(64<<20))*8/d.Seconds()/1e9)
				}
				d, err := lab.Transfer(testContext(t), l.Nodes[0].Pods[1].End(), l.Nodes[0].Pods[0].End(), family, bulk(64<<20))
				require.NoError(t, err)
				t.Logf("tap to veth: %.2f Gbit/s", float64(bulk(64<<20))*8/d.Seconds()/1e9)
			})
			requireNoLeak(t, l, frames)
		})
	}
}

// A checksum that a veth pod chose arrives as it is: one that is right, one that is wrong, and one that only looks unfinished.
func TestVethPodsChecksumsAreTheirOwn(t *testing.T) {
	t.Parallel()
	l := newVethLab(t, lab.Options{Nodes: 2, Pods: 2})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	attachAs(t, n1.Pods[1], "tap")
	attachAs(t, n2.Pods[1], "tap")
	from := n1.Pods[0]
	dev := device(t, from.Netns(), "eth0")
	gateway, err := net.ParseMAC(gatewayMACOf(t, n1))
	require.NoError(t, err)
	for _, to := range []*lab.Pod{n1.Pods[1], n2.Pods[0], n2.Pods[1]} {
		t.Run("to_"+to.Name(), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, family int) {
				c, err := lab.StartCapture(to.Netns(), func(b []byte) bool { return bytes.Contains(b, []byte("checksum test")) })
				require.NoError(t, err)
				src, dst := netip.AddrPortFrom(from.Addr(family), 4000), netip.AddrPortFrom(to.Addr(family), 4001)
				frame := udpFrame(t, dev.HardwareAddr, gateway, src, dst, []byte("checksum test"))
				field := bytes.Index(frame, []byte("checksum test")) - 2
				right := binary.BigEndian.Uint16(frame[field:])
				want := []uint16{right, right ^ 0x1234, pseudoSum(frame, family)}
				for _, sum := range want {
					binary.BigEndian.PutUint16(frame[field:], sum)
					sendFrame(t, from.Netns(), "eth0", frame)
				}
				require.Eventually(t, func() bool { return len(c.Frames()) == len(want) }, 5*time.Second, 10*time.Millisecond)
				var got []uint16
				for _, f := range c.Stop() {
					ip, ok := lab.ParseOuterIP(f.Bytes)
					require.True(t, ok)
					got = append(got, binary.BigEndian.Uint16(ip.Payload[6:]))
				}
				require.Equal(t, want, got)
			})
		})
	}
}

// pseudoSum is what a stack leaves in the field of a UDP datagram whose checksum its device is to finish.
func pseudoSum(frame []byte, family int) uint16 {
	p := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	udp := p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	sum := uint32(17) + uint32(udp.Length)
	addrs := frame[26:34]
	if family == 6 {
		addrs = frame[22:54]
	}
	for i := 0; i < len(addrs); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(addrs[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// While the daemon is away, what a veth pod sends dies; above all it is not routed by the node's kernel. Then everything goes on.
func TestVethPodsDaemonAwayAndBack(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		workers int
		away    func(*lab.Node) error
		back    func(*testing.T, *lab.Node) error
	}{
		{"killed", 1, (*lab.Node).Kill, start},
		{"killed_2_workers", 2, (*lab.Node).Kill, start},
		{"stopped", 1, (*lab.Node).Stop, start},
		{"hung", 1, func(n *lab.Node) error { return n.Signal(unix.SIGSTOP) }, func(_ *testing.T, n *lab.Node) error { return n.Signal(unix.SIGCONT) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newVethLab(t, lab.Options{Nodes: 2, Pods: 3, Workers: c.workers, IPForward: 1})
			n1, n2 := l.Nodes[0], l.Nodes[1]
			attachAs(t, n2.Pods[1], "tap")
			kinds := kindsOf(t, n2)
			var podFlows []*flow
			for _, family := range families {
				podFlows = append(podFlows,
					openFlow(t, n1.Pods[0].End(), n2.Pods[0].End(), family), // remote
					openFlow(t, n2.Pods[0].End(), n2.Pods[1].End(), family), // of the other kind
					openFlow(t, n2.Pods[2].End(), n2.Pods[0].End(), family))
			}
			nodeFlow := openFlow(t, n2.End(), n1.End(), 4)
			podDevice := deviceIndex(t, n2.Pods[0].Netns())

			require.NoError(t, c.away(n2))
			forwarded := map[int]uint64{}
			for _, family := range families {
				count, err := l.KernelForwarded(family)
				require.NoError(t, err)
				forwarded[family] = count
			}
			for _, family := range families {
				requireUnreachable(t, n2.Pods[0].End(), l.ExtEnd().Addr(family))
				requireUnreachable(t, n2.Pods[0].End(), n2.Addr(family))
				requireUnreachable(t, n2.Pods[0].End(), n2.Pods[1].Addr(family))
			}
			nodeFlow.requireAlive(t, 5*time.Second)
			require.Equal(t, podDevice, deviceIndex(t, n2.Pods[0].Netns()), "the pod keeps its device")
			for _, family := range families {
				count, err := l.KernelForwarded(family)
				require.NoError(t, err)
				require.Equal(t, forwarded[family], count, "the node's kernel forwarded a pod's packets")
			}

			require.NoError(t, c.back(t, n2))
			require.NoError(t, n2.WaitProgrammed(testContext(t)))
			require.Equal(t, kinds, kindsOf(t, n2))
			for _, f := range podFlows {
				f.requireAlive(t, 15*time.Second)
			}
			require.Equal(t, podDevice, deviceIndex(t, n2.Pods[0].Netns()), "the pod keeps its device")
			requireReachable(t, n1.Pods[1].End(), n2.Pods[2].End())
			requireReachable(t, n2.End(), n2.Pods[0].End())
		})
	}
}

// The same under load, and with the other number of workers afterwards.
func TestVethPodsTransferSurvivesACrash(t *testing.T) {
	t.Parallel()
	l := newVethLab(t, lab.Options{Nodes: 2, Pods: 1, Workers: 2})
	done := make(chan error, 1)
	go func() {
		_, err := lab.Transfer(testContext(t), l.Nodes[0].Pods[0].End(), l.Nodes[1].Pods[0].End(), 6, bulk(128<<20))
		done <- err
	}()
	for i, n := range l.Nodes {
		time.Sleep(200 * time.Millisecond)
		require.Empty(t, done, "the transfer ended before the crash")
		require.NoError(t, n.Kill())
		require.NoError(t, n.StartWith(testContext(t), lab.StartOptions{Env: []string{fmt.Sprintf("OVERPLANE_WORKERS=%d", 1+i), "OVERPLANE_CPUS=none"}}))
	}
	require.NoError(t, <-done)
}

func TestVethPodDetachedAndDeleted(t *testing.T) {
	t.Parallel()
	l := newVethLab(t, lab.Options{Nodes: 2, Pods: 3})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	ctx := testContext(t)
	hostEnds := func() int { return strings.Count(strings.Join(interfaces(t, n2.Netns()), " "), "ovpv") }
	require.Equal(t, 3, hostEnds())
	before := openFiles(t, n2.Pid())

	t.Run("detached", func(t *testing.T) {
		p := n2.Pods[2]
		require.NoError(t, p.Detach(ctx))
		require.Equal(t, 2, hostEnds())
		require.NotContains(t, interfaces(t, p.Netns()), "eth0")
		_, err := p.Attach(ctx)
		require.NoError(t, err)
		requireReachable(t, n1.Pods[0].End(), p.End())
	})
	t.Run("device_deleted", func(t *testing.T) {
		p := n2.Pods[2]
		Exec(t, p.Netns(), "ip", "link", "del", "eth0")
		require.NoError(t, n2.WaitStatus(ctx, "aware of the loss", func(s *controlv1.GetStatusResponse) bool { return s.PodCount == 2 && s.Ready }))
		_, err := p.Attach(ctx)
		require.NoError(t, err)
		requireReachable(t, n1.Pods[0].End(), p.End())
	})
	t.Run("device_deleted_while_the_daemon_is_away", func(t *testing.T) {
		p := n2.Pods[2]
		require.NoError(t, n2.Kill())
		Exec(t, p.Netns(), "ip", "link", "del", "eth0")
		require.NoError(t, n2.Start(ctx))
		require.NoError(t, n2.WaitStatus(ctx, "without the pod", func(s *controlv1.GetStatusResponse) bool { return s.PodCount == 2 && s.Ready }))
		require.Equal(t, 2, hostEnds())
		_, err := p.Attach(ctx)
		require.NoError(t, err)
		requireReachable(t, n1.Pods[0].End(), p.End())
		before = openFiles(t, n2.Pid())
	})
	t.Run("namespace_deleted", func(t *testing.T) {
		victim := n2.Pods[0]
		require.NoError(t, unix.Unmount(lab.NetnsPath(victim.Netns()), unix.MNT_DETACH))
		require.NoError(t, os.Remove(lab.NetnsPath(victim.Netns())))
		require.NoError(t, n2.WaitStatus(ctx, "aware of the loss", func(s *controlv1.GetStatusResponse) bool { return s.PodCount == 2 }))
		require.Eventually(t, func() bool { return hostEnds() == 2 && openFiles(t, n2.Pid()) < before }, 10*time.Second, 50*time.Millisecond)
		require.True(t, status(t, n2).Ready)
		requireReachable(t, n1.Pods[0].End(), n2.Pods[1].End())
		for _, family := range families {
			requireUnreachable(t, n1.Pods[0].End(), victim.Addr(family))
		}
		require.NoError(t, victim.Detach(ctx))
		n2.Pods = n2.Pods[1:]
		require.NoError(t, victim.Recreate(ctx))
		n2.Pods = append([]*lab.Pod{victim}, n2.Pods...)
		require.NoError(t, n2.WaitProgrammed(ctx))
		requireReachable(t, n1.Pods[0].End(), victim.End())
	})
}

// Spoofing is stopped whatever the kind.
func TestVethPodsCannotSpoof(t *testing.T) {
	t.Parallel()
	l := newVethLab(t, lab.Options{Nodes: 1, Pods: 2})
	n1 := l.Nodes[0]
	pod := n1.Pods[0]
	dev := device(t, pod.Netns(), "eth0")
	gateway, err := net.ParseMAC(gatewayMACOf(t, n1))
	require.NoError(t, err)
	eachFamily(t, func(t *testing.T, family int) {
		rx := newReceiver(t, n1.Pods[1].End(), family)
		before := dropsOf(t, n1, pod.Name(), "source_not_pods")
		for _, src := range []netip.Addr{n1.Addr(family), l.ExtEnd().Addr(family)} {
			sendFrame(t, pod.Netns(), "eth0", udpFrame(t, dev.HardwareAddr, gateway, netip.AddrPortFrom(src, 4000), rx.addr, []byte("spoofed")))
		}
		require.Eventually(t, func() bool { return dropsOf(t, n1, pod.Name(), "source_not_pods") == before+2 }, 5*time.Second, 20*time.Millisecond)
		require.False(t, rx.got(t, 200*time.Millisecond))
	})
}

// A node full of veth pods: their memory is bounded by their rings, and idle ones cost no time.
// Not beside other tests, as TestResourcesOfAFullNode.
func TestVethResourcesOfAFullNode(t *testing.T) {
	const pods, ring = 250, 512 // the default of OVERPLANE_POD_RING_SIZE
	l := newVethLab(t, lab.Options{Nodes: 1, Pods: 1, Workers: 1})
	n1 := l.Nodes[0]
	ctx := testContext(t)
	pid := n1.Pid()
	filesBefore, resident, available := openFiles(t, pid), statusField(t, pid, "VmRSS"), memoryAvailable(t)
	begin := time.Now()
	for len(n1.Pods) < pods {
		_, err := n1.AddPod(ctx)
		require.NoError(t, err)
	}
	t.Logf("%d pods attached in %.1f s", pods-1, time.Since(begin).Seconds())
	require.NoError(t, n1.WaitProgrammed(ctx))
	requireReachable(t, n1.Pods[0].End(), n1.Pods[pods-1].End())
	requireReachable(t, n1.Pods[137].End(), n1.End())

	t.Run("memory", func(t *testing.T) {
		if builtWithRaceDetector(t) {
			t.Skip("the race detector multiplies memory")
		}
		perPod := (statusField(t, pid, "VmRSS") - resident) / (pods - 1)
		t.Logf("resident %d KiB a pod; the machine has %d KiB a pod less available", perPod, (available-memoryAvailable(t))/(pods-1))
		require.Less(t, perPod, (ring+256)*2*5/4, "chunks of 2 KiB, a quarter more for the rest")
	})
	t.Run("idle", func(t *testing.T) { requireIdle(t, pid, 5*time.Second) })
	t.Run("restart", func(t *testing.T) {
		require.NoError(t, n1.Kill())
		begin := time.Now()
		require.NoError(t, n1.Start(ctx))
		require.NoError(t, n1.WaitProgrammed(ctx))
		t.Logf("%d pods adopted in %.1f s", pods, time.Since(begin).Seconds())
		requireReachable(t, n1.Pods[0].End(), n1.Pods[pods-1].End())
		pid = n1.Pid()
	})
	t.Run("nothing_leaks", func(t *testing.T) {
		for _, p := range n1.Pods[1:] {
			require.NoError(t, p.Detach(ctx))
		}
		require.Eventually(t, func() bool { return openFiles(t, pid) <= filesBefore }, 10*time.Second, 100*time.Millisecond,
			"%d descriptors before, %d after", filesBefore, openFiles(t, pid))
		require.Equal(t, 1, strings.Count(strings.Join(interfaces(t, n1.Netns()), " "), "ovpv"))
	})
}

// memoryAvailable is the machine's, KiB.
func memoryAvailable(t *testing.T) (kib int) {
	t.Helper()
	data, err := os.ReadFile("/proc/meminfo")
	require.NoError(t, err)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "MemAvailable:"); ok {
			_, err := fmt.Sscan(rest, &kib)
			require.NoError(t, err)
		}
	}
	return kib
}
