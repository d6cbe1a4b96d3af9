package agent

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// These tests run the real daemon on real devices, in network namespaces of their own:
//
//	ovpagt-n1-p1 ─ tap ─ [overplaned] ─ ovpagt-n1:eth0 ── veth ── eth0:ovpagt-n2 ─ [overplaned] ─ tap ─ ovpagt-n2-p1
//
// They take root and /dev/net/tun. The prefix has the test process's id besides, so that two of them do not meet: ovpagt1234-n1.
const testProgram = "ovpagt"

var testPrefix = fmt.Sprintf("%s%d-", testProgram, os.Getpid())

// machine is the two nodes.
type machine struct {
	t   *testing.T
	bin string
	dir string
}

// buildDir holds the binary under test, once it was built.
var buildDir string

func TestMain(m *testing.M) {
	status := m.Run()
	if buildDir != "" {
		_ = os.RemoveAll(buildDir)
	}
	os.Exit(status)
}

var buildDaemon = sync.OnceValues(func() (string, error) {
	var err error
	if buildDir, err = os.MkdirTemp("", "ovpagt"); err != nil {
		return "", err
	}
	bin := filepath.Join(buildDir, "overplaned")
	out, err := exec.Command("go", "build", "-o", bin, "../../cmd/overplaned").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w: %s", err, out)
	}
	return bin, nil
})

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes network namespaces, TAP devices and AF_XDP sockets")
	}
	if testing.Short() {
		t.Skip("runs real daemons, which are programs of their own")
	}
	require.NoError(t, checkTun(tunPath))
	bin, err := buildDaemon()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "ovpagt")
	require.NoError(t, err)
	m := &machine{t: t, bin: bin, dir: dir}
	m.sweep() // what a crash left
	bpf := filepath.Join(dir, "bpf")
	require.NoError(t, os.Mkdir(bpf, 0o700))
	require.NoError(t, unix.Mount("bpf", bpf, "bpf", 0, ""))
	t.Cleanup(func() {
		m.sweep()
		require.NoError(t, unix.Unmount(bpf, unix.MNT_DETACH)) // the pins go with it
		_ = os.RemoveAll(dir)
	})
	for i := range 2 {
		m.ip("netns", "add", m.ns(i+1))
	}
	m.ip("-n", m.ns(1), "link", "add", "eth0", "address", "02:00:00:00:00:01", "numrxqueues", "2", "numtxqueues", "2",
		"type", "veth", "peer", "name", "eth0", "address", "02:00:00:00:00:02", "numrxqueues", "2", "numtxqueues", "2", "netns", m.ns(2))
	for i := 1; i <= 2; i++ {
		m.uplinkUp(i)
		require.NoError(t, os.Mkdir(m.path(i), 0o755))
	}
	return m
}

func (m *machine) uplinkUp(i int) {
	m.ip("-n", m.ns(i), "link", "set", "lo", "up")
	m.ip("-n", m.ns(i), "addr", "replace", fmt.Sprintf("10.240.0.1%d/24", i), "dev", "eth0")
	m.ip("-n", m.ns(i), "addr", "replace", fmt.Sprintf("fd00:240::1%d/64", i), "dev", "eth0", "nodad")
	m.ip("-n", m.ns(i), "link", "set", "eth0", "up")
	m.in(m.ns(i), "ethtool", "-K", "eth0", "tx", "off") // an AF_XDP receiver sees unfinished checksums otherwise
}

func (m *machine) ns(i int) string        { return fmt.Sprintf("%sn%d", testPrefix, i) }
func (m *machine) podNS(i, p int) string  { return fmt.Sprintf("%sn%d-p%d", testPrefix, i, p) }
func (m *machine) path(i int) string      { return filepath.Join(m.dir, fmt.Sprintf("n%d", i)) }
func (m *machine) bpf(i int) string       { return filepath.Join(m.dir, "bpf", fmt.Sprintf("n%d", i)) }
func netnsPath(name string) string        { return "/run/netns/" + name }
func (m *machine) stateFile(i int) string { return filepath.Join(m.path(i), "state.json") }

// sweep removes this process's namespaces, and those of processes that are gone.
func (m *machine) sweep() {
	entries, _ := os.ReadDir("/run/netns")
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), testProgram)
		pid, _, numbered := strings.Cut(rest, "-")
		if !ours || !numbered {
			continue
		}
		if _, err := os.Stat(filepath.Join("/proc", pid)); pid == strconv.Itoa(os.Getpid()) || os.IsNotExist(err) {
			_ = exec.Command("ip", "netns", "del", e.Name()).Run()
		}
	}
}

func (m *machine) ip(args ...string) {
	m.t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	require.NoError(m.t, err, "ip %s: %s", strings.Join(args, " "), out)
}

