package main

import (
	"encoding/json"
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/control/client/view"
)

func (a *app) statusCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "The node on one page: what is wrong, how the uplink is driven, what is programmed",
		Long: `The node on one page: what is wrong, how the uplink is driven and why not better, what is programmed, what the workers do.

It exits with 0 if the node is ready, with 3 if it is not, with 1 if it cannot be asked.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				r, err := c.GetStatus(cmd.Context(), &controlv1.GetStatusRequest{})
				if err != nil {
					return err
				}
				if a.json {
					err = view.JSON(cmd.OutOrStdout(), r)
				} else {
					err = view.Status(cmd.OutOrStdout(), r, version, a.now())
				}
				if err == nil && !r.GetReady() {
					err = statusNotReady
				}
				return err
			})
		},
	}
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "The versions of this command and of the daemon, if one answers",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			daemon := ""
			problem := a.withClient(func(c *client.Client) error {
				r, err := c.GetStatus(cmd.Context(), &controlv1.GetStatusRequest{})
				daemon = r.GetDaemonVersion()
				return err
			})
			if a.json {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(struct {
					Version       string `json:"version"`
					DaemonVersion string `json:"daemon_version"`
				}{version, daemon})
			}
			answer := daemon
			if problem != nil {
				answer = "no answer: " + problem.Error()
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "overplane   %s (%s, %s/%s)\noverplaned  %s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH, answer)
			return err
		},
	}
}
