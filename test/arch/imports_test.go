package arch

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// layers says, for each part of the module, which other parts its non-test files may import. A part is a folder with all below it, less the
// parts that have a line of their own. "x/..." is x and every part below it.
//
//	cmd -> control, test/lab -> dataplane -> {snat, fib, icmp, port, packet} -> drop
var layers = map[string][]string{
	"cmd":                {"control/...", "dataplane/...", "snat", "ipam", "bench", "test/lab"},
	"bench":              {"control/...", "dataplane/...", "snat", "ipam", "test/lab"},
	"test":               {"control/...", "dataplane/...", "snat", "ipam", "test/lab"},
	"test/lab":           {"control/...", "dataplane/...", "ipam"},
	"control":            {"control/api", "dataplane/...", "snat", "ipam"},
	"control/api":        {"ipam"},
	"dataplane":          {"dataplane/fib", "dataplane/icmp", "dataplane/packet", "dataplane/port", "dataplane/drop", "snat"},
	"dataplane/fib":      {"dataplane/packet"},
	"dataplane/icmp":     {"dataplane/packet", "dataplane/drop"},
	"dataplane/packet":   {"dataplane/drop"},
	"dataplane/drop":     {},
	"dataplane/port":     {},
	"dataplane/port/mem": {"dataplane/port", "dataplane/packet"},
	"dataplane/port/tap": {"dataplane/port", "dataplane/packet"},
	"dataplane/port/xdp": {"dataplane/port", "dataplane/packet"},
	"snat":               {"dataplane/packet", "dataplane/drop"},
	"ipam":               {},
}

// partOf is the part that a path in the module belongs to, or "".
func partOf(path string) string {
	best := ""
	for p := range layers {
		if under(path, p) && len(p) > len(best) {
			best = p
		}
	}
	return best
}

func mayImport(from, to string) bool {
	return from == to || slices.ContainsFunc(layers[from], func(a string) bool {
		if all, ok := strings.CutSuffix(a, "/..."); ok {
			return under(to, all)
		}
		return a == to
	})
}

func layerBreaches(all []*pkg) (breaches []string) {
	for _, p := range all {
		from := partOf(p.path())
		if from == "" {
			breaches = append(breaches, fmt.Sprintf("%s has no place in the layers: give its folder one in this test", p.path()))
			continue
		}
		for _, imp := range p.Imports {
			if path, ours := strings.CutPrefix(imp, module); ours && !mayImport(from, partOf(path)) {
				breaches = append(breaches, fmt.Sprintf("%s imports %s", p.path(), path))
			}
		}
	}
	return breaches
}

func TestImportsRunOneWay(t *testing.T) {
	check(t, "imports run cmd -> control -> dataplane -> {snat, fib, icmp, port, packet} -> drop, so that each layer can be read, tested and "+
		"replaced without those above it. If a lower layer needs something of a higher one, inject it, as ports are.", layerBreaches(packages(t)))
}

// external says which packages outside the module and the standard library a part may import, non-test files, directly.
// Parts without a line are free.
var external = map[string][]string{
	"dataplane":          {"golang.org/x/sys/unix"},
	"dataplane/drop":     {},
	"dataplane/packet":   {},
	"dataplane/icmp":     {},
	"dataplane/fib":      {"github.com/gaissmai/bart"},
	"dataplane/port":     {},
	"dataplane/port/mem": {"github.com/google/gopacket"},
	"dataplane/port/tap": {"golang.org/x/sys/unix", "github.com/songgao/water"},
	"dataplane/port/xdp": {"golang.org/x/sys/unix", "github.com/cilium/ebpf"},
}

// dropImports is all that package drop may import: what stringer's output needs.
var dropImports = []string{"strconv"}

func externalBreaches(all []*pkg) (breaches []string) {
	for _, p := range all {
		allowed, restricted := external[partOf(p.path())]
		if !restricted {
			continue
		}
		for _, imp := range p.Imports {
			if standard(imp) {
				if p.path() == "dataplane/drop" && !slices.Contains(dropImports, imp) {
					breaches = append(breaches, fmt.Sprintf("%s imports %s", p.path(), imp))
				}
				continue
			}
			if !under(imp, strings.TrimSuffix(module, "/")) && !underAny(imp, allowed...) {
				breaches = append(breaches, fmt.Sprintf("%s imports %s", p.path(), imp))
			}
		}
	}
	return breaches
}

func TestLowerLayersHaveFewDependencies(t *testing.T) {
	check(t, "what runs once a packet is ours to the last line, but for the trie and the system calls: no dependency's change may slow it down "+
		"or bring more along. Package port is what other port kinds are written against, and drop what everything imports.", externalBreaches(packages(t)))
}

// heavy is what neither dataplane nor anything below it may drag in, however indirectly, and who is excepted.
var heavy = []struct {
	imports string
	except  string
}{
	{"google.golang.org/grpc", ""},
	{"google.golang.org/protobuf", ""},
	{"go.etcd.io", ""},
	{"github.com/vishvananda", ""},
	{"github.com/cilium/ebpf", "dataplane/port/xdp"},
	{module + "dataplane/port/xdp", "dataplane/port/xdp"},
	{module + "dataplane/port/tap", "dataplane/port/tap"},
	{module + "dataplane/port/mem", "dataplane/port/mem"},
}

