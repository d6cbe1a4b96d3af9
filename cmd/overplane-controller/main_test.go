package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client/admin"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
)

// beProgram makes the test's binary the program itself, so that tests can kill it.
const beProgram = "OVERPLANE_TEST_BE_CONTROLLER"

func TestMain(m *testing.M) {
	if os.Getenv(beProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// program is a controller process with embedded etcd, that may be killed and started again.
type program struct {
	t                     *testing.T
	dir                   string
	nodes, admin, metrics string
	log                   *os.File
	cmd                   *exec.Cmd
}

func freeAddress(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	return l.Addr().String()
}

func newProgram(t *testing.T) *program {
	p := &program{t: t, dir: t.TempDir(), nodes: freeAddress(t), admin: freeAddress(t), metrics: freeAddress(t)}
	p.run("pki", "init", "--dir", p.dir)
	p.run("pki", "issue", "controller", "controller", "--dir", p.dir, "--host", "127.0.0.1")
	p.run("pki", "issue", "admin", "admin", "--dir", p.dir)
	var err error
	p.log, err = os.Create(filepath.Join(p.dir, "log"))
	require.NoError(t, err)
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			text, _ := os.ReadFile(p.log.Name())
			t.Logf("the controller's log:\n%s", text[max(0, len(text)-8000):])
		}
	})
	return p
}

// run runs another command of the program in this process.
func (p *program) run(args ...string) string {
	var out, errOut bytes.Buffer
	require.Zero(p.t, run(p.t.Context(), args, nil, &out, &errOut), errOut.String())
	return out.String()
}

func (p *program) environ() []string {
	return []string{
		EnvPrefix + "LISTEN=" + p.nodes, EnvPrefix + "ADMIN_LISTEN=" + p.admin, EnvPrefix + "METRICS_LISTEN=" + p.metrics,
		EnvPrefix + "CA=" + p.file("ca.crt"), EnvPrefix + "CERT=" + p.file("controller.crt"), EnvPrefix + "KEY=" + p.file("controller.key"),
		EnvPrefix + "STATE_DIR=" + p.file("state"), EnvPrefix + "COOLDOWN=1s", EnvPrefix + "POD_CIDRS=10.244.0.0/16",
	}
}

// EnvPrefix is the controller's.
const EnvPrefix = "OVERPLANE_CONTROLLER_"

func (p *program) file(name string) string { return filepath.Join(p.dir, name) }

func (p *program) start() {
	p.cmd = exec.Command(os.Args[0], "serve")
	p.cmd.Env = append(append(os.Environ(), beProgram+"=1"), p.environ()...)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(p.t, p.cmd.Start())
}

func (p *program) kill() {
	if p.cmd != nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		p.cmd = nil
	}
}

func (p *program) ready() {
	require.Eventually(p.t, func() bool {
		r, err := http.Get("http://" + p.metrics + "/readyz")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		return r.StatusCode == http.StatusOK
	}, 30*time.Second, 20*time.Millisecond, "the controller does not become ready")
}

func (p *program) dial() *admin.Client {
	c, err := admin.Dial(&admin.Config{Address: p.admin, Files: pki.Files{CA: p.file("ca.crt"), Cert: p.file("admin.crt"), Key: p.file("admin.key")}})
	require.NoError(p.t, err)
	p.t.Cleanup(func() { _ = c.Close() })
	return c
}

// node starts a simulated node.
func (p *program) node(ctx context.Context, i int, wg *sync.WaitGroup, got func(name string, s *controlv1.NodeState)) {
	name := fmt.Sprintf("n%d", i)
	if _, err := os.Stat(p.file(name + ".crt")); err != nil {
		require.NoError(p.t, pki.Issue(p.dir, pki.Request{Role: pki.Node, Name: name}, p.file(name+".crt"), p.file(name+".key"), false, time.Now()))
	}
	c, err := syncclient.New(syncclient.Config{
		Node: name, Addresses: []string{p.nodes}, TLS: pki.Files{CA: p.file("ca.crt"), Cert: p.file(name + ".crt"), Key: p.file(name + ".key")},
		MinBackoff: 20 * time.Millisecond, MaxBackoff: 300 * time.Millisecond,
		Facts: func() (syncclient.Facts, error) {
			return syncclient.Facts{IPv4: fmt.Sprintf("10.240.%d.%d", i/250, i%250+1)}, nil
		},
	})
	require.NoError(p.t, err)
	wg.Go(func() {
		_ = c.Run(ctx, func(_ context.Context, s *controlv1.NodeState) error {
			got(name, s)
			return nil
		})
	})
}

// raceDetector reports whether this binary, and with it the program under test, is built with it.
func raceDetector() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

