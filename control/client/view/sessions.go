package view

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Sessions writes a table of translated flows, by pod and destination.
func Sessions(w io.Writer, r *controlv1.ListSessionsResponse) error {
	if len(r.GetSessions()) == 0 {
		_, err := io.WriteString(w, "no sessions\n")
		return err
	}
	list := slices.Clone(r.GetSessions())
	slices.SortStableFunc(list, func(a, b *controlv1.Session) int {
		return cmp.Or(cmp.Compare(a.GetPod(), b.GetPod()), cmp.Compare(a.GetRemote(), b.GetRemote()), cmp.Compare(a.GetInside(), b.GetInside()))
	})
	t := newTable("POD", "PROTOCOL", "INSIDE", "EXTERNAL", "REMOTE", "STATE", ">AGE", ">LEFT", ">OUT", ">IN")
	for _, s := range list {
		t.row(cmp.Or(s.GetPod(), "-"), s.GetProtocol(), s.GetInside(), cmp.Or(s.GetExternal(), "-"), s.GetRemote(), s.GetState(),
			seconds(s.GetAgeSeconds()), seconds(s.GetLeftSeconds()), number(s.GetPacketsOut()), number(s.GetPacketsIn()))
	}
	if err := t.write(w); err != nil {
		return err
	}
	more := ""
	if r.GetTruncated() {
		more = ", and there are more: filter, or raise --limit"
	}
	_, err := fmt.Fprintf(w, "%d sessions%s\n", len(list), more)
	return err
}

func seconds(n uint64) string { return (time.Duration(n) * time.Second).String() }

// SNAT writes how address translation stands.
func SNAT(w io.Writer, r *controlv1.GetSnatResponse) error {
	state := "on"
	if !r.GetEnabled() {
		state = "off: pods leave with their own addresses"
	}
	if _, err := fmt.Fprintf(w, "translation  %s\naddresses    %s %s\nmapping      %s\nports        %d-%d; held by the node's own sockets: TCP %v, UDP %v\n", state,
		cmp.Or(r.GetIpv4(), "-"), cmp.Or(r.GetIpv6(), "-"), r.GetMapping(), r.GetFirstPort(), r.GetLastPort(), r.GetHostTcpPorts(), r.GetHostUdpPorts()); err != nil {
		return err
	}
	if len(r.GetNoMasqueradeCidrs()) > 0 {
		from := ""
		if len(r.GetNoMasqueradeFiles()) > 0 {
			from = " (also by " + strings.Join(r.GetNoMasqueradeFiles(), ", ") + ")"
		}
		if _, err := fmt.Fprintf(w, "untranslated towards %s%s\n", strings.Join(r.GetNoMasqueradeCidrs(), ", "), from); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(w, "\n"); err != nil {
		return err
	}
	of := func(n, limit uint32) string { return fmt.Sprintf("%d of %d", n, limit) }
	t := newTable(">WORKER", ">IPV4 SESSIONS", ">IPV6 SESSIONS", ">PINNED", ">HALF OPEN", ">CREATED", ">EXPIRED", ">FRAGMENTED", ">HANDED OVER")
	for _, x := range r.GetWorkers() {
		t.row(number(x.GetWorker()), of(x.GetSessionsIpv4(), x.GetCapacityIpv4()), of(x.GetSessionsIpv6(), x.GetCapacityIpv6()), number(x.GetPins()), number(x.GetHalfOpen()),
			number(x.GetCreated()), number(x.GetExpired()), number(x.GetFragmented()), number(x.GetHandedOver()))
	}
	if err := t.write(w); err != nil {
		return err
	}
	if len(r.GetPods()) > 0 {
		t = newTable("POD", ">IPV4 SESSIONS", ">IPV6 SESSIONS", ">TCP PORTS", ">UDP PORTS", ">ICMP IDS")
		for _, p := range r.GetPods() {
			t.row(p.GetPod(), number(p.GetSessionsIpv4()), number(p.GetSessionsIpv6()), of(p.GetTcpPorts(), p.GetTcpLimit()), of(p.GetUdpPorts(), p.GetUdpLimit()),
				of(p.GetIcmpIdentifiers(), p.GetIcmpLimit()))
		}
		if _, err := io.WriteString(w, "\n"); err != nil {
			return err
		}
		if err := t.write(w); err != nil {
			return err
		}
	}
	for _, d := range r.GetSaturated() {
		if _, err := fmt.Fprintf(w, "\n%s has %d of %d %s ports in use towards %s", d.GetPod(), d.GetPorts(), d.GetLimit(), d.GetProtocol(), d.GetRemote()); err != nil {
			return err
		}
	}
	if len(r.GetSaturated()) > 0 {
		_, err := io.WriteString(w, "\n")
		return err
	}
	return nil
}