func heavyBreaches(all []*pkg) (breaches []string) {
	for _, p := range all {
		if !underAny(p.path(), "dataplane", "snat") {
			continue
		}
		for _, h := range heavy {
			if h.except != "" && under(p.path(), h.except) {
				continue
			}
			for _, dep := range p.Deps {
				if under(dep, h.imports) {
					breaches = append(breaches, fmt.Sprintf("%s depends on %s", p.path(), strings.TrimPrefix(dep, module)))
					break
				}
			}
		}
	}
	return breaches
}

func TestDataPlaneKnowsNoControlNorPort(t *testing.T) {
	check(t, "the data plane is driven by snapshots and injected ports: it knows no RPC, store, netlink, BPF or concrete port, so that the same "+
		"code forwards, explains and replays, and its tests need neither root nor network.", heavyBreaches(packages(t)))
}

// netlinkUsers are the only places that may talk netlink, tests included.
var netlinkUsers = []string{"control/agent", "test/lab"}

func netlinkBreaches(all []*pkg) (breaches []string) {
	for _, p := range all {
		if underAny(p.path(), netlinkUsers...) {
			continue
		}
		for _, imp := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if underAny(imp, "github.com/vishvananda", "github.com/mdlayher/netlink", "github.com/jsimonetti/rtnetlink") {
				breaches = append(breaches, fmt.Sprintf("%s imports %s", p.path(), imp))
			}
		}
	}
	return breaches
}

func TestNetlinkStandsInTheAgentAndTheLab(t *testing.T) {
	check(t, "the kernel's links, routes and neighbours are followed and changed in one place, control/agent, which everything else learns them "+
		"from; test/lab builds topologies. Two writers of the same kernel state undo each other.", netlinkBreaches(packages(t)))
}

// TestImportRulesFindBreaches gives each rule packages that break it, and packages that just do not.
func TestImportRulesFindBreaches(t *testing.T) {
	mk := func(path string, imports ...string) []*pkg {
		return []*pkg{{ImportPath: module + path, Imports: imports, Deps: imports}}
	}
	for _, tc := range []struct {
		name string
		rule func([]*pkg) []string
		pkgs []*pkg
		bad  bool
	}{
		{"control from dataplane", layerBreaches, mk("dataplane", module+"control/agent"), true},
		{"dataplane from packet", layerBreaches, mk("dataplane/packet", module+"dataplane"), true},
		{"concrete port from dataplane", layerBreaches, mk("dataplane", module+"dataplane/port/tap"), true},
		{"a port from another", layerBreaches, mk("dataplane/port/tap", module+"dataplane/port/mem"), true},
		{"api from nothing", layerBreaches, mk("control/api", module+"dataplane/packet"), true},
		{"cmd from anything", layerBreaches, mk("control/agent", module+"cmd/overplaned"), true},
		{"lab from control", layerBreaches, mk("control/agent", module+"test/lab"), true},
		{"new folder", layerBreaches, mk("misc"), true},
		{"agent", layerBreaches, mk("control/agent", module+"control/api/x/v1", module+"dataplane/port/tap", "fmt"), false},
		{"generated below api", layerBreaches, mk("control/api", module+"control/api/x/v1"), false},
		{"bpf below xdp", layerBreaches, mk("dataplane/port/xdp", module+"dataplane/port/xdp/bpf"), false},
		{"lab command", layerBreaches, mk("cmd/overplane", module+"test/lab"), false},

		{"trie in packet", externalBreaches, mk("dataplane/packet", "github.com/gaissmai/bart"), true},
		{"anything in port", externalBreaches, mk("dataplane/port", "golang.org/x/sys/unix"), true},
		{"fmt in drop", externalBreaches, mk("dataplane/drop", "fmt"), true},
		{"strconv in drop", externalBreaches, mk("dataplane/drop", "strconv"), false},
		{"trie in fib", externalBreaches, mk("dataplane/fib", "github.com/gaissmai/bart", "fmt"), false},

		{"grpc", heavyBreaches, mk("dataplane", "google.golang.org/grpc/codes"), true},
		{"ebpf", heavyBreaches, mk("dataplane", "github.com/cilium/ebpf/link"), true},
		{"netlink under xdp", heavyBreaches, mk("dataplane/port/xdp", "github.com/vishvananda/netlink"), true},
		{"port under dataplane", heavyBreaches, mk("dataplane", module+"dataplane/port/mem"), true},
		{"ebpf under xdp", heavyBreaches, mk("dataplane/port/xdp/bpf", "github.com/cilium/ebpf"), false},

		{"netlink in cmd", netlinkBreaches, mk("cmd/overplaned", "github.com/vishvananda/netlink"), true},
		{"netlink in a test", netlinkBreaches, []*pkg{{ImportPath: module + "dataplane/port/tap", TestImports: []string{"github.com/vishvananda/netns"}}}, true},
		{"netlink below the agent", netlinkBreaches, mk("control/agent/kernel", "github.com/vishvananda/netlink"), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.bad, len(tc.rule(tc.pkgs)) > 0, "%v", tc.rule(tc.pkgs))
		})
	}
}
