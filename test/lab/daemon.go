package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/control/pki"
)

const (
	startTimeout = 30 * time.Second
	stopPatience = 10 * time.Second
	// watchdogInterval is what the daemon is told in WATCHDOG_USEC. The lab counts its messages and kills nobody: a debugger or `node pause`
	// may stop a daemon for as long as it likes.
	watchdogInterval = 2 * time.Second
)

// StartOptions are for tests that start a daemon under unusual circumstances.
type StartOptions struct {
	Env  []string // appended to the node's settings
	Wrap []string // a program and its arguments that is to execute the daemon, e.g. setpriv(1)
}

// settings is the environment of the node's daemon.
func (n *Node) settings() []string {
	o := &n.lab.Options
	env := []string{
		"OVERPLANE_NODE_NAME=" + n.Name(),
		"OVERPLANE_UPLINK=" + uplinkName,
		"OVERPLANE_UPLINK_MODE=" + o.Uplink,
		"OVERPLANE_POD_PORT=" + o.PodPort,
		"OVERPLANE_WORKERS=" + strconv.Itoa(o.Workers),
		"OVERPLANE_CPUS=" + workerCPUs(n.Number, o.Workers),
		"OVERPLANE_STATE_SOURCE=" + o.State,
		"OVERPLANE_STATE_DIR=" + filepath.Join(n.Dir(), "state"),
		"OVERPLANE_MASQ_DIR=" + n.MasqDir(),
		"OVERPLANE_SOCKET=" + n.Socket(),
		"OVERPLANE_BPF_DIR=" + n.BPFDir(),
	}
	if c := n.lab.Controller; c != nil {
		own := filepath.Join(n.Dir(), "pki", "node")
		env = append(env, "OVERPLANE_SYNC_ADDRESSES="+c.Address, "OVERPLANE_TLS_CA="+n.lab.pkiFile(pki.CACert), "OVERPLANE_TLS_CERT="+own+".crt", "OVERPLANE_TLS_KEY="+own+".key")
	} else {
		env = append(env, "OVERPLANE_STATE_FILE="+n.StatePath())
	}
	return append(env, o.Env...)
}

func (n *Node) envPath() string { return filepath.Join(n.Dir(), "overplaned.env") }
func (n *Node) pidPath() string { return filepath.Join(n.Dir(), "overplaned.pid") }

// process is the node's daemon, if it lives.
func (n *Node) process() (process, bool) { return readProcess(n.pidPath()) }

// Pid is the daemon's process id, 0 if it does not run.
func (n *Node) Pid() int {
	p, ok := n.process()
	if !ok {
		return 0
	}
	return p.pid
}

// Start starts the node's daemon and returns when it has said READY=1. An error carries the end of its log.
func (n *Node) Start(ctx context.Context) error { return n.StartWith(ctx, StartOptions{}) }