func TestKilledAtRandomPointsTheControllerLosesNothingAndGivesNothingTwice(t *testing.T) {
	if testing.Short() && !raceDetector() {
		t.Skip("takes ten seconds")
	}
	p := newProgram(t)
	p.start()
	p.ready()
	const nodes, kills = 60, 8
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var mu sync.Mutex
	first := make(map[string]string) // a node's block, as it was told first
	got := func(name string, s *controlv1.NodeState) {
		mu.Lock()
		defer mu.Unlock()
		for _, b := range s.GetOwnBlocks() {
			if first[name] == "" {
				first[name] = b.GetCidr()
			}
			if first[name] != b.GetCidr() {
				t.Errorf("node %s was told block %s, and then %s", name, first[name], b.GetCidr())
			}
		}
		if first[name] != "" && len(s.GetOwnBlocks()) == 0 {
			t.Errorf("node %s lost its block", name)
		}
	}
	go func() {
		for i := range nodes {
			p.node(ctx, i, &wg, got)
			time.Sleep(rand.N(60 * time.Millisecond))
		}
	}()
	for range kills {
		time.Sleep(rand.N(600 * time.Millisecond))
		p.kill()
		p.start()
	}
	p.ready()
	a := p.dial()
	require.Eventually(t, func() bool {
		r, err := a.GetConvergence(ctx, &controlv1.GetConvergenceRequest{})
		return err == nil && r.GetConverged() == nodes
	}, 60*time.Second, 100*time.Millisecond, "the nodes do not converge")
	blocks, err := a.ListBlocks(ctx, &controlv1.ListBlocksRequest{})
	require.NoError(t, err)
	owners := make(map[string]string)
	for _, b := range blocks.GetBlocks() {
		require.Equal(t, controlv1.BlockState_BLOCK_STATE_ALLOCATED, b.GetState())
		require.Empty(t, owners[b.GetOwner()], "node %s owns two blocks", b.GetOwner())
		owners[b.GetOwner()] = b.GetCidr()
	}
	mu.Lock()
	defer mu.Unlock()
	require.Equal(t, first, owners)
}

func TestBackupAndRestore(t *testing.T) {
	p := newProgram(t)
	p.start()
	p.ready()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var mu sync.Mutex
	var last *controlv1.NodeState
	var blocks []string
	p.node(ctx, 1, &wg, func(_ string, s *controlv1.NodeState) {
		mu.Lock()
		defer mu.Unlock()
		last = s
		for _, b := range s.GetOwnBlocks() {
			blocks = append(blocks, b.GetCidr())
		}
	})
	state := func() *controlv1.NodeState {
		mu.Lock()
		defer mu.Unlock()
		return last
	}
	require.Eventually(t, func() bool { return len(state().GetOwnBlocks()) == 1 }, 20*time.Second, 10*time.Millisecond)
	before := state()

	flags := []string{"--controller", p.admin, "--ca", p.file("ca.crt"), "--cert", p.file("admin.crt"), "--key", p.file("admin.key")}
	p.run(append([]string{"backup", p.file("backup.json")}, flags...)...)
	// SIGTERM ends it cleanly.
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, p.cmd.Wait())
	p.cmd = nil

	require.NoError(t, os.RemoveAll(p.file("state")))
	var out, errOut bytes.Buffer
	require.Zero(t, run(ctx, []string{"restore", p.file("backup.json")}, p.environ(), &out, &errOut), errOut.String())
	require.NotZero(t, run(ctx, []string{"restore", p.file("backup.json")}, p.environ(), &out, &errOut), "a store that is not empty was overwritten")
	require.Contains(t, errOut.String(), "not empty")
	p.start()
	p.ready()
	require.Eventually(t, func() bool {
		return state().GetVersion().GetIncarnation() != before.GetVersion().GetIncarnation()
	}, 20*time.Second, 10*time.Millisecond, "the node does not take the new incarnation over")
	require.Equal(t, before.GetOwnBlocks()[0].GetCidr(), state().GetOwnBlocks()[0].GetCidr())
}

func TestConfigurationErrorsNameTheVariable(t *testing.T) {
	for _, tt := range []struct{ variable, want string }{
		{"LISTEN=here", `OVERPLANE_CONTROLLER_LISTEN="here": allowed: host:port or :port`},
		{"COOLDOWN=soon", `OVERPLANE_CONTROLLER_COOLDOWN="soon": allowed: a duration`},
		{"POD_CIDRS=10.244.0.0/16,10.244.8.0/24", "pod range 10.244.8.0/24 overlaps pod range 10.244.0.0/16"},
		{"SERVICE_CIDRS=10.244.0.0/17", "service ranges: there are 1 for the families [IPv4 IPv6]"},
		{"SNAT={\"disable\":true}", "OVERPLANE_CONTROLLER_SNAT"},
	} {
		var out, errOut bytes.Buffer
		require.Equal(t, exitConfig, run(t.Context(), []string{"serve", "--check-config"}, []string{EnvPrefix + tt.variable}, &out, &errOut), tt.variable)
		require.Contains(t, errOut.String(), tt.want)
	}
	var out bytes.Buffer
	require.Zero(t, run(t.Context(), []string{"serve", "--check-config"}, []string{EnvPrefix + "LISEN=x"}, io.Discard, &out))
	require.Contains(t, out.String(), "unknown variable OVERPLANE_CONTROLLER_LISEN")
}

func TestIssuedFilesMayGoIntoANewFolder(t *testing.T) {
	dir := t.TempDir()
	var out, errOut bytes.Buffer
	for _, args := range [][]string{{"init"}, {"issue", "node", "n1", "--out", filepath.Join(dir, "new", "n1")}} {
		require.Zero(t, run(t.Context(), append([]string{"pki", "--dir", dir}, args...), nil, &out, &errOut), errOut.String())
	}
	info, err := os.Stat(filepath.Join(dir, "new", "n1", "n1.key"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())
}
