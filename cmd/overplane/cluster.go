package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client/admin"
	"github.com/overplane/overplane/control/client/view"
)

// clusterCommands ask the controller instead of the node's daemon.
func (a *app) clusterCommands() []*cobra.Command {
	return []*cobra.Command{a.nodesCommand(), a.nodeCommand(), a.blocksCommand(), a.poolsCommand(), a.staticCommand(), a.convergeCommand()}
}

// clusterCommand gives a command a connection to the controller, and the flags that say which.
func clusterCommand(c *cobra.Command, f func(cmd *cobra.Command, args []string, c *admin.Client) error) *cobra.Command {
	cfg := admin.Default()
	cfg.Flags(c.Flags())
	c.RunE = func(cmd *cobra.Command, args []string) error {
		client, err := admin.Dial(cfg)
		if err != nil {
			return err
		}
		return errors.Join(f(cmd, args, client), client.Close())
	}
	return c
}

func (a *app) nodesCommand() *cobra.Command {
	return clusterCommand(&cobra.Command{Use: "nodes", Short: "The cluster's nodes: who is connected, and who owns which block", Args: cobra.NoArgs},
		func(cmd *cobra.Command, _ []string, c *admin.Client) error {
			r, err := c.ListNodes(cmd.Context(), &controlv1.ListNodesRequest{})
			if err != nil {
				return err
			}
			if a.json {
				return view.JSON(cmd.OutOrStdout(), r)
			}
			return view.Nodes(cmd.OutOrStdout(), r.GetNodes(), a.now())
		})
}

func (a *app) nodeCommand() *cobra.Command {
	c := &cobra.Command{Use: "node", Short: "Drain a node, or release its blocks"}
	undo := false
	drain := clusterCommand(&cobra.Command{
		Use: "drain NODE", Short: "Say that a node gets no more blocks", Args: cobra.ExactArgs(1),
		Long: "Say that a node gets no more blocks. It keeps those that it has until it is released.",
	}, func(cmd *cobra.Command, args []string, c *admin.Client) error {
		r, err := c.DrainNode(cmd.Context(), &controlv1.DrainNodeRequest{Node: args[0], Undo: undo})
		if err != nil {
			return err
		}
		if a.json {
			return view.JSON(cmd.OutOrStdout(), r)
		}
		text := "node %s is draining\n"
		if undo {
			text = "node %s is not draining any more\n"
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), text, args[0])
		return err
	})
	drain.Flags().BoolVar(&undo, "undo", false, "take it back: the node gets blocks again")

	fenced := false
	release := clusterCommand(&cobra.Command{
		Use: "release NODE", Short: "Take a node's blocks away, once it has withdrawn them", Args: cobra.ExactArgs(1),
		Long: `Drain a node and take its blocks away. They are releasing until the node has withdrawn them, then cool down until the other nodes have, and
are free after that.

A node that is dead cannot say that it has withdrawn anything: --fenced says so in its place. If it is not dead after all, its addresses may
get a second owner.`,
	}, func(cmd *cobra.Command, args []string, c *admin.Client) error {
		r, err := c.ReleaseNode(cmd.Context(), &controlv1.ReleaseNodeRequest{Node: args[0], Fenced: fenced})
		if err != nil {
			return err
		}
		if a.json {
			return view.JSON(cmd.OutOrStdout(), r)
		}
		return view.Blocks(cmd.OutOrStdout(), r.GetBlocks(), a.now())
	})
	release.Flags().BoolVar(&fenced, "fenced", false, "the node is known to be dead")
	c.AddCommand(drain, release)
	return c
}

