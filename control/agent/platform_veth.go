package agent

import (
	"fmt"

	"github.com/overplane/overplane/control/agent/kernel"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/dataplane/port/tap"
	"github.com/overplane/overplane/dataplane/port/xdp"
)

// vethHost is the name of the node's end of a pod's veth pair: the same each time, so that a daemon that starts finds the pairs of the one before.
func vethHost(pod string) string { return fmt.Sprintf("ovpv%010x", fnv64(pod)&(1<<40-1)) }

func (l *linux) podVeth(pools []*port.Pool) xdp.VethConfig {
	return xdp.VethConfig{Pools: pools, RingSize: l.cfg.PodRingSize, TxBudget: l.cfg.TXBudget}
}

// attachPod makes a pod's device of its kind.
func (l *linux) attachPod(d PodDevice, pools []*port.Pool) (port.Port, error) {
	if d.Kind == KindVeth {
		return l.steerReceive(d, func() (*xdp.VethPort, error) { return kernel.AttachVeth(podDevice(d), l.podVeth(pools)) })
	}
	return withHeader(podTAP(d, pools), func(cfg tap.Config) (*tap.Port, error) { return kernel.AttachTAP(podDevice(d), cfg) })
}

// reopenPod opens a pod's device of its kind again.
func (l *linux) reopenPod(d PodDevice, pools []*port.Pool) (port.Port, error) {
	if d.Kind == KindVeth {
		return l.steerReceive(d, func() (*xdp.VethPort, error) { return kernel.ReopenVeth(podDevice(d), l.podVeth(pools)) })
	}
	return withHeader(podTAP(d, pools), func(cfg tap.Config) (*tap.Port, error) { return kernel.ReopenTAP(podDevice(d), cfg) })
}

// steerReceive opens a veth pod's port and has the pod's stack do its receiving work away from the workers. A kernel that cannot is no reason to refuse a pod.
func (l *linux) steerReceive(d PodDevice, open func() (*xdp.VethPort, error)) (port.Port, error) {
	p, err := open()
	if err != nil {
		return nil, err // not p: an interface with a nil pointer in it is not nil
	}
	if err := kernel.SetReceiveCPUs(podDevice(d), l.podCPUs); err != nil {
		l.log.Warn("workers do the receiving work of a pod's stack", "pod", d.Pod, "error", err)
	}
	return p, nil
}
