package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/test/lab"
)

var update = flag.Bool("update", false, "write the golden files anew")

// overplane runs the command and returns what it said.
func overplane(t *testing.T, stdin string, args ...string) (exit int, out, errOut string) {
	var o, e bytes.Buffer
	exit = run(t.Context(), args, strings.NewReader(stdin), &o, &e, func() time.Time { return clock })
	return exit, o.String(), e.String()
}

// golden compares text with testdata/name.
func golden(t *testing.T, name, text string) {
	path := filepath.Join("testdata", name)
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(path, []byte(text), 0o644))
	}
	want, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(want), text)
}

func TestOutput(t *testing.T) {
	notReady := func(d *fakeDaemon) {
		s := d.status
		s.Ready, s.Problems = false, []string{"uplink eth0 is down; other nodes cannot be reached", "pod default/batch-0 has no device: its network namespace is gone"}
		s.Uplink.Up, s.Uplink.Queues, s.Uplink.Rung, s.Uplink.WhyNotMore = false, 1, "", nil
		s.Programmed = &controlv1.Version{Incarnation: s.Desired.Incarnation, Revision: 6}
	}
	following := func(d *fakeDaemon) {
		d.status.StateSource = "controller"
		d.status.Controller = &controlv1.ControllerStatus{Connected: true, Address: "10.0.0.5:7443", Since: timestamppb.New(clock.Add(-90 * time.Second)), Accepted: d.status.Desired}
	}
	stale := func(d *fakeDaemon) {
		d.status.StateSource, d.status.Warnings = "controller", []string{"no controller for 1m30s; the node forwards by the last table: controller 10.0.0.5:7443: connection refused"}
		d.status.Controller = &controlv1.ControllerStatus{Since: timestamppb.New(clock.Add(-90 * time.Second)), Accepted: d.status.Desired, Problem: "controller 10.0.0.5:7443: connection refused"}
	}
	empty := func(d *fakeDaemon) {
		d.status = &controlv1.GetStatusResponse{Node: "n1", DaemonVersion: "v0.1.0", StateSource: "api", Problems: []string{"there is no desired state yet"}}
		d.pods, d.routes, d.counters, d.drops = nil, &controlv1.ListRoutesResponse{}, &controlv1.GetCountersResponse{}, [][]*controlv1.DropCount{nil}
	}
	tests := []struct {
		golden string
		args   string
		daemon func(*fakeDaemon)
		exit   int
	}{
		{"status.txt", "status", nil, 0},
		{"status.json", "status --json", nil, 0},
		{"status-not-ready.txt", "status", notReady, 3},
		{"status-not-ready.json", "status --json", notReady, 3},
		{"status-empty.txt", "status", empty, 3},
		{"status-controller.txt", "status", following, 0},
		{"status-stale.txt", "status", stale, 0},
		{"status-stale.json", "status --json", stale, 0},
		{"routes.txt", "routes", nil, 0},
		{"routes.json", "routes --json --kind node", nil, 0},
		{"routes-kind.txt", "routes --kind node,pod", nil, 0},
		{"routes-lookup.txt", "routes 10.244.2.7", nil, 0},
		{"routes-empty.txt", "routes", empty, 0},
		{"pods.txt", "pods", nil, 0},
		{"pods.json", "pods --json", nil, 0},
		{"pods-empty.txt", "pods", empty, 0},
		{"pods-attach.txt", "pods attach db --netns db --ipv4 10.244.1.10 --ipv6 fd12:3456:789a:0:1::a", nil, 0},
		{"pods-attach.json", "pods attach db --netns /proc/7/ns/net --ipv4 10.244.1.10 --interface net1 --json", nil, 0},
		{"pods-detach.txt", "pods detach web", nil, 0},
		{"pods-detach-absent.txt", "pods detach db", nil, 0},
		{"pods-detach.json", "pods detach db --json", nil, 0},
		{"drops.txt", "drops", nil, 0},
		{"drops.json", "drops --json", nil, 0},
		{"drops-workers.txt", "drops --workers", nil, 0},
		{"drops-pod-reason.txt", "drops --pod web --reason source_not_pods,no_frame", nil, 0},
		{"drops-empty.txt", "drops", empty, 0},
		{"drops-quiet-pod.txt", "drops --pod default/batch-0", nil, 0},
		{"counters.txt", "counters", nil, 0},
		{"counters.json", "counters --json", nil, 0},
		{"counters-workers.txt", "counters --workers", nil, 0},
		{"counters-empty.txt", "counters", empty, 0},
		{"state-get.txt", "state get", nil, 0},
		{"state-get.json", "state get --json", nil, 0},
		{"state-get-hashes.txt", "state get --hashes", nil, 0},
		{"version.json", "version --json", nil, 0},
	}
	for _, tt := range tests {
		t.Run(tt.golden, func(t *testing.T) {
			d := newFakeDaemon()
			if tt.daemon != nil {
				tt.daemon(d)
			}
			exit, out, errOut := overplane(t, "", append(strings.Fields(tt.args), "--socket", d.serve(t))...)
			require.Empty(t, errOut)
			require.Equal(t, tt.exit, exit)
			golden(t, tt.golden, out)
			if strings.HasSuffix(tt.golden, ".json") {
				require.True(t, json.Valid([]byte(out)))
			}
			for line := range strings.Lines(out) {
				require.Equal(t, strings.TrimRight(line, " \n"), strings.TrimSuffix(line, "\n"), "white space at the end of a line")
			}
		})
	}
}

