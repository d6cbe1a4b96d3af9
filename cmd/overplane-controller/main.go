// Command overplane-controller is the control plane of a cluster: it gives nodes their blocks and pushes routes. It is configured by
// OVERPLANE_CONTROLLER_* variables. This package is flags and wiring.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/overplane/overplane/control/controller"
)

// version is set by the linker: -X main.version=v0.1.0.
var version = "dev"

// Exit statuses beside 0. Service managers do not restart on a wrong configuration (RestartPreventExitStatus=78; EX_CONFIG of sysexits.h). It must not be 2, which is what
// Go's runtime exits with after a panic, and after the SIGABRT of a watchdog.
const (
	exitError  = 1
	exitConfig = 78
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// configError is a wrong configuration.
type configError struct{ error }

// run is the whole program but for the process around it. It returns the exit status.
func run(ctx context.Context, args, environ []string, out, errOut io.Writer) int {
	root := newRoot(environ)
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(errOut)
	err := root.ExecuteContext(ctx)
	var wrong configError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &wrong):
		fmt.Fprintf(errOut, "overplane-controller: the configuration cannot be used:\n%v\n", wrong.error)
		return exitConfig
	}
	fmt.Fprintf(errOut, "overplane-controller: %v\n", err)
	return exitError
}

func newRoot(environ []string) *cobra.Command {
	root := &cobra.Command{
		Use:   "overplane-controller",
		Short: "The control plane of an Overplane cluster",
		Long: `The control plane of an Overplane cluster: gives nodes their blocks, and pushes routes.

A cluster's first steps:

  overplane-controller pki init
  overplane-controller pki issue controller controller --host 10.0.0.5 --host 127.0.0.1
  overplane-controller pki issue admin admin
  overplane-controller pki issue node n1
  overplane-controller serve

Exit status: 0 if all went well, 1 after an error, 78 if the configuration cannot be used.`,
		Version: version, SilenceErrors: true, SilenceUsage: true,
	}
	root.SetVersionTemplate("overplane-controller {{.Version}}\n")
	root.AddCommand(serveCommand(environ), pkiCommand(), backupCommand(), restoreCommand(environ))
	for _, c := range root.Commands() {
		refuseUnknown(c)
	}
	return root
}

// refuseUnknown makes commands that only have sub-commands show their help when called alone, and fail when called with a word that is none of them.
func refuseUnknown(c *cobra.Command) {
	for _, sub := range c.Commands() {
		refuseUnknown(sub)
	}
	if !c.Runnable() {
		c.Args = cobra.NoArgs
		c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	}
}

func serveCommand(environ []string) *cobra.Command {
	check, show := false, false
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run the controller until SIGTERM or SIGINT",
		Long:  "Run the controller until SIGTERM or SIGINT. Nodes forward on without it.\n\nEnvironment:\n" + environment(),
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := load(cmd, environ)
			if err != nil {
				return err
			}
			switch {
			case show:
				for _, v := range cfg.Variables() {
					fmt.Fprintf(cmd.OutOrStdout(), "%s=%s\n", v.Name, v.Value)
				}
				return nil
			case check:
				_, err := fmt.Fprintln(cmd.OutOrStdout(), "the configuration is right")
				return err
			}
			return controller.Run(cmd.Context(), cfg, version, cfg.NewLog())
		},
	}
	c.Flags().BoolVar(&check, "check-config", false, "say whether the configuration is right, and exit")
	c.Flags().BoolVar(&show, "print-config", false, "print the configuration as it is understood, and exit")
	return c
}

// load reads the configuration and prints its warnings.
func load(cmd *cobra.Command, environ []string) (controller.Config, error) {
	cfg, warnings, err := controller.Load(environ)
	for _, w := range warnings {
		fmt.Fprintln(cmd.ErrOrStderr(), "overplane-controller: warning:", w)
	}
	if err != nil {
		return cfg, configError{err}
	}
	return cfg, nil
}

func environment() string {
	var b strings.Builder
	var cfg controller.Config
	for _, v := range cfg.Variables() {
		def := v.Default
		if def == "" {
			def = "(none)"
		}
		fmt.Fprintf(&b, "  %s\n      default %s; allowed: %s\n", v.Name, def, v.Allowed)
	}
	return b.String()
}
