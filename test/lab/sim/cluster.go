package sim

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/overplane/overplane/control/pki"
)

// Cluster is what the controllers and nodes of one simulation share. Its methods may be called concurrently.
type Cluster struct {
	// Dir has everything: pki/ and a folder for each controller.
	Dir string
	// Program is the path of overplane-controller.
	Program string
}

// NewCluster makes the authority and the certificates of controllers and operators in a folder, which must not have them yet. binaries is the folder with the
// built programs.
func NewCluster(dir, binaries string) (*Cluster, error) {
	c := &Cluster{Dir: dir, Program: filepath.Join(binaries, "overplane-controller")}
	if _, err := os.Stat(c.Program); err != nil {
		return nil, fmt.Errorf("%w: make build first", err)
	}
	if err := os.MkdirAll(c.pki(""), 0o700); err != nil {
		return nil, err
	}
	if err := pki.Init(c.pki(""), "simulation", time.Now()); err != nil {
		return nil, err
	}
	for _, r := range []pki.Request{{Role: pki.Controller, Name: "controller", Hosts: []string{"127.0.0.1"}}, {Role: pki.Admin, Name: "admin"}} {
		if _, err := c.Issue(r); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *Cluster) pki(name string) string { return filepath.Join(c.Dir, "pki", name) }

// Files are the certificate files of somebody.
func (c *Cluster) Files(name string) pki.Files {
	return pki.Files{CA: c.pki(pki.CACert), Cert: c.pki(name + ".crt"), Key: c.pki(name + ".key")}
}

// Issue makes a certificate, or returns the files of the one that was made before.
func (c *Cluster) Issue(r pki.Request) (pki.Files, error) {
	f := c.Files(r.Name)
	if _, err := os.Stat(f.Cert); err == nil {
		return f, nil
	}
	return f, pki.Issue(c.pki(""), r, f.Cert, f.Key, false, time.Now())
}

// freeAddresses finds addresses of the loopback that nobody listens on, now.
func freeAddresses(n int) ([]string, error) {
	var out []string
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		out = append(out, l.Addr().String())
	}
	return out, nil
}
