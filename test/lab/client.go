package lab

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

const (
	rpcTimeout     = 10 * time.Second
	programTimeout = 30 * time.Second
	pollInterval   = 50 * time.Millisecond
)

// Call runs fn with a client of the node's local API.
func (n *Node) Call(ctx context.Context, fn func(context.Context, controlv1.LocalServiceClient) error) error {
	conn, err := grpc.NewClient("unix://"+n.Socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("%s: %w", n.Name(), err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	if err := fn(ctx, controlv1.NewLocalServiceClient(conn)); err != nil {
		return fmt.Errorf("%s: %w", n.Name(), err)
	}
	return nil
}

// Status asks the daemon for its status.
func (n *Node) Status(ctx context.Context) (*controlv1.GetStatusResponse, error) {
	var r *controlv1.GetStatusResponse
	err := n.Call(ctx, func(ctx context.Context, c controlv1.LocalServiceClient) (err error) {
		r, err = c.GetStatus(ctx, &controlv1.GetStatusRequest{})
		return err
	})
	return r, err
}

// Drops asks the daemon for what it dropped.
func (n *Node) Drops(ctx context.Context) ([]*controlv1.DropCount, error) {
	var r *controlv1.GetDropsResponse
	err := n.Call(ctx, func(ctx context.Context, c controlv1.LocalServiceClient) (err error) {
		r, err = c.GetDrops(ctx, &controlv1.GetDropsRequest{})
		return err
	})
	return r.GetDrops(), err
}

// DropsOf sums the packets that died of one reason at one port ("" is any) over workers and directions.
func (n *Node) DropsOf(ctx context.Context, port, reason string) (uint64, error) {
	drops, err := n.Drops(ctx)
	var sum uint64
	for _, d := range drops {
		if d.Reason == reason && (port == "" || d.Port == port) {
			sum += d.Packets
		}
	}
	return sum, err
}

// AttachedPods asks the daemon for the pods it knows.
func (n *Node) AttachedPods(ctx context.Context) ([]*controlv1.Pod, error) {
	var r *controlv1.ListPodsResponse
	err := n.Call(ctx, func(ctx context.Context, c controlv1.LocalServiceClient) (err error) {
		r, err = c.ListPods(ctx, &controlv1.ListPodsRequest{})
		return err
	})
	return r.GetPods(), err
}

// Attach has the daemon give a pod its device.
func (p *Pod) Attach(ctx context.Context) (*controlv1.Pod, error) {
	var r *controlv1.AttachPodResponse
	err := p.node.Call(ctx, func(ctx context.Context, c controlv1.LocalServiceClient) (err error) {
		r, err = c.AttachPod(ctx, &controlv1.AttachPodRequest{
			Name: p.Name(), Netns: NetnsPath(p.Netns()),
			Ipv4: p.IPv4().String(), Ipv6: p.IPv6().String(), Kind: p.Kind,
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("attaching pod %s: %w", p.Name(), err)
	}
	if pod := r.GetPod(); pod.GetState() != controlv1.PodState_POD_STATE_READY {
		return pod, fmt.Errorf("pod %s was attached but is not ready: %s", p.Name(), pod.GetReason())
	}
	return r.GetPod(), nil
}

// Detach has the daemon take a pod's device away.
func (p *Pod) Detach(ctx context.Context) error {
	return p.node.Call(ctx, func(ctx context.Context, c controlv1.LocalServiceClient) error {
		_, err := c.DetachPod(ctx, &controlv1.DetachPodRequest{Name: p.Name()})
		return err
	})
}

// WaitProgrammed returns when the node forwards by the version last written and reports itself ready.
func (n *Node) WaitProgrammed(ctx context.Context) error {
	if n.lab.Controller != nil {
		return n.waitController(ctx)
	}
	want := n.lab.Version()
	return n.WaitStatus(ctx, "ready at revision "+fmt.Sprint(want.Revision), func(s *controlv1.GetStatusResponse) bool {
		return s.GetReady() && proto.Equal(s.GetProgrammed(), want)
	})
}

// waitController is WaitProgrammed with a controller. One that is away cannot say what the newest version is.
func (n *Node) waitController(ctx context.Context) error {
	if n.lab.ControllerPid() != 0 {
		if err := n.lab.waitConverged(ctx, n.Name()); err != nil {
			return fmt.Errorf("%w\n%s", err, n.LogTail(10))
		}
	}
	return n.WaitStatus(ctx, "ready", func(s *controlv1.GetStatusResponse) bool {
		return s.GetReady() && s.GetDesired() != nil && proto.Equal(s.GetDesired(), s.GetProgrammed())
	})
}

// WaitStatus polls the daemon's status until ok accepts it, for at most 30 s.
func (n *Node) WaitStatus(ctx context.Context, what string, ok func(*controlv1.GetStatusResponse) bool) error {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	for {
		s, err := n.Status(ctx)
		if err == nil && ok(s) {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = fmt.Errorf("ready=%v, programmed revision %d, problems: %s",
					s.GetReady(), s.GetProgrammed().GetRevision(), strings.Join(s.GetProblems(), "; "))
			}
			return fmt.Errorf("%s is not %s: %w\n%s", n.Name(), what, err, n.LogTail(10))
		case <-time.After(pollInterval):
		}
	}
}

// WaitProgrammed returns when every node whose daemon runs forwards by the version last written.
func (l *Lab) WaitProgrammed(ctx context.Context) error {
	if l.Controller != nil && l.ControllerPid() != 0 {
		if err := l.waitConverged(ctx); err != nil {
			return err
		}
	}
	return l.each(func(n *Node) error {
		if n.Gone {
			return nil
		}
		return n.WaitProgrammed(ctx)
	})
}

// each runs fn for all nodes at once and joins the errors.
func (l *Lab) each(fn func(*Node) error) error {
	errs := make([]error, len(l.Nodes))
	done := make(chan struct{})
	for i, n := range l.Nodes {
		go func() {
			errs[i] = fn(n)
			done <- struct{}{}
		}()
	}
	for range l.Nodes {
		<-done
	}
	return errors.Join(errs...)
}
