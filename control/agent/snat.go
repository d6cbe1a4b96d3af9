package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/snat"
)

// snatSettings is what translators are made with. Another value takes new ones.
type snatSettings struct {
	mapping     snat.Mapping
	filtering   snat.Filtering
	choice      snat.Choice
	first, last uint16
}

// The range of external ports where the desired state names none: outside the kernel's ephemeral ports and Kubernetes's node ports.
const defaultFirstPort, defaultLastPort = 10000, 29999

// maxTranslatedPods is how many pods of a node may have translated sessions at once.
const maxTranslatedPods = 254

// settingsOf reads the rules, nil being the defaults.
func settingsOf(r *controlv1.SnatRules) snatSettings {
	s := snatSettings{first: uint16(r.GetFirstPort()), last: uint16(r.GetLastPort())}
	if s.first == 0 && s.last == 0 {
		s.first, s.last = defaultFirstPort, defaultLastPort
	}
	if r.GetMapping() == controlv1.SnatMapping_SNAT_MAPPING_ENDPOINT_INDEPENDENT {
		s.mapping = snat.EndpointIndependent
	}
	switch r.GetPortChoice() {
	case controlv1.SnatPortChoice_SNAT_PORT_CHOICE_HASH:
		s.choice = snat.ChooseHash
	case controlv1.SnatPortChoice_SNAT_PORT_CHOICE_PRESERVE:
		s.choice = snat.ChoosePreserve
	}
	switch r.GetFiltering() {
	case controlv1.SnatFiltering_SNAT_FILTERING_ADDRESS_DEPENDENT:
		s.filtering = snat.FilterAddress
	case controlv1.SnatFiltering_SNAT_FILTERING_ENDPOINT_INDEPENDENT:
		s.filtering = snat.FilterNone
	}
	return s
}

// parseRules makes the rules by which destinations see the node's address.
func (d *desired) parseRules(r *controlv1.SnatRules) error {
	c := snat.RulesConfig{Off: r.GetDisabled(), TranslateNodes: r.GetTranslateNodes()}
	var errs []error
	for _, text := range r.GetNoMasqueradeCidrs() {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("no-masquerade CIDR %q: %w", text, err))
			continue
		}
		c.NoMasquerade = append(c.NoMasquerade, p)
	}
	for i := range d.members {
		for _, a := range []netip.Addr{d.members[i].addr4, d.members[i].addr6} {
			if a.IsValid() {
				c.Nodes = append(c.Nodes, a)
			}
		}
	}
	d.rules, d.rulesConfig, d.snat = snat.NewRules(c), c, settingsOf(r)
	return errors.Join(errs...)
}

// translation is the workers' translators and what they share. The translators are the workers' while those run.
type translation struct {
	settings    snatSettings
	alloc       *snat.Allocator
	translators []*snat.Translator

	hostTCP, hostUDP []uint16 // ports of the range that the node's own sockets hold
	connections      []uint16 // ports of the node's TCP sockets that do not listen, as of the last look for them
	looks            int
	toldPorts        bool // that the sockets cannot be listed
	toldReserve      bool // that the range cannot be reserved
}

// makeTranslation makes a translator for each worker, with the sessions that an earlier daemon of this boot left in the folder of the local API's socket. To be called when the
// remembered pods have their slots.
func (a *Agent) makeTranslation(workers int) (*translation, error) {
	var rules *controlv1.SnatRules
	if a.state != nil {
		rules = a.state.raw.GetSnat()
	}
	t := &translation{settings: settingsOf(rules)}
	var err error
	if t.alloc, err = snat.NewAllocator(snat.AllocatorConfig{First: t.settings.first, Last: t.settings.last, Workers: workers, MaxPods: maxTranslatedPods}); err != nil {
		return nil, err
	}
	a.watchHostPorts(t)
	var pods []snat.AdoptedPod
	for _, p := range a.pods {
		if i := p.slot - dataplane.FirstPodSlot; i < maxTranslatedPods {
			pods = append(pods, snat.AdoptedPod{Index: i, Addr4: packet.AddrFrom(p.rec.IPv4), Addr6: packet.AddrFrom(p.rec.IPv6)})
		}
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return nil, fmt.Errorf("clock_gettime: %w", err)
	}
	for i := range workers {
		cfg := snat.Config{Worker: i, Mapping: t.settings.mapping, Filtering: t.settings.filtering, Choice: t.settings.choice}
		tr, err := a.openTranslator(cfg, t.alloc, ts.Nano(), pods)
		if err != nil {
			t.close()
			return nil, err
		}
		t.translators = append(t.translators, tr)
	}
	a.sweepSessionFiles(workers)
	return t, nil
}

