package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// Options is what a lab is made of. The zero value of a field is its default, except where it says otherwise.
type Options struct {
	Name      string `json:"name"`       // prefix of everything; "ovp"
	Nodes     int    `json:"nodes"`      // 3
	Pods      int    `json:"pods"`       // pods on each node; zero is none, the command's default is 2
	Uplink    string `json:"uplink"`     // OVERPLANE_UPLINK_MODE of the daemons; "auto"
	PodPort   string `json:"pod_port"`   // OVERPLANE_POD_PORT of the daemons; "tap"
	Workers   int    `json:"workers"`    // forwarding threads of a daemon; 1
	Queues    int    `json:"queues"`     // of the nodes' uplinks; as many as workers
	MTU       int    `json:"mtu"`        // of the underlay; 1500
	IPForward int    `json:"ip_forward"` // net.ipv4.ip_forward and net.ipv6.conf.all.forwarding in the nodes; 0
	State     string `json:"state"`      // StateController, or StateFile: the lab writes the nodes' state files itself; "controller"
	Underlay  string `json:"underlay"`   // name of the lab whose gw namespace is joined; empty: an underlay of its own

	// Wires, if there are any, take the place of the nodes' veth pairs. They serve one node each, and go back to the machine with the lab.
	Wires []Wire `json:"wires,omitempty"`
	// Binaries is the folder with overplaned; see FindBinaries.
	Binaries string `json:"binaries"`
	// Env are further OVERPLANE_* settings of every daemon, NAME=value.
	Env []string `json:"env,omitempty"`
	// Snat is how the nodes translate, with StateFile; nil is the defaults.
	Snat *controlv1.SnatRules `json:"-"`
	// Log, if set, is told what happens, one line a call.
	Log func(format string, args ...any) `json:"-"`
}

// uplinkModes are the values of --uplink: OVERPLANE_UPLINK_MODE's.
var uplinkModes = []string{"auto", "xdp", "xdp-zerocopy", "xdp-copy", "tun", "plain"}

var labNamePattern = regexp.MustCompile(`^[a-z][a-z0-9]*$`)

// resolve fills in defaults and checks everything at once.
func (o *Options) resolve() error {
	setDefault(&o.Name, defaultLabName)
	setDefault(&o.Nodes, 3)
	setDefault(&o.Uplink, "auto")
	setDefault(&o.PodPort, "tap")
	setDefault(&o.State, StateController)
	setDefault(&o.Workers, 1)
	setDefault(&o.Queues, o.Workers)
	setDefault(&o.MTU, 1500)
	if o.Log == nil {
		o.Log = func(string, ...any) {}
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if err := checkName(o.Name); err != nil {
		errs = append(errs, err)
	}
	if o.Underlay != "" && (checkName(o.Underlay) != nil || o.Underlay == o.Name) {
		bad("--underlay %q: want the name of another lab", o.Underlay)
	}
	if o.Nodes < 1 || o.Nodes > maxNodeNumber {
		bad("--nodes %d: want 1 to %d", o.Nodes, maxNodeNumber)
	}
	if o.Pods < 0 || o.Pods > maxPodsPerNode {
		bad("--pods %d: want 0 to %d", o.Pods, maxPodsPerNode)
	}
	if !slices.Contains(uplinkModes, o.Uplink) {
		bad("--uplink %q: want one of %s", o.Uplink, strings.Join(uplinkModes, ", "))
	}
	if o.PodPort != "tap" && o.PodPort != "veth" {
		bad("--pod-port %q: want tap or veth", o.PodPort)
	}
	if o.State != StateController && o.State != StateFile {
		bad("--state %q: want %s or %s", o.State, StateController, StateFile)
	}
	if o.Workers < 1 || o.Workers > workersLimit {
		bad("--workers %d: want 1 to %d", o.Workers, workersLimit)
	}
	if o.Queues < o.Workers || o.Queues > queuesLimit {
		bad("--queues %d: want as many as workers, or up to %d", o.Queues, queuesLimit)
	}
	if o.MTU < minUnderlayMTU || o.MTU > maxUnderlayMTU {
		bad("--mtu %d: want %d to %d", o.MTU, minUnderlayMTU, maxUnderlayMTU)
	}
	if o.IPForward != 0 && o.IPForward != 1 {
		bad("--ip-forward %d: want 0 or 1", o.IPForward)
	}
	return errors.Join(errs...)
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func checkName(name string) error {
	if !labNamePattern.MatchString(name) || len(name) > maxLabNameRunes {
		return fmt.Errorf("--name %q: want 1 to %d lower-case letters and digits, a letter first", name, maxLabNameRunes)
	}
	return nil
}

// workerCPUs is the OVERPLANE_CPUS of node number n: cores are dealt out round the nodes, so that the nodes' first workers do not
// all share the first core. Unpinned when there are more workers than cores.
func workerCPUs(n, workers int) string {
	cores := runtime.NumCPU()
	if workers > cores {
		return "none"
	}
	list := make([]string, workers)
	for w := range list {
		list[w] = fmt.Sprint(((n-1)*workers + w) % cores)
	}
	return strings.Join(list, ",")
}

// FindBinaries returns the folder that holds overplaned: $OVERPLANE_BIN (a folder, or a program in it), else the folder of the running program.
func FindBinaries() (string, error) {
	dir := os.Getenv("OVERPLANE_BIN")
	from := "OVERPLANE_BIN"
	if dir == "" {
		self, err := os.Executable()
		if err != nil {
			return "", err
		}
		dir, from = filepath.Dir(self), "the folder of this program"
	} else if st, err := os.Stat(dir); err == nil && !st.IsDir() {
		dir = filepath.Dir(dir)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	st, err := os.Stat(filepath.Join(dir, "overplaned"))
	if err != nil || st.IsDir() {
		return "", fmt.Errorf("overplaned is not in %s (%s): `make build` first, or set OVERPLANE_BIN to the folder with the built programs", dir, from)
	}
	return dir, nil
}

// CheckRoot says what is missing if the lab cannot work for this user.
func CheckRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("the lab makes network namespaces and loads BPF programs: run it as root (sudo)")
	}
	return nil
}