func TestErrors(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.json")
	require.NoError(t, os.WriteFile(bad, []byte(`{"node": "n1", "poool": []}`), 0o600))
	invalid := filepath.Join(dir, "invalid.json")
	require.NoError(t, os.WriteFile(invalid, []byte(`{"node": "n1", "pools": [{"cidr": "10.0.0.1/8", "block_prefix_length": 24}], "snat": {"first_port": 1}}`), 0o600))
	tests := []struct {
		args string
		want string
	}{
		{"bogus", `unknown command "bogus" for "overplane"`},
		{"state bogus", `unknown command "bogus" for "overplane state"`},
		{"lab bogus", `unknown command "bogus" for "overplane lab"`},
		{"status extra", `unknown command "extra" for "overplane status"`},
		{"routes nonsense", `"nonsense": want an address or a prefix, e.g. "10.244.2.7" or "10.244.2.0/24"`},
		{"routes ::ffff:10.0.0.0/100", `"::ffff:10.0.0.0/100": want an address or a prefix, e.g. "10.244.2.7" or "10.244.2.0/24"`},
		{"routes 2001:db8::1", `no route covers 2001:db8::1/128: packets for it are unreachable`},
		{"routes --kind pods", `--kind "pods": want some of pod, node, member, host, outside, unreachable`},
		{"pods attach", `accepts 1 arg(s), received 0`},
		{"pods attach db --ipv4 10.244.1.10", `required flag(s) "netns" not set`},
		{"pods attach db --netns=", `a pod needs an address: give --ipv4, --ipv6 or both`},
		{"pods attach db --netns= --ipv4 10.244.1.10", `--netns is empty: want the name or the path of a network namespace`},
		{"pods attach web --netns web --ipv4 10.244.1.10", `pod web is attached with other values: ipv4 is 10.244.1.2`},
		{"drops --reason bogus", `--reason "bogus": there is no such reason`},
		{"drops --pod bogus", `--pod "bogus": there is no such pod on this node`},
		{"drops --watch 0", `--watch 0: want 0.1 to 3600 seconds`},
		{"drops --watch -1", `--watch -1: want 0.1 to 3600 seconds`},
		{"drops --watch 0.1 --reason bogus", `--reason "bogus": there is no such reason`},
		{"state replace " + bad, bad + `: line 1, column 16: unknown field "poool"`},
		{"state replace " + filepath.Join(dir, "none"), "open " + filepath.Join(dir, "none") + ": no such file or directory"},
		{"state replace " + invalid, `pool "10.0.0.1/8": cidr: not in canonical form: want "10.0.0.0/8"` + "\n" +
			`snat: first_port 1, last_port 0: want 1024 <= first_port <= last_port <= 65535, or both 0 for the default`},
		{"state validate " + bad, bad + " is not valid:\n  " + bad + `: line 1, column 16: unknown field "poool"`},
		{"state validate " + invalid, invalid + " is not valid:\n" + `  pool "10.0.0.1/8": cidr: not in canonical form: want "10.0.0.0/8"` + "\n" +
			`  snat: first_port 1, last_port 0: want 1024 <= first_port <= last_port <= 65535, or both 0 for the default`},
		{"state patch " + bad, bad + `: line 1, column 16: unknown field "poool"`},
	}
	socket := newFakeDaemon().serve(t)
	for _, tt := range tests {
		t.Run(tt.args, func(t *testing.T) {
			exit, out, errOut := overplane(t, "", append(strings.Fields(tt.args), "--socket", socket)...)
			require.Equal(t, 1, exit)
			require.Empty(t, out)
			require.Equal(t, "overplane: "+tt.want+"\n", errOut)
		})
	}
}

