// Package systemd tests the units of deploy/. Here is what systemd-analyze says of them without running them; ./run runs them, under a systemd that is process 1 of a
// container, and ../kernels/run in virtual machines.
package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var units = []string{"overplaned.service", "overplane-controller.service"}

func analyze(t *testing.T, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if strings.Contains(string(out), "unrecognized option") {
		t.Skip("systemd-analyze is older than 250")
	}
	return string(out), err
}

var overall = regexp.MustCompile(`Overall exposure level for \S+: ([0-9.]+)`)

// 0 is a service that may do nothing, 10 one that may do everything.
func TestUnitsAreExposedLessThanThree(t *testing.T) {
	for _, u := range units {
		t.Run(u, func(t *testing.T) {
			out, err := analyze(t, "security", "--no-pager", "--offline=true", filepath.Join("../../deploy", u))
			require.NoError(t, err, out)
			m := overall.FindStringSubmatch(out)
			require.NotNil(t, m, out)
			level, err := strconv.ParseFloat(m[1], 64)
			require.NoError(t, err)
			t.Logf("exposure %v", level)
			require.Less(t, level, 3.0, out)
		})
	}
}

// The programs do not have to be where the units say: they are put there for the time of the test.
func TestUnitsAreUnderstoodWhole(t *testing.T) {
	for _, u := range units {
		t.Run(u, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("../../deploy", u))
			require.NoError(t, err)
			require.Contains(t, string(text), "ExecStart=/usr/bin/over")
			copied := filepath.Join(t.TempDir(), u)
			program := regexp.MustCompile(`ExecStart=/usr/bin/\S+`).ReplaceAllString(string(text), "ExecStart=/bin/true")
			require.NoError(t, os.WriteFile(copied, []byte(program), 0o644))
			out, err := analyze(t, "verify", "--man=no", copied)
			require.NoError(t, err, out)
			for line := range strings.Lines(out) {
				require.NotContains(t, line, u, "systemd does not understand a line")
			}
		})
	}
}
