// Overplaned is the node daemon: it attaches pods, and forwards their packets between each other, the node and the underlay without
// encapsulation. It is configured by OVERPLANE_* variables (docs/reference/configuration.md).
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/overplane/overplane/control/agent"
)

// version is set by the linker: -X main.version=v1.2.3.
var version = ""

const usage = `Usage: overplaned [--check-config | --print-config | --version | --help]
       overplaned uninstall

Without arguments overplaned runs until SIGTERM or SIGINT. Pods, their devices, routes and the steering program stay when it stops, and
the next start takes them over. SIGHUP reads the desired state again.

  --check-config  say whether the configuration is right, and exit
  --print-config  print the configuration as it is understood, and exit
  --version       print the version, and exit

uninstall removes all that stays: pods' devices, the host port and its routes, the steering program and its pins, and what is remembered.

Environment:
`

// Exit statuses beside 0. Service managers do not restart on a wrong configuration (RestartPreventExitStatus=78; EX_CONFIG of sysexits.h). It must not be 2, which is what
// Go's runtime exits with after a panic, and after the SIGABRT of a watchdog.
const (
	exitError  = 1
	exitConfig = 78
)

func main() { os.Exit(run(os.Args[1:], os.Environ(), os.Stdout, os.Stderr)) }

func run(args, environ []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("overplaned", flag.ContinueOnError)
	flags.SetOutput(stderr)
	check := flags.Bool("check-config", false, "")
	show := flags.Bool("print-config", false, "")
	showVersion := flags.Bool("version", false, "")
	flags.Usage = func() { help(stderr) }
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		help(stdout)
		return 0
	case err != nil:
		return exitConfig
	}
	if *showVersion {
		fmt.Fprintln(stdout, "overplaned", versionText())
		return 0
	}
	verb := flags.Arg(0)
	if flags.NArg() > 1 || verb != "" && verb != "uninstall" {
		fmt.Fprintf(stderr, "overplaned: unknown argument %q\n", flags.Arg(flags.NArg()-1))
		help(stderr)
		return exitConfig
	}

	cfg, warnings, err := agent.Load(environ)
	for _, w := range warnings {
		fmt.Fprintln(stderr, "overplaned: warning:", w)
	}
	if err != nil {
		fmt.Fprintf(stderr, "overplaned: the configuration cannot be used:\n%v\n", err)
		return exitConfig
	}
	switch {
	case *show:
		for _, v := range cfg.Variables() {
			fmt.Fprintf(stdout, "%s=%s\n", v.Name, v.Value)
		}
		return 0
	case *check:
		fmt.Fprintln(stdout, "the configuration is right")
		return 0
	}

	log := newLog(&cfg, stderr)
	slog.SetDefault(log)
	if verb == "uninstall" {
		err = agent.Uninstall(cfg, log, nil)
	} else {
		err = serve(cfg, log)
	}
	if err != nil {
		log.Error("overplaned ends", "error", err)
		var wrong *agent.ConfigError
		if errors.As(err, &wrong) {
			return exitConfig
		}
		return exitError
	}
	return 0
}

func serve(cfg agent.Config, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	reload := make(chan os.Signal, 1)
	signal.Notify(reload, syscall.SIGHUP)
	return agent.Run(ctx, cfg, agent.Options{Version: versionText(), Log: log, Reload: reload})
}

func newLog(cfg *agent.Config, w io.Writer) *slog.Logger {
	o := &slog.HandlerOptions{Level: cfg.Level()}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}

func help(w io.Writer) {
	fmt.Fprint(w, usage)
	var cfg agent.Config
	for _, v := range cfg.Variables() {
		def := v.Default
		if def == "" {
			def = "(none)"
		}
		fmt.Fprintf(w, "  %s\n      default %s; allowed: %s\n", v.Name, def, v.Allowed)
	}
}

// versionText is the version the linker was told, else what the toolchain stamped.
func versionText() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}
