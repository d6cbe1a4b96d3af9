package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/control/client/view"
)

func (a *app) podsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pods",
		Short: "The node's pods; attach and detach them",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				r, err := c.ListPods(cmd.Context(), &controlv1.ListPodsRequest{})
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				return view.Pods(cmd.OutOrStdout(), r.GetPods(), a.now())
			})
		},
	}
	c.AddCommand(a.attachCommand(), a.detachCommand())
	return c
}

func (a *app) attachCommand() *cobra.Command {
	r := &controlv1.AttachPodRequest{}
	c := &cobra.Command{
		Use:   "attach NAME --netns NETNS [--ipv4 ADDRESS] [--ipv6 ADDRESS]",
		Short: "Give a pod its device, addresses and routes",
		Long: `Give a pod its device, addresses and routes. The addresses are from the node's own blocks and the same index within them.
Attaching the same pod with the same values again changes nothing.`,
		Example: `  ip netns add web
  overplane pods attach web --netns web --ipv4 10.244.1.10 --ipv6 fd12:3456:789a:0:1::a`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if r.GetIpv4() == "" && r.GetIpv6() == "" {
				return errors.New("a pod needs an address: give --ipv4, --ipv6 or both")
			}
			netns, err := netnsPath(r.GetNetns())
			if err != nil {
				return err
			}
			r.Name, r.Netns = args[0], netns
			return a.withClient(func(c *client.Client) error {
				resp, err := c.AttachPod(cmd.Context(), r)
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), resp)
				}
				return view.PodAttached(cmd.OutOrStdout(), resp.GetPod())
			})
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	f := c.Flags()
	f.StringVar(&r.Netns, "netns", "", "the pod's network namespace: its name as ip netns has it, or a path, e.g. /proc/123/ns/net")
	f.StringVar(&r.Ipv4, "ipv4", "", "the pod's IPv4 address")
	f.StringVar(&r.Ipv6, "ipv6", "", "the pod's IPv6 address")
	f.StringVar(&r.Interface, "interface", "eth0", "the device's name in the pod")
	if err := c.MarkFlagRequired("netns"); err != nil {
		panic(err) // there is no such flag
	}
	return c
}

// netnsPath makes a path of a namespace's name, and an absolute one of a relative one: the daemon's working directory is another.
func netnsPath(s string) (string, error) {
	if s == "" {
		return "", errors.New("--netns is empty: want the name or the path of a network namespace")
	}
	if !strings.Contains(s, "/") {
		return "/run/netns/" + s, nil
	}
	return filepath.Abs(s)
}

func (a *app) detachCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "detach NAME",
		Short: "Take a pod's device away; a pod that is not attached is no error",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withClient(func(c *client.Client) error {
				r, err := c.DetachPod(cmd.Context(), &controlv1.DetachPodRequest{Name: args[0]})
				switch {
				case err != nil:
					return err
				case a.json:
					return view.JSON(cmd.OutOrStdout(), r)
				case r.GetExisted():
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "pod %s: detached\n", args[0])
				default:
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "pod %s: was not attached\n", args[0])
				}
				return err
			})
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return a.complete(cmd.Context(), podNames)
		},
	}
}

func podNames(ctx context.Context, c *client.Client) ([]string, error) {
	r, err := c.ListPods(ctx, &controlv1.ListPodsRequest{})
	var names []string
	for _, p := range r.GetPods() {
		names = append(names, p.GetName())
	}
	return names, err
}
