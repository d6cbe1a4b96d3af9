package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// Command is `overplane lab`. Commands return errors; printing them and the exit status are the caller's, except that exec exits with the
// status of what it executed ([ExitError]).
func Command() *cobra.Command {
	c := &cobra.Command{
		Use:   "lab",
		Short: "A cluster on this machine: namespaces, wires and real daemons",
		Long: `A cluster on this machine, made of network namespaces, a real controller and real daemons. It needs root.

  overplane lab run                 make a cluster, prove that it works, take it down
  overplane lab up                  make a cluster and leave it there to play with
  overplane lab exec n1-p1 -- ping 10.244.1.2
  overplane lab exec gw -- overplane nodes
  overplane lab node kill n2
  overplane lab controller kill
  overplane lab down

Namespaces are named ovp-gw (the underlay's bridge and router), ovp-ext (outside), ovp-n1 (a node), ovp-n1-p1 (a pod); files are under
/run/overplane-lab/ovp, the controller's and an administrator's certificate in controller/.`,
		Args: cobra.NoArgs,
	}
	name := c.PersistentFlags().String("name", defaultLabName, "name of the lab, the prefix of its namespaces")
	c.AddCommand(upCommand(name), runCommand(name), statusCommand(name), downCommand(name), execCommand(name), nodeCommand(name), controllerCommand(name))
	return c
}

// ExitError is the exit status of a command executed in the lab.
type ExitError struct{ Code int }

func (e *ExitError) Error() string { return fmt.Sprintf("exit status %d", e.Code) }

// optionFlags declares the flags of up and run.
func optionFlags(c *cobra.Command, o *Options) {
	f := c.Flags()
	f.IntVar(&o.Nodes, "nodes", 3, "nodes")
	f.IntVar(&o.Pods, "pods", 2, "pods on each node")
	f.StringVar(&o.Uplink, "uplink", "auto", "how the uplinks are driven: "+strings.Join(uplinkModes, ", "))
	f.StringVar(&o.PodPort, "pod-port", "tap", "kind of the pods' ports: tap or veth")
	f.IntVar(&o.Workers, "workers", 1, "forwarding threads of each daemon")
	f.IntVar(&o.Queues, "queues", 0, "queues of each node's uplink; 0 is as many as workers")
	f.IntVar(&o.MTU, "mtu", 1500, "MTU of the underlay")
	f.IntVar(&o.IPForward, "ip-forward", 0, "the kernel's ip_forward in the nodes, both families: 0 or 1")
	f.StringVar(&o.State, "state", StateController, "where nodes get their desired state: controller, or file, which the lab writes")
	f.StringVar(&o.Underlay, "underlay", "", "join the underlay of another lab instead of making one")
	f.StringArrayVar(&o.Env, "env", nil, "a further setting of every daemon, OVERPLANE_X=value (repeatable)")
}

// Interruptible is a context that ends at Ctrl-C, SIGTERM or SIGHUP. From here on the process also survives that nobody reads its output any more
// (`overplane lab run | head`): what was made must be taken down.
func Interruptible(c *cobra.Command) (context.Context, context.CancelFunc) {
	signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE) // not Ignore: children would inherit that
	ctx := c.Context()
	if ctx == nil {
		ctx = context.Background()
	}
	return signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM, unix.SIGHUP)
}

func progress(w io.Writer) func(string, ...any) {
	return func(format string, args ...any) { fmt.Fprintf(w, format+"\n", args...) }
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func upCommand(name *string) *cobra.Command {
	var o Options
	var asJSON bool
	c := &cobra.Command{
		Use: "up", Short: "Make a lab; return when every node has programmed every route", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := Interruptible(c)
			defer stop()
			o.Name, o.Log = *name, progress(c.ErrOrStderr())
			l, err := Up(ctx, o)
			if err != nil {
				return err
			}
			return l.print(ctx, c.OutOrStdout(), asJSON)
		},
	}
	optionFlags(c, &o)
	c.Flags().BoolVar(&asJSON, "json", false, "print the lab as JSON")
	return c
}

func statusCommand(name *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "status", Short: "Show a lab; exit status 1 if something is missing", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := CheckRoot(); err != nil {
				return err
			}
			l, err := Load(*name)
			if err != nil {
				return err
			}
			ctx, stop := Interruptible(c)
			defer stop()
			return l.print(ctx, c.OutOrStdout(), asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print the lab as JSON")
	return c
}

// print writes the lab for people or as JSON. It is an error if the lab is not whole.
func (l *Lab) print(ctx context.Context, w io.Writer, asJSON bool) error {
	r := l.Report(ctx)
	if asJSON {
		if err := printJSON(w, r); err != nil {
			return err
		}
	} else {
		t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
		fmt.Fprintln(t, "NAME\tNETNS\tIPV4\tIPV6\tRUNG\tPID\tREADY")
		for _, n := range r.Nodes {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%v\n", n.Name, n.Netns, n.IPv4, n.IPv6, orDash(n.Rung), n.PID, n.Ready)
			for _, p := range n.Pods {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\t\t\t\n", p.Name, p.Netns, p.IPv4, p.IPv6)
			}
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t\t\t\n", r.Ext.Name, r.Ext.Netns, r.Ext.IPv4, r.Ext.IPv6)
		if err := t.Flush(); err != nil {
			return err
		}
		for _, p := range r.Problems {
			fmt.Fprintln(w, "problem:", p)
		}
	}
	if !r.Ready {
		return fmt.Errorf("lab %s is not whole: %s", l.Name, r.Problems[0])
	}
	return nil
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func downCommand(name *string) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Remove a lab and all that a crash has left of it", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return Down(*name) },
	}
}

// Exec executes a command in a namespace of the lab named without its prefix ("n1", "n1-p1", "ext", "gw"), connected to this
// process's terminal. The error is an *ExitError if the command ended with another status than 0.
func (l *Lab) Exec(where string, argv []string) error {
	ns, err := l.netns(where)
	if err != nil {
		return err
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	if l.Controller != nil {
		cmd.Env = append(os.Environ(), l.adminEnv()...) // `overplane nodes` and the like
	}
	// The terminal sends Ctrl-C to the command as well; the command decides what it means. It must not inherit that we ignore it.
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt)
	defer signal.Stop(interrupts)
	if err := InNetns(ns, cmd.Start); err != nil {
		return err
	}
	err = cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code := exit.ExitCode()
		if st, ok := exit.Sys().(unix.WaitStatus); ok && st.Signaled() {
			code = 128 + int(st.Signal())
		}
		return &ExitError{Code: code}
	}
	return err
}

