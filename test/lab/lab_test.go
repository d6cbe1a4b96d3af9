package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

const testLab = "ovptlab"

func TestOptionsNameEveryMistakeAtOnce(t *testing.T) {
	o := Options{Name: "Bad_Name", Nodes: 1000, Pods: -1, Uplink: "carrier-pigeon", PodPort: "pigeonhole", Workers: 99, Queues: 5, MTU: 100, IPForward: 2, Underlay: "x y", State: "gossip"}
	err := o.resolve()
	for _, flag := range []string{"--name", "--nodes", "--pods", "--uplink", "--pod-port", "--workers", "--queues", "--mtu", "--ip-forward", "--underlay", "--state"} {
		require.ErrorContains(t, err, flag)
	}
	for _, rung := range []string{"xdp-copy", "tun", "plain"} {
		o := Options{Uplink: rung}
		require.NoError(t, o.resolve())
	}
	o = Options{}
	require.NoError(t, o.resolve())
	require.Equal(t, "ovp", o.Name)
	require.Equal(t, 3, o.Nodes)
	require.Equal(t, StateController, o.State)
	o = Options{Workers: 2}
	require.NoError(t, o.resolve())
	require.Equal(t, 2, o.Queues, "as many as workers")
}

func TestAddressPlan(t *testing.T) {
	l := &Lab{Options: Options{Name: "ovp"}, Nodes: []*Node{{Number: 1, Block: 1, Pods: []*Pod{{Number: 1, Index: 2}}}, {Number: 10, Block: 10, Pods: []*Pod{{Number: 9, Index: 10}}}}}
	l.adopt()
	require.Equal(t, "10.240.0.11 fd00:240::11", fmt.Sprint(l.Nodes[0].IPv4(), " ", l.Nodes[0].IPv6()))
	require.Equal(t, "10.240.0.20 fd00:240::20", fmt.Sprint(l.Nodes[1].IPv4(), " ", l.Nodes[1].IPv6()))
	p := l.Nodes[0].Pods[0]
	require.Equal(t, "ovp-n1-p1 10.244.1.2 fd12:3456:789a:0:1::2", fmt.Sprint(p.Netns(), " ", p.IPv4(), " ", p.IPv6()))
	p = l.Nodes[1].Pods[0]
	require.Equal(t, "ovp-n10-p9 10.244.10.10 fd12:3456:789a:0:a::a", fmt.Sprint(p.Netns(), " ", p.IPv4(), " ", p.IPv6()))
	require.Equal(t, netip.MustParsePrefix("fd12:3456:789a:0:a::/80"), blockIPv6(10))
	// What the controller gave counts, whatever the node's number.
	l.Nodes[1].BlockIPv4, l.Nodes[1].BlockIPv6 = netip.MustParsePrefix("10.245.1.128/25"), netip.MustParsePrefix("fd12:3456:789a:0:7::/80")
	require.Equal(t, "10.245.1.138 fd12:3456:789a:0:7::a", fmt.Sprint(p.IPv4(), " ", p.IPv6()))
}

func TestStateNamesEveryOtherNodesBlocks(t *testing.T) {
	l := &Lab{Options: Options{Name: "ovp"}, Incarnation: newIncarnation(), Nodes: []*Node{
		{Number: 1, Block: 1, MAC: "02:00:00:00:00:01"}, {Number: 2, Block: 2, MAC: "02:00:00:00:00:02"}, {Number: 3, Block: 3, Gone: true},
	}}
	l.adopt()
	s := l.State(l.Nodes[0])
	require.Len(t, s.Members, 2, "a node that is being drained is no member for the others")
	require.Len(t, s.Routes, 2)
	require.Equal(t, "10.244.2.0/24", s.Routes[0].Prefix)
	require.Equal(t, "n2", s.Routes[0].GetNode())
}

func TestSNMPCounters(t *testing.T) {
	v, err := snmpColumn("Ip: Forwarding ForwDatagrams\nIp: 1 42\nIcmp: ForwDatagrams\nIcmp: 7\n", "Ip:", "ForwDatagrams")
	require.NoError(t, err)
	require.EqualValues(t, 42, v)
	v, err = snmpLine("Ip6InReceives   1\nIp6OutForwDatagrams   \t 7\n", "Ip6OutForwDatagrams")
	require.NoError(t, err)
	require.EqualValues(t, 7, v)
	_, err = snmpLine("", "Ip6OutForwDatagrams")
	require.Error(t, err)
}

// newTopology makes an underlay and nodes without daemons.
func newTopology(t *testing.T, nodes int) *Lab {
	t.Helper()
	if err := CheckRoot(); err != nil {
		t.Skip(err)
	}
	require.NoError(t, Down(testLab), "removing what an earlier run left")
	t.Cleanup(func() {
		require.NoError(t, Down(testLab))
		left, err := Leftovers(testLab)
		require.NoError(t, err)
		require.Empty(t, left)
	})
	l := &Lab{Options: Options{Name: testLab, Workers: 2, State: StateFile}, First: 1}
	require.NoError(t, l.resolve())
	require.NoError(t, buildUnderlay(testLab, l.MTU))
	for i := range nodes {
		l.Nodes = append(l.Nodes, &Node{Number: 1 + i, Block: 1 + i, MAC: nodeMAC(1 + i).String(), lab: l})
		require.NoError(t, l.Nodes[i].build())
	}
	require.NoError(t, l.save())
	return l
}

