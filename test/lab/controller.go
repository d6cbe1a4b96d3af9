package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/pki"
)

// Where a lab's desired state comes from: Options.State.
const (
	StateController = "controller" // nodes register with the lab's controller
	StateFile       = "file"       // the lab writes each node's state file itself
)

const (
	controllerProgram = "overplane-controller"
	firstPort         = 7443 // of the controller's three: nodes, operators, metrics
	portsApart        = 10   // controllers of labs on one underlay
	// labCooldown is how long a block rests: nobody waits a minute for a demonstration.
	labCooldown = 3 * time.Second
)

// Controller is a lab's controller, in the namespace of the underlay's router.
type Controller struct {
	Address string `json:"address"` // where nodes dial
	Admin   string `json:"admin"`   // where operators dial
	Metrics string `json:"metrics"`
}

func (l *Lab) controllerDir() string { return filepath.Join(l.Dir(), "controller") }
func (l *Lab) pkiDir() string        { return filepath.Join(l.controllerDir(), "pki") }
func (l *Lab) pkiFile(name string) string {
	return filepath.Join(l.pkiDir(), name)
}

// ControllerLog is the controller's log.
func (l *Lab) ControllerLog() string {
	return filepath.Join(l.controllerDir(), controllerProgram+".log")
}

func controllerPid(lab string) string {
	return filepath.Join(runRoot, lab, "controller", controllerProgram+".pid")
}

// ControllerPid is the controller's process id, 0 if it does not run.
func (l *Lab) ControllerPid() int {
	p, ok := readProcess(controllerPid(l.Name))
	if !ok {
		return 0
	}
	return p.pid
}

// makeController makes the authority and the controller's files, finds free ports, and starts it.
func (l *Lab) makeController(ctx context.Context) error {
	if err := os.MkdirAll(l.pkiDir(), 0o700); err != nil {
		return err
	}
	now := time.Now()
	if err := pki.Init(l.pkiDir(), "lab "+l.Name, now); err != nil {
		return err
	}
	for _, r := range []pki.Request{{Role: pki.Controller, Name: "controller", Hosts: []string{gatewayIPv4, gatewayIPv6}}, {Role: pki.Admin, Name: "admin"}} {
		if err := pki.Issue(l.pkiDir(), r, l.pkiFile(r.Name+".crt"), l.pkiFile(r.Name+".key"), false, now); err != nil {
			return err
		}
	}
	port, err := freePorts(l.Gateway())
	if err != nil {
		return err
	}
	at := func(i int) string { return net.JoinHostPort(gatewayIPv4, strconv.Itoa(port+i)) }
	l.Controller = &Controller{Address: at(0), Admin: at(1), Metrics: at(2)}
	if err := writeAtomically(filepath.Join(l.controllerDir(), "admin.env"), []byte(strings.Join(l.adminEnv(), "\n")+"\n"), 0o644); err != nil {
		return err
	}
	if err := l.save(); err != nil {
		return err
	}
	return l.StartController(ctx)
}

// freePorts finds three ports in a row that nobody listens on in the namespace.
func freePorts(netns string) (int, error) {
	for port := firstPort; port < firstPort+100*portsApart; port += portsApart {
		err := InNetns(netns, func() error {
			for i := range 3 {
				ln, err := net.Listen("tcp4", net.JoinHostPort(gatewayIPv4, strconv.Itoa(port+i)))
				if err != nil {
					return err
				}
				ln.Close()
			}
			return nil
		})
		if err == nil {
			return port, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) {
			return 0, err
		}
	}
	return 0, fmt.Errorf("%s has no free port for a controller", netns)
}

// adminEnv is the environment that tells `overplane nodes` and the like of this controller.
func (l *Lab) adminEnv() []string {
	return []string{
		"OVERPLANE_CONTROLLER=" + l.Controller.Admin,
		"OVERPLANE_ADMIN_CA=" + l.pkiFile(pki.CACert),
		"OVERPLANE_ADMIN_CERT=" + l.pkiFile("admin.crt"),
		"OVERPLANE_ADMIN_KEY=" + l.pkiFile("admin.key"),
	}
}