// netns resolves a name without the lab's prefix.
func (l *Lab) netns(where string) (string, error) {
	switch where {
	case "gw":
		return l.Gateway(), nil
	case "ext":
		return l.Ext(), nil
	}
	for _, n := range l.Nodes {
		if n.Name() == where {
			return n.Netns(), nil
		}
		for _, p := range n.Pods {
			if p.Name() == where {
				return p.Netns(), nil
			}
		}
	}
	return "", fmt.Errorf("lab %s has no %q: want gw, ext, a node such as n1 or a pod such as n1-p1", l.Name, where)
}

func execCommand(name *string) *cobra.Command {
	c := &cobra.Command{
		Use: "exec n1|n1-p1|ext|gw -- COMMAND...", Short: "Execute a command in a node, a pod, outside, or on the underlay",
		Args: cobra.MinimumNArgs(2),
		RunE: func(c *cobra.Command, args []string) error {
			if err := CheckRoot(); err != nil {
				return err
			}
			if args[1] == "--" {
				args = append(args[:1:1], args[2:]...)
			}
			if len(args) < 2 {
				return errors.New("no command")
			}
			l, err := Load(*name)
			if err != nil {
				return err
			}
			return l.Exec(args[0], args[1:])
		},
	}
	// What follows the name belongs to the command, flags included, with and without "--".
	c.Flags().SetInterspersed(false)
	return c
}

// labCommand is a command that does something with a lab that is up.
func labCommand(name *string, use, short string, args cobra.PositionalArgs, do func(context.Context, *Lab, []string) error) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: args,
		RunE: func(c *cobra.Command, args []string) error {
			if err := CheckRoot(); err != nil {
				return err
			}
			l, err := Load(*name)
			if err != nil {
				return err
			}
			l.Log = progress(c.ErrOrStderr())
			ctx, stop := Interruptible(c)
			defer stop()
			return do(ctx, l, args)
		},
	}
}

func controllerCommand(name *string) *cobra.Command {
	c := &cobra.Command{Use: "controller", Short: "Kill, stop or start the lab's controller", Args: cobra.NoArgs}
	c.AddCommand(
		labCommand(name, "kill", "SIGKILL to the controller", cobra.NoArgs, func(_ context.Context, l *Lab, _ []string) error { return l.KillController() }),
		labCommand(name, "stop", "SIGTERM to the controller", cobra.NoArgs, func(_ context.Context, l *Lab, _ []string) error { return l.StopController() }),
		labCommand(name, "start", "Start the controller again; return when all nodes have converged", cobra.NoArgs, func(ctx context.Context, l *Lab, _ []string) error {
			if err := l.StartController(ctx); err != nil {
				return err
			}
			return l.WaitProgrammed(ctx)
		}))
	return c
}

func nodeCommand(name *string) *cobra.Command {
	c := &cobra.Command{Use: "node", Short: "Add, drain, kill, stop, start, pause or resume a node", Args: cobra.NoArgs}
	withLab := func(use, short string, args cobra.PositionalArgs, do func(context.Context, *Lab, []string) error) {
		c.AddCommand(labCommand(name, use, short, args, do))
	}
	onNode := func(use, short string, do func(context.Context, *Node) error) {
		withLab(use+" n2", short, cobra.ExactArgs(1), func(ctx context.Context, l *Lab, args []string) error {
			n := l.Node(args[0])
			if n == nil {
				return fmt.Errorf("lab %s has no node %q", l.Name, args[0])
			}
			return do(ctx, n)
		})
	}
	withLab("add", "Add a node; return when every node has programmed the routes to it", cobra.NoArgs,
		func(ctx context.Context, l *Lab, _ []string) error {
			n, err := l.AddNode(ctx)
			if err == nil {
				l.Log("%s is up", n.Name())
			}
			return err
		})
	withLab("drain n2", "Take a node out of the cluster: pods detached, routes withdrawn, daemon stopped, namespaces removed", cobra.ExactArgs(1),
		func(ctx context.Context, l *Lab, args []string) error { return l.Drain(ctx, args[0]) })
	onNode("kill", "SIGKILL to the node's daemon; its pods and namespaces stay", func(_ context.Context, n *Node) error { return n.Kill() })
	onNode("stop", "SIGTERM to the node's daemon; its pods and namespaces stay", func(_ context.Context, n *Node) error { return n.Stop() })
	onNode("start", "Start the node's daemon again", func(ctx context.Context, n *Node) error {
		if err := n.Start(ctx); err != nil {
			return err
		}
		return n.WaitProgrammed(ctx)
	})
	onNode("pause", "SIGSTOP to the node's daemon, as if it hung", func(_ context.Context, n *Node) error { return n.Signal(unix.SIGSTOP) })
	onNode("resume", "SIGCONT to the node's daemon", func(_ context.Context, n *Node) error { return n.Signal(unix.SIGCONT) })
	return c
}
