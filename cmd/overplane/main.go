// Command overplane is the operator's command: it asks the node's daemon over its unix socket and shows the answers, and makes clusters
// on one machine (overplane lab).
//
// This package is flags and wiring: package client speaks to the daemon, package view makes tables and JSON.
//
// It exits with 0 if all went well, with 1 after an error, and `overplane status` with 3 if the node answered but is not ready, `overplane converge` with
// 3 if not every node has converged.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/overplane/overplane/control/client"
	"github.com/overplane/overplane/test/lab"
)

// version is set by the linker: -X main.version=v0.1.0.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, time.Now))
}

// run is the whole program but for the process around it. It returns the exit status.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer, now func() time.Time) int {
	root := newRoot(now)
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	return exitCode(root.ExecuteContext(ctx), errOut)
}

// exitCode is the status to exit with after an error, which is told unless it stands for a status alone. Errors of other programs, which have a status as well, are told.
func exitCode(err error, errOut io.Writer) int {
	var status exitStatus
	var executed *lab.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case errors.As(err, &executed):
		return executed.Code
	}
	fmt.Fprintf(errOut, "overplane: %v\n", err)
	return 1
}

// exitStatus is an exit status without a message: the output said it.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// statusNotReady is what `overplane status` exits with if the node is not ready.
const statusNotReady exitStatus = 3

// app is what all commands share.
type app struct {
	socket string
	json   bool
	now    func() time.Time
}

const (
	groupNode    = "node"
	groupCluster = "cluster"
	groupLab     = "lab"
)

func newRoot(now func() time.Time) *cobra.Command {
	a := &app{now: now}
	root := &cobra.Command{
		Use:   "overplane",
		Short: "See and change what a node of an Overplane cluster does",
		Long: `See and change what a node of an Overplane cluster does.

Commands for a node ask its daemon, overplaned, over its unix socket; those for the cluster ask the controller, over TLS.
Exit status: 0 if all went well, 1 after an error; status exits with 3 if the node is not ready, converge if not all nodes have converged.`,
		Version:       version,
		SilenceErrors: true, // run prints them
		SilenceUsage:  true,
	}
	root.SetVersionTemplate("overplane {{.Version}}\n")
	f := root.PersistentFlags()
	f.StringVar(&a.socket, "socket", client.Socket(), "the daemon's unix socket (environment: "+client.SocketEnv+")")
	f.BoolVar(&a.json, "json", false, "print JSON for programs instead of tables for people")

	root.AddGroup(&cobra.Group{ID: groupNode, Title: "A node:"}, &cobra.Group{ID: groupCluster, Title: "The cluster (asks the controller):"}, &cobra.Group{ID: groupLab, Title: "A cluster on this machine:"})
	for _, c := range []*cobra.Command{a.statusCommand(), a.routesCommand(), a.podsCommand(), a.dropsCommand(), a.sessionsCommand(), a.snatCommand(), a.countersCommand(), a.stateCommand()} {
		c.GroupID = groupNode
		root.AddCommand(c)
	}
	for _, c := range a.clusterCommands() {
		c.GroupID = groupCluster
		root.AddCommand(c)
	}
	l := lab.Command()
	l.GroupID = groupLab
	root.AddCommand(l, a.versionCommand())
	for _, c := range root.Commands() {
		refuseUnknown(c)
	}
	return root
}

// refuseUnknown makes commands that only have sub-commands show their help when called alone, and fail when called with a word that is none of
// them. Cobra does so for the root only, and otherwise succeeds.
func refuseUnknown(c *cobra.Command) {
	for _, sub := range c.Commands() {
		refuseUnknown(sub)
	}
	if !c.Runnable() {
		c.Args = cobra.NoArgs
		c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	}
}

// withClient gives a command a connection to the daemon for as long as f runs.
func (a *app) withClient(f func(*client.Client) error) error {
	c, err := client.Dial(a.socket)
	if err != nil {
		return err
	}
	return errors.Join(f(c), c.Close())
}

// complete makes a completion function of what the daemon knows. Without a daemon nothing is offered.
func (a *app) complete(ctx context.Context, f func(context.Context, *client.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	var names []string
	err := a.withClient(func(c *client.Client) (err error) {
		names, err = f(ctx, c)
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
