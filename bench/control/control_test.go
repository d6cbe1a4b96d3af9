package control

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// programs is the folder with the built programs.
func programs(t *testing.T) string {
	if os.Getenv("OVERPLANE_BIN") != "" {
		dir, err := lab.FindBinaries()
		require.NoError(t, err)
		return dir
	}
	dir := t.TempDir()
	out, err := exec.Command("go", "build", "-o", filepath.Join(dir, "overplane-controller"), "../../cmd/overplane-controller").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return dir
}

// A benchmark that does not run is none: a small one, for its figures to be there.
func TestFewNodes(t *testing.T) {
	if testing.Short() {
		t.Skip("it is run without -short")
	}
	r, err := Run(t.Context(), Options{Binaries: programs(t), Nodes: 40, Stuck: 3, Changes: 2, Applies: 2, Log: t.Logf})
	require.NoError(t, err)
	t.Log("\n" + r.String())
	text, err := json.Marshal(r)
	require.NoError(t, err)
	var figures map[string]any
	require.NoError(t, json.Unmarshal(text, &figures))
	for name, v := range figures {
		if f, ok := v.(float64); ok && name != "change_controller_cpu_s" && name != "cold_start_controller_cpu_s" { // hundredths of a second: may be none
			require.Positive(t, f, name)
		}
	}
	require.Len(t, r.Acknowledged, 2)
	require.Positive(t, r.Apply.Packets)
	require.Positive(t, r.Apply.LongestPoll)
}

// The bounds, with OVERPLANE_E2E=full: they are the machine's affair, too.
func TestBounds(t *testing.T) {
	if os.Getenv("OVERPLANE_E2E") != "full" {
		t.Skip("OVERPLANE_E2E=full runs it: 5,000 nodes take about a minute of two cores")
	}
	nodes, _ := strconv.Atoi(os.Getenv("OVERPLANE_SCALE_NODES")) // 0: the default
	r, err := Run(t.Context(), Options{Binaries: programs(t), Nodes: nodes, Log: t.Logf})
	require.NoError(t, err)
	t.Log("\n" + r.String())
	require.Empty(t, r.Exceeded())
}

func TestExceededNamesEveryBound(t *testing.T) {
	require.Empty(t, (&Result{}).Exceeded())
	r := Result{ColdStart: 60, ColdStartCPU: 20, ChangeP99: 1, PeakResident: MaxResident, Apply: Apply{Median: 10}}
	require.Len(t, r.Exceeded(), 5)
}
