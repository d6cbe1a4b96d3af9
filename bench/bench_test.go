package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/test/lab"
)

// smokePrefix is that of the namespaces of this package's tests.
const smokePrefix = "ovpbt"

// execute runs a command line as overplane-bench does.
func execute(t *testing.T, args ...string) (string, error) {
	t.Helper()
	c := Command("test")
	var out bytes.Buffer
	c.SetOut(&out)
	c.SetErr(&out)
	c.SetArgs(args)
	err := c.ExecuteContext(context.Background())
	return out.String(), err
}

func TestSettingsAreChecked(t *testing.T) {
	for _, tc := range []struct{ args, want string }{
		{"pipeline --rounds 0", "at least 1 round"},
		{"pipeline --span 2h", "spans of 10ms to 1m"},
		{"pipeline --loss 1", "a share from 0 to below 1"},
		{"tcp --prefix UPPER", "--prefix"},
		{"tcp --prefix toolong", "--prefix"},
		{"tcp --only (", "--only"},
		{"compare a.json", "accepts 2 arg"},
		{"compare /dev/null /dev/null", "no result of overplane-bench"},
		{"nothing", "unknown command"},
	} {
		_, err := execute(t, append(strings.Fields(tc.args), flagsFor(t, tc.args)...)...)
		require.ErrorContains(t, err, tc.want, tc.args)
	}
}

func flagsFor(t *testing.T, args string) []string {
	if strings.HasPrefix(args, "compare") || args == "nothing" {
		return nil
	}
	return []string{"--out", t.TempDir()}
}

// The order of scenarios is what all runs; names are commands.
func TestScenarios(t *testing.T) {
	seen := map[string]bool{}
	for _, s := range scenarios {
		require.False(t, seen[s.Name], s.Name)
		seen[s.Name] = true
		require.NotEmpty(t, s.Short)
		require.NotNil(t, s.Run)
	}
	require.Less(t, len(selected(func(s *Scenario) bool { return s.Quick })), len(selected(func(s *Scenario) bool { return s.All })))
}

// A run in memory, its files, a comparison with itself and with one of other settings, and the report made again.
func TestPipelineFromRunToReport(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	_, err := execute(t, "pipeline", "--rounds", "2", "--span", "20ms", "--out", a, "--report", filepath.Join(dir, "page.md"))
	require.NoError(t, err)
	r, err := result.Read(filepath.Join(a, rawFile))
	require.NoError(t, err)
	require.True(t, r.Complete)
	for _, s := range r.Series {
		require.Len(t, s.Values, 2)
		for _, v := range s.Values {
			require.Positive(t, v, "%v", s.Key)
		}
	}
	require.FileExists(t, filepath.Join(dir, "page.md"))
	require.FileExists(t, filepath.Join(dir, "page", "pipeline-time.svg"))

	out, err := execute(t, "compare", filepath.Join(a, rawFile), filepath.Join(a, rawFile))
	require.NoError(t, err)
	require.Contains(t, out, "stage=poll/frame=64")
	out, err = execute(t, "compare", "--limit", "1.01", filepath.Join(a, rawFile), filepath.Join(a, rawFile))
	require.NoError(t, err)
	require.Contains(t, out, "No stage is slower")

	_, err = execute(t, "pipeline", "--rounds", "1", "--span", "20ms", "--out", b)
	require.NoError(t, err)
	_, err = execute(t, "compare", filepath.Join(a, rawFile), filepath.Join(b, rawFile))
	require.ErrorContains(t, err, "rounds: 2, 1")

	out, err = execute(t, "render", filepath.Join(a, rawFile), "--out", b)
	require.NoError(t, err)
	require.Contains(t, out, "pipeline: time")
}

func TestWithoutRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("is root")
	}
	_, err := execute(t, "tcp", "--out", t.TempDir())
	require.ErrorContains(t, err, "root")
}

