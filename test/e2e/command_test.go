package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

// overplaneLab prepares `overplane lab --name NAME ...`. Nothing of that lab is there before, nor after the test.
func overplaneLab(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	if err := lab.CheckRoot(); err != nil {
		t.Skip(err)
	}
	cmd := exec.CommandContext(testContext(t), filepath.Join(binaries, "overplane"), append([]string{"lab", "--name", labName(t)}, args...)...)
	cmd.Env = append(os.Environ(), "OVERPLANE_BIN="+binaries)
	return cmd
}

func cleanCommandLab(t *testing.T) {
	t.Helper()
	if err := lab.CheckRoot(); err != nil {
		t.Skip(err)
	}
	require.NoError(t, lab.Down(labName(t)))
	t.Cleanup(func() { _ = lab.Down(labName(t)) })
}

func requireNothingLeft(t *testing.T) {
	t.Helper()
	left, err := lab.Leftovers(labName(t))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestLabRunProvesAndCleansUp(t *testing.T) {
	t.Parallel()
	cleanCommandLab(t)
	out, err := overplaneLab(t, "run").CombinedOutput()
	require.NoError(t, err, string(out))
	for _, p := range append(lab.Proofs(), lab.ControlProofs()...) {
		require.Contains(t, string(out), p.Name)
	}
	require.NotContains(t, string(out), "FAILED")
	require.Contains(t, string(out), "nothing left behind")
	requireNothingLeft(t)
}

// What goes wrong while it runs shows in the exit status, and the lab is taken down all the same.
func TestLabRunTellsTheTruth(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		do   func(t *testing.T, run *os.Process)
		says string
	}{
		{"a_daemon_dies", func(t *testing.T, _ *os.Process) {
			l, err := lab.Load(labName(t))
			require.NoError(t, err)
			require.NoError(t, l.Node("n2").Kill())
		}, "overplaned of n2 does not run"},
		{"interrupted", func(t *testing.T, run *os.Process) { require.NoError(t, run.Signal(unix.SIGINT)) }, "interrupted"},
		{"terminated", func(t *testing.T, run *os.Process) { require.NoError(t, run.Signal(unix.SIGTERM)) }, "interrupted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cleanCommandLab(t)
			cmd := overplaneLab(t, "run", "--nodes", "2", "--pods", "1")
			var table, said bytes.Buffer
			cmd.Stdout = &table
			stderr, err := cmd.StderrPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			all := io.TeeReader(stderr, &said)
			lines := bufio.NewScanner(all)
			for lines.Scan() {
				if strings.HasPrefix(lines.Text(), "IPv4 ") { // the first proof is done
					c.do(t, cmd.Process)
					break
				}
			}
			_, _ = io.Copy(io.Discard, all)
			err = cmd.Wait()
			require.Error(t, err)
			require.Contains(t, table.String()+said.String(), c.says)
			requireNothingLeft(t)
		})
	}
}

func TestLabRunCleansUpWhenNobodyReads(t *testing.T) {
	t.Parallel()
	cleanCommandLab(t)
	cmd := overplaneLab(t, "run", "--nodes", "2", "--pods", "1")
	r, w, err := os.Pipe()
	require.NoError(t, err)
	cmd.Stdout, cmd.Stderr = w, w
	require.NoError(t, cmd.Start())
	require.NoError(t, w.Close())
	require.NoError(t, r.Close())
	err = cmd.Wait()
	var exit *exec.ExitError
	require.True(t, err == nil || errors.As(err, &exit) && exit.Exited(), "it ended by itself: %v", err)
	requireNothingLeft(t)
}

// A lab whose `up` was killed is recognised as such and can be removed.
func TestLabCrashedWhileComingUp(t *testing.T) {
	t.Parallel()
	cleanCommandLab(t)
	cmd := overplaneLab(t, "up")
	stderr, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "attaching") {
			break
		}
	}
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	out, err := overplaneLab(t, "up").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "half there")
	require.Contains(t, string(out), "overplane lab down --name "+labName(t))
	out, err = overplaneLab(t, "status").CombinedOutput()
	require.Error(t, err, string(out))
	out, err = overplaneLab(t, "down").CombinedOutput()
	require.NoError(t, err, string(out))
	requireNothingLeft(t)
}

