package bench

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/overplane/overplane/bench/report"
	"github.com/overplane/overplane/bench/result"
	"github.com/overplane/overplane/bench/rig"
)

// rawFile is the name of the file with raw figures.
const rawFile = "result.json"

// write writes all files of a run, and the report to w. The raw figures are written first, whatever becomes of the rest.
func (f *flags) write(w io.Writer, r *result.Run) error {
	if err := os.MkdirAll(f.out, 0o755); err != nil {
		return err
	}
	if err := r.Write(filepath.Join(f.out, rawFile)); err != nil {
		return err
	}
	err := writeReport(w, f.out, r)
	if f.page != "" {
		err = errors.Join(err, writePage(f.page, r))
	}
	return err
}

// writeReport writes report.md and plots into a folder, and the report to w.
func writeReport(w io.Writer, dir string, r *result.Run) error {
	plots, err := report.Plots(dir, r)
	if err != nil {
		return err
	}
	var text strings.Builder
	if err := report.Markdown(&text, r, plots); err != nil {
		return err
	}
	if _, err := io.WriteString(w, text.String()); err != nil {
		return err
	}
	fmt.Fprintf(w, "Written to %s: %s, report.md and plots.\n", dir, rawFile)
	return os.WriteFile(filepath.Join(dir, "report.md"), []byte(text.String()), 0o644)
}

// writePage writes the documentation's page, and plots and raw figures into the folder of the same name.
func writePage(path string, r *result.Run) error {
	dir := strings.TrimSuffix(path, filepath.Ext(path))
	if dir == path {
		return fmt.Errorf("--report %s: want a file name with an extension", path)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := r.Write(filepath.Join(dir, rawFile)); err != nil {
		return err
	}
	plots, err := report.Plots(dir, r)
	if err != nil {
		return err
	}
	var text strings.Builder
	if err := report.Page(&text, r, plots, filepath.Base(dir)); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text.String()), 0o644)
}

// renderCommand makes a report of raw figures again.
func renderCommand() *cobra.Command {
	var page, out string
	c := &cobra.Command{
		Use: "render RESULT.json", Short: "Write the report and the plots of a result again", Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			r, err := result.Read(args[0])
			if err != nil {
				return err
			}
			if page != "" {
				return writePage(page, r)
			}
			if err := os.MkdirAll(out, 0o755); err != nil {
				return err
			}
			return writeReport(c.OutOrStdout(), out, r)
		},
	}
	c.Flags().StringVar(&page, "report", "", "write the documentation's page to this file")
	c.Flags().StringVar(&out, "out", "bench-out", "folder for report.md and plots")
	return c
}

// forwardCommand is the process that the asavie/xdp peer is.
func forwardCommand() *cobra.Command {
	var in, out, mac, ready string
	var cpu int
	c := &cobra.Command{
		Use: rig.Forward, Hidden: true, Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return rig.RunForward(in, out, mac, cpu, func() error { return os.WriteFile(ready, nil, 0o644) })
		},
	}
	f := c.Flags()
	f.StringVar(&in, "in", "", "interface to receive from")
	f.StringVar(&out, "out", "", "interface to send by")
	f.StringVar(&mac, "mac", "", "destination of what is sent")
	f.StringVar(&ready, "ready", "", "file to make when it runs")
	f.IntVar(&cpu, "cpu", 0, "core")
	return c
}
