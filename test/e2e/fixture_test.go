package e2e

import (
	"context"
	"debug/buildinfo"
	"flag"
	"fmt"
	"hash/fnv"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// binaries is the folder with the programs under test.
var binaries string

var families = []int{4, 6}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if len(os.Args) > 3 && os.Args[1] == denyArgument {
		fmt.Fprintln(os.Stderr, denyAndExec(os.Args[2:]))
		return 1
	}
	if len(os.Args) > 2 && os.Args[1] == echoArgument {
		if err := serveEcho(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	flag.Parse()
	if lab.CheckRoot() != nil {
		return m.Run() // every test skips
	}
	if os.Getenv("OVERPLANE_BIN") != "" {
		dir, err := lab.FindBinaries()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		binaries = dir
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "overplane-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	build := exec.Command("go", "build", "-o", dir+"/", "../../cmd/...")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the programs under test: %v\n%s", err, out)
		return 1
	}
	binaries = dir
	return m.Run()
}

// labName is the name of a test's lab: the same for its subtests, the same in every run, so that what a crash left is found, and another one than
// other tests', which may run at the same time.
func labName(t *testing.T) string {
	top, _, _ := strings.Cut(t.Name(), "/")
	h := fnv.New32a()
	_, _ = h.Write([]byte(os.Getenv(cellVariable) + top))
	return fmt.Sprintf("ovpt%04x", uint16(h.Sum32()^h.Sum32()>>16))
}

// labsUp is the name of the test that each lab of this process belongs to, by the lab's name.
var labsUp sync.Map

// newLab makes a lab, which is one of state files unless o says that it has a controller, and takes it down at the end of the test; nothing may be left of it then. When the test failed, the daemons' logs
// are part of its output.
func newLab(t *testing.T, o lab.Options) *lab.Lab {
	t.Helper()
	if err := lab.CheckRoot(); err != nil {
		t.Skip(err)
	}
	if o.Name == "" {
		o.Name = labName(t)
	}
	require.True(t, strings.HasPrefix(o.Name, "ovpt"), "a lab of the tests must not be a user's")
	o.Binaries = binaries
	if o.State == "" {
		o.State = lab.StateFile
	}
	cellDefaults(t, &o)
	if len(o.Wires) > 0 && o.Workers > 1 {
		t.Skip("the machine's NICs have one queue each, which is enough for one worker")
	}
	if other, taken := labsUp.LoadOrStore(o.Name, t.Name()); taken { // taking it down first would take it from under a test that runs beside this one
		t.Fatalf("lab %s is %v's: leave Options.Name empty", o.Name, other)
	}
	require.NoError(t, lab.Down(o.Name), "removing what an earlier run left")
	t.Cleanup(func() {
		defer labsUp.Delete(o.Name)
		require.NoError(t, lab.Down(o.Name))
		left, err := lab.Leftovers(o.Name)
		require.NoError(t, err)
		require.Empty(t, left, "left behind")
	})
	l, err := lab.Up(testContext(t), o)
	require.NoError(t, err)
	t.Cleanup(func() {
		if l.Controller != nil {
			log, err := os.ReadFile(l.ControllerLog())
			require.NoError(t, err)
			require.NotContains(t, string(log), "panic:")
			if t.Failed() {
				t.Logf("log of the controller:\n%s", log[max(0, len(log)-4000):])
			}
		}
		for _, n := range l.Nodes {
			log, err := os.ReadFile(n.LogPath())
			require.NoError(t, err)
			for _, bad := range []string{"DATA RACE", "panic:", "fatal error:", "SIGSEGV"} {
				require.NotContains(t, string(log), bad, "log of %s", n.Name())
			}
		}
		if t.Failed() {
			for _, n := range l.Nodes {
				t.Logf("log of %s:\n%s", n.Name(), n.LogTail(15))
			}
		}
	})
	if len(o.Wires) > 0 {
		for _, n := range l.Nodes {
			requireSockets(t, n, o.Uplink)
		}
	}
	return l
}

// testContext ends shortly before the test's deadline, so that clean-ups still run.
func testContext(t *testing.T) context.Context {
	t.Helper()
	deadline, ok := t.Deadline()
	if !ok {
		return context.Background()
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline.Add(-15*time.Second))
	t.Cleanup(cancel)
	return ctx
}

// eachFamily runs a subtest for IPv4 and one for IPv6.
func eachFamily(t *testing.T, check func(t *testing.T, family int)) {
	t.Helper()
	for _, family := range families {
		t.Run(fmt.Sprintf("IPv%d", family), func(t *testing.T) { check(t, family) })
	}
}

// packages are the tools' packages in Debian.
var packages = map[string]string{
	"ping": "iputils-ping", "tracepath": "iputils-tracepath", "setpriv": "util-linux", "ip": "iproute2", "tc": "iproute2", "ss": "iproute2",
	"turnserver": "coturn", "turnutils_natdiscovery": "coturn", "nping": "nmap", "hping3": "hping3",
	"traceroute": "traceroute", "iperf3": "iperf3", "tcpdump": "tcpdump", "ethtool": "ethtool",
}

// tool is the path of a program from Debian. Without it the test skips, in CI it fails.
func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err != nil {
			path, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	if err != nil {
		missing := name + " is not installed"
		if p := packages[name]; p != "" {
			missing += ": apt-get install --no-install-recommends " + p
		}
		if os.Getenv("CI") != "" {
			t.Fatal(missing)
		}
		t.Skip(missing)
	}
	return path
}

// Exec runs a program in a namespace and returns what it wrote; it must succeed.
func Exec(t *testing.T, netns string, argv ...string) string {
	t.Helper()
	out, err := tryExec(t, netns, argv...)
	require.NoError(t, err, "%s: %s\n%s", netns, strings.Join(argv, " "), out)
	return out
}

func tryExec(t *testing.T, netns string, argv ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(testContext(t), tool(t, argv[0]), argv[1:]...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := lab.InNetns(netns, cmd.Start); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// requirePing checks that one end reaches another with ping.
func requirePing(t *testing.T, from, to lab.End, family int) {
	t.Helper()
	_, err := lab.Ping(testContext(t), from.Netns, to.Addr(family))
	require.NoError(t, err, "%s to %s, IPv%d", from.Name, to.Name, family)
}

// requireReachable checks ping, TCP and UDP from one end to another, both families.
func requireReachable(t *testing.T, from, to lab.End) {
	t.Helper()
	for _, family := range families {
		requirePing(t, from, to, family)
		require.NoError(t, lab.EchoTCP(testContext(t), from, to, family), "TCP from %s to %s, IPv%d", from.Name, to.Name, family)
		_, err := lab.EchoUDP(testContext(t), from, to, family, nil)
		require.NoError(t, err, "UDP from %s to %s, IPv%d", from.Name, to.Name, family)
	}
}

// requireUnreachable checks that a few echo requests get no echo reply.
func requireUnreachable(t *testing.T, from lab.End, to netip.Addr) {
	t.Helper()
	p, err := lab.NewPinger(from.Netns, to)
	require.NoError(t, err)
	defer p.Close()
	for range 2 {
		_, _, err := p.Once(56, 300*time.Millisecond)
		require.Error(t, err, "%s reaches %v", from.Name, to)
	}
}

// requireProofs runs everything that `overplane lab run` shows.
func requireProofs(t *testing.T, l *lab.Lab) {
	t.Helper()
	for _, p := range lab.Proofs() {
		t.Run(strings.ReplaceAll(p.Name, " ", "_"), func(t *testing.T) {
			eachFamily(t, func(t *testing.T, family int) {
				if strings.Contains(p.Name, "64 MiB") && emulated() {
					_, err := lab.Transfer(testContext(t), l.Nodes[0].Pods[0].End(), l.Nodes[1].Pods[0].End(), family, bulk(64<<20))
					require.NoError(t, err)
					return
				}
				detail, err := p.Check(testContext(t), l, family)
				require.NoError(t, err)
				t.Log(detail)
			})
		})
	}
}

// status asks a daemon for its status.
func status(t *testing.T, n *lab.Node) *controlv1.GetStatusResponse {
	t.Helper()
	s, err := n.Status(testContext(t))
	require.NoError(t, err)
	return s
}

// dropsOf is how many packets died of a reason at a port.
func dropsOf(t *testing.T, n *lab.Node, port, reason string) uint64 {
	t.Helper()
	count, err := n.DropsOf(testContext(t), port, reason)
	require.NoError(t, err)
	return count
}

// openFiles is how many descriptors a process has.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	require.NoError(t, err)
	return len(entries)
}

// statusField reads a number from /proc/<pid>/status, in the file's unit.
func statusField(t *testing.T, pid int, name string) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, name+":"); ok {
			var v int
			_, err := fmt.Sscan(rest, &v)
			require.NoError(t, err)
			return v
		}
	}
	t.Fatalf("no %s in /proc/%d/status", name, pid)
	return 0
}

// builtWithRaceDetector tells from the daemon's build settings.
func builtWithRaceDetector(t *testing.T) bool {
	t.Helper()
	info, err := buildinfo.ReadFile(filepath.Join(binaries, "overplaned"))
	require.NoError(t, err)
	return slices.ContainsFunc(info.Settings, func(s debug.BuildSetting) bool { return s.Key == "-race" && s.Value == "true" })
}

// workersPossible skips what needs more workers than cores are worth trying.
func workersPossible(t *testing.T, workers int) {
	t.Helper()
	if workers > 2*runtime.NumCPU() {
		t.Skipf("%d workers on %d cores", workers, runtime.NumCPU())
	}
}