// command runs in a network namespace but keeps the mounts, so that the BPF file system stays visible (ip netns exec mounts another /sys).
func (m *machine) command(ns string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"--net=" + netnsPath(ns)}, args...)...)
}

func (m *machine) in(ns string, args ...string) string {
	m.t.Helper()
	out, err := m.command(ns, args...).CombinedOutput()
	require.NoError(m.t, err, "in %s: %s: %s", ns, strings.Join(args, " "), out)
	return string(out)
}

func (m *machine) ping(ns, to string) error {
	out, err := m.command(ns, "ping", "-c", "1", "-W", "1", to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("in %s: ping %s: %w: %s", ns, to, err, out)
	}
	return nil
}

// reaches waits until a ping is answered.
func (m *machine) reaches(ns, to string) {
	m.t.Helper()
	var err error
	for range 8 {
		if err = m.ping(ns, to); err == nil {
			return
		}
	}
	require.NoError(m.t, err)
}

// state is the desired state of node i.
func (m *machine) state(i int) *controlv1.NodeState {
	s := &controlv1.NodeState{
		Node: fmt.Sprintf("n%d", i), Version: &controlv1.Version{Incarnation: "test", Revision: 1},
		Pools:     []*controlv1.Pool{{Cidr: "10.244.0.0/16", BlockPrefixLength: 24}, {Cidr: "fd12:3456:789a::/64", BlockPrefixLength: 80}},
		OwnBlocks: []*controlv1.OwnBlock{{Cidr: fmt.Sprintf("10.244.%d.0/24", i)}, {Cidr: fmt.Sprintf("fd12:3456:789a:0:%d::/80", i)}},
	}
	for j := 1; j <= 2; j++ {
		name := fmt.Sprintf("n%d", j)
		s.Members = append(s.Members, &controlv1.Member{
			Name: name, Ipv4: fmt.Sprintf("10.240.0.1%d", j), Ipv6: fmt.Sprintf("fd00:240::1%d", j), Mac: fmt.Sprintf("02:00:00:00:00:0%d", j),
		})
		if j != i {
			s.Routes = append(s.Routes, &controlv1.Route{Prefix: fmt.Sprintf("10.244.%d.0/24", j), Target: &controlv1.Route_Node{Node: name}},
				&controlv1.Route{Prefix: fmt.Sprintf("fd12:3456:789a:0:%d::/80", j), Target: &controlv1.Route_Node{Node: name}})
		}
	}
	api.Seal(s)
	return s
}

