package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab"
)

// changedRoutes is how many routes one step adds or removes.
const changedRoutes = 100

// churnOverplane gives Overplane its changes: routes come with a new desired state, which is complete when all workers forward by it.
func churnOverplane(sys *System, l *lab.Lab) {
	n1 := l.Nodes[0]
	sys.ChangeRoutes = func(ctx context.Context, step int) error {
		l.Revision++
		state := l.State(n1)
		if step%2 == 0 {
			const far = "far"
			state.Members = append(state.Members, &controlv1.Member{Name: far, Ipv4: "10.240.0.250", Ipv6: "fd00:240::250", Mac: "02:4f:56:00:00:fa"})
			for i := range changedRoutes {
				state.Routes = append(state.Routes, &controlv1.Route{Prefix: fmt.Sprintf("10.244.%d.0/24", 100+i), Target: &controlv1.Route_Node{Node: far}})
			}
		}
		if err := l.WriteState(n1, state); err != nil {
			return err
		}
		if err := n1.Reload(); err != nil {
			return err
		}
		return n1.WaitProgrammed(ctx)
	}
	if len(n1.Pods) > 2 {
		sys.ChangePods = func(ctx context.Context) error {
			p := n1.Pods[2]
			if err := p.Detach(ctx); err != nil {
				return err
			}
			_, err := p.Attach(ctx)
			return err
		}
	}
	sys.Sessions = func(ctx context.Context) (int, error) {
		n := 0
		err := n1.Call(ctx, func(ctx context.Context, c controlv1.LocalServiceClient) error {
			r, err := c.GetSnat(ctx, &controlv1.GetSnatRequest{})
			for _, w := range r.GetWorkers() {
				n += int(w.GetSessionsIpv4() + w.GetSessionsIpv6())
			}
			return err
		})
		return n, err
	}
}

// churnKernel gives the kernel the same changes, by iproute2.
func churnKernel(sys *System, s *space) {
	node := s.ns("n1")
	sys.ChangeRoutes = func(ctx context.Context, step int) error {
		verb := map[int]string{0: "add", 1: "del"}[step%2]
		var batch strings.Builder
		for i := range changedRoutes {
			fmt.Fprintf(&batch, "route %s unreachable 10.244.%d.0/24\n", verb, 100+i)
		}
		c := &space{env: s.env, name: s.name, ctx: ctx}
		c.exec([]string{"ip", "-n", node, "-batch", "-"}, batch.String())
		return c.err()
	}
	sys.ChangePods = func(ctx context.Context) error {
		c := &space{env: s.env, name: s.name, ctx: ctx}
		c.pod(1, 3, defaultMTU)
		c.routePod(1, 3)
		c.run("ip -n %s link del %s3", node, nodePort)
		return errors.Join(c.err(), c.close())
	}
	sys.Sessions = func(context.Context) (n int, err error) {
		err = lab.InNetns(node, func() error {
			data, err := os.ReadFile(filepath.Join("/proc/thread-self/net", "stat/nf_conntrack"))
			if err != nil {
				return err
			}
			// The first column of the second line is the number of entries, in hexadecimal.
			lines := strings.Split(string(data), "\n")
			if len(lines) < 2 || len(strings.Fields(lines[1])) == 0 {
				return errors.New("nf_conntrack has no entries")
			}
			v, err := strconv.ParseUint(strings.Fields(lines[1])[0], 16, 32)
			n = int(v)
			return err
		})
		return n, err
	}
}
