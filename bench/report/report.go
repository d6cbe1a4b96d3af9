package report

import (
	"fmt"
	"io"
	"strings"

	"github.com/overplane/overplane/bench/result"
)

// Markdown writes the whole report of a run. plots maps scenarios to images, paths as the report's reader sees them; it may be nil.
func Markdown(w io.Writer, r *result.Run, plots map[string][]string) error {
	if err := Preamble(w, r); err != nil {
		return err
	}
	var floors strings.Builder
	if err := WriteFloors(&floors, r); err != nil {
		return err
	}
	if floors.Len() > 0 {
		fmt.Fprintf(w, "### Floors and goals\n\nRatios are to the named peer in the same round; medians of all rounds, best of Overplane's variants.\n\n%s", floors.String())
	}
	for _, scenario := range Scenarios(r) {
		fmt.Fprintf(w, "### %s\n\n", scenario)
		for _, p := range plots[scenario] {
			fmt.Fprintf(w, "![%s](%s)\n\n", scenario, p)
		}
		if err := Figures(w, r, scenario); err != nil {
			return err
		}
		if err := Curves(w, r, scenario); err != nil {
			return err
		}
	}
	if len(r.Balances) > 0 {
		fmt.Fprint(w, "### Offered, received, dropped\n\n")
		return Balances(w, r)
	}
	return nil
}
