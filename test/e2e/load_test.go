package e2e

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// loads are how much TestTranslationUnderLoad does; OVERPLANE_E2E=full is what is promised of address translation.
type loads struct {
	cells       []cell
	apart       bool          // the families one after the other
	greed       time.Duration // of one pod
	floods      time.Duration // each of the others
	connections int           // of each family
	transfer    int64         // bytes
}

func loadsOfRun() loads {
	if !full() {
		return loads{
			cells: []cell{{"xdp-copy", "tap", 2}, {"plain", "veth", 2}},
			greed: 2 * time.Second, floods: time.Second / 2, connections: 1000, transfer: 128 << 20,
		}
	}
	full := loads{apart: true, greed: time.Minute, floods: 10 * time.Second, connections: 10000, transfer: 1 << 30}
	for _, c := range cells() {
		if c.workers == 2 {
			full.cells = append(full.cells, c)
		}
	}
	return full
}

// TestTranslationUnderLoad is one greedy pod, floods, many connections, and restarts under way, in cells of the matrix; always with two workers
// and an uplink of four queues, so that packets arrive at workers that do not own their sessions.
func TestTranslationUnderLoad(t *testing.T) {
	inCell(t)
	ls := loadsOfRun()
	var rows [][]string
	for _, c := range ls.cells {
		t.Run(c.String(), func(t *testing.T) {
			workersPossible(t, c.workers)
			l := newLab(t, lab.Options{Name: "ovptnat", Nodes: 1, Pods: 4, Uplink: c.uplink, PodPort: c.podPort, Workers: 2, Queues: 4})
			require.Equal(t, c.uplink, status(t, l.Nodes[0]).Uplink.Rung)
			groups := [][]int{{4, 6}}
			if ls.apart {
				groups = [][]int{{4}, {6}}
			}
			step := func(name string, families []int, check func(t *testing.T) string) {
				family := strings.Trim(strings.ReplaceAll(fmt.Sprint(families), " ", "+IPv"), "[]")
				r := []string{c.uplink, c.podPort, name, "IPv" + family, "skipped", ""}
				if !t.Run(fmt.Sprintf("%s/IPv%s", strings.ReplaceAll(name, " ", "_"), family), func(t *testing.T) { r[5], r[4] = check(t), "ok" }) {
					r[4] = "FAILED"
				}
				rows = append(rows, r)
			}
			for _, families := range groups {
				// First, since what the others leave behind takes ports and sessions for minutes.
				step("many connections", families, func(t *testing.T) string { return manyConnections(t, l, families, ls.connections) })
				step("restarts", families[:1], func(t *testing.T) string { return transferOverRestarts(t, l, families[0], ls.transfer) })
			}
			for _, families := range groups {
				step("greedy pod", families, func(t *testing.T) string { return oneGreedyPod(t, l, families, ls.greed) })
				step("SYN flood", families, func(t *testing.T) string { return oneFlood(t, l, families, ls.floods, fromPodToMany) })
				step("fragments, pod", families, func(t *testing.T) string { return oneFlood(t, l, families, ls.floods, fragmentsFromPod) })
				step("fragments, outside", families, func(t *testing.T) string { return oneFlood(t, l, families, ls.floods, fragmentsFromOutside) })
			}
		})
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "UPLINK\tPODS\tLOAD\tFAMILY\tRESULT\t")
	for _, r := range rows {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	_ = w.Flush()
	t.Log("\n" + b.String())
}

// farAddresses are n addresses of the host outside, which the first call gives it.
func farAddresses(t *testing.T, l *lab.Lab, family, n int) []netip.Addr {
	t.Helper()
	addr := netip.MustParseAddr(map[int]string{4: "198.51.100.100", 6: "2001:db8:100::100"}[family])
	var batch strings.Builder
	var all []netip.Addr
	for range n {
		all = append(all, addr)
		fmt.Fprintf(&batch, "addr replace %v/%d dev eth0%s\n", addr, map[int]int{4: 24, 6: 64}[family], map[int]string{4: "", 6: " nodad"}[family])
		addr = addr.Next()
	}
	path := t.TempDir() + "/addresses"
	require.NoError(t, os.WriteFile(path, []byte(batch.String()), 0o600))
	Exec(t, l.Ext(), "ip", "-batch", path)
	return all
}

const manyDestinations = 20

// manyConnections opens n connections of each family from four pods to twenty destinations, has them all at once, and uses each in both directions, twice.
func manyConnections(t *testing.T, l *lab.Lab, families []int, n int) string {
	requireDescriptors(t, n*len(families)+500)
	var dsts []netip.AddrPort
	for _, family := range families {
		dsts = append(dsts, startEchoServer(t, l, l.Nodes[0].Addr(family), farAddresses(t, l, family, manyDestinations))...)
	}
	node := l.Nodes[0]
	total := n * len(families)
	conns := make([]*net.TCPConn, total)
	defer func() {
		for _, c := range conns {
			if c != nil {
				c.Close()
			}
		}
	}()
	each := func(do func(i int) error) time.Duration {
		begin := time.Now()
		var next, failed atomic.Int64
		var first error
		var once sync.Once
		var wg sync.WaitGroup
		for range 128 {
			wg.Go(func() {
				for i := int(next.Add(1)) - 1; i < total; i = int(next.Add(1)) - 1 {
					if err := do(i); err != nil {
						failed.Add(1)
						once.Do(func() { first = err })
					}
				}
			})
		}
		wg.Wait()
		require.NoError(t, first, "%d of %d", failed.Load(), total)
		return time.Since(begin)
	}
	ctx := testContext(t)
	opening := each(func(i int) (err error) {
		pod := node.Pods[i%len(node.Pods)]
		conns[i], err = lab.DialTCP(ctx, pod.End(), dsts[i%len(dsts)])
		return err
	})
	for range 2 {
		each(func(i int) error {
			sent, got := []byte(fmt.Sprintf("connection %06d", i)), make([]byte, 17)
			_ = conns[i].SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := conns[i].Write(sent); err != nil {
				return err
			}
			if _, err := io.ReadFull(conns[i], got); err != nil {
				return err
			}
			if string(got) != string(sent) {
				return fmt.Errorf("connection %d got %q", i, got)
			}
			return nil
		})
	}
	return fmt.Sprintf("%d open to %d destinations, opened at %.0f/s", total, len(dsts), float64(total)/opening.Seconds())
}

// transferOverRestarts downloads from outside while the daemon is restarted twice and killed once.
func transferOverRestarts(t *testing.T, l *lab.Lab, family int, size int64) string {
	ctx := testContext(t)
	n1 := l.Nodes[0]
	server, err := lab.ListenTCP(l.ExtEnd(), family)
	require.NoError(t, err)
	defer server.Close()
	sent := make(chan [sha256.Size]byte, 1)
	go func() {
		defer close(sent)
		c, err := server.AcceptTCP()
		if err != nil {
			return
		}
		defer c.Close()
		h := sha256.New()
		block := make([]byte, 1<<20)
		_, _ = rand.Read(block)
		for left := size; left > 0; left -= int64(len(block)) {
			block[left>>20&0xfffff]++ // no two blocks are the same
			h.Write(block)
			_ = c.SetWriteDeadline(time.Now().Add(30 * time.Second))
			if _, err := c.Write(block); err != nil {
				return
			}
		}
		sent <- [sha256.Size]byte(h.Sum(nil))
	}()
	c, err := lab.DialTCP(ctx, n1.Pods[0].End(), server.Addr().(*net.TCPAddr).AddrPort())
	require.NoError(t, err)
	defer c.Close()
	begin, h, got := time.Now(), sha256.New(), int64(0)
	buf := make([]byte, 256<<10)
	events := []func() error{n1.Stop, n1.Stop, n1.Kill}
	var under chan error // the event under way
	for {
		if len(events) > 0 && got >= size/4*int64(4-len(events)) {
			if under != nil {
				require.NoError(t, <-under)
			}
			end := events[0]
			events, under = events[1:], make(chan error, 1)
			go func() { under <- errors.Join(end(), n1.Start(ctx), n1.WaitProgrammed(ctx)) }()
		}
		_ = c.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, err := c.Read(buf)
		h.Write(buf[:n])
		got += int64(n)
		if err == io.EOF {
			break
		}
		require.NoError(t, err, "after %d of %d bytes", got, size)
	}
	require.NoError(t, <-under)
	require.Empty(t, events)
	require.Equal(t, size, got)
	require.Equal(t, <-sent, [sha256.Size]byte(h.Sum(nil)))
	return fmt.Sprintf("%d MiB in %.1f s", size>>20, time.Since(begin).Seconds())
}

// oneGreedyPod has one pod open sessions towards what two others use, whose every new connection must succeed.
func oneGreedyPod(t *testing.T, l *lab.Lab, families []int, span time.Duration) string {
	n1 := l.Nodes[0]
	w, vs := podWire(t, n1.Pods[3]), newVictims(t, l, families)
	var makers []func(int) []byte
	for _, family := range families {
		// Another port of the same host: it may treat as it likes those that connect to a port that is flooded.
		target, err := lab.ListenTCP(l.ExtEnd(), family)
		require.NoError(t, err)
		defer target.Close()
		makers = append(makers, greed(t, w, n1.Pods[3].Addr(family), l.ExtEnd().Addr(family), target.Addr().(*net.TCPAddr).AddrPort().Port()))
	}
	refused := func() (sum uint64) {
		for _, reason := range []string{"nat_no_port", "nat_session_limit", "nat_half_open_limit", "nat_table_full"} {
			sum += dropsOf(t, n1, n1.Pods[3].Name(), reason)
		}
		return sum
	}
	before, memory := refused(), statusField(t, n1.Pid(), "RssAnon")
	rate := during(t, w, interleave(makers), func() { vs.connect(span) })
	if span >= time.Minute {
		require.Greater(t, refused(), before, "the greedy pod met a limit")
	}
	require.Less(t, statusField(t, n1.Pid(), "RssAnon")-memory, 64<<10, "kilobytes more than before")
	for _, pod := range n1.Pods[:3] {
		for _, reason := range []string{"nat_no_port", "nat_session_limit", "nat_half_open_limit", "nat_table_full"} {
			require.Zero(t, dropsOf(t, n1, pod.Name(), reason), "%s of %s", reason, pod.Name())
		}
	}
	return fmt.Sprintf("%s; %d k refused", vs.said(rate), (refused()-before)/1000)
}

// oneFlood is the same with another flood.
func oneFlood(t *testing.T, l *lab.Lab, families []int, span time.Duration, make func(t *testing.T, l *lab.Lab, family int) (*wire, func(int) []byte)) string {
	var w *wire
	var makers []func(int) []byte
	for _, family := range families {
		var m func(int) []byte
		w, m = make(t, l, family)
		makers = append(makers, m)
	}
	vs := newVictims(t, l, families)
	memory := statusField(t, l.Nodes[0].Pid(), "RssAnon")
	rate := during(t, w, interleave(makers), func() { vs.connect(span) })
	require.Less(t, statusField(t, l.Nodes[0].Pid(), "RssAnon")-memory, 64<<10, "kilobytes more than before")
	return vs.said(rate)
}

func fromPodToMany(t *testing.T, l *lab.Lab, family int) (*wire, func(int) []byte) {
	pod := l.Nodes[0].Pods[3]
	w := podWire(t, pod)
	return w, synFlood(t, w, pod.Addr(family), farAddresses(t, l, family, manyDestinations))
}

func fragmentsFromPod(t *testing.T, l *lab.Lab, family int) (*wire, func(int) []byte) {
	pod := l.Nodes[0].Pods[3]
	w := podWire(t, pod)
	return w, fragmentFlood(t, w, []netip.Addr{pod.Addr(family)}, l.ExtEnd().Addr(family))
}

func fragmentsFromOutside(t *testing.T, l *lab.Lab, family int) (*wire, func(int) []byte) {
	w := extWire(t, l)
	return w, fragmentFlood(t, w, farAddresses(t, l, family, 2*manyDestinations), l.Nodes[0].Addr(family))
}
