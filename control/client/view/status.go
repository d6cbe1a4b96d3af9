package view

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Status writes the node's state on one page: what is wrong first. command is the version of the program that asks.
func Status(w io.Writer, s *controlv1.GetStatusResponse, command string, now time.Time) error {
	var p page
	if s.GetReady() {
		p.linef("node %s: ready", s.GetNode())
	} else {
		p.linef("node %s: NOT READY", s.GetNode())
	}
	for _, problem := range s.GetProblems() {
		p.linef("  ! %s", problem)
	}
	for _, warning := range s.GetWarnings() {
		p.linef("  warning: %s", warning)
	}
	p.linef("")

	up := ""
	if s.GetStartedAt() != nil {
		up = ", up " + age(now, s.GetStartedAt().AsTime())
	}
	p.item("versions", fmt.Sprintf("overplaned %s%s; overplane %s", s.GetDaemonVersion(), up, command))
	p.item("state", "source "+s.GetStateSource()+", "+versions(s))
	if c := s.GetController(); c != nil {
		p.item("controller", controller(c, now))
	}
	p.item("table", strings.Join([]string{
		count(s.GetMemberCount(), "member"), count(s.GetRouteCount(), "route"), count(s.GetPodCount(), "pod"),
		fmt.Sprintf("%d entries", s.GetEntryCount()),
	}, ", "))
	p.item("pools", s.GetPools()...)
	p.item("own blocks", s.GetOwnBlocks()...)
	p.uplink(s.GetUplink())
	if h := s.GetHostPort(); h != nil {
		p.item("host port", fmt.Sprintf("%s, mac %s, mtu %d", h.GetInterface(), h.GetMac(), h.GetMtu()))
	}
	if steering := s.GetUplink().GetSteering(); len(steering) > 0 {
		var counts []string
		for _, name := range slices.Sorted(maps.Keys(steering)) {
			counts = append(counts, fmt.Sprintf("%s %d", name, steering[name]))
		}
		p.item("steering", counts...)
	}
	if len(s.GetWorkers()) == 0 {
		p.item("workers")
	} else {
		p.linef("")
	}
	if _, err := io.WriteString(w, p.String()); err != nil || len(s.GetWorkers()) == 0 {
		return err
	}

	t := newTable(">WORKER", ">CPU", "QUEUES", ">PACKETS", ">POLLS", ">BUSY", ">PARKS", ">FRAMES FREE", ">LARGE FREE", ">SNAPSHOT")
	for _, k := range s.GetWorkers() {
		t.row(number(k.GetIndex()), number(k.GetCpu()), queues(k.GetUplinkQueues()), number(k.GetPackets()), number(k.GetPolls()), number(k.GetBusyPolls()),
			number(k.GetParks()), fmt.Sprintf("%d/%d", k.GetFramesFree(), k.GetFramesTotal()), fmt.Sprintf("%d/%d", k.GetLargeFree(), k.GetLargeTotal()),
			number(k.GetSnapshot()))
	}
	return t.write(w)
}

// controller says whether there is a stream to one, and since when or for how long there is none.
func controller(c *controlv1.ControllerStatus, now time.Time) string {
	since := ""
	if c.GetSince() != nil {
		since = " for " + age(now, c.GetSince().AsTime())
	}
	if c.GetConnected() {
		return c.GetAddress() + ", connected" + since
	}
	return "NOT CONNECTED, stale" + since
}

// versions says how far the programmed state is.
func versions(s *controlv1.GetStatusResponse) string {
	if api.EqualVersions(s.GetDesired(), s.GetProgrammed()) {
		if s.GetDesired() == nil {
			return "none yet"
		}
		return "version " + api.FormatVersion(s.GetDesired()) + " programmed"
	}
	return fmt.Sprintf("version %s desired, but %s programmed", api.FormatVersion(s.GetDesired()), api.FormatVersion(s.GetProgrammed()))
}

// page is lines with a margin that names them.
type page struct{ strings.Builder }

func (p *page) linef(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

// item writes values one a line, the first with its name in front.
func (p *page) item(name string, values ...string) {
	if len(values) == 0 {
		values = []string{"none"}
	}
	for _, v := range values {
		p.linef("%-12s%s", name, v)
		name = ""
	}
}

func (p *page) uplink(u *controlv1.Uplink) {
	if u == nil {
		p.item("uplink")
		return
	}
	state := "DOWN"
	if u.GetUp() {
		state = "up"
	}
	lines := []string{fmt.Sprintf("%s %s, mac %s, mtu %d, %s", u.GetInterface(), state, u.GetMac(), u.GetMtu(), count(u.GetQueues(), "queue"))}
	if u.GetRung() == "" {
		lines = append(lines, "not driven yet")
	} else {
		lines = append(lines, "driven by "+u.GetRung())
	}
	for _, r := range u.GetWhyNotMore() {
		lines = append(lines, fmt.Sprintf("not by %s: %s", r.GetRung(), r.GetReason()))
	}
	p.item("uplink", lines...)

	var addresses []string
	for _, a := range []string{u.GetIpv4(), u.GetIpv6()} {
		if a != "" {
			addresses = append(addresses, a)
		}
	}
	p.item("addresses", addresses...)

	var gateways []string
	for _, g := range [][2]string{{u.GetGatewayIpv4(), u.GetGatewayMacIpv4()}, {u.GetGatewayIpv6(), u.GetGatewayMacIpv6()}} {
		switch {
		case g[0] != "" && g[1] != "":
			gateways = append(gateways, g[0]+" at "+g[1])
		case g[0] != "":
			gateways = append(gateways, g[0]+", whose Ethernet address is not known yet")
		}
	}
	p.item("gateways", gateways...)
	if u.GetUnderlay() != "" {
		p.item("underlay", u.GetUnderlay())
	}
}

func count(n uint32, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// queues lists queue numbers, runs of them as first-last.
func queues(list []uint32) string {
	list = slices.Sorted(slices.Values(list))
	var parts []string
	for i := 0; i < len(list); {
		j := i
		for j+1 < len(list) && list[j+1] == list[j]+1 {
			j++
		}
		if j == i {
			parts = append(parts, number(list[i]))
		} else {
			parts = append(parts, number(list[i])+"-"+number(list[j]))
		}
		i = j + 1
	}
	return strings.Join(parts, ",")
}
