// Command overplane-bench measures Overplane and its peers side by side. Package bench is the harness.
//
// It exits with 0 if all went well, with 1 after an error; what was measured before the error is written all the same, and marked.
package main

import (
	"fmt"
	"os"

	"github.com/overplane/overplane/bench"
)

// version is set by the linker: -X main.version=v0.1.0.
var version = "dev"

func main() {
	if err := bench.Command(version).Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "overplane-bench:", err)
		os.Exit(1)
	}
}
