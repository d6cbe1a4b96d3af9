package bench

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/overplane/overplane/bench/result"
)

func compareCommand() *cobra.Command {
	limit := 0.0
	c := &cobra.Command{
		Use: "compare A.json B.json", Short: "Compare two results by benchstat's statistics", Args: cobra.ExactArgs(2),
		Long: `Compares every figure that both results have: medians, and whether their difference is more than chance (Mann-Whitney U test, as benchstat). Results whose settings
differ are refused, and the settings named.

With --limit, it is for results of ` + "`pipeline`" + ` and a baseline that may come from another machine: the multiples of the reference loop are compared, best round with best round, and it fails if
one is worse by more than that factor.`,
		RunE: func(c *cobra.Command, args []string) error {
			a, err := result.Read(args[0])
			if err != nil {
				return err
			}
			b, err := result.Read(args[1])
			if err != nil {
				return err
			}
			if limit > 0 {
				return compareBaseline(c.OutOrStdout(), a, b, limit)
			}
			rows, err := result.Compare(a, b)
			if err != nil {
				return err
			}
			for i, r := range []*result.Run{a, b} {
				if !r.Complete {
					fmt.Fprintf(c.OutOrStdout(), "%s is not complete: %s\n", args[i], r.Problem)
				}
			}
			return result.WriteComparison(c.OutOrStdout(), rows)
		},
	}
	c.Flags().Float64Var(&limit, "limit", 0, "fail if a multiple of the reference loop got worse by more than this factor")
	return c
}

func compareBaseline(w io.Writer, a, b *result.Run, limit float64) error {
	worse, err := result.Worse(a, b, metricRatio, limit)
	if err != nil {
		return err
	}
	if len(worse) > 0 {
		return fmt.Errorf("slower than the baseline:\n  %s", strings.Join(worse, "\n  "))
	}
	_, err = fmt.Fprintf(w, "No stage is slower than the baseline by more than a factor of %v.\n", limit)
	return err
}
