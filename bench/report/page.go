package report

import (
	_ "embed"
	"fmt"
	"io"
	"strings"

	"github.com/overplane/overplane/bench/result"
)

//go:embed page.md
var page string

// mark is where the page has what a run has found.
const mark = "<!-- figures -->\n"

// Page writes docs/benchmarks.md: what is measured, how to repeat it, what it does not show, and a run's figures. base is the path of the folder with plots and
// raw figures, as seen from the page.
func Page(w io.Writer, r *result.Run, plots map[string][]string, base string) error {
	before, after, ok := strings.Cut(page, mark)
	if !ok {
		return fmt.Errorf("page.md has no %q", mark)
	}
	if _, err := io.WriteString(w, before); err != nil {
		return err
	}
	linked := map[string][]string{}
	for scenario, names := range plots {
		for _, n := range names {
			linked[scenario] = append(linked[scenario], base+"/"+n)
		}
	}
	fmt.Fprintf(w, "Raw figures, every round of every system: [%s/result.json](%s/result.json).\n\n", base, base)
	if err := Markdown(w, r, linked); err != nil {
		return err
	}
	_, err := io.WriteString(w, after)
	return err
}
