package sim

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/control/client/admin"
	"github.com/overplane/overplane/control/pki"
)

// StartTimeout is how long a controller may take until it leads, or serves if another one leads.
const StartTimeout = 30 * time.Second

// Controller is a controller process that may be ended and started again, on the same addresses and the same store. One goroutine starts and ends it.
type Controller struct {
	cluster *Cluster
	name    string

	Address, Admin, Metrics string // where nodes, operators and Prometheus dial

	// Env are further settings, NAME=value without the prefix. They may be changed between starts.
	Env []string
	// Wrap is put before the command line: a program that executes the rest, in the same process.
	Wrap []string

	mu   sync.Mutex
	cmd  *exec.Cmd
	done chan struct{} // closed when the process is gone
}

// NewController prepares a controller; Start starts it. Its folder has the name.
func (c *Cluster) NewController(name string) (*Controller, error) {
	at, err := freeAddresses(3)
	if err != nil {
		return nil, err
	}
	v := &Controller{cluster: c, name: name, Address: at[0], Admin: at[1], Metrics: at[2]}
	return v, os.MkdirAll(v.StateDir(), 0o700)
}

// StateDir is where the embedded etcd is.
func (v *Controller) StateDir() string { return filepath.Join(v.cluster.Dir, v.name, "state") }

// LogPath is the log of all its lives.
func (v *Controller) LogPath() string { return filepath.Join(v.cluster.Dir, v.name, "log") }

// environ is the process's whole environment.
func (v *Controller) environ() []string {
	f := v.cluster.Files("controller")
	env := []string{"PATH=" + os.Getenv("PATH")}
	if p := os.Getenv("GOCOVERDIR"); p != "" {
		env = append(env, "GOCOVERDIR="+p)
	}
	for _, s := range append([]string{
		"NAME=" + v.name, "LISTEN=" + v.Address, "ADMIN_LISTEN=" + v.Admin, "METRICS_LISTEN=" + v.Metrics,
		"CA=" + f.CA, "CERT=" + f.Cert, "KEY=" + f.Key, "STATE_DIR=" + v.StateDir(),
	}, v.Env...) {
		env = append(env, "OVERPLANE_CONTROLLER_"+s)
	}
	return env
}

// Launch starts the process and does not wait for anything.
func (v *Controller) Launch() error {
	if v.Running() {
		return fmt.Errorf("controller %s runs already", v.name)
	}
	log, err := os.OpenFile(v.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	argv := append(v.Wrap[:len(v.Wrap):len(v.Wrap)], v.cluster.Program, "serve")
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = "/", v.environ(), log, log
	// In a group of its own, out of reach of a terminal's signals.
	cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in the log
		close(done)
	}()
	v.mu.Lock()
	v.cmd, v.done = cmd, done
	v.mu.Unlock()
	return nil
}

// Start starts the process and waits until it leads.
func (v *Controller) Start(ctx context.Context) error {
	if err := v.Launch(); err != nil {
		return err
	}
	return v.WaitLeads(ctx)
}

// WaitLeads returns when the controller leads. An error carries the end of its log.
func (v *Controller) WaitLeads(ctx context.Context) error {
	return v.await(ctx, "lead", v.Leads)
}

// WaitServes returns when the controller answers, whether it leads or not.
func (v *Controller) WaitServes(ctx context.Context) error {
	return v.await(ctx, "serve", func() bool { return v.get("/livez") })
}

func (v *Controller) await(ctx context.Context, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, StartTimeout)
	defer cancel()
	for !ok() {
		select {
		case <-v.Exited():
			return fmt.Errorf("controller %s ended; its log says:\n%s", v.name, v.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("controller %s does not %s: %w; its log says:\n%s", v.name, what, ctx.Err(), v.LogTail())
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil
}

// Leads asks the controller.
func (v *Controller) Leads() bool { return v.get("/readyz") }

func (v *Controller) get(path string) bool {
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := client.Get("http://" + v.Metrics + path)
	if err != nil {
		return false
	}
	r.Body.Close()
	return r.StatusCode == http.StatusOK
}

// LogTail is the end of the log.
func (v *Controller) LogTail() string {
	text, err := os.ReadFile(v.LogPath())
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4000):])
}

// Exited is closed when the process that was started last is gone.
func (v *Controller) Exited() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.done
}

// Running reports whether the process lives.
func (v *Controller) Running() bool {
	done := v.Exited()
	if done == nil {
		return false
	}
	select {
	case <-done:
		return false
	default:
		return true
	}
}

// Pid is the process's, or 0.
func (v *Controller) Pid() int {
	if !v.Running() {
		return 0
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.cmd.Process.Pid
}

// Signal sends a signal to the process.
func (v *Controller) Signal(sig unix.Signal) error {
	pid := v.Pid()
	if pid == 0 {
		return fmt.Errorf("controller %s does not run", v.name)
	}
	return unix.Kill(pid, sig)
}

// Kill ends the process with SIGKILL and returns when it is gone. One that does not run is gone.
func (v *Controller) Kill() error {
	if err := v.Signal(unix.SIGKILL); err != nil && v.Running() {
		return err
	}
	if done := v.Exited(); done != nil {
		<-done
	}
	return nil
}

// Stop ends the process as a service manager would, and returns when it is gone.
func (v *Controller) Stop() error {
	if err := v.Signal(unix.SIGTERM); err != nil {
		return err
	}
	select {
	case <-v.Exited():
		return nil
	case <-time.After(10 * time.Second):
		return errors.Join(fmt.Errorf("controller %s does not end; its log says:\n%s", v.name, v.LogTail()), v.Kill())
	}
}

// Operator is a client of the controller's admin service; the caller closes it.
func (v *Controller) Operator() (*admin.Client, error) {
	return admin.Dial(&admin.Config{Address: v.Admin, Files: v.cluster.Files("admin")})
}

// Call runs f with an operator's client.
func (v *Controller) Call(f func(controlv1.AdminServiceClient) error) error {
	a, err := v.Operator()
	if err != nil {
		return err
	}
	return errors.Join(f(a), a.Close())
}

// Blocks are all blocks with a record.
func (v *Controller) Blocks(ctx context.Context) (out []*controlv1.Block, err error) {
	err = v.Call(func(a controlv1.AdminServiceClient) error {
		r, err := a.ListBlocks(ctx, &controlv1.ListBlocksRequest{})
		out = r.GetBlocks()
		return err
	})
	return out, err
}

// DialNode opens a node's stream without a client behind it; the caller closes the connection.
func (c *Cluster) DialNode(ctx context.Context, name, address string) (controlv1.ControlService_SyncClient, *grpc.ClientConn, error) {
	f, err := c.Issue(pki.Request{Role: pki.Node, Name: name})
	if err != nil {
		return nil, nil, err
	}
	return dialNode(ctx, f, address)
}
