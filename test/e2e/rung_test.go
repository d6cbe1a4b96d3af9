package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// The matrix: every way of driving the uplink, with every kind of pod port, with one worker and with two. TestRungs takes each cell through a reduced set of proofs.
// OVERPLANE_E2E=full takes each through the whole suite first, which takes some minutes a cell: go test -timeout 60m.
const (
	fullVariable = "OVERPLANE_E2E" // "full"
	cellVariable = "OVERPLANE_E2E_CELL"
)

// full says whether tests are to do all they can.
func full() bool { return os.Getenv(fullVariable) == "full" }

// cell is one entry of the matrix.
type cell struct {
	uplink, podPort string
	workers         int
}

func (c cell) String() string { return fmt.Sprintf("%s/%s/workers=%d", c.uplink, c.podPort, c.workers) }

func cells() []cell {
	var all []cell
	for _, uplink := range []string{"xdp-copy", "tun", "plain"} {
		for _, podPort := range podPorts {
			for workers := 1; workers <= 2; workers++ {
				all = append(all, cell{uplink, podPort, workers})
			}
		}
	}
	return all
}

// podPorts are the kinds of pod ports that the matrix has.
var podPorts = []string{"tap", "veth"}

// cellDefaults are what a lab of this run of the suite is made of where its test does not say.
func cellDefaults(t *testing.T, o *lab.Options) {
	t.Helper()
	parts := strings.Split(os.Getenv(cellVariable), "/")
	if len(parts) != 3 {
		return
	}
	if o.Uplink == "" {
		o.Uplink = parts[0]
	}
	if o.PodPort == "" {
		o.PodPort = parts[1]
	}
	if o.Wires == nil {
		o.Wires = wires(t)
	}
	if o.Workers == 0 {
		o.Workers, _ = strconv.Atoi(strings.TrimPrefix(parts[2], "workers="))
	}
}

// inCell skips tests that choose their cells themselves when the suite runs for one.
func inCell(t *testing.T) {
	t.Helper()
	if os.Getenv(cellVariable) != "" {
		t.Skip("the suite runs for one cell of the matrix; this test has cells of its own")
	}
}

// row is a line of the table at the end.
type row struct {
	cell    cell
	verdict string
	goodput [2]float64 // Gbit/s, IPv4 and IPv6
}

func printRows(t *testing.T, rows []row) {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "UPLINK\tPODS\tWORKERS\tRESULT\tTCP IPV4\tTCP IPV6")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s", r.cell.uplink, r.cell.podPort, r.cell.workers, r.verdict)
		for _, g := range r.goodput {
			if g == 0 {
				fmt.Fprint(w, "\t-")
				continue
			}
			fmt.Fprintf(w, "\t%.2f Gbit/s", g)
		}
		fmt.Fprintln(w)
	}
	_ = w.Flush()
	t.Log("\n" + b.String())
}

func TestRungs(t *testing.T) {
	t.Parallel()
	inCell(t)
	if full() {
		t.Skip("TestWholeSuiteOnEveryRung does more")
	}
	var rows []row
	for _, c := range cells() {
		r := row{cell: c, verdict: "skipped"}
		t.Run(c.String(), func(t *testing.T) {
			workersPossible(t, c.workers)
			r.verdict = "FAILED"
			r.goodput = proveCell(t, c)
			r.verdict = "ok"
		})
		rows = append(rows, r)
	}
	printRows(t, rows)
}

// proveCell is what TestRungs does with a cell.
func proveCell(t *testing.T, c cell) (goodput [2]float64) {
	l := newLab(t, lab.Options{Nodes: 2, Pods: 2, Uplink: c.uplink, PodPort: c.podPort, Workers: c.workers})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	s := status(t, n1)
	require.Equal(t, c.uplink, s.Uplink.Rung)
	require.EqualValues(t, c.workers, s.Uplink.Queues)
	var forwarded [2]uint64
	for i, family := range families {
		var err error
		forwarded[i], err = l.KernelForwarded(family)
		require.NoError(t, err)
	}
	frames := freeFrames(t, l)
	requireProofs(t, l)
	for i, family := range families {
		goodput[i] = measureTCP(t, n1.Pods[0].End(), n2.Pods[0].End(), family, 300*time.Millisecond)
		now, err := l.KernelForwarded(family)
		require.NoError(t, err)
		require.Equal(t, forwarded[i], now, "the nodes' kernels forwarded packets")
	}
	requireNoLeak(t, l, frames)

	// Away and back: the node's own traffic goes on, the pods' is dropped meanwhile and goes on afterwards.
	nodeFlow, podFlow := openFlow(t, n1.End(), n2.End(), 4), openFlow(t, n1.Pods[0].End(), n2.Pods[0].End(), 6)
	away := n2.Stop
	if c.workers > 1 {
		away = n2.Kill
	}
	require.NoError(t, away())
	nodeFlow.requireAlive(t, 5*time.Second)
	requireUnreachable(t, n1.Pods[0].End(), n2.Pods[0].IPv4())
	require.NoError(t, n2.Start(testContext(t)))
	require.NoError(t, n2.WaitProgrammed(testContext(t)))
	podFlow.requireAlive(t, 15*time.Second)
	if c.workers > 1 {
		return goodput
	}
	// Hung: longer than the heartbeat's limit.
	require.NoError(t, n2.Signal(unix.SIGSTOP))
	time.Sleep(2500 * time.Millisecond)
	nodeFlow.requireAlive(t, 5*time.Second)
	requireUnreachable(t, n1.Pods[0].End(), n2.Pods[0].IPv4())
	require.NoError(t, n2.Signal(unix.SIGCONT))
	podFlow.requireAlive(t, 15*time.Second)
	require.Positive(t, status(t, n2).Uplink.Steering["dropped_stale"])
	return goodput
}

