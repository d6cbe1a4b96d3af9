package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

var podNamePattern = regexp.MustCompile(`^[A-Za-z0-9._/-]{1,253}$`)

// podRequest is a checked AttachPodRequest.
type podRequest struct {
	name, netns, ifname string
	kind                string // empty: the node's default
	a4, a6              netip.Addr
}

func parsePodRequest(r *controlv1.AttachPodRequest) (podRequest, error) {
	out := podRequest{name: r.GetName(), netns: r.GetNetns(), ifname: cmp.Or(r.GetInterface(), "eth0"), kind: r.GetKind()}
	var errs []error
	if !podNamePattern.MatchString(out.name) {
		errs = append(errs, fmt.Errorf("name %q: want 1 to 253 characters of [A-Za-z0-9._/-]", out.name))
	}
	if !strings.HasPrefix(out.netns, "/") {
		errs = append(errs, fmt.Errorf("netns %q: want the absolute path of a network namespace", out.netns))
	}
	if !validIfName(out.ifname) {
		errs = append(errs, fmt.Errorf("interface %q: want at most 15 characters without '/', ':' and white space", out.ifname))
	}
	if out.kind != "" && out.kind != KindTAP && out.kind != KindVeth {
		errs = append(errs, fmt.Errorf("kind %q: want %s, %s or nothing", out.kind, KindTAP, KindVeth))
	}
	var err error
	if r.GetIpv4() != "" {
		if out.a4, err = netip.ParseAddr(r.GetIpv4()); err != nil || !out.a4.Is4() {
			errs = append(errs, fmt.Errorf("ipv4 %q is no IPv4 address", r.GetIpv4()))
		}
	}
	if r.GetIpv6() != "" {
		if out.a6, err = netip.ParseAddr(r.GetIpv6()); err != nil || !out.a6.Is6() || out.a6.Is4In6() || out.a6.Zone() != "" {
			errs = append(errs, fmt.Errorf("ipv6 %q is no IPv6 address", r.GetIpv6()))
		}
	}
	if len(errs) == 0 && !out.a4.IsValid() && !out.a6.IsValid() {
		errs = append(errs, errors.New("ipv4 and ipv6 are both empty: a pod needs at least one address"))
	}
	if len(errs) > 0 {
		return podRequest{}, status.Error(codes.InvalidArgument, errors.Join(errs...).Error())
	}
	return out, nil
}

func (r *podRequest) same(p *PodRecord) bool {
	return p.NetNS == r.netns && p.Interface == r.ifname && p.IPv4 == r.a4 && p.IPv6 == r.a6 && (r.kind == "" || r.kind == p.kind())
}

// attach gives a pod its device: the body of AttachPod. What it does is undone if a later step fails; what a crash interrupts is undone by the
// next start, which finds the record pending.
func (a *Agent) attach(r podRequest) (*controlv1.Pod, error) {
	if p := a.pods[r.name]; p != nil {
		if p.port != nil && !a.plat.PodAlive(p.dev) {
			a.forget(p, "its network namespace or device is gone") // and the request is for a new one
		} else if !r.same(&p.rec) {
			return nil, status.Errorf(codes.AlreadyExists, "pod %s is attached with other values: netns %s, interface %s, kind %s, addresses %s: detach it first",
				r.name, p.rec.NetNS, p.rec.Interface, p.rec.kind(), addressList(p.rec.IPv4, p.rec.IPv6))
		} else if p.port != nil {
			return a.podMessage(p), nil
		} else {
			a.forget(p, "its device could not be opened") // make it anew
		}
	}
	if err := a.checkFree(r); err != nil {
		return nil, err
	}
	if a.host == nil {
		return nil, status.Error(codes.Unavailable, "the daemon is starting")
	}
	slot, err := a.slots.take()
	if err != nil {
		return nil, status.Error(codes.ResourceExhausted, err.Error())
	}
	_, mtu := a.mtus()
	p := &pod{slot: slot, rec: PodRecord{
		Name: r.name, NetNS: r.netns, Interface: r.ifname, Kind: cmp.Or(r.kind, a.cfg.PodPort, KindTAP), IPv4: r.a4, IPv6: r.a6,
		MAC: formatMAC(podMAC(a.cfg.NodeName, r.name)), AttachedAt: time.Now().UTC().Truncate(time.Second), Pending: true,
	}}
	p.dev = p.rec.device(mtu)
	a.pods[r.name] = p
	undo := func(code codes.Code, format string, args ...any) error {
		a.forget(p, "")
		err := status.Errorf(code, format, args...)
		a.log.Error("pod not attached", "pod", r.name, "netns", r.netns, "error", err)
		return err
	}
	if err := a.savePods(); err != nil {
		return nil, undo(codes.Unavailable, "%v", err)
	}
	// The slot must not carry the half-made pod into a snapshot, so nothing is published before the device is there.
	if p.port, p.rec.NetNSID, err = a.plat.CreatePod(p.dev, a.pools); err != nil {
		code := codes.Internal
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrPodGone) {
			code = codes.InvalidArgument
		}
		return nil, undo(code, "pod %s: %v", r.name, err)
	}
	p.dev.NetNSID = p.rec.NetNSID
	a.publish()
	p.rec.Pending = false
	if err := a.savePods(); err != nil {
		return nil, undo(codes.Unavailable, "%v", err)
	}
	a.log.Info("pod attached", "pod", r.name, "netns", r.netns, "kind", p.rec.kind(), "ipv4", r.a4, "ipv6", r.a6)
	return a.podMessage(p), nil
}