// openTranslator adopts a worker's sessions from its file, or makes that anew.
func (a *Agent) openTranslator(cfg snat.Config, alloc *snat.Allocator, now int64, pods []snat.AdoptedPod) (*snat.Translator, error) {
	path := a.sessionFile(cfg.Worker)
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	switch {
	case err == nil:
		t, stats, err := snat.Adopt(cfg, alloc, f, now, pods)
		if err == nil {
			a.log.Info("translated sessions adopted", "worker", cfg.Worker, "sessions", stats.Sessions, "over", stats.Over, "orphans", stats.Orphans, "broken", stats.Broken)
			return t, nil
		}
		a.log.Warn("translated sessions of the daemon before are lost", "worker", cfg.Worker, "error", err)
	case !errors.Is(err, fs.ErrNotExist):
		a.log.Warn("translated sessions of the daemon before are lost", "worker", cfg.Worker, "error", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("replacing the file of sessions: %w", err)
	}
	f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("file of translated sessions: %w", err)
	}
	return snat.NewIn(cfg, alloc, f)
}

// sessionFile is where a worker's sessions lie: beside the socket, which is in a file system of memory that does not outlive the machine's boot. The boot's identity in its name
// says so where it is not, since the sessions' times count from the boot.
func (a *Agent) sessionFile(worker int) string {
	return filepath.Join(filepath.Dir(a.cfg.Socket), fmt.Sprintf("sessions-%s-%d", bootID(), worker))
}

func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil || len(b) < 8 {
		return "0"
	}
	return string(b[:8])
}

// sweepSessionFiles removes those of other boots and of more workers than there are.
func (a *Agent) sweepSessionFiles(workers int) {
	var keep []string
	for i := range workers {
		keep = append(keep, a.sessionFile(i))
	}
	files, _ := filepath.Glob(filepath.Join(filepath.Dir(a.cfg.Socket), "sessions-*-*"))
	for _, f := range files {
		if !slices.Contains(keep, f) {
			_ = os.Remove(f)
		}
	}
}

// close gives up the tables; the sessions stay in their files.
func (t *translation) close() {
	for _, tr := range t.translators {
		_ = tr.Close()
	}
	t.translators = nil
}

// connectionsEvery is at how many looks for the node's sockets those of connections are looked for, too, which takes the kernel some milliseconds. They rarely have
// a port of the range: only if the program chose it, since the range is reserved.
const connectionsEvery = 10

// watchHostPorts finds out which ports of the range the node's own sockets hold, and reserves the range. It reports whether they changed.
func (a *Agent) watchHostPorts(t *translation) bool {
	err := a.plat.ReservePorts(t.settings.first, t.settings.last)
	if err != nil && !t.toldReserve {
		a.log.Warn("the kernel may give translated ports to the node's own sockets, which are then the sockets'", "error", err)
	}
	t.toldReserve = err != nil
	tcp, udp, err := a.plat.HostPorts()
	if err == nil && t.looks%connectionsEvery == 0 {
		var connections []uint16
		if connections, err = a.plat.HostConnections(); err == nil {
			t.connections = connections
		}
	}
	if err != nil && !t.toldPorts {
		a.log.Error("the ports of the node's own sockets cannot be listed; those known stay theirs", "error", err)
	}
	if t.toldPorts = err != nil; err != nil {
		return false
	}
	t.looks++ // a look that failed is made again
	tcp = append(tcp, t.connections...)
	inRange := func(ports []uint16) []uint16 {
		ports = slices.DeleteFunc(ports, func(p uint16) bool { return p < t.settings.first || p > t.settings.last })
		slices.Sort(ports)
		return slices.Compact(ports)
	}
	tcp, udp = inRange(tcp), inRange(udp)
	if slices.Equal(tcp, t.hostTCP) && slices.Equal(udp, t.hostUDP) {
		return false
	}
	t.hostTCP, t.hostUDP = tcp, udp
	t.alloc.SetHostPorts(packet.ProtoTCP, tcp)
	t.alloc.SetHostPorts(packet.ProtoUDP, udp)
	return true
}

// followTranslation does what time and a new desired state bring: other host ports to steering, other settings to a new start.
func (a *Agent) followTranslation() {
	t := a.translation
	if t == nil {
		return
	}
	if a.state != nil && a.state.snat != t.settings {
		a.restart("the settings of address translation changed: " + strings.TrimSpace(fmt.Sprintf("%+v to %+v", t.settings, a.state.snat)))
		return
	}
	if a.watchHostPorts(t) {
		a.applySteering(a.steeringPlan())
	}
}

// planTranslation says in a plan which packets for the node may be replies.
func (a *Agent) planTranslation(p *SteeringPlan) {
	if p.OutsideSeesPods = a.outsideSeesPods(); p.OutsideSeesPods && !a.cfg.Routed() {
		p.GatewayMACs = distinctMACs(a.facts.GatewayMAC4, a.facts.GatewayMAC6)
	}
	if a.translation == nil || a.state == nil || a.state.noSNAT {
		return
	}
	p.Node4, p.Node6 = primaryAddresses(a.facts, a.cfg.Node4(), a.cfg.Node6())
	p.FirstPort, p.LastPort = a.translation.settings.first, a.translation.settings.last
	p.HostTCP, p.HostUDP = a.translation.hostTCP, a.translation.hostUDP
}