// measureTCP sends for a while by one connection and returns Gbit/s as the receiver saw them. Congestion control is cubic, whatever the machine's default is.
func measureTCP(t *testing.T, from, to lab.End, family int, span time.Duration) float64 {
	t.Helper()
	l, err := lab.ListenTCP(to, family)
	require.NoError(t, err)
	defer l.Close()
	c, err := lab.DialTCP(testContext(t), from, l.Addr().(*net.TCPAddr).AddrPort())
	require.NoError(t, err)
	defer c.Close()
	raw, err := c.SyscallConn()
	require.NoError(t, err)
	_ = raw.Control(func(fd uintptr) { _ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic") })
	server, err := l.AcceptTCP()
	require.NoError(t, err)
	defer server.Close()
	go func() {
		b := make([]byte, 256<<10)
		for {
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	}()
	b, total := make([]byte, 1<<20), 0
	require.NoError(t, server.SetReadDeadline(time.Now().Add(span+10*time.Second)))
	begin := time.Now()
	for time.Since(begin) < span {
		n, err := server.Read(b)
		require.NoError(t, err)
		total += n
	}
	return float64(total) * 8 / time.Since(begin).Seconds() / 1e9
}

// TestWholeSuiteOnEveryRung runs this binary again for each cell.
func TestWholeSuiteOnEveryRung(t *testing.T) {
	inCell(t)
	if !full() {
		t.Skipf("takes minutes for each of %d cells: set %s=full", len(cells()), fullVariable)
	}
	if err := lab.CheckRoot(); err != nil {
		t.Skip(err)
	}
	self, err := os.Executable()
	require.NoError(t, err)
	var rows []row
	for _, c := range cells() {
		r := row{cell: c, verdict: "FAILED"}
		t.Run(c.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(testContext(t), 20*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, self, "-test.v", "-test.timeout=19m")
			cmd.Env = append(os.Environ(), fullVariable+"=", cellVariable+"="+c.String(), "OVERPLANE_BIN="+binaries)
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, "%s", out)
			r.goodput = proveCell(t, c)
			r.verdict = "ok"
		})
		rows = append(rows, r)
	}
	printRows(t, rows)
}

// A GSO frame crosses two nodes whole where the links between them take it whole.
func TestGSOFramesCrossWhole(t *testing.T) {
	t.Parallel()
	inCell(t)
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1, Uplink: "tun"})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	from, to := n1.Pods[0], n2.Pods[0]
	for _, end := range []struct{ netns, dev string }{
		{l.Gateway(), "br0"}, {l.Gateway(), n1.Name()}, {l.Gateway(), n2.Name()}, {n1.Netns(), "eth0"}, {n2.Netns(), "eth0"},
	} {
		Exec(t, end.netns, "ethtool", "-K", end.dev, "tx", "on", "sg", "on", "tso", "on", "gso", "on")
	}
	eachFamily(t, func(t *testing.T, family int) {
		const large = 60000
		whole := func(f []byte) bool { return len(f) > large }
		wire, err := lab.StartCapture(l.Gateway(), whole)
		require.NoError(t, err)
		defer wire.Stop()
		pod, err := lab.StartCapture(to.Netns(), whole)
		require.NoError(t, err)
		defer pod.Stop()
		before := uplinkCounters(t, n1)
		gbit := measureTCP(t, from.End(), to.End(), family, 500*time.Millisecond)
		after := uplinkCounters(t, n1)
		sent, packets := after.Frames-before.Frames, after.Packets-before.Packets
		t.Logf("%.1f Gbit/s; n1 sent %d frames that stand for %d packets", gbit, sent, packets)
		require.Greater(t, packets, 10*sent, "frames are cut on the way")

		hopLimit := func(where string, frames []lab.Frame) uint8 {
			var limit uint8
			seen := 0
			for _, f := range frames {
				ip, ok := lab.ParseOuterIP(f.Bytes)
				if !ok || ip.Src != from.Addr(family) || ip.Dst != to.Addr(family) {
					continue
				}
				at := map[int]int{4: 14 + 8, 6: 14 + 7}[family]
				if seen++; seen > 1 {
					require.Equal(t, limit, f.Bytes[at])
				}
				limit = f.Bytes[at]
			}
			require.Positive(t, seen, "no frame of over %d bytes was seen %s", large, where)
			return limit
		}
		require.Equal(t, uint8(63), hopLimit("on the wire", wire.Frames()), "n1 takes one hop")
		require.Equal(t, uint8(62), hopLimit("in the pod", pod.Frames()), "n2 takes one more")
	})
}

// uplinkCounters is what a node sent by its uplink.
func uplinkCounters(t *testing.T, n *lab.Node) *controlv1.Traffic {
	t.Helper()
	sum := &controlv1.Traffic{}
	require.NoError(t, n.Call(testContext(t), func(ctx context.Context, c controlv1.LocalServiceClient) error {
		r, err := c.GetCounters(ctx, &controlv1.GetCountersRequest{})
		for _, p := range r.GetPorts() {
			if p.Kind == "uplink" {
				sum.Frames += p.Out.Frames
				sum.Packets += p.Out.Packets
			}
		}
		return err
	}))
	return sum
}
