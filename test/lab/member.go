package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// AddNode gives the lab another node with as many pods as the others began with, and returns when every running node has
// programmed the routes to it.
func (l *Lab) AddNode(ctx context.Context) (*Node, error) {
	unlock, err := lock(l.Name)
	if err != nil {
		return nil, err
	}
	defer unlock()
	number, err := nextNode(l.Gateway())
	if err != nil {
		return nil, err
	}
	if number > maxNodeNumber {
		return nil, fmt.Errorf("the underlay has room for %d nodes", maxNodeNumber)
	}
	block := 1
	for _, n := range l.Nodes {
		block = max(block, n.Block+1)
	}
	n := &Node{Number: number, Block: block, MAC: nodeMAC(number).String(), lab: l}
	if err := n.build(); err != nil {
		return nil, err
	}
	l.Nodes = append(l.Nodes, n)
	// The record knows the node from here on, whatever happens: drain removes it.
	l.Log("starting %s", n.Name())
	if l.Controller != nil {
		err = errors.Join(l.save(), n.join(ctx))
	} else if err = l.WriteStates(); err == nil {
		err = n.Start(ctx)
	}
	if err != nil {
		return nil, err
	}
	for range l.Options.Pods {
		if _, err := n.AddPod(ctx); err != nil {
			return nil, err
		}
	}
	if err := l.save(); err != nil {
		return nil, err
	}
	return n, l.reload(ctx)
}

// reload has every running daemon read its state and waits for it.
func (l *Lab) reload(ctx context.Context) error {
	if l.Controller != nil {
		return l.WaitProgrammed(ctx)
	}
	return l.each(func(n *Node) error {
		if n.Pid() == 0 {
			return nil
		}
		if err := n.Reload(); err != nil {
			return err
		}
		return n.WaitProgrammed(ctx)
	})
}

// Drain takes a node out of the cluster in order: its pods are detached, the others forget its routes, its daemon ends, its namespaces go.
func (l *Lab) Drain(ctx context.Context, name string) error {
	unlock, err := lock(l.Name)
	if err != nil {
		return err
	}
	defer unlock()
	n := l.Node(name)
	if n == nil {
		return fmt.Errorf("lab %s has no node %s", l.Name, name)
	}
	if len(l.Nodes) == 1 {
		return fmt.Errorf("%s is the last node of lab %s: `overplane lab down` removes the lab", name, l.Name)
	}
	if n.Pid() != 0 {
		for _, p := range n.Pods {
			if err := p.Detach(ctx); err != nil {
				return err
			}
		}
	}
	n.Gone = true
	if l.Controller != nil {
		err = errors.Join(l.save(), n.leave(ctx))
	} else if err = l.WriteStates(); err == nil {
		err = l.reload(ctx)
	}
	if err != nil {
		return err
	}
	if n.Pid() != 0 {
		if err := n.Stop(); err != nil {
			return err
		}
	}
	namespaces := []string{n.Netns()}
	for _, p := range n.Pods {
		namespaces = append(namespaces, p.Netns())
	}
	errs := []error{endProcesses(namespaces)}
	errs = append(errs, os.RemoveAll(n.BPFDir()))
	if h, err := openHandle(l.Gateway()); err == nil {
		if link, err := h.LinkByName(n.Name()); err == nil {
			errs = append(errs, h.remove(link))
		}
		h.close()
	}
	errs = append(errs, returnNICs(n.Netns()))
	for _, ns := range namespaces {
		errs = append(errs, deleteNetns(ns))
	}
	n.mu.Lock()
	if n.notify != nil {
		n.notify.close()
		n.notify = nil
	}
	n.mu.Unlock()
	errs = append(errs, os.RemoveAll(n.Dir()))
	l.Nodes = slices.DeleteFunc(l.Nodes, func(m *Node) bool { return m == n })
	errs = append(errs, l.save())
	return errors.Join(errs...)
}

// Report is what `up --json` and `status --json` print.
type Report struct {
	Name       string            `json:"name"`
	Ready      bool              `json:"ready"`
	Problems   []string          `json:"problems,omitempty"`
	Underlay   string            `json:"underlay"` // namespace of the bridge
	MTU        int               `json:"mtu"`
	Revision   uint64            `json:"revision"`
	Created    time.Time         `json:"created"`
	Nodes      []NodeReport      `json:"nodes"`
	Ext        EndReport         `json:"ext"`
	Controller *ControllerReport `json:"controller,omitempty"` // none: the lab writes the state files itself
}

// NodeReport is one node.
type NodeReport struct {
	Name   string      `json:"name"`
	Netns  string      `json:"netns"`
	IPv4   string      `json:"ipv4"`
	IPv6   string      `json:"ipv6"`
	Rung   string      `json:"rung"`
	PID    int         `json:"pid"`
	Socket string      `json:"socket"`
	Ready  bool        `json:"ready"`
	Log    string      `json:"log"`
	Pods   []EndReport `json:"pods"`
}

// EndReport is a namespace with an address of each family.
type EndReport struct {
	Name  string `json:"name"`
	Netns string `json:"netns"`
	IPv4  string `json:"ipv4"`
	IPv6  string `json:"ipv6"`
}

// ControllerReport is the lab's controller.
type ControllerReport struct {
	PID     int    `json:"pid"`
	Address string `json:"address"`
}

// Report asks every daemon how it is.
func (l *Lab) Report(ctx context.Context) *Report {
	r := &Report{
		Name: l.Name, Underlay: l.Gateway(), MTU: l.MTU, Revision: l.Revision, Created: l.Created,
		Nodes:    make([]NodeReport, len(l.Nodes)),
		Ext:      EndReport{Name: "ext", Netns: l.Ext(), IPv4: extIPv4, IPv6: extIPv6},
		Problems: l.Broken(ctx),
	}
	r.Ready = len(r.Problems) == 0
	if l.Controller != nil {
		r.Controller = &ControllerReport{PID: l.ControllerPid(), Address: l.Controller.Address}
	}
	for i, n := range l.Nodes {
		nr := NodeReport{
			Name: n.Name(), Netns: n.Netns(), IPv4: n.IPv4().String(), IPv6: n.IPv6().String(),
			PID: n.Pid(), Socket: n.Socket(), Log: n.LogPath(), Pods: []EndReport{},
		}
		var s *controlv1.GetStatusResponse
		if nr.PID != 0 {
			s, _ = n.Status(ctx)
		}
		if l.Controller != nil {
			r.Revision = max(r.Revision, s.GetProgrammed().GetRevision())
		}
		nr.Rung, nr.Ready = s.GetUplink().GetRung(), s.GetReady()
		for _, p := range n.Pods {
			nr.Pods = append(nr.Pods, EndReport{Name: p.Name(), Netns: p.Netns(), IPv4: p.IPv4().String(), IPv6: p.IPv6().String()})
		}
		r.Nodes[i] = nr
	}
	return r
}