func (a *app) blocksCommand() *cobra.Command {
	node, states := "", []string(nil)
	c := clusterCommand(&cobra.Command{Use: "blocks", Short: "Blocks that are or were in use: their owners, states, and what they wait for", Args: cobra.NoArgs},
		func(cmd *cobra.Command, _ []string, c *admin.Client) error {
			for _, s := range states {
				if !slices.Contains(view.BlockStates, s) {
					return fmt.Errorf("--state %q: want some of %s", s, strings.Join(view.BlockStates, ", "))
				}
			}
			r, err := c.ListBlocks(cmd.Context(), &controlv1.ListBlocksRequest{})
			if err != nil {
				return err
			}
			r.Blocks = view.SelectBlocks(r.GetBlocks(), node, states)
			if a.json {
				return view.JSON(cmd.OutOrStdout(), r)
			}
			return view.Blocks(cmd.OutOrStdout(), r.GetBlocks(), a.now())
		})
	c.Flags().StringVar(&node, "node", "", "only this node's")
	c.Flags().StringSliceVar(&states, "state", nil, "only in these states: "+strings.Join(view.BlockStates, ", "))
	mustComplete(c, "state", cobra.FixedCompletions(view.BlockStates, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) poolsCommand() *cobra.Command {
	c := clusterCommand(&cobra.Command{Use: "pools", Short: "The pod CIDRs: how many nodes they fit, and how much is used", Args: cobra.NoArgs},
		func(cmd *cobra.Command, _ []string, c *admin.Client) error {
			r, err := c.ListPools(cmd.Context(), &controlv1.ListPoolsRequest{})
			if err != nil {
				return err
			}
			if a.json {
				return view.JSON(cmd.OutOrStdout(), r)
			}
			return view.Pools(cmd.OutOrStdout(), r)
		})
	block := uint32(0)
	add := clusterCommand(&cobra.Command{
		Use: "add CIDR", Short: "Add a pod CIDR while the cluster runs; it cannot be removed", Args: cobra.ExactArgs(1), Example: "  overplane pools add 10.245.0.0/16 --block 24",
	}, func(cmd *cobra.Command, args []string, c *admin.Client) error {
		r, err := c.AddPool(cmd.Context(), &controlv1.AddPoolRequest{Cidr: args[0], BlockPrefixLength: block})
		if err != nil {
			return err
		}
		if a.json {
			return view.JSON(cmd.OutOrStdout(), r)
		}
		for _, w := range r.GetWarnings() {
			fmt.Fprintln(cmd.ErrOrStderr(), "overplane: warning:", w)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "pool %s is there\n", args[0])
		return err
	})
	add.Flags().Uint32Var(&block, "block", 0, "the prefix `length` of its blocks (default 24, 80 for IPv6)")
	c.AddCommand(add)
	return c
}

func (a *app) staticCommand() *cobra.Command {
	c := clusterCommand(&cobra.Command{Use: "static-routes", Short: "Routes that every node gets beside the blocks'", Args: cobra.NoArgs},
		func(cmd *cobra.Command, _ []string, c *admin.Client) error {
			r, err := c.ListStaticRoutes(cmd.Context(), &controlv1.ListStaticRoutesRequest{})
			if err != nil {
				return err
			}
			if a.json {
				return view.JSON(cmd.OutOrStdout(), r)
			}
			return view.StaticRoutes(cmd.OutOrStdout(), r.GetRoutes())
		})
	node, host, unreachable := "", false, false
	set := clusterCommand(&cobra.Command{Use: "set PREFIX", Short: "Add a route, or change where it leads", Args: cobra.ExactArgs(1)},
		func(cmd *cobra.Command, args []string, c *admin.Client) error {
			r := &controlv1.Route{Prefix: args[0]}
			switch {
			case node != "":
				r.Target = &controlv1.Route_Node{Node: node}
			case host:
				r.Target = &controlv1.Route_Host{Host: true}
			case unreachable:
				r.Target = &controlv1.Route_Unreachable{Unreachable: true}
			}
			reply, err := c.SetStaticRoute(cmd.Context(), &controlv1.SetStaticRouteRequest{Route: r})
			if err != nil || !a.json {
				return err
			}
			return view.JSON(cmd.OutOrStdout(), reply)
		})
	set.Flags().StringVar(&node, "node", "", "to this node")
	set.Flags().BoolVar(&host, "host", false, "to each node's own kernel")
	set.Flags().BoolVar(&unreachable, "unreachable", false, "nowhere: packets are answered with an ICMP error")
	set.MarkFlagsOneRequired("node", "host", "unreachable")
	set.MarkFlagsMutuallyExclusive("node", "host", "unreachable")
	remove := clusterCommand(&cobra.Command{Use: "remove PREFIX", Short: "Remove a route", Args: cobra.ExactArgs(1)},
		func(cmd *cobra.Command, args []string, c *admin.Client) error {
			reply, err := c.RemoveStaticRoute(cmd.Context(), &controlv1.RemoveStaticRouteRequest{Prefix: args[0]})
			if err != nil || !a.json {
				return err
			}
			return view.JSON(cmd.OutOrStdout(), reply)
		})
	c.AddCommand(set, remove)
	return c
}

func (a *app) convergeCommand() *cobra.Command {
	wait, allow := time.Duration(0), uint32(0)
	c := clusterCommand(&cobra.Command{
		Use: "converge", Short: "What the controller issued against what every node forwards by", Args: cobra.NoArgs,
		Long: `What the controller issued against what every node forwards by.

It exits with 0 if every node is connected and forwards by the newest version, with 3 if not, with 1 if the controller cannot be asked.`,
	}, func(cmd *cobra.Command, _ []string, c *admin.Client) error {
		if allow > 0 {
			if _, err := c.AllowRemovals(cmd.Context(), &controlv1.AllowRemovalsRequest{Count: allow}); err != nil {
				return err
			}
		}
		r, err := awaitConvergence(cmd.Context(), c, wait)
		if err != nil {
			return err
		}
		if a.json {
			err = view.JSON(cmd.OutOrStdout(), r)
		} else {
			err = view.Convergence(cmd.OutOrStdout(), r, a.now())
		}
		if err == nil && int(r.GetConverged()) < len(r.GetNodes()) {
			err = statusNotReady
		}
		return err
	})
	c.Flags().DurationVar(&wait, "wait", 0, "wait so long for all nodes to converge")
	c.Flags().Uint32Var(&allow, "allow-removals", 0, "let nodes remove `N` entries at once that they refuse to, for ten minutes")
	return c
}

// awaitConvergence asks until all nodes have converged or the time is up, and returns the last answer.
func awaitConvergence(ctx context.Context, c *admin.Client, wait time.Duration) (*controlv1.GetConvergenceResponse, error) {
	const every = 50 * time.Millisecond
	for end := time.Now().Add(wait); ; {
		r, err := c.GetConvergence(ctx, &controlv1.GetConvergenceRequest{})
		if err != nil || int(r.GetConverged()) == len(r.GetNodes()) || time.Now().After(end) {
			return r, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(every):
		}
	}
}