// daemon is one running overplaned.
type daemon struct {
	m      *machine
	i      int
	cmd    *exec.Cmd
	log    *syncBuffer
	ended  chan error
	client controlv1.LocalServiceClient
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func (m *machine) daemonCommand(i int, settings ...string) *exec.Cmd {
	cmd := m.command(m.ns(i), m.bin)
	cmd.Env = append(os.Environ(), append([]string{
		fmt.Sprintf("OVERPLANE_NODE_NAME=n%d", i), "OVERPLANE_UPLINK=eth0", "OVERPLANE_STATE_DIR=" + filepath.Join(m.path(i), "state"),
		"OVERPLANE_STATE_FILE=" + m.stateFile(i), "OVERPLANE_SOCKET=" + filepath.Join(m.path(i), "sock"), "OVERPLANE_BPF_DIR=" + m.bpf(i),
	}, settings...)...)
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// start runs node i's daemon and waits until it answers.
func (m *machine) start(i int, settings ...string) *daemon {
	m.t.Helper()
	d := &daemon{m: m, i: i, cmd: m.daemonCommand(i, settings...), log: &syncBuffer{}, ended: make(chan error, 1)}
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	started := make(chan error)
	go func() { // Pdeathsig is sent when the thread that started the process ends: keep it
		runtime.LockOSThread()
		err := d.cmd.Start()
		started <- err
		if err == nil {
			d.ended <- d.cmd.Wait()
		}
	}()
	require.NoError(m.t, <-started)
	m.t.Cleanup(func() {
		_ = d.cmd.Process.Kill()
		select {
		case <-d.ended:
		case <-time.After(5 * time.Second):
		}
		if m.t.Failed() {
			m.t.Logf("log of n%d:\n%s", i, d.log)
		}
	})
	conn, err := grpc.NewClient("unix:"+filepath.Join(m.path(i), "sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	require.NoError(m.t, err)
	m.t.Cleanup(func() { _ = conn.Close() })
	d.client = controlv1.NewLocalServiceClient(conn)
	ctx, cancel := context.WithTimeout(m.t.Context(), 20*time.Second)
	defer cancel()
	_, err = d.client.GetStatus(ctx, &controlv1.GetStatusRequest{}, grpc.WaitForReady(true))
	require.NoError(m.t, err, "the daemon does not answer:\n%s", d.log)
	return d
}

// end sends a signal and waits for the process to be gone.
func (d *daemon) end(sig unix.Signal) error {
	d.m.t.Helper()
	require.NoError(d.m.t, d.cmd.Process.Signal(sig))
	select {
	case err := <-d.ended:
		d.ended <- err
		return err
	case <-time.After(10 * time.Second):
		d.m.t.Fatal("the daemon does not end")
		return nil
	}
}

func (d *daemon) attach(p int) *controlv1.Pod {
	d.m.t.Helper()
	r, err := d.client.AttachPod(d.m.t.Context(), &controlv1.AttachPodRequest{
		Name: fmt.Sprintf("p%d", p), Netns: netnsPath(d.m.podNS(d.i, p)), Ipv4: fmt.Sprintf("10.244.%d.%d", d.i, p+1), Ipv6: fmt.Sprintf("fd12:3456:789a:0:%d::%x", d.i, p+1),
	})
	require.NoError(d.m.t, err)
	return r.GetPod()
}

func (d *daemon) status() *controlv1.GetStatusResponse {
	d.m.t.Helper()
	s, err := d.client.GetStatus(d.m.t.Context(), &controlv1.GetStatusRequest{}, grpc.WaitForReady(true))
	require.NoError(d.m.t, err)
	return s
}

func (d *daemon) eventually(what string, f func(*controlv1.GetStatusResponse) bool) {
	d.m.t.Helper()
	var last *controlv1.GetStatusResponse
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if last = d.status(); f(last) {
			return
		}
	}
	d.m.t.Fatalf("%s: problems are %q\n%s", what, last.GetProblems(), d.log)
}

type statusResponse = controlv1.GetStatusResponse

func ready(s *statusResponse) bool { return s.GetReady() }

// pair starts both nodes with a pod each.
func pair(t *testing.T) (*machine, *daemon, *daemon) {
	m := newMachine(t)
	var d [3]*daemon
	for i := 1; i <= 2; i++ {
		require.NoError(t, api.WriteFile(m.stateFile(i), m.state(i)))
		m.ip("netns", "add", m.podNS(i, 1))
		d[i] = m.start(i)
		d[i].attach(1)
	}
	return m, d[1], d[2]
}

func TestRealDaemonsForwardAndRestartUnderTheirPods(t *testing.T) {
	m, d1, d2 := pair(t)
	require.Empty(t, d1.status().GetProblems())
	require.Equal(t, "xdp-copy", d1.status().GetUplink().GetRung())
	all := func() {
		t.Helper()
		for _, to := range []string{"10.244.2.2", "fd12:3456:789a:0:2::2"} {
			m.reaches(m.podNS(1, 1), to) // pod to pod
			m.reaches(m.ns(1), to)       // node to remote pod
			m.reaches(m.ns(2), to)       // node to its own pod
		}
		m.reaches(m.podNS(1, 1), "10.240.0.12") // pod to another node
		m.reaches(m.podNS(1, 1), "fd00:240::11")
	}
	all()

	before := m.in(m.podNS(1, 1), "ip", "-o", "addr", "show", "eth0")
	require.NoError(t, d1.end(unix.SIGTERM), "a clean stop")
	require.Error(t, m.ping(m.podNS(1, 1), "10.244.2.2"))
	require.NoError(t, m.ping(m.ns(1), "10.240.0.12"), "the node's own traffic goes on")
	d1 = m.start(1)
	all()
	require.Equal(t, before, m.in(m.podNS(1, 1), "ip", "-o", "addr", "show", "eth0"), "the pod is not touched")

	require.Error(t, d2.end(unix.SIGKILL))
	require.NoError(t, m.ping(m.ns(2), "10.240.0.11"))
	d2 = m.start(2)
	all()
	require.True(t, d2.status().GetReady(), "%v", d2.status().GetProblems())

	second := m.daemonCommand(1, "OVERPLANE_STATE_DIR="+filepath.Join(m.dir, "other"), "OVERPLANE_SOCKET="+filepath.Join(m.dir, "other.sock"))
	out, err := second.CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "another overplaned (pid "+strconv.Itoa(d1.cmd.Process.Pid)+")")

	// Removal: nothing stays.
	require.NoError(t, d1.end(unix.SIGTERM))
	uninstall := m.daemonCommand(1)
	uninstall.Args = append(uninstall.Args, "uninstall")
	out, err = uninstall.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, m.in(m.podNS(1, 1), "ip", "link"), "eth0")
	require.NotContains(t, m.in(m.ns(1), "ip", "link"), "xdp")
	require.NotContains(t, m.in(m.ns(1), "ip", "link"), "ovp0")
	require.NotContains(t, m.in(m.ns(1), "ip", "route", "show", "table", "all"), "10.244.")
	require.NoDirExists(t, m.bpf(1))
}
