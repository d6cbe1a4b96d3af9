package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/overplane/overplane/test/lab"
)

// Command is `overplane-bench control`. It fails if a bound is exceeded.
func Command() *cobra.Command {
	var o Options
	var file string
	c := &cobra.Command{
		Use:   "control",
		Short: "Measure the control plane: one controller and 5,000 simulated nodes on two cores",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			if o.Binaries, err = lab.FindBinaries(); err != nil {
				return err
			}
			o.Log = func(format string, args ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
			r, err := Run(ctx, o)
			if err != nil {
				return err
			}
			if err := write(file, &r); err != nil {
				return err
			}
			fmt.Fprint(cmd.OutOrStdout(), r.String())
			if over := r.Exceeded(); len(over) > 0 {
				return errors.New(strings.Join(over, "; "))
			}
			return nil
		},
	}
	c.SetContext(context.Background())
	f := c.Flags()
	f.IntVar(&o.Nodes, "nodes", 5000, "simulated nodes")
	f.IntVar(&o.Stuck, "stuck", 50, "clients that say hello and never read; -1: none")
	f.IntVar(&o.Changes, "changes", 20, "nodes that join one after the other")
	f.IntVar(&o.Applies, "applies", 30, "how often the one node that forwards applies a table")
	f.StringVar(&file, "json", "", "file for the results as JSON")
	return c
}

func write(file string, r *Result) error {
	if file == "" {
		return nil
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}