// program builds overplane-bench and returns its path: a peer is a process of it, and signals are for a process.
func program(t *testing.T) string {
	t.Helper()
	if err := lab.CheckRoot(); err != nil {
		t.Skip(err)
	}
	bin, err := lab.FindBinaries()
	if err != nil {
		t.Skip(err)
	}
	path := filepath.Join(bin, "overplane-bench")
	if _, err := os.Stat(path); err != nil {
		t.Skipf("overplane-bench is not built: make build")
	}
	t.Cleanup(func() { requireNothingLeft(t) })
	return path
}

func requireNothingLeft(t *testing.T) {
	t.Helper()
	left, err := filepath.Glob("/run/netns/" + smokePrefix + "*")
	require.NoError(t, err)
	require.Empty(t, left, "namespaces are left")
	left, err = filepath.Glob("/run/overplane-lab/" + smokePrefix + "*")
	require.NoError(t, err)
	require.Empty(t, left, "labs are left")
}

// The shortest run with a peer: packets and streams cross both, the books are right, and nothing is left behind.
func TestSmoke(t *testing.T) {
	path := program(t)
	dir := t.TempDir()
	cmd := exec.Command(path, "udp", "--short", "--rounds", "1", "--span", "50ms", "--only", "^kernel$|tap/tun", "--prefix", smokePrefix, "--out", dir)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	r, err := result.Read(filepath.Join(dir, rawFile))
	require.NoError(t, err)
	require.True(t, r.Complete)
	require.Empty(t, r.Failed)
	for _, system := range []string{"kernel", "overplane tap/tun"} {
		s := r.Find(result.Key{Scenario: "udp", Case: "two-nodes/wire/frame=64", System: system, Metric: "received"})
		require.NotNil(t, s, system)
		require.Positive(t, s.Values[0])
	}
	for _, b := range r.Balances {
		if b.System == "kernel" {
			require.LessOrEqual(t, b.Received, b.Offered)
			require.InDelta(t, 0, float64(b.Unaccounted()), 0.02*float64(b.Offered)+64, "%+v", b)
		}
	}
}

// Interrupted, a run takes everything down, writes what it has, and says that it is not complete. Another one with the same prefix is refused meanwhile.
func TestInterrupted(t *testing.T) {
	path := program(t)
	dir := t.TempDir()
	args := []string{"tcp", "--short", "--rounds", "100", "--span", "100ms", "--only", "^kernel$", "--prefix", smokePrefix, "--out", dir}
	cmd := exec.Command(path, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	progress, err := cmd.StdoutPipe()
	require.NoError(t, err)
	_ = progress
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool {
		found, _ := filepath.Glob("/run/netns/" + smokePrefix + "*-n1-p2")
		return len(found) > 0
	}, 20*time.Second, 20*time.Millisecond)

	out, err := exec.Command(path, args...).CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "another overplane-bench measures")

	time.Sleep(time.Second)
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	require.Error(t, cmd.Wait(), "the exit status says it")
	require.Contains(t, said.String(), "interrupted")
	data, err := os.ReadFile(filepath.Join(dir, rawFile))
	require.NoError(t, err)
	var r result.Run
	require.NoError(t, json.Unmarshal(data, &r))
	require.False(t, r.Complete)
	require.Contains(t, r.Problem, "interrupted")
	requireNothingLeft(t)
}

// What a killed run has left is removed by the next one.
func TestKilled(t *testing.T) {
	path := program(t)
	args := []string{"tcp", "--short", "--rounds", "100", "--span", "100ms", "--only", "^kernel$|tap", "--prefix", smokePrefix, "--out", t.TempDir()}
	cmd := exec.Command(path, args...)
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool {
		found, _ := filepath.Glob("/run/netns/" + smokePrefix + "*-n1-p2")
		return len(found) > 1
	}, 20*time.Second, 20*time.Millisecond)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	out, err := exec.Command(path, "tcp", "--rounds", "1", "--only", "^nobody$", "--prefix", smokePrefix, "--out", t.TempDir()).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "removed what an earlier run left")
}