// checkFree says why the pod cannot have what it asks for.
func (a *Agent) checkFree(r podRequest) error {
	if err := a.state.checkPodAddresses(r.a4, r.a6); err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	for _, p := range a.pods {
		switch {
		case r.a4.IsValid() && p.rec.IPv4 == r.a4:
			return status.Errorf(codes.AlreadyExists, "address %s belongs to pod %s", r.a4, p.rec.Name)
		case r.a6.IsValid() && p.rec.IPv6 == r.a6:
			return status.Errorf(codes.AlreadyExists, "address %s belongs to pod %s", r.a6, p.rec.Name)
		case p.rec.NetNS == r.netns && p.rec.Interface == r.ifname && a.plat.PodAlive(p.dev):
			return status.Errorf(codes.AlreadyExists, "interface %s in %s belongs to pod %s", r.ifname, r.netns, p.rec.Name)
		}
	}
	return nil
}

// forget takes a pod away: out of the table, its port closed once no worker uses it, its device deleted, and off the disk last, so that a crash in
// between leaves a record of which the next start clears up the rest.
func (a *Agent) forget(p *pod, why string) {
	if a.pods[p.rec.Name] != p {
		return
	}
	delete(a.pods, p.rec.Name)
	if why != "" {
		a.log.Warn("pod removed", "pod", p.rec.Name, "why", why)
	}
	a.publish()
	dev := p.dev
	a.retire(p.slot, p.port, nil)
	if err := a.plat.RemovePod(dev); err != nil {
		a.log.Error("a pod's device could not be deleted", "pod", dev.Pod, "netns", dev.NetNS, "device", dev.Interface, "error", err)
	}
	_ = a.savePods() // reported and tried again by retry
}

// detach is the body of DetachPod.
func (a *Agent) detach(name string) bool {
	p := a.pods[name]
	if p == nil {
		return false
	}
	a.forget(p, "")
	a.log.Info("pod detached", "pod", name)
	return true
}

// savePods writes the remembered pods.
func (a *Agent) savePods() error {
	recs := make([]PodRecord, 0, len(a.pods))
	for _, p := range a.pods {
		recs = append(recs, p.rec)
	}
	slices.SortFunc(recs, func(x, y PodRecord) int { return cmp.Compare(x.Name, y.Name) })
	if err := a.store.Save(recs); err != nil {
		if a.storeProblem == "" {
			a.log.Error("attached pods cannot be remembered", "error", err)
		}
		a.storeProblem = err.Error()
		return err
	}
	a.storeProblem = ""
	return nil
}

// readopt opens the devices of the remembered pods again. Pods are not touched: their addresses, routes and connections stay.
func (a *Agent) readopt(recs []PodRecord) {
	_, mtu := a.mtus()
	for i := range recs {
		rec := recs[i]
		dev := rec.device(mtu)
		if rec.Pending { // never answered for
			a.log.Warn("removing the device of an attachment that was interrupted", "pod", rec.Name, "netns", rec.NetNS)
			if err := a.plat.RemovePod(dev); err != nil {
				a.log.Error("a pod's device could not be deleted", "pod", rec.Name, "error", err)
			}
			continue
		}
		port, err := a.plat.ReopenPod(dev, a.pools)
		if errors.Is(err, ErrPodGone) {
			a.log.Warn("pod removed", "pod", rec.Name, "why", err)
			continue
		}
		slot, serr := a.slots.take()
		if serr != nil {
			a.log.Error("pod not re-adopted", "pod", rec.Name, "error", serr)
			continue
		}
		p := &pod{rec: rec, dev: dev, slot: slot, port: port}
		p.dev.MTU = 0 // whatever it was: updatePodMTUs sets it
		if err != nil {
			p.port, p.reason = nil, err.Error()
			a.log.Error("a remembered pod's device cannot be opened", "pod", rec.Name, "netns", rec.NetNS, "error", err)
		}
		a.pods[rec.Name] = p
	}
	if len(recs) > 0 {
		a.log.Info("pods re-adopted", "remembered", len(recs), "kept", len(a.pods))
	}
	_ = a.savePods()
}

// podGone is called when a pod's namespace may have been deleted.
func (a *Agent) podGone(ctx context.Context, name string) {
	_ = a.do(ctx, func() {
		if p := a.pods[name]; p != nil && !a.plat.PodAlive(p.dev) {
			a.forget(p, "its network namespace or device is gone")
		}
	})
}

// buryDead removes pods whose device was deleted while their namespace lives, which no watcher of namespaces sees: the descriptors tell. A
// host port, or a device that stands for the uplink, that was deleted is made again.
func (a *Agent) buryDead() {
	if d, ok := a.uplink.Port.(interface{ Dead() bool }); ok && d.Dead() {
		a.restart(fmt.Sprintf("the device that uplink %s is driven through was deleted", a.facts.Name))
		return
	}
	if d, ok := a.host.(interface{ Dead() bool }); ok && d.Dead() {
		a.restart(fmt.Sprintf("the host port %s was deleted", a.cfg.HostPort))
		return
	}
	for _, p := range a.pods {
		if d, ok := p.port.(interface{ Dead() bool }); ok && d.Dead() && !a.plat.PodAlive(p.dev) {
			a.forget(p, "its device was deleted")
		}
	}
}

func (p *PodRecord) kind() string { return cmp.Or(p.Kind, KindTAP) }

func (p *PodRecord) device(mtu int) PodDevice {
	mac, _ := parseMAC(p.MAC) // checked when it was read or made
	return PodDevice{
		Pod: p.Name, Kind: p.kind(), NetNS: p.NetNS, NetNSID: p.NetNSID, Interface: p.Interface,
		MAC: mac, Addr4: p.IPv4, Addr6: p.IPv6, MTU: mtu,
	}
}

func addressList(addrs ...netip.Addr) string {
	var out []string
	for _, a := range addrs {
		if a.IsValid() {
			out = append(out, a.String())
		}
	}
	return strings.Join(out, " and ")
}
