package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client/admin"
	"github.com/overplane/overplane/control/controller"
	"github.com/overplane/overplane/control/store"
)

func backupCommand() *cobra.Command {
	cfg := admin.Default()
	c := &cobra.Command{
		Use:   "backup FILE",
		Short: "Write everything that the controller stores to a file, as JSON; - is standard output",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := admin.Dial(cfg)
			if err != nil {
				return err
			}
			defer a.Close()
			r, err := a.Backup(cmd.Context(), &controlv1.BackupRequest{})
			if err != nil {
				return err
			}
			if args[0] == "-" {
				_, err = cmd.OutOrStdout().Write(r.GetContent())
				return err
			}
			return replace(args[0], r.GetContent())
		},
	}
	cfg.Flags(c.Flags())
	return c
}

// replace writes a file so that after a crash there is the old one or the new one.
func replace(name string, content []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if closeErr := f.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // the first error is the one to report
	}
	return err
}

func restoreCommand(environ []string) *cobra.Command {
	return &cobra.Command{
		Use:   "restore FILE",
		Short: "Make a store of a backup: STATE_DIR, or ETCD_PREFIX of the external etcd, which must be empty",
		Long: `Make a store of a backup, with the controller stopped. The configuration is that of serve; the store that it names must be empty. It is a new
incarnation: nodes take it for another history than the one they know.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			content, err := os.ReadFile(args[0])
			if err != nil {
				return err
			}
			cfg, err := load(cmd, environ)
			if err != nil {
				return err
			}
			st, err := controller.OpenStore(cmd.Context(), cfg, cfg.NewLog())
			if err != nil {
				return err
			}
			_, err = st.Campaign(cmd.Context(), "restore")
			if err == nil {
				err = store.Restore(cmd.Context(), st, content)
			}
			if resignErr := st.Resign(cmd.Context()); err == nil {
				err = resignErr
			}
			if closeErr := st.Close(); err == nil {
				err = closeErr
			}
			if err == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), "restored")
			}
			return err
		},
	}
}