func TestTopologyIsAWire(t *testing.T) {
	l := newTopology(t, 2)
	n1, n2, ext := l.Nodes[0].End(), l.Nodes[1].End(), l.ExtEnd()
	ctx := context.Background()
	for _, family := range []int{4, 6} {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) {
			lost, err := Ping(ctx, n1.Netns, n2.Addr(family))
			require.NoError(t, err)
			require.Zero(t, lost)
			require.NoError(t, EchoTCP(ctx, n1, ext, family))
			_, err = EchoUDP(ctx, ext, n2, family, nil)
			require.NoError(t, err)

			hops, err := Trace(ctx, n1.Netns, ext.Addr(family), 5)
			require.NoError(t, err)
			gateway := map[int]string{4: gatewayIPv4, 6: gatewayIPv6}[family]
			require.Equal(t, []netip.Addr{netip.MustParseAddr(gateway), ext.Addr(family)}, hops)

			// Only frames of at most an MTU, with finished checksums, may cross: what an AF_XDP receiver relies on.
			magic := []byte("0123456789abcdef overplane wire test")
			longest := 0
			capture, err := StartCapture(l.Gateway(), func(f []byte) bool {
				longest = max(longest, len(f))
				return bytes.Contains(f, magic)
			})
			require.NoError(t, err)
			_, err = EchoUDP(ctx, n1, n2, family, magic)
			require.NoError(t, err)
			_, err = Transfer(ctx, n1, n2, family, 4<<20)
			require.NoError(t, err)
			require.Eventually(t, func() bool { return len(capture.Frames()) >= 2 }, time.Second, time.Millisecond)
			frames := capture.Stop()
			require.LessOrEqual(t, longest, 14+l.MTU)
			require.Greater(t, longest, 14+l.MTU/2)
			for _, f := range frames {
				ip, ok := ParseOuterIP(f.Bytes)
				require.True(t, ok)
				require.EqualValues(t, unix.IPPROTO_UDP, ip.Protocol)
				require.Zero(t, udpChecksumError(ip), "unfinished checksum on the wire")
			}
		})
	}
	_, err := Ping(ctx, ext.Netns, netip.MustParseAddr("10.244.1.2"))
	require.Error(t, err, "outside has no route to the pod CIDR")
}

// udpChecksumError is what a receiver's sum over a UDP datagram differs from zero by.
func udpChecksumError(ip OuterIP) uint16 {
	sum := append(ip.Src.AsSlice(), ip.Dst.AsSlice()...)
	sum = append(sum, 0, ip.Protocol, byte(len(ip.Payload)>>8), byte(len(ip.Payload)))
	if len(sum)%2 != 0 {
		panic("pseudo-header")
	}
	return internetChecksum(append(sum, ip.Payload...))
}

func TestUpRefusesWhatIsHalfThereAndDownRemovesIt(t *testing.T) {
	l := newTopology(t, 1)
	// A process that a crash left behind in a node's namespace, stopped and deaf to SIGTERM.
	cmd := exec.Command("sh", "-c", "trap '' TERM; while :; do sleep 1; done")
	require.NoError(t, InNetns(l.Nodes[0].Netns(), cmd.Start))
	go func() { _ = cmd.Wait() }()
	p, ok := findProcess(cmd.Process.Pid)
	require.True(t, ok)
	require.NoError(t, p.signal(unix.SIGSTOP))

	bin := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(bin, "overplaned"), []byte("#!/bin/sh\n"), 0o755))
	_, err := Up(context.Background(), Options{Name: testLab, Nodes: 1, Binaries: bin})
	require.ErrorContains(t, err, "half there")
	require.ErrorContains(t, err, "overplane lab down --name "+testLab)

	// Without its record, namespaces alone are recognised.
	require.NoError(t, os.RemoveAll(l.Dir()))
	_, err = Up(context.Background(), Options{Name: testLab, Nodes: 1, Binaries: bin})
	require.ErrorContains(t, err, "half there")

	require.NoError(t, Down(testLab))
	require.True(t, p.wait(time.Second), "the process in the namespace is gone")
}

func TestUpThatFailsTakesDownWhatItMade(t *testing.T) {
	if err := CheckRoot(); err != nil {
		t.Skip(err)
	}
	require.NoError(t, Down(testLab))
	bin := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(bin, "overplaned"), []byte("#!/bin/sh\necho no good reason\nexit 3\n"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(bin, "overplane-controller"), []byte("#!/bin/sh\necho no better one\nexit 4\n"), 0o755))
	for state, want := range map[string][2]string{StateFile: {"exit status 3", "no good reason"}, StateController: {"exit status 4", "no better one"}} {
		_, err := Up(context.Background(), Options{Name: testLab, Nodes: 2, Pods: 1, Binaries: bin, State: state})
		require.ErrorContains(t, err, want[0])
		require.ErrorContains(t, err, want[1], "the log says why")
		left, err := Leftovers(testLab)
		require.NoError(t, err)
		require.Empty(t, left)
	}
	_, err := Load(testLab)
	require.True(t, errors.Is(err, ErrNoLab))
}
