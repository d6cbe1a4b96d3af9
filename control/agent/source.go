package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
)

// filePoll is how often the state file is looked at. A stat(2) sees every way in which files are replaced (rename, symbolic links,
// mounts), which inotify does not.
const filePoll = 500 * time.Millisecond

// lastState is the file in STATE_DIR that keeps the state in force, so that the next daemon forwards at once.
const lastState = "last-state.json"

// checkState completes and validates a state that is to become this node's.
func checkState(node string, s *controlv1.NodeState) (*desired, error) {
	if s == nil {
		return nil, errors.New("no state")
	}
	if s.GetNode() != node {
		return nil, fmt.Errorf("node: %q: the state is not this node's, which is %q (%sNODE_NAME)", s.GetNode(), node, EnvPrefix)
	}
	if err := api.Validate(s); err != nil {
		return nil, err
	}
	return parseDesired(s)
}

// loadFile reads and checks a state file. Errors name the file, the field and the value.
func loadFile(node, path string) (*desired, error) {
	s, err := api.ReadFile(path)
	if err != nil {
		return nil, err
	}
	d, err := checkState(node, s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

// loadInitial finds the state to start with: the source's, else the last one that was in force. problem says what is wrong with the source.
func loadInitial(cfg *Config) (d *desired, problem string) {
	last := filepath.Join(cfg.StateDir, lastState)
	switch cfg.StateSource {
	case SourceController:
		s, err := syncclient.Last(cfg.StateDir, cfg.NodeName)
		if s != nil && err == nil {
			d, err = checkState(cfg.NodeName, s)
		}
		if err != nil {
			return nil, fmt.Sprintf("the last table cannot be used: %v; waiting for the controller", err)
		}
		return d, ""
	case SourceFile:
		d, err := loadFile(cfg.NodeName, cfg.StateFile)
		if err == nil {
			return d, ""
		}
		problem = stateFileProblem(cfg.StateFile, err)
		if d, err := loadFile(cfg.NodeName, last); err == nil {
			return d, problem
		}
		return nil, problem
	default:
		d, err := loadFile(cfg.NodeName, last)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Sprintf("the last state cannot be used: %v; waiting for a state to be pushed", err)
		}
		return d, ""
	}
}

func stateFileProblem(path string, err error) string {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Sprintf("there is no state file %s (%sSTATE_FILE)", path, EnvPrefix)
	}
	return fmt.Sprintf("state file: %v", err)
}

// fileStamp tells whether a file is still the one it was.
type fileStamp struct {
	exists     bool
	modified   time.Time
	size       int64
	dev, inode uint64
}

func stampOf(path string) fileStamp {
	info, err := os.Stat(path)
	if err != nil {
		return fileStamp{}
	}
	s := fileStamp{exists: true, modified: info.ModTime(), size: info.Size()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.dev, s.inode = uint64(st.Dev), st.Ino
	}
	return s
}

// followFile takes over the state file whenever it changes, and when reload asks for it. seen is the stamp of the file that was read at start.
func (a *Agent) followFile(ctx context.Context, seen fileStamp, reload <-chan chan error) {
	tick := time.NewTicker(filePoll)
	defer tick.Stop()
	for {
		var answer chan error
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			now := stampOf(a.cfg.StateFile)
			if now == seen {
				continue
			}
			seen = now
		case answer = <-reload:
			seen = stampOf(a.cfg.StateFile)
		}
		d, err := loadFile(a.cfg.NodeName, a.cfg.StateFile)
		_ = a.do(ctx, func() {
			if err != nil {
				if p := stateFileProblem(a.cfg.StateFile, err); p != a.stateProblem {
					a.stateProblem = p
					a.log.Error("the state file cannot be used; the old state stays in force", "file", a.cfg.StateFile, "error", err)
				}
				return
			}
			a.setState(d)
		})
		if answer != nil {
			answer <- err
		}
	}
}

// setState makes d the desired state and programs it. It returns false if a worker did not take it over in time.
func (a *Agent) setState(d *desired) bool {
	a.state, a.stateProblem = d, ""
	a.publish()
	if a.saver != nil {
		a.saver.Save(d)
	}
	a.log.Info("desired state programmed", "version", api.FormatVersion(d.raw.GetVersion()), "pools", len(d.pools), "own_blocks", len(d.own),
		"members", len(d.members), "routes", len(d.routes), "table", a.built.Routes, "problems", len(a.built.Problems))
	for _, p := range a.built.Problems {
		a.log.Warn("desired state cannot be programmed in full", "problem", p)
	}
	return a.programmed == a.state
}

func saveState(path string, d *desired) error { return api.WriteFile(path, d.raw) }
