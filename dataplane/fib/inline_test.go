package fib

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestHotFunctionsInline: what is called once or more a packet around a lookup costs no call. Lookup4 and Lookup6 themselves are beyond the
// compiler's budget for inlining.
func TestHotFunctionsInline(t *testing.T) {
	if testing.Short() {
		t.Skip("runs the compiler")
	}
	out, err := exec.Command("go", "build", "-gcflags=-m", ".").CombinedOutput()
	if err != nil {
		t.Skipf("the compiler does not run here: %v: %s", err, out)
	}
	for _, f := range []string{"MakeEntry", "Entry.Kind", "Entry.Adjacency", "(*Table).Adjacency", "addr4"} {
		require.True(t, strings.Contains(string(out), "can inline "+f+"\n"), "%s is not inlined any more", f)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "./lookup.go:") {
			require.NotContains(t, line, "to heap", "a lookup allocates nothing")
		}
	}
}
