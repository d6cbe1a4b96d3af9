package view

import (
	"fmt"
	"io"
	"strings"
	"time"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Pods writes a table of pods, in the order given, and below it why those that are not ready are not.
func Pods(w io.Writer, pods []*controlv1.Pod, now time.Time) error {
	if len(pods) == 0 {
		_, err := io.WriteString(w, "no pods\n")
		return err
	}
	t := newTable("NAME", "STATE", "IPV4", "IPV6", "MAC", "INTERFACE", "KIND", ">MTU", ">AGE", "NETNS")
	var reasons strings.Builder
	for _, p := range pods {
		since := ""
		if p.GetAttachedAt() != nil {
			since = age(now, p.GetAttachedAt().AsTime())
		}
		t.row(p.GetName(), podState(p.GetState()), p.GetIpv4(), p.GetIpv6(), p.GetMac(), p.GetInterface(), p.GetKind(), number(p.GetMtu()), since, p.GetNetns())
		if p.GetState() != controlv1.PodState_POD_STATE_READY {
			fmt.Fprintf(&reasons, "  ! %s: %s\n", p.GetName(), p.GetReason())
		}
	}
	if err := t.write(w); err != nil {
		return err
	}
	_, err := io.WriteString(w, reasons.String())
	return err
}

// PodAttached writes what a pod that was attached got.
func PodAttached(w io.Writer, p *controlv1.Pod) error {
	var out page
	out.linef("pod %s: %s", p.GetName(), podState(p.GetState()))
	if p.GetReason() != "" {
		out.linef("  ! %s", p.GetReason())
	}
	out.item("interface", fmt.Sprintf("%s (%s), mac %s, mtu %d, in %s", p.GetInterface(), p.GetKind(), p.GetMac(), p.GetMtu(), p.GetNetns()))
	for _, a := range [][2]string{{p.GetIpv4(), p.GetGatewayIpv4()}, {p.GetIpv6(), p.GetGatewayIpv6()}} {
		if a[0] != "" {
			out.item("address", fmt.Sprintf("%s, by way of %s at %s", a[0], a[1], p.GetGatewayMac()))
		}
	}
	_, err := io.WriteString(w, out.String())
	return err
}

// podState is the state's name without what all of them start with.
func podState(s controlv1.PodState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "POD_STATE_"))
}
