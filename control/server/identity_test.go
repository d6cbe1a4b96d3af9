package server_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/pki"
)

func TestIdentityIsTheCertificates(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	refused := func(f pki.Files, m *controlv1.SyncRequest, code codes.Code, text string) {
		t.Helper()
		s, err := c.tryDial(f)
		if err == nil {
			_ = s.Send(m)
			_, err = s.Recv()
		}
		require.Equal(t, code, status.Code(err), "%v", err)
		require.ErrorContains(t, err, text)
	}
	n1 := c.issue(pki.Node, "n1", 0)
	refused(n1, hello("n2", 1), codes.PermissionDenied, `the certificate is node "n1"'s, but the hello says "n2"`)
	refused(c.files("admin"), hello("admin", 1), codes.Unavailable, "") // TLS: an administrator is no node
	refused(n1, &controlv1.SyncRequest{}, codes.InvalidArgument, "hello")
	refused(n1, hello("n1", 300), codes.InvalidArgument, "ipv4")
	r, err := c.admin().ListNodes(t.Context(), &controlv1.ListNodesRequest{})
	require.NoError(t, err)
	require.Empty(t, r.GetNodes(), "who was refused became a member")

	// A node cannot administer, and another authority's certificates are nothing here.
	tc, err := n1.Client("127.0.0.1")
	require.NoError(t, err)
	conn, err := grpc.NewClient(c.adminAt, grpc.WithTransportCredentials(credentials.NewTLS(tc)))
	require.NoError(t, err)
	defer conn.Close()
	_, err = controlv1.NewAdminServiceClient(conn).ListNodes(t.Context(), &controlv1.ListNodesRequest{})
	require.Equal(t, codes.Unavailable, status.Code(err))
	other := &cluster{t: t, dir: t.TempDir()}
	require.NoError(t, pki.Init(other.dir, "other", time.Now()))
	foreign := other.issue(pki.Node, "n1", 0)
	foreign.CA = n1.CA
	refused(foreign, hello("n1", 1), codes.Unavailable, "")
}

func TestExpiredCertificateIsRefused(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	f := c.issue(pki.Node, "late", 1500*time.Millisecond)
	tc, err := f.Client("127.0.0.1") // with a certificate that holds yet
	require.NoError(t, err)
	time.Sleep(1600 * time.Millisecond)
	conn, err := grpc.NewClient(c.node, grpc.WithTransportCredentials(credentials.NewTLS(tc)))
	require.NoError(t, err)
	defer conn.Close()
	s, err := controlv1.NewControlServiceClient(conn).Sync(t.Context())
	if err == nil {
		_ = s.Send(hello("late", 1))
		_, err = s.Recv()
	}
	require.Equal(t, codes.Unavailable, status.Code(err), "%v", err)
	r, err := c.admin().ListNodes(t.Context(), &controlv1.ListNodesRequest{})
	require.NoError(t, err)
	require.Empty(t, r.GetNodes())
	_, err = f.Client("127.0.0.1")
	require.ErrorContains(t, err, "issue a new one")
}

func TestCertificatesAreRotated(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	n1 := c.join(1, nil)
	c.converged(n1)
	// A new authority: for a while both are trusted, then the controller and the node have certificates of the new one.
	old := c.dir
	c.dir = t.TempDir()
	require.NoError(t, pki.Init(c.dir, "new", time.Now()))
	for name, role := range map[string]pki.Role{"controller": pki.Controller, "n1": pki.Node, "n2": pki.Node, "admin": pki.Admin} {
		f := c.issue(role, name, 0)
		for _, from := range []string{f.Cert, f.Key} {
			text, err := os.ReadFile(from)
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(old, filepath.Base(from)), text, 0o600))
		}
	}
	text, err := os.ReadFile(filepath.Join(c.dir, pki.CACert))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(old, pki.CACert), text, 0o600))
	time.Sleep(1100 * time.Millisecond) // files are looked at once a second
	n2 := c.join(2, nil)
	c.eventually(func() bool { return len(n2.own()) == 1 }, "the new certificates are not in use")
	require.True(t, n1.client.Status().Connected, "a stream that stood was ended")
	c.converged(n1, n2)
}

func TestStreamEndsWhenTheCertificateExpires(t *testing.T) {
	c := newCluster(t, onePool(16), nil)
	f := c.issue(pki.Node, "n1", 2*time.Second)
	s := c.dial(f)
	require.NoError(t, s.Send(hello("n1", 1)))
	_, err := s.Recv()
	require.NoError(t, err)
	for err == nil {
		_, err = s.Recv()
	}
	require.Equal(t, codes.Unauthenticated, status.Code(err), "%v", err)
}