// StartWith is Start under unusual circumstances.
func (n *Node) StartWith(ctx context.Context, o StartOptions) error {
	if pid := n.Pid(); pid != 0 {
		return fmt.Errorf("%s: overplaned runs already (pid %d)", n.Name(), pid)
	}
	settings := append(n.settings(), o.Env...)
	if err := writeAtomically(n.envPath(), []byte(strings.Join(settings, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	n.mu.Lock()
	if n.notify != nil {
		n.notify.close()
	}
	notify, err := newNotifySocket(filepath.Join(n.Dir(), "notify.sock"))
	n.notify = notify
	n.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s: notify socket: %w", n.Name(), err)
	}
	log, err := os.OpenFile(n.LogPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()

	cmd := n.command(o)
	cmd.Env = append(cmd.Env,
		"NOTIFY_SOCKET="+notify.path,
		"WATCHDOG_USEC="+strconv.FormatInt(watchdogInterval.Microseconds(), 10))
	cmd.Stdout, cmd.Stderr = log, log
	// A child begins in the network namespace of the thread that forks it.
	if err := InNetns(n.Netns(), cmd.Start); err != nil {
		return fmt.Errorf("%s: overplaned: %w", n.Name(), err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	if p, ok := findProcess(cmd.Process.Pid); ok {
		if err := p.write(n.pidPath()); err != nil {
			_ = p.signal(unix.SIGKILL)
			return err
		}
	}
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-notify.ready:
		return nil
	case err := <-exited:
		if err == nil {
			err = errors.New("exit status 0")
		}
		return fmt.Errorf("%s: overplaned ended while starting (%w); its log %s says:\n%s", n.Name(), err, n.LogPath(), n.LogTail(20))
	case <-timeout.C:
		err = fmt.Errorf("%s: overplaned was not ready after %v; its log %s says:\n%s", n.Name(), startTimeout, n.LogPath(), n.LogTail(20))
	case <-ctx.Done():
		err = ctx.Err()
	}
	if p, ok := n.process(); ok {
		_ = p.end(stopPatience)
	}
	return err
}

// command is the daemon's command line with the node's settings.
func (n *Node) command(o StartOptions) *exec.Cmd {
	argv := append(append([]string(nil), o.Wrap...), filepath.Join(n.lab.Binaries, "overplaned"))
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = "/"
	cmd.Env = append(append(cleanEnviron(), n.settings()...), o.Env...)
	// A session of its own: a Ctrl-C at the lab's terminal is the lab's to handle.
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	return cmd
}

// Try runs one more daemon in the node's namespace that is expected to end by itself, and returns what it said. It has the node's settings
// unless o.Env changes them. After the time it is killed, and the error says so.
func (n *Node) Try(ctx context.Context, o StartOptions, limit time.Duration) (output string, err error) {
	var said bytes.Buffer
	cmd := n.command(o)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := InNetns(n.Netns(), cmd.Start); err != nil {
		return "", err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case err := <-done:
		return said.String(), err
	case <-timeout.C:
		err = fmt.Errorf("it still ran after %v", limit)
	case <-ctx.Done():
		err = ctx.Err()
	}
	_ = cmd.Process.Kill()
	<-done
	return said.String(), err
}

// cleanEnviron is this process's environment without what is meant for somebody else's daemon.
func cleanEnviron() []string {
	var env []string
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		switch {
		case strings.HasPrefix(name, "OVERPLANE_"), name == "NOTIFY_SOCKET", strings.HasPrefix(name, "WATCHDOG_"), strings.HasPrefix(name, "LISTEN_"):
		default:
			env = append(env, kv)
		}
	}
	return env
}

// Stop ends the daemon as a service manager does: SIGTERM, and SIGKILL if it takes longer than 10 s, which is an error.
func (n *Node) Stop() error {
	p, ok := n.process()
	if !ok {
		return fmt.Errorf("%s: overplaned does not run", n.Name())
	}
	if err := p.signal(unix.SIGTERM); err != nil {
		return err
	}
	if p.wait(stopPatience) {
		return nil
	}
	_ = p.end(0)
	return fmt.Errorf("%s: overplaned did not end within %v of SIGTERM and was killed", n.Name(), stopPatience)
}

// Kill ends the daemon with SIGKILL and returns when it is gone.
func (n *Node) Kill() error {
	if err := n.Signal(unix.SIGKILL); err != nil {
		return err
	}
	if p, ok := n.process(); ok && !p.wait(deathPatience) {
		return fmt.Errorf("%s: process %d does not die", n.Name(), p.pid)
	}
	return nil
}

// Signal sends the daemon a signal: SIGSTOP to pause it, SIGCONT, SIGHUP.
func (n *Node) Signal(sig unix.Signal) error {
	p, ok := n.process()
	if !ok {
		return fmt.Errorf("%s: overplaned does not run", n.Name())
	}
	return p.signal(sig)
}

// Reload has the daemon read its desired state again.
func (n *Node) Reload() error { return n.Signal(unix.SIGHUP) }

// LogTail is the last lines of the daemon's log, indented.
func (n *Node) LogTail(lines int) string { return tail(n.LogPath(), lines) }

func tail(path string, lines int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return "    " + err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	all = all[max(0, len(all)-lines):]
	return "    " + strings.Join(all, "\n    ")
}
