package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sort"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// outcome is one line of the table at the end.
type outcome struct {
	name   string
	result [2]string // IPv4, IPv6
	errs   []error
}

func runCommand(name *string) *cobra.Command {
	var o Options
	var keep bool
	c := &cobra.Command{
		Use: "run", Short: "Make a lab, prove that it works, take it down; the exit status is the truth", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := Interruptible(c)
			defer stop()
			o.Name, o.Log = *name, progress(c.ErrOrStderr())
			return Run(ctx, o, keep, c.OutOrStdout())
		},
	}
	optionFlags(c, &o)
	c.Flags().BoolVar(&keep, "keep", false, "leave the lab up")
	return c
}

// Run makes a lab, proves that it works, writes a table to w and takes the lab down, also when ctx ends; keep leaves it up. The error
// says how many proofs failed.
func Run(ctx context.Context, o Options, keep bool, w io.Writer) (err error) {
	if o.Nodes < 2 || o.Pods < 1 {
		return fmt.Errorf("--nodes %d --pods %d: proofs need at least 2 nodes and 1 pod on each", o.Nodes, o.Pods)
	}
	begin := time.Now()
	l, err := Up(ctx, o)
	if err != nil {
		return err
	}
	defer func() {
		if keep {
			l.Log("lab %s stays up: `overplane lab down --name %s` removes it", l.Name, l.Name)
			return
		}
		l.Log("taking the lab down")
		downErr := l.Down()
		if downErr == nil {
			var left []string
			if left, downErr = Leftovers(l.Name); len(left) > 0 {
				downErr = fmt.Errorf("left behind: %v", left)
			}
		}
		err = errors.Join(err, downErr)
		if err == nil {
			fmt.Fprintf(w, "all proven, nothing left behind, %.0f s\n", time.Since(begin).Seconds())
		}
	}()
	report := l.Report(ctx)
	outcomes, err := l.prove(ctx)
	if err != nil {
		return err
	}
	drops := l.dropTable(ctx)
	printOutcomes(w, report, outcomes, drops)
	failed := 0
	for _, oc := range outcomes {
		if len(oc.errs) > 0 {
			failed++
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d proofs failed", failed, len(outcomes))
	}
	return nil
}

// prove runs all proofs for both families. An error means that it was interrupted.
func (l *Lab) prove(ctx context.Context) ([]outcome, error) {
	var before [2]uint64
	families := [2]int{4, 6}
	for i, family := range families {
		var err error
		if before[i], err = l.KernelForwarded(family); err != nil {
			return nil, err
		}
	}
	proofs, both := Proofs(), map[string]bool{}
	if l.Controller != nil {
		for _, p := range ControlProofs() {
			proofs, both[p.Name] = append(proofs, p), true
		}
	}
	proofs = append(proofs, Proof{"the kernel forwarded nothing", func(_ context.Context, l *Lab, family int) (string, error) {
		now, err := l.KernelForwarded(family)
		if err == nil && now != before[(family-4)/2] {
			err = fmt.Errorf("the nodes' kernels forwarded %d packets", now-before[(family-4)/2])
		}
		return "0 packets", err
	}})
	var outcomes []outcome
	for _, p := range proofs {
		oc := outcome{name: p.Name}
		for i, family := range families {
			if both[p.Name] && i > 0 {
				oc.result[i] = oc.result[0]
				continue
			}
			detail, err := "", l.daemonsRun()
			if err == nil {
				detail, err = p.Check(ctx, l, family)
			}
			if ctx.Err() != nil {
				return nil, errors.New("interrupted")
			}
			if err != nil {
				detail = "FAILED"
				if !both[p.Name] {
					err = fmt.Errorf("IPv%d: %w", family, err)
				}
				oc.errs = append(oc.errs, err)
			}
			oc.result[i] = detail
			if both[p.Name] {
				l.Log("%s: %s", p.Name, detail)
				continue
			}
			l.Log("IPv%d %s: %s", family, p.Name, detail)
		}
		outcomes = append(outcomes, oc)
	}
	return outcomes, nil
}

// daemonsRun says which daemon died. With one dead, proofs would fail one after the other and each take its time.
func (l *Lab) daemonsRun() error {
	for _, n := range l.Nodes {
		if n.Pid() == 0 {
			return fmt.Errorf("not tried: overplaned of %s does not run any more; its log says:\n%s", n.Name(), n.LogTail(20))
		}
	}
	return nil
}

// dropLine is one reason at one node.
type dropLine struct {
	node, port, direction, reason, description string
	packets                                    uint64
}

// dropTable is what all nodes dropped, summed over workers.
func (l *Lab) dropTable(ctx context.Context) []dropLine {
	sums := map[dropLine]uint64{}
	for _, n := range l.Nodes {
		drops, err := n.Drops(ctx)
		if err != nil {
			l.Log("drops of %s: %v", n.Name(), err)
		}
		for _, d := range drops {
			if d.Packets > 0 {
				sums[dropLine{node: n.Name(), port: d.Port, direction: d.Direction, reason: d.Reason, description: d.Description}] += d.Packets
			}
		}
	}
	var lines []dropLine
	for line, packets := range sums {
		line.packets = packets
		lines = append(lines, line)
	}
	sort.Slice(lines, func(i, j int) bool {
		a, b := lines[i], lines[j]
		return fmt.Sprint(a.node, a.port, a.direction, a.reason) < fmt.Sprint(b.node, b.port, b.direction, b.reason)
	})
	return lines
}

func printOutcomes(w io.Writer, r *Report, outcomes []outcome, drops []dropLine) {
	rung, pods := "", 0
	for _, n := range r.Nodes {
		rung, pods = n.Rung, pods+len(n.Pods)
	}
	fmt.Fprintf(w, "\n%d nodes, %d pods, uplinks driven by %s, MTU %d\n\n", len(r.Nodes), pods, orDash(rung), r.MTU)
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "PROOF\tRESULT\tIPV4\tIPV6")
	for _, oc := range outcomes {
		verdict := "ok"
		if len(oc.errs) > 0 {
			verdict = "FAILED"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", oc.name, verdict, oc.result[0], oc.result[1])
	}
	t.Flush()
	for _, oc := range outcomes {
		for _, err := range oc.errs {
			fmt.Fprintf(w, "\n%s: %v\n", oc.name, err)
		}
	}
	fmt.Fprintln(w)
	if len(drops) == 0 {
		fmt.Fprintln(w, "No packet was dropped.")
		return
	}
	fmt.Fprintln(t, "DROPPED AT\tPORT\tDIRECTION\tREASON\tPACKETS\tMEANING")
	for _, d := range drops {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\n", d.node, d.port, d.direction, d.reason, d.packets, d.description)
	}
	t.Flush()
}
