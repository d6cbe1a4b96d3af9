package sim

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoEtcd says that the machine has no etcd.
var ErrNoEtcd = errors.New("there is no etcd in PATH (Debian: etcd-server)")

// Etcd is an etcd of one member that is a program of its own: the machine's, Debian's etcd-server for one.
type Etcd struct {
	// Endpoint is where clients dial.
	Endpoint string

	program, peer, dir string
	cmd                *exec.Cmd
}

// NewEtcd prepares an etcd whose data is in the folder; Start starts it.
func NewEtcd(dir string) (*Etcd, error) {
	program, err := exec.LookPath("etcd")
	if err != nil {
		return nil, ErrNoEtcd
	}
	at, err := freeAddresses(2)
	if err != nil {
		return nil, err
	}
	return &Etcd{Endpoint: "http://" + at[0], program: program, peer: "http://" + at[1], dir: dir}, nil
}

// Start starts it and returns when it is healthy.
func (e *Etcd) Start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(e.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	e.cmd = exec.Command(e.program, "--name", "sim", "--data-dir", filepath.Join(e.dir, "data"), "--listen-client-urls", e.Endpoint, "--advertise-client-urls", e.Endpoint,
		"--listen-peer-urls", e.peer, "--initial-advertise-peer-urls", e.peer, "--initial-cluster", "sim="+e.peer, "--heartbeat-interval", "50", "--election-timeout", "500")
	e.cmd.Stdout, e.cmd.Stderr = log, log
	e.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if err := e.cmd.Start(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, StartTimeout)
	defer cancel()
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		if r, err := client.Get(e.Endpoint + "/health"); err == nil {
			r.Body.Close()
			if r.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("etcd does not start: %w; its log is %s", ctx.Err(), log.Name())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Kill ends it with SIGKILL and returns when it is gone.
func (e *Etcd) Kill() {
	if e.cmd == nil || e.cmd.Process == nil {
		return
	}
	_ = e.cmd.Process.Kill()
	_ = e.cmd.Wait() // it was killed
	e.cmd = nil
}