// Every command that asks the daemon gives its refusal, and says what is wrong if there is none.
func TestEveryCommandFailsWithoutAnAnswer(t *testing.T) {
	dir := t.TempDir()
	state := filepath.Join(dir, "state.json")
	require.NoError(t, os.WriteFile(state, []byte(`{"node": "n1"}`), 0o600))
	d := newFakeDaemon()
	d.err = status.Error(codes.Unavailable, "the daemon is stopping")
	socket := d.serve(t)
	for _, args := range []string{
		"status", "routes", "pods", "pods attach db --netns db --ipv4 10.244.1.10", "pods detach db", "drops", "drops --watch 1", "counters", "state get",
		"state replace " + state,
	} {
		for _, form := range []string{"--json=false", "--json"} {
			exit, out, errOut := overplane(t, "", append(strings.Fields(args), form, "--socket", socket)...)
			require.Equal(t, 1, exit, args)
			require.Empty(t, out, args)
			require.Contains(t, errOut, "the daemon is stopping", args)

			exit, out, errOut = overplane(t, "", append(strings.Fields(args), form, "--socket", filepath.Join(dir, "none.sock"))...)
			require.Equal(t, 1, exit, args)
			require.Empty(t, out, args)
			require.Contains(t, errOut, "none.sock does not exist, so overplaned is not running", args)
		}
	}
}

func TestSocketComesFromTheEnvironment(t *testing.T) {
	t.Setenv(client.SocketEnv, newFakeDaemon().serve(t))
	exit, out, _ := overplane(t, "", "pods", "detach", "web")
	require.Equal(t, 0, exit)
	require.Equal(t, "pod web: detached\n", out)
}

func TestStatesAreEditedAndPushed(t *testing.T) {
	d := newFakeDaemon()
	socket := d.serve(t)
	exit, text, _ := overplane(t, "", "state", "get", "--socket", socket)
	require.Equal(t, 0, exit)
	before := d.state.GetDigest()

	// Edited by hand, the hashes not thought of.
	edited := strings.NewReplacer("10.244.2.0/24", "10.244.3.0/24", `"revision": "7"`, `"revision": "8"`).Replace(text)
	path := filepath.Join(t.TempDir(), "state.json")
	require.NoError(t, os.WriteFile(path, []byte(edited), 0o600))
	exit, out, errOut := overplane(t, "", "state", "validate", path)
	require.Equal(t, 0, exit, errOut)
	require.Equal(t, path+" is valid: node n1, version 2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11/8, 1 pools, 1 own blocks, 2 members, 1 routes\n", out)
	exit, out, errOut = overplane(t, "", "state", "replace", path, "--socket", socket)
	require.Equal(t, 0, exit, errOut)
	require.Equal(t, "version 2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11/8 is programmed\n", out)
	require.Equal(t, "10.244.3.0/24", d.state.GetRoutes()[0].GetPrefix())
	require.NotEqual(t, before, d.state.GetDigest())
	require.NoError(t, api.Validate(d.state))

	// As JSON, from standard input.
	exit, out, errOut = overplane(t, edited, "state", "replace", "-", "--json", "--socket", socket)
	require.Equal(t, 0, exit, errOut)
	require.JSONEq(t, `{"programmed": {"incarnation": "2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11", "revision": "8"}}`, out)

	patch := `{"node": "n1", "base": {"incarnation": "2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11", "revision": 8},
		"version": {"incarnation": "2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11", "revision": 9}, "upsert_routes": [{"prefix": "10.0.0.0/16", "host": true}]}`
	exit, out, errOut = overplane(t, patch, "state", "patch", "-", "--socket", socket)
	require.Equal(t, 0, exit, errOut)
	require.Equal(t, "version 2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11/9 is programmed\n", out)
	require.Len(t, d.state.GetRoutes(), 2)

	exit, _, errOut = overplane(t, patch, "state", "patch", "-", "--json", "--socket", socket)
	require.Equal(t, 1, exit)
	require.Contains(t, errOut, "read it again")

	d.state = nil
	exit, _, errOut = overplane(t, "", "state", "get", "--socket", socket)
	require.Equal(t, 1, exit)
	require.Equal(t, "overplane: the node has no desired state yet\n", errOut)
}

func TestValidateAsJSON(t *testing.T) {
	exit, out, errOut := overplane(t, `{"node": "N1"}`, "state", "validate", "-", "--json")
	require.Equal(t, 1, exit)
	require.Empty(t, errOut)
	var answer struct {
		Valid    bool
		Problems []string
	}
	require.NoError(t, json.Unmarshal([]byte(out), &answer))
	require.False(t, answer.Valid)
	require.Len(t, answer.Problems, 1)
	require.Contains(t, answer.Problems[0], `node: name "N1"`)

	exit, out, _ = overplane(t, `{"node": "n1"}`, "state", "validate", "-")
	require.Equal(t, 0, exit)
	require.Equal(t, "standard input is valid: node n1, version none, 0 pools, 0 own blocks, 0 members, 0 routes\n", out)

	exit, out, _ = overplane(t, `{"node": "n1"}`, "state", "validate", "-", "--json")
	require.Equal(t, 0, exit)
	require.JSONEq(t, `{"valid": true, "problems": []}`, out)
}

