package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/control/client/view"
	"github.com/overplane/overplane/dataplane/drop"
)

func (a *app) countersCommand() *cobra.Command {
	workers := false
	c := &cobra.Command{
		Use:   "counters",
		Short: "What went in and out at each port, and what the data plane answered itself",
		Long: `What went in and out at each port since the daemon started, seen from the data plane: in is received from the port. A frame that
carries several segments is one frame and as many packets. JSON is per worker always.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				r, err := c.GetCounters(cmd.Context(), &controlv1.GetCountersRequest{})
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				return view.Counters(cmd.OutOrStdout(), r, workers)
			})
		},
	}
	c.Flags().BoolVar(&workers, "workers", false, "one row a port and worker instead of their sum")
	return c
}

// dropsOptions are the flags of the drops command.
type dropsOptions struct {
	filter  view.DropFilter
	workers bool
	watch   float64 // seconds; 0: once
	count   int     // intervals; 0: until interrupted
}

func (a *app) dropsCommand() *cobra.Command {
	var o dropsOptions
	c := &cobra.Command{
		Use:   "drops",
		Short: "What packets died of, by port, direction and reason",
		Long: `What packets died of since the daemon started, by port, direction and reason. Direction in is on the way from the port into
the data plane, out is on the way to it. JSON is per worker always.

With --watch, what was dropped in each interval; as JSON one object a line.`,
		Example: `  overplane drops --pod web
  overplane drops --watch 2 --reason port_full,no_frame`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("watch") && (o.watch < 0.1 || o.watch > 3600) {
				return fmt.Errorf("--watch %v: want 0.1 to 3600 seconds", o.watch)
			}
			return a.withClient(func(c *client.Client) error {
				if o.watch > 0 {
					return a.watchDrops(cmd, c, &o)
				}
				r, err := c.GetDrops(cmd.Context(), &controlv1.GetDropsRequest{})
				if err != nil {
					return err
				}
				if err := o.check(cmd.Context(), c, r); err != nil {
					return err
				}
				r.Drops = o.filter.Select(r.GetDrops())
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				return view.Drops(cmd.OutOrStdout(), r.GetDrops(), o.workers)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&o.filter.Pod, "pod", "", "only this pod's port")
	f.StringSliceVar(&o.filter.Reasons, "reason", nil, "only these reasons")
	f.BoolVar(&o.workers, "workers", false, "one row a worker instead of their sum")
	f.Float64Var(&o.watch, "watch", 0, "show what was dropped in every `SECONDS`, until interrupted")
	f.IntVar(&o.count, "count", 0, "with --watch: stop after so many intervals")
	mustComplete(c, "pod", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.complete(cmd.Context(), podNames)
	})
	mustComplete(c, "reason", cobra.FixedCompletions(reasons(), cobra.ShellCompDirectiveNoFileComp))
	return c
}

// reasons are the names of the drop reasons that this version knows, with what they mean for completion.
func reasons() []string {
	var out []string
	for r := drop.None + 1; r < drop.NumReasons; r++ {
		out = append(out, cobra.CompletionWithDesc(r.String(), r.Description()))
	}
	return out
}

// check refuses filters that cannot match anything: a mistyped name must not look like "no drops".
func (o *dropsOptions) check(ctx context.Context, c *client.Client, r *controlv1.GetDropsResponse) error {
	known := make(map[string]bool)
	for reason := drop.None + 1; reason < drop.NumReasons; reason++ {
		known[reason.String()] = true
	}
	for _, d := range r.GetDrops() {
		known[d.GetReason()] = true // a newer daemon's
	}
	for _, reason := range o.filter.Reasons {
		if !known[reason] {
			return fmt.Errorf("--reason %q: there is no such reason", reason)
		}
	}
	if o.filter.Pod == "" || len((view.DropFilter{Pod: o.filter.Pod}).Select(r.GetDrops())) > 0 {
		return nil
	}
	pods, err := podNames(ctx, c)
	if err == nil && !slices.Contains(pods, o.filter.Pod) {
		err = fmt.Errorf("--pod %q: there is no such pod on this node", o.filter.Pod)
	}
	return err
}

// watchDrops shows what is dropped from now on, interval by interval. Being interrupted is its ordinary end.
func (a *app) watchDrops(cmd *cobra.Command, c *client.Client, o *dropsOptions) error {
	ctx, out := cmd.Context(), cmd.OutOrStdout()
	before, err := c.GetDrops(ctx, &controlv1.GetDropsRequest{})
	if err != nil {
		return err
	}
	if err := o.check(ctx, c, before); err != nil {
		return err
	}
	ticker := time.NewTicker(time.Duration(o.watch * float64(time.Second)))
	defer ticker.Stop()
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		after, err := c.GetDrops(ctx, &controlv1.GetDropsRequest{})
		if err != nil {
			if errors.Is(ctx.Err(), context.Canceled) {
				return nil
			}
			return err
		}
		drops := o.filter.Select(view.DropsSince(before.GetDrops(), after.GetDrops()))
		if a.json {
			err = view.JSONLine(out, &controlv1.GetDropsResponse{Drops: drops})
		} else if _, err = fmt.Fprintln(out, a.now().Format(time.TimeOnly)); err == nil {
			err = view.Drops(out, drops, o.workers)
		}
		if err != nil || n == o.count {
			return err
		}
		before = after
	}
}