// StartController starts the controller, which must not run, and returns when it leads. An error carries the end of its log.
func (l *Lab) StartController(ctx context.Context) error {
	if l.Controller == nil {
		return fmt.Errorf("lab %s has no controller: it is one of --state file", l.Name)
	}
	if pid := l.ControllerPid(); pid != 0 {
		return fmt.Errorf("%s runs already (pid %d)", controllerProgram, pid)
	}
	log, err := os.OpenFile(l.ControllerLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	settings := []string{
		"LISTEN=" + l.Controller.Address, "ADMIN_LISTEN=" + l.Controller.Admin, "METRICS_LISTEN=" + l.Controller.Metrics,
		"CA=" + l.pkiFile(pki.CACert), "CERT=" + l.pkiFile("controller.crt"), "KEY=" + l.pkiFile("controller.key"),
		"STATE_DIR=" + filepath.Join(l.controllerDir(), "state"), "POD_CIDRS=" + poolIPv4 + "," + poolIPv6,
		"COOLDOWN=" + labCooldown.String(), "NAME=" + l.Name,
	}
	for i := range settings {
		settings[i] = "OVERPLANE_CONTROLLER_" + settings[i]
	}
	if err := writeAtomically(filepath.Join(l.controllerDir(), "controller.env"), []byte(strings.Join(settings, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(l.Binaries, controllerProgram), "serve")
	cmd.Dir, cmd.Env = "/", append(cleanEnviron(), settings...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := InNetns(l.Gateway(), cmd.Start); err != nil {
		return fmt.Errorf("%s: %w", controllerProgram, err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	if p, ok := findProcess(cmd.Process.Pid); ok {
		if err := p.write(controllerPid(l.Name)); err != nil {
			_ = p.signal(unix.SIGKILL)
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DialContext: l.dialGateway, DisableKeepAlives: true}}
	for {
		if r, err := client.Get("http://" + l.Controller.Metrics + "/readyz"); err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case err := <-exited:
			if err == nil {
				err = errors.New("exit status 0")
			}
			return fmt.Errorf("%s ended while starting (%w); its log %s says:\n%s", controllerProgram, err, l.ControllerLog(), tail(l.ControllerLog(), 20))
		case <-ctx.Done():
			_ = l.KillController()
			return fmt.Errorf("%s was not ready: %w; its log %s says:\n%s", controllerProgram, ctx.Err(), l.ControllerLog(), tail(l.ControllerLog(), 20))
		case <-time.After(pollInterval):
		}
	}
}

// StopController ends the controller with SIGTERM, KillController with SIGKILL. They return when it is gone; one that does not run is an error.
func (l *Lab) StopController() error { return l.endController(unix.SIGTERM) }

// KillController is StopController with SIGKILL.
func (l *Lab) KillController() error { return l.endController(unix.SIGKILL) }

func (l *Lab) endController(sig unix.Signal) error {
	p, ok := readProcess(controllerPid(l.Name))
	if !ok {
		return fmt.Errorf("%s of lab %s does not run", controllerProgram, l.Name)
	}
	if err := p.signal(sig); err != nil {
		return err
	}
	if p.wait(stopPatience) {
		return nil
	}
	_ = p.end(0)
	return fmt.Errorf("%s did not end within %v and was killed", controllerProgram, stopPatience)
}

// dialGateway dials from within the namespace that the controller is in.
func (l *Lab) dialGateway(ctx context.Context, _, address string) (net.Conn, error) {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, err
	}
	return DialTCP(ctx, End{Netns: l.Gateway()}, at)
}

// AdminCall runs fn with an operator's client of the controller.
func (l *Lab) AdminCall(ctx context.Context, fn func(context.Context, controlv1.AdminServiceClient) error) error {
	if l.Controller == nil {
		return fmt.Errorf("lab %s has no controller", l.Name)
	}
	tls, err := (&pki.Files{CA: l.pkiFile(pki.CACert), Cert: l.pkiFile("admin.crt"), Key: l.pkiFile("admin.key")}).Client(gatewayIPv4)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+l.Controller.Admin, grpc.WithTransportCredentials(credentials.NewTLS(tls)),
		grpc.WithContextDialer(func(ctx context.Context, a string) (net.Conn, error) { return l.dialGateway(ctx, "tcp", a) }))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	if err := fn(ctx, controlv1.NewAdminServiceClient(conn)); err != nil {
		return fmt.Errorf("controller: %w", err)
	}
	return nil
}

// Convergence is what the controller issued, and what every node made of it.
func (l *Lab) Convergence(ctx context.Context) (*controlv1.GetConvergenceResponse, error) {
	var r *controlv1.GetConvergenceResponse
	err := l.AdminCall(ctx, func(ctx context.Context, c controlv1.AdminServiceClient) (err error) {
		r, err = c.GetConvergence(ctx, &controlv1.GetConvergenceRequest{})
		return err
	})
	return r, err
}

// Blocks are the controller's blocks that are or were in use by a node; empty: by anybody.
func (l *Lab) Blocks(ctx context.Context, node string) ([]*controlv1.Block, error) {
	var out []*controlv1.Block
	err := l.AdminCall(ctx, func(ctx context.Context, c controlv1.AdminServiceClient) error {
		r, err := c.ListBlocks(ctx, &controlv1.ListBlocksRequest{})
		for _, b := range r.GetBlocks() {
			if node == "" || b.GetOwner() == node {
				out = append(out, b)
			}
		}
		return err
	})
	return out, err
}

// waitConverged returns when all nodes that the controller knows, or those that are named, forward by the newest version that it issued.
func (l *Lab) waitConverged(ctx context.Context, names ...string) error {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	for {
		r, err := l.Convergence(ctx)
		if err == nil {
			if err = unconverged(r, names); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lab %s does not converge: %w", l.Name, err)
		case <-time.After(pollInterval):
		}
	}
}

// unconverged says why not all (or the named) nodes have converged.
func unconverged(r *controlv1.GetConvergenceResponse, names []string) error {
	if len(names) == 0 {
		if int(r.GetConverged()) != len(r.GetNodes()) {
			return fmt.Errorf("%d of %d nodes forward by %s", r.GetConverged(), len(r.GetNodes()), api.FormatVersion(r.GetIssued()))
		}
		return nil
	}
	have := make(map[string]*controlv1.NodeConvergence)
	for _, n := range r.GetNodes() {
		have[n.GetNode()] = n
	}
	for _, name := range names {
		switch n := have[name]; {
		case n == nil:
			return fmt.Errorf("%s has not joined", name)
		case !n.GetConnected() || len(n.GetFailures()) > 0 || !api.EqualVersions(n.GetProgrammed(), r.GetIssued()):
			return fmt.Errorf("%s forwards by %s, not %s; connected=%v, problem %q, failures %v", name, api.FormatVersion(n.GetProgrammed()), api.FormatVersion(r.GetIssued()),
				n.GetConnected(), n.GetProblem(), n.GetFailures())
		}
	}
	return nil
}

// waitFor polls until what is asked for is true.
func (l *Lab) waitFor(ctx context.Context, what string, done func(context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	for {
		ok, err := done(ctx)
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waiting in vain for this: %s", what), err)
		case <-time.After(pollInterval):
		}
	}
}