func TestDropsAreWatched(t *testing.T) {
	answers := func() [][]*controlv1.DropCount {
		return [][]*controlv1.DropCount{
			{dropped("eth0", "uplink", "in", "ip_bad_checksum", 5, 0), dropped("web", "pod", "out", "port_full", 7, 1)},
			{dropped("eth0", "uplink", "in", "ip_bad_checksum", 8, 0), dropped("web", "pod", "out", "port_full", 7, 1), dropped("eth0", "uplink", "in", "too_big", 1, 0)},
			{dropped("eth0", "uplink", "in", "ip_bad_checksum", 8, 0), dropped("web", "pod", "out", "port_full", 7, 1), dropped("eth0", "uplink", "in", "too_big", 1, 0)},
			{dropped("eth0", "uplink", "in", "ip_bad_checksum", 2, 0)}, // started again
		}
	}
	for _, form := range []string{"txt", "json"} {
		d := newFakeDaemon()
		d.drops = answers()
		exit, out, errOut := overplane(t, "", "drops", "--watch", "0.1", "--count", "3", "--socket", d.serve(t), "--json="+map[string]string{"txt": "false", "json": "true"}[form])
		require.Equal(t, 0, exit, errOut)
		golden(t, "drops-watch."+form, out)
	}

	// Being interrupted is no error.
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	var out, errOut bytes.Buffer
	exit := run(ctx, []string{"drops", "--watch", "3600", "--socket", newFakeDaemon().serve(t)}, nil, &out, &errOut, time.Now)
	require.Equal(t, 0, exit, errOut.String())
}

func TestVersion(t *testing.T) {
	exit, out, _ := overplane(t, "", "version", "--socket", newFakeDaemon().serve(t))
	require.Equal(t, 0, exit)
	require.Regexp(t, `^overplane   dev \(go[^ ]+, linux/\w+\)\noverplaned  v0\.1\.0\n$`, out)

	exit, out, _ = overplane(t, "", "version", "--socket", filepath.Join(t.TempDir(), "none"))
	require.Equal(t, 0, exit)
	require.Contains(t, out, "\noverplaned  no answer: socket ")

	exit, out, _ = overplane(t, "", "--version")
	require.Equal(t, 0, exit)
	require.Equal(t, "overplane dev\n", out)
}

func TestCompletion(t *testing.T) {
	socket := newFakeDaemon().serve(t)
	complete := func(args ...string) []string {
		exit, out, errOut := overplane(t, "", append([]string{"__complete", "--socket", socket}, args...)...)
		require.Equal(t, 0, exit, errOut)
		return strings.Split(strings.TrimSpace(out), "\n")
	}
	require.Equal(t, []string{"web", "default/batch-0", ":4"}, complete("pods", "detach", ""))
	require.Equal(t, []string{":4"}, complete("pods", "detach", "web", ""))
	require.Equal(t, []string{"web", "default/batch-0", ":4"}, complete("drops", "--pod", ""))
	require.Contains(t, strings.Join(complete("drops", "--reason", ""), "\n"), "port_full\t")
	require.Equal(t, []string{"pod", "node", "member", "host", "outside", "unreachable", ":4"}, complete("routes", "--kind", ""))

	// Without a daemon there is nothing to offer, and no noise.
	socket = filepath.Join(t.TempDir(), "none")
	require.Equal(t, []string{":1"}, complete("pods", "detach", ""))

	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		exit, out, _ := overplane(t, "", "completion", shell)
		require.Equal(t, 0, exit)
		require.NotEmpty(t, out)
	}
}

func TestEveryCommandHasHelp(t *testing.T) {
	for _, c := range newRoot(time.Now).Commands() {
		require.NotEmpty(t, c.Short, c.Name())
		exit, out, _ := overplane(t, "", c.Name(), "--help")
		require.Equal(t, 0, exit)
		require.Contains(t, out, "Usage:")
	}
}

// The status of a program that overplane ran and that failed is not overplane's own: the error is told.
func TestErrorsOfOtherProgramsAreTold(t *testing.T) {
	var out strings.Builder
	err := exec.Command("sh", "-c", "exit 78").Run()
	require.Equal(t, 1, exitCode(fmt.Errorf("overplaned on n1 ended: %w", err), &out))
	require.Equal(t, "overplane: overplaned on n1 ended: exit status 78\n", out.String())
	out.Reset()
	require.Equal(t, 3, exitCode(statusNotReady, &out))
	require.Equal(t, 7, exitCode(&lab.ExitError{Code: 7}, &out))
	require.Empty(t, out.String())
}
