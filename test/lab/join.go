package lab

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/pki"
)

// certify issues the node's certificate, if it has none, and lets the node join if it was drained before.
func (n *Node) certify(ctx context.Context) error {
	dir := filepath.Join(n.Dir(), "pki")
	if _, err := os.Stat(filepath.Join(dir, "node.crt")); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := pki.Issue(n.lab.pkiDir(), pki.Request{Role: pki.Node, Name: n.Name()}, filepath.Join(dir, "node.crt"), filepath.Join(dir, "node.key"), false, time.Now()); err != nil {
		return err
	}
	err := n.lab.AdminCall(ctx, func(ctx context.Context, c controlv1.AdminServiceClient) error {
		_, err := c.DrainNode(ctx, &controlv1.DrainNodeRequest{Node: n.Name(), Undo: true})
		return err
	})
	if status.Code(err) == codes.NotFound {
		return nil
	}
	return err
}

// join starts a node's daemon and returns when the controller has given it its blocks.
func (n *Node) join(ctx context.Context) error {
	if err := n.certify(ctx); err != nil {
		return err
	}
	if err := n.Start(ctx); err != nil {
		return err
	}
	var blocks []string
	if err := n.WaitStatus(ctx, "given its blocks", func(s *controlv1.GetStatusResponse) bool {
		blocks = s.GetOwnBlocks()
		return len(blocks) == 2
	}); err != nil {
		return err
	}
	for _, b := range blocks {
		p, err := netip.ParsePrefix(b)
		if err != nil {
			return err
		}
		if p.Addr().Is4() {
			n.BlockIPv4 = p
		} else {
			n.BlockIPv6 = p
		}
	}
	return n.lab.save()
}

// leave has the controller take a node's blocks away, and returns when no other node sends to them and the node is no member any more. Its daemon ends on the
// way. A node whose daemon does not run is fenced.
func (n *Node) leave(ctx context.Context) error {
	fenced := n.Pid() == 0
	release := func(fenced bool) error {
		return n.lab.AdminCall(ctx, func(ctx context.Context, c controlv1.AdminServiceClient) error {
			_, err := c.ReleaseNode(ctx, &controlv1.ReleaseNodeRequest{Node: n.Name(), Fenced: fenced})
			return err
		})
	}
	if err := release(fenced); err != nil {
		return err
	}
	if err := n.lab.waitFor(ctx, n.Name()+" withdraws its blocks", func(ctx context.Context) (bool, error) {
		blocks, err := n.lab.Blocks(ctx, n.Name())
		for _, b := range blocks {
			if s := b.GetState(); s == controlv1.BlockState_BLOCK_STATE_ALLOCATED || s == controlv1.BlockState_BLOCK_STATE_RELEASING {
				return false, err
			}
		}
		return err == nil, err
	}); err != nil {
		return err
	}
	if fenced {
		return nil
	}
	if err := n.Stop(); err != nil {
		return err
	}
	return n.lab.waitFor(ctx, n.Name()+" leaves", func(ctx context.Context) (bool, error) {
		r, err := n.lab.Convergence(ctx)
		for _, m := range r.GetNodes() {
			if m.GetNode() == n.Name() {
				return false, err
			}
		}
		return err == nil, err
	})
}
