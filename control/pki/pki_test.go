package pki

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func authority(t *testing.T) string {
	dir := t.TempDir()
	require.NoError(t, Init(dir, "test", time.Now()))
	return dir
}

func issue(t *testing.T, dir string, role Role, name string, hosts ...string) Files {
	f := Files{CA: filepath.Join(dir, CACert), Cert: filepath.Join(dir, name+".crt"), Key: filepath.Join(dir, name+".key")}
	require.NoError(t, Issue(dir, Request{Role: role, Name: name, Hosts: hosts}, f.Cert, f.Key, true, time.Now()))
	return f
}

// shake makes a TLS connection and returns what both ends say.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			defer c.Close()
			err = tls.Server(c, server).Handshake()
		}
		done <- err
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	defer c.Close()
	clientErr = tls.Client(c, client).Handshake()
	return <-done, clientErr
}

func TestWhoMaySpeakToWhom(t *testing.T) {
	dir := authority(t)
	controller := issue(t, dir, Controller, "controller", "127.0.0.1", "controller.example")
	node, admin := issue(t, dir, Node, "n1"), issue(t, dir, Admin, "admin")
	server, err := controller.Server(Node)
	require.NoError(t, err)
	as := func(f Files, name string) *tls.Config {
		c, err := f.Client(name)
		require.NoError(t, err)
		return c
	}
	for _, name := range []string{"127.0.0.1", "controller.example"} {
		serverErr, clientErr := shake(t, server, as(node, name))
		require.NoError(t, serverErr)
		require.NoError(t, clientErr)
	}
	_, clientErr := shake(t, server, as(node, "127.0.0.2"))
	require.ErrorAs(t, clientErr, new(x509.HostnameError))
	serverErr, _ := shake(t, server, as(admin, "127.0.0.1"))
	require.ErrorContains(t, serverErr, "overplane:admins")

	// A node cannot pass for a controller, nor somebody of another authority for a node.
	server, err = node.Server(Node)
	require.NoError(t, err)
	_, clientErr = shake(t, server, as(node, "127.0.0.1"))
	require.Error(t, clientErr)
	server, err = controller.Server(Node)
	require.NoError(t, err)
	foreign := issue(t, authority(t), Node, "n1")
	foreign.CA = node.CA
	serverErr, _ = shake(t, server, as(foreign, "127.0.0.1"))
	require.ErrorAs(t, serverErr, new(*tls.CertificateVerificationError))
	serverErr, _ = shake(t, server, &tls.Config{InsecureSkipVerify: true})
	require.ErrorContains(t, serverErr, "didn't provide a certificate")

	_, err = node.Client("")
	require.Error(t, err)
}

func TestFilesAreNotOverwritten(t *testing.T) {
	dir := authority(t)
	require.ErrorContains(t, Init(dir, "again", time.Now()), "there is an authority")
	f := issue(t, dir, Node, "n1")
	require.ErrorContains(t, Issue(dir, Request{Role: Node, Name: "n1"}, f.Cert, f.Key, false, time.Now()), "exists")
	info, err := os.Stat(f.Key)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())
	require.ErrorContains(t, Issue(t.TempDir(), Request{Role: Node, Name: "n1"}, "x", "y", false, time.Now()), "pki init makes one")
	require.ErrorContains(t, Issue(dir, Request{Role: Controller, Name: "c"}, filepath.Join(dir, "c.crt"), filepath.Join(dir, "c.key"), false, time.Now()), "addresses or DNS names")
	require.ErrorContains(t, Issue(dir, Request{Role: "x", Name: "c"}, filepath.Join(dir, "c.crt"), filepath.Join(dir, "c.key"), false, time.Now()), "want node, admin or controller")
}

func TestHalfReplacedFilesAreNotTakenOver(t *testing.T) {
	dir := authority(t)
	f := issue(t, dir, Node, "n1")
	l, err := f.load()
	require.NoError(t, err)
	before, _, err := l.get()
	require.NoError(t, err)
	other := issue(t, dir, Node, "n2")
	text, err := os.ReadFile(other.Cert)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(f.Cert, text, 0o644)) // and the key is the old one
	l.checked = time.Time{}
	now, _, err := l.get()
	require.NoError(t, err)
	require.Equal(t, before, now)
	text, err = os.ReadFile(other.Key)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(f.Key, text, 0o600))
	l.checked = time.Time{}
	now, _, err = l.get()
	require.NoError(t, err)
	require.Equal(t, "n2", now.Leaf.Subject.CommonName)
}
