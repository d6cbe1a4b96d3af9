package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/overplane/overplane/control/api"
	"github.com/overplane/overplane/control/pki"
)

// defaultPKI is where the authority and what it issues are.
const defaultPKI = "/etc/overplane/pki"

func pkiCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "pki",
		Short: "A small certificate authority for nodes, administrators and controllers",
		Long: `A small certificate authority. Another one serves as well: certificates need the organization overplane:nodes, overplane:admins or
overplane:controllers, the node's name as common name, and the extended key usage clientAuth (controllers: serverAuth, and the names that nodes dial).`,
	}
	dir := c.PersistentFlags().String("dir", defaultPKI, "where the authority's ca.crt and ca.key are")
	c.AddCommand(pkiInitCommand(dir), pkiIssueCommand(dir))
	return c
}

func pkiInitCommand(dir *string) *cobra.Command {
	name := ""
	c := &cobra.Command{
		Use:   "init",
		Short: "Make the authority: ca.crt, which everybody gets, and ca.key, which nobody does",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := pki.Init(*dir, name, time.Now()); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s\n", filepath.Join(*dir, pki.CACert), filepath.Join(*dir, pki.CAKey))
			return err
		},
	}
	c.Flags().StringVar(&name, "name", "overplane", "the authority's name")
	return c
}

func pkiIssueCommand(dir *string) *cobra.Command {
	r, out, replace := pki.Request{}, "", false
	c := &cobra.Command{
		Use:   "issue node|admin|controller NAME",
		Short: "Issue a certificate and its key: NAME.crt, NAME.key",
		Example: `  overplane-controller pki issue node n1 --out /tmp/n1
  overplane-controller pki issue controller controller --host 10.0.0.5 --host controller.example`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			role, ok := pki.Roles[args[0]]
			if !ok {
				return fmt.Errorf("%q: want node, admin or controller", args[0])
			}
			r.Role, r.Name = role, args[1]
			if role == pki.Node {
				if err := api.ValidateNodeName(r.Name); err != nil {
					return err
				}
			}
			if r.Name == "" || strings.ContainsAny(r.Name, "/\x00") || strings.HasPrefix(r.Name, ".") || r.Name == "ca" {
				return fmt.Errorf("name %q: want one that a file can have, and not the authority's", r.Name)
			}
			if out == "" {
				out = *dir
			} else if err := os.MkdirAll(out, 0o700); err != nil {
				return err
			}
			cert, key := filepath.Join(out, r.Name+".crt"), filepath.Join(out, r.Name+".key")
			if err := pki.Issue(*dir, r, cert, key, replace, time.Now()); err != nil {
				return err
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s\n%s\n", cert, key)
			return err
		},
		ValidArgs: []string{"node", "admin", "controller"},
	}
	f := c.Flags()
	f.StringVar(&out, "out", "", "where the files go (default: the authority's directory)")
	f.StringArrayVar(&r.Hosts, "host", nil, "an address or DNS name that nodes dial; controllers only; may be repeated")
	f.DurationVar(&r.Validity, "validity", pki.LeafValidity, "for how long the certificate holds")
	f.BoolVar(&replace, "replace", false, "replace the files if they are there; who uses them takes the new ones over")
	return c
}
