package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Up makes a lab and returns when every node has programmed every route and every pod has its device. When it fails, or ctx ends, it takes
// down what it made; the error then has the end of the log in question.
func Up(ctx context.Context, o Options) (_ *Lab, err error) {
	if err := o.resolve(); err != nil {
		return nil, err
	}
	if err := CheckRoot(); err != nil {
		return nil, err
	}
	if o.Binaries == "" {
		if o.Binaries, err = FindBinaries(); err != nil {
			return nil, err
		}
	}
	if err := checkFree(ctx, o.Name); err != nil {
		return nil, err
	}
	unlock, err := lock(o.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	l := &Lab{Options: o, First: 1, Incarnation: newIncarnation(), Created: time.Now().UTC().Truncate(time.Second)}
	defer func() {
		if err != nil {
			o.Log("failed; taking down what is there")
			err = errors.Join(err, down(o.Name))
		}
	}()
	if l.MountedBPF, err = makePins(l.Name); err != nil {
		return nil, err
	}
	if err := l.save(); err != nil {
		return nil, err
	}
	if err := l.build(ctx); err != nil {
		return nil, err
	}
	l.Complete = true
	return l, l.save()
}

func (l *Lab) build(ctx context.Context) error {
	if l.Underlay == "" {
		l.Log("underlay: %s-gw (bridge and router), %s-ext (outside), MTU %d", l.Name, l.Name, l.MTU)
		if err := buildUnderlay(l.Name, l.MTU); err != nil {
			return err
		}
	} else {
		host, err := Load(l.Underlay)
		if err != nil {
			return fmt.Errorf("--underlay: %w", err)
		}
		if host.MTU != l.MTU {
			return fmt.Errorf("--mtu %d: the underlay of lab %s has %d", l.MTU, l.Underlay, host.MTU)
		}
		if l.First, err = nextNode(l.Gateway()); err != nil {
			return err
		}
		if l.First+l.Options.Nodes-1 > maxNodeNumber {
			return fmt.Errorf("--nodes %d: the underlay of lab %s has %d nodes and room for %d", l.Options.Nodes, l.Underlay, l.First-1, maxNodeNumber)
		}
		l.Log("underlay: joining %s; nodes from n%d on", l.Gateway(), l.First)
	}
	for i := range l.Options.Nodes {
		l.Nodes = append(l.Nodes, &Node{Number: l.First + i, Block: 1 + i, MAC: nodeMAC(l.First + i).String(), lab: l})
	}
	for _, n := range l.Nodes {
		if err := n.build(); err != nil {
			return err
		}
	}
	if err := l.startNodes(ctx); err != nil {
		return err
	}
	l.Log("attaching %d pods", len(l.Nodes)*l.Options.Pods)
	err := l.each(func(n *Node) error {
		for range l.Options.Pods {
			if _, err := n.AddPod(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	l.Log("waiting until every node has programmed every route")
	return l.WaitProgrammed(ctx)
}

// startNodes starts the daemons with a source of desired state.
func (l *Lab) startNodes(ctx context.Context) error {
	if l.Options.State == StateFile {
		if err := l.WriteStates(); err != nil {
			return err
		}
		l.Log("starting %d daemons", len(l.Nodes))
		return l.each(func(n *Node) error { return n.Start(ctx) })
	}
	l.Log("starting the controller, and %d daemons that join", len(l.Nodes))
	if err := l.makeController(ctx); err != nil {
		return err
	}
	// One after the other, so that they get blocks in the order of their numbers.
	for _, n := range l.Nodes {
		if err := n.join(ctx); err != nil {
			return err
		}
	}
	return nil
}

// build makes the node's namespace, its wire and its folder.
func (n *Node) build() error {
	if err := os.MkdirAll(n.Dir(), 0o755); err != nil {
		return err
	}
	return buildNode(&n.lab.Options, n.lab.Gateway(), n.Netns(), n.Number)
}

// AddPod makes the next pod of a node: a namespace with lo up, and the device that the daemon gives it. The caller saves the record.
func (n *Node) AddPod(ctx context.Context) (*Pod, error) {
	p := &Pod{Number: 1, Index: firstPodIndex, node: n}
	if k := len(n.Pods); k > 0 {
		p.Number, p.Index = n.Pods[k-1].Number+1, n.Pods[k-1].Index+1
	}
	if len(n.Pods) >= maxPodsPerNode || p.Index > 254 {
		return nil, fmt.Errorf("%s: there is no room for another pod", n.Name())
	}
	if err := p.Recreate(ctx); err != nil {
		return nil, err
	}
	n.Pods = append(n.Pods, p)
	return p, nil
}

// Recreate makes the pod's namespace, which must not be there, and has the daemon give it its device.
func (p *Pod) Recreate(ctx context.Context) error {
	if err := createNetns(p.Netns()); err != nil {
		return err
	}
	if err := InNetns(p.Netns(), quietIPv6); err != nil {
		return err
	}
	_, err := p.Attach(ctx)
	return err
}

// checkFree refuses a name that is taken, and says what to do.
func checkFree(ctx context.Context, name string) error {
	l, err := Load(name)
	if err == nil {
		if broken := l.Broken(ctx); len(broken) > 0 {
			return fmt.Errorf("lab %s is half there (%s): `overplane lab down --name %s` removes what is left, then try again", name, broken[0], name)
		}
		return fmt.Errorf("lab %s is up already, with %d nodes: use it, take it down with `overplane lab down --name %s`, or choose another --name", name, len(l.Nodes), name)
	}
	if !errors.Is(err, ErrNoLab) {
		return err
	}
	left, err := labNetns(name)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("lab %s is half there (network namespace %s is left of it): `overplane lab down --name %s` removes it, then try again", name, left[0], name)
	}
	return nil
}

// Broken lists what a lab lacks to be whole: sentences for people, empty if nothing.
func (l *Lab) Broken(ctx context.Context) []string {
	var broken []string
	if !l.Complete {
		broken = append(broken, "its `up` was not finished")
	}
	have := map[string]bool{}
	names, _ := labNetns(l.Name)
	under, _ := labNetns(l.Underlay)
	for _, n := range append(names, under...) {
		have[n] = true
	}
	want := []string{l.Gateway(), l.Ext()}
	for _, n := range l.Nodes {
		want = append(want, n.Netns())
		for _, p := range n.Pods {
			want = append(want, p.Netns())
		}
	}
	for _, name := range want {
		if !have[name] {
			broken = append(broken, "network namespace "+name+" is missing")
		}
	}
	if l.Controller != nil && l.ControllerPid() == 0 {
		broken = append(broken, controllerProgram+" does not run")
	}
	for _, n := range l.Nodes {
		if n.Pid() == 0 {
			broken = append(broken, "overplaned of "+n.Name()+" does not run")
			continue
		}
		if s, err := n.Status(ctx); err != nil {
			broken = append(broken, "overplaned of "+n.Name()+" does not answer: "+err.Error())
		} else if !s.GetReady() {
			broken = append(broken, fmt.Sprintf("%s is not ready: %v", n.Name(), s.GetProblems()))
		}
	}
	return broken
}

// makePins makes the lab's folder of the BPF file system, in which the daemons make theirs, and says whether it mounted the latter.
func makePins(name string) (mounted bool, err error) {
	unlock, err := lockShared()
	if err != nil {
		return false, err
	}
	defer unlock()
	if mounted, err = mountBPF(); err != nil {
		return false, err
	}
	return mounted, os.MkdirAll(filepath.Join(pinRoot, name), 0o700)
}

// mountBPF mounts the BPF file system where it belongs if it is not there, and says whether it did.
func mountBPF() (mounted bool, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(bpffsPath, &st); err != nil {
		return false, fmt.Errorf("%s: %w: mount sysfs on /sys", bpffsPath, err)
	}
	if st.Type == unix.BPF_FS_MAGIC {
		return false, nil
	}
	if err := unix.Mount("bpf", bpffsPath, "bpf", 0, "mode=0700"); err != nil {
		return false, fmt.Errorf("mounting the BPF file system on %s: %w", bpffsPath, err)
	}
	return true, nil
}
