package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/control/client/view"
)

func (a *app) routesCommand() *cobra.Command {
	var kinds []string
	c := &cobra.Command{
		Use:   "routes [ADDRESS | PREFIX]",
		Short: "The programmed routes, or the one that an address or prefix takes",
		Long: `The programmed routes. With an address, the route that its packets take: the longest match. With a prefix, the longest
route that covers all of it.`,
		Example: `  overplane routes
  overplane routes 10.244.2.7
  overplane routes --kind node,host`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			for _, k := range kinds {
				if !slices.Contains(view.RouteKinds, k) {
					return fmt.Errorf("--kind %q: want some of %s", k, strings.Join(view.RouteKinds, ", "))
				}
			}
			return a.withClient(func(c *client.Client) error {
				r, err := c.ListRoutes(cmd.Context(), &controlv1.ListRoutesRequest{})
				if err != nil {
					return err
				}
				// The match is looked for among all routes: another kind may hide the one that would be longest among those asked for.
				if len(args) == 1 {
					to, err := view.ParseDestination(args[0])
					if err != nil {
						return err
					}
					match := view.Lookup(r.GetRoutes(), to)
					if match == nil {
						return fmt.Errorf("no route covers %s: packets for it are unreachable", to)
					}
					r.Routes = []*controlv1.ProgrammedRoute{match}
				}
				r.Routes = view.SelectRoutes(r.GetRoutes(), kinds)
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				return view.Routes(cmd.OutOrStdout(), r.GetRoutes())
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	c.Flags().StringSliceVar(&kinds, "kind", nil, "only these kinds: "+strings.Join(view.RouteKinds, ", "))
	mustComplete(c, "kind", cobra.FixedCompletions(view.RouteKinds, cobra.ShellCompDirectiveNoFileComp))
	return c
}

// mustComplete registers a flag's completion. It fails for flags that do not exist only.
func mustComplete(c *cobra.Command, flag string, f cobra.CompletionFunc) {
	if err := c.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err)
	}
}
