package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/control/agent"
)

func TestCommandLine(t *testing.T) {
	valid := []string{"OVERPLANE_NODE_NAME=n1"}
	for _, c := range []struct {
		name    string
		args    []string
		environ []string
		status  int
		stdout  string
		stderr  string
	}{
		{"help", []string{"--help"}, nil, 0, "OVERPLANE_UPLINK_MODE", ""},
		{"version", []string{"--version"}, nil, 0, "overplaned ", ""},
		{"right configuration", []string{"--check-config"}, valid, 0, "the configuration is right", ""},
		{"wrong configuration", []string{"--check-config"}, []string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_WORKERS=x", "OVERPLANE_MTU=1"}, exitConfig, "", `OVERPLANE_MTU="1"`},
		{"wrong configuration, the other variable", nil, []string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_WORKERS=x", "OVERPLANE_MTU=1"}, exitConfig, "", `OVERPLANE_WORKERS="x"`},
		{"unknown variable", []string{"--check-config"}, append(valid, "OVERPLANE_WROKERS=2"), 0, "right", "nearest known one is OVERPLANE_WORKERS"},
		{"printed configuration", []string{"--print-config"}, append(valid, "OVERPLANE_CPUS=1-2"), 0, "OVERPLANE_CPUS=1-2\n", ""},
		{"unknown flag", []string{"--daemon"}, valid, exitConfig, "", "-daemon"},
		{"unknown verb", []string{"start"}, valid, exitConfig, "", `unknown argument "start"`},
		{"verb with argument", []string{"uninstall", "now"}, valid, exitConfig, "", `unknown argument "now"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			require.Equal(t, c.status, run(c.args, c.environ, &stdout, &stderr), "%s", &stderr)
			require.Contains(t, stdout.String(), c.stdout)
			require.Contains(t, stderr.String(), c.stderr)
		})
	}
}

func TestHelpNamesEveryVariable(t *testing.T) {
	var out bytes.Buffer
	help(&out)
	var cfg agent.Config
	for _, v := range cfg.Variables() {
		require.Contains(t, out.String(), v.Name+"\n")
	}
}

func TestLogForms(t *testing.T) {
	var out bytes.Buffer
	newLog(&agent.Config{LogFormat: "json", LogLevel: "warn"}, &out).Info("quiet")
	require.Empty(t, out.String())
	newLog(&agent.Config{LogFormat: "json", LogLevel: "debug"}, &out).Debug("loud", slog.Int("n", 1))
	require.True(t, strings.HasPrefix(out.String(), "{"), "%s", &out)
	require.Contains(t, out.String(), `"n":1`)
}
