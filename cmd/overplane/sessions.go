package main

import (
	"github.com/spf13/cobra"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/control/client/view"
)

func (a *app) sessionsCommand() *cobra.Command {
	r := &controlv1.ListSessionsRequest{}
	c := &cobra.Command{
		Use: "sessions", Short: "Flows to the outside that leave with the node's address", Args: cobra.NoArgs,
		Example: `  overplane sessions --pod web --protocol tcp
  overplane sessions --address 198.51.100.10 --json`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				out, err := c.ListSessions(cmd.Context(), r)
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), out)
				}
				return view.Sessions(cmd.OutOrStdout(), out)
			})
		},
	}
	f := c.Flags()
	f.StringVar(&r.Pod, "pod", "", "only this pod's")
	f.StringVar(&r.Protocol, "protocol", "", "only tcp, udp, icmp, icmpv6, sctp, esp or gre")
	f.StringVar(&r.Address, "address", "", "only from or to this `ADDRESS`")
	f.Uint32Var(&r.Limit, "limit", 0, "at most so many; 0 is 10,000")
	mustComplete(c, "pod", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return a.complete(cmd.Context(), podNames)
	})
	mustComplete(c, "protocol", cobra.FixedCompletions([]string{"tcp", "udp", "icmp", "icmpv6", "sctp", "esp", "gre"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) snatCommand() *cobra.Command {
	return &cobra.Command{
		Use: "snat", Short: "How address translation stands: sessions, ports by pod, destinations that saturate", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				r, err := c.GetSnat(cmd.Context(), &controlv1.GetSnatRequest{})
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				return view.SNAT(cmd.OutOrStdout(), r)
			})
		},
	}
}