// The life of a lab by hand.
func TestLabCommands(t *testing.T) {
	t.Parallel()
	cleanCommandLab(t)
	must := func(args ...string) string {
		t.Helper()
		cmd := overplaneLab(t, args...)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		require.NoError(t, err, "%v\n%s%s", args, out, stderr.String())
		return string(out)
	}
	var up struct {
		Name  string
		Nodes []struct {
			Name, Netns, IPv4, IPv6, Rung, Socket string
			PID                                   int
			Pods                                  []struct{ Name, Netns, IPv4, IPv6 string }
		}
		Ext        struct{ Netns, IPv4, IPv6 string }
		Controller struct {
			PID     int
			Address string
		}
	}
	require.NoError(t, json.Unmarshal([]byte(must("up", "--nodes", "2", "--pods", "1", "--json")), &up))
	require.Equal(t, labName(t), up.Name)
	require.Len(t, up.Nodes, 2)
	n2 := up.Nodes[1]
	require.Equal(t, "n2 "+labName(t)+"-n2 10.240.0.12 fd00:240::12", strings.Join([]string{n2.Name, n2.Netns, n2.IPv4, n2.IPv6}, " "))
	require.Contains(t, []string{"xdp-copy", "xdp-zerocopy"}, n2.Rung)
	require.Positive(t, n2.PID)
	require.FileExists(t, "/run/overplane-lab/"+labName(t)+"/n2/overplaned.env")
	require.Equal(t, labName(t)+"-n2-p1 10.244.1.2 fd12:3456:789a:0:1::2", strings.Join([]string{n2.Pods[0].Netns, n2.Pods[0].IPv4, n2.Pods[0].IPv6}, " "))
	require.Equal(t, labName(t)+"-ext 198.51.100.10 2001:db8:100::10", strings.Join([]string{up.Ext.Netns, up.Ext.IPv4, up.Ext.IPv6}, " "))
	require.Positive(t, up.Controller.PID)
	require.Equal(t, "10.240.0.1:7443", up.Controller.Address)

	out, err := overplaneLab(t, "up").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "up already")

	require.Contains(t, must("exec", "n1-p1", "--", "cat", "/proc/net/if_inet6"), "fd123456789a00000000000000000002")
	require.Contains(t, must("exec", "gw", "sh", "-c", "echo $0 from the gateway", "hello"), "hello from the gateway")
	err = overplaneLab(t, "exec", "ext", "--", "sh", "-c", "exit 42").Run()
	var exit *exec.ExitError
	require.ErrorAs(t, err, &exit)
	require.Equal(t, 42, exit.ExitCode())
	out, err = overplaneLab(t, "exec", "n7", "--", "true").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), `no "n7"`)

	must("node", "pause", "n2")
	must("node", "resume", "n2")
	must("node", "kill", "n2")
	out, err = overplaneLab(t, "status").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "overplaned of n2 does not run")
	must("node", "start", "n2")
	must("node", "stop", "n2")
	must("node", "start", "n2")
	must("controller", "kill")
	out, err = overplaneLab(t, "status").CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "overplane-controller does not run")
	must("node", "stop", "n2")
	must("node", "start", "n2")
	must("controller", "start")
	must("controller", "stop")
	must("controller", "start")
	must("node", "add")
	require.Contains(t, must("status"), labName(t)+"-n3-p1")
	must("node", "drain", "n2")
	require.NotContains(t, must("status"), labName(t)+"-n2")

	l, err := lab.Load(labName(t))
	require.NoError(t, err)
	requireReachable(t, l.Node("n1").Pods[0].End(), l.Node("n3").Pods[0].End())
	must("down")
	requireNothingLeft(t)
	must("down") // again: nothing to do is no error
	require.NotEqual(t, time.Time{}, l.Created)
}
