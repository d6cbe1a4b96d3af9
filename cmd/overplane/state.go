package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/control/client/view"
)

// stdin is what stands for standard input in the place of a file's name, stdinName what errors call it.
const (
	stdin     = "-"
	stdinName = "standard input"
)

func (a *app) stateCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "state",
		Short: "The node's desired state: read, check, push",
	}
	c.AddCommand(a.stateGetCommand(), a.stateReplaceCommand(), a.statePatchCommand(), a.stateValidateCommand())
	return c
}

func (a *app) stateGetCommand() *cobra.Command {
	hashes := false
	c := &cobra.Command{
		Use:   "get",
		Short: "Print the desired state as a state file",
		Long: `Print the desired state as a state file: what "overplane state replace" and the state source "file" read. Hashes, digest and entry
count are left out, so that it can be edited: they are computed again when it is read.

With --json, the daemon's whole answer, with every field.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withClient(func(c *client.Client) error {
				r, err := c.GetState(cmd.Context(), &controlv1.GetStateRequest{})
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				if r.GetState() == nil {
					return errors.New("the node has no desired state yet")
				}
				if !hashes {
					api.StripHashes(r.GetState())
				}
				text, err := api.Format(r.GetState())
				if err != nil {
					return err
				}
				_, err = cmd.OutOrStdout().Write(text)
				return err
			})
		},
	}
	c.Flags().BoolVar(&hashes, "hashes", false, "with hashes, digest and entry count")
	return c
}

func (a *app) stateReplaceCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "replace FILE",
		Short: "Make a state file the node's desired state, and wait until it is programmed",
		Long:  `Make a state file the node's desired state, and wait until it is programmed. "-" is standard input. The daemon's state source must be "api".`,
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := readState(cmd, args[0])
			if err != nil {
				return err
			}
			return a.withClient(func(c *client.Client) error {
				r, err := c.ReplaceState(cmd.Context(), &controlv1.ReplaceStateRequest{State: s})
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				return programmed(cmd.OutOrStdout(), r.GetProgrammed())
			})
		},
	}
}

func (a *app) statePatchCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "patch FILE",
		Short: "Apply a patch (StatePatch as JSON) to the node's desired state, and wait until it is programmed",
		Long: `Apply a patch (StatePatch as JSON) to the node's desired state, and wait until it is programmed. "-" is standard input. The patch names
the version that it is for; if the node's is another, nothing is changed. The daemon's state source must be "api".`,
		Example: `  overplane state patch - <<EOF
  {"node": "n1", "base": {"revision": 7}, "version": {"revision": 8},
   "upsert_routes": [{"prefix": "10.0.0.0/16", "host": true}]}
  EOF`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := readPatch(cmd, args[0])
			if err != nil {
				return err
			}
			return a.withClient(func(c *client.Client) error {
				r, err := c.PatchState(cmd.Context(), &controlv1.PatchStateRequest{Patch: p})
				if err != nil {
					return err
				}
				if a.json {
					return view.JSON(cmd.OutOrStdout(), r)
				}
				return programmed(cmd.OutOrStdout(), r.GetProgrammed())
			})
		},
	}
}

func (a *app) stateValidateCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "validate FILE",
		Short: "Say everything that is wrong with a state file, without asking a daemon",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			if name == stdin {
				name = stdinName
			}
			s, err := readState(cmd, args[0])
			if err == nil {
				err = api.Validate(s)
			}
			var problems []string
			if err != nil {
				problems = strings.Split(err.Error(), "\n")
			}
			if a.json {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				if err := e.Encode(struct {
					Valid    bool     `json:"valid"`
					Problems []string `json:"problems"`
				}{err == nil, append([]string{}, problems...)}); err != nil {
					return err
				}
				if err != nil {
					return exitStatus(1)
				}
				return nil
			}
			if err != nil {
				return fmt.Errorf("%s is not valid:\n  %s", name, strings.Join(problems, "\n  "))
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is valid: node %s, version %s, %d pools, %d own blocks, %d members, %d routes\n", name, s.GetNode(),
				api.FormatVersion(s.GetVersion()), len(s.GetPools()), len(s.GetOwnBlocks()), len(s.GetMembers()), len(s.GetRoutes()))
			return err
		},
	}
}

func readState(cmd *cobra.Command, path string) (*controlv1.NodeState, error) {
	if path == stdin {
		return api.Read(cmd.InOrStdin(), stdinName)
	}
	return api.ReadFile(path)
}

func readPatch(cmd *cobra.Command, path string) (*controlv1.StatePatch, error) {
	if path == stdin {
		return api.ReadPatch(cmd.InOrStdin(), stdinName)
	}
	return api.ReadPatchFile(path)
}

func programmed(w io.Writer, v *controlv1.Version) error {
	_, err := fmt.Fprintf(w, "version %s is programmed\n", api.FormatVersion(v))
	return err
}
