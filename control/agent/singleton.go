package agent

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// nodeSocket is the abstract unix socket that a running daemon holds. Abstract names belong to a network namespace (unix(7)), so the name
// is taken exactly when another daemon serves the same node.
const nodeSocket = "@overplane/overplaned"

// AlreadyRunningError says that another daemon serves this node or uses this state.
type AlreadyRunningError struct {
	PID  int // 0: not known
	What string
}

func (e *AlreadyRunningError) Error() string {
	who := "another overplaned"
	if e.PID != 0 {
		who = fmt.Sprintf("another overplaned (pid %d)", e.PID)
	}
	return fmt.Sprintf("%s %s; stop it first", who, e.What)
}

// instance is the claim to be the node's only daemon. The kernel drops it when the process ends, however that happens.
type instance struct {
	lock   *os.File
	socket net.Listener
}

// claimNode claims the node and the state folder, or says who has them. It creates the folder.
func claimNode(stateDir string) (*instance, error) {
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("creating the state folder (%sSTATE_DIR): %w", EnvPrefix, err)
	}
	path := filepath.Join(stateDir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		text, _ := os.ReadFile(path)
		pid, _ := strconv.Atoi(strings.TrimSpace(string(text)))
		return nil, &AlreadyRunningError{PID: pid, What: "uses " + stateDir}
	}
	socket, err := net.Listen("unix", nodeSocket)
	if err != nil {
		f.Close()
		if !errors.Is(err, unix.EADDRINUSE) {
			return nil, fmt.Errorf("claiming this network namespace: %w", err)
		}
		return nil, &AlreadyRunningError{PID: listenerPID(nodeSocket), What: "serves this network namespace"}
	}
	pid := strconv.Itoa(os.Getpid()) + "\n"
	if err := f.Truncate(0); err == nil {
		_, err = f.WriteAt([]byte(pid), 0)
		if err != nil {
			socket.Close()
			f.Close()
			return nil, fmt.Errorf("writing the lock: %w", err)
		}
	}
	go func() { // whoever connects wants our credentials and nothing else
		for {
			c, err := socket.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return &instance{lock: f, socket: socket}, nil
}

func (i *instance) Close() {
	i.socket.Close()
	i.lock.Close()
}

// listenerPID is the process that listens on a unix socket, 0 if it cannot be told.
func listenerPID(address string) int {
	c, err := net.Dial("unix", address)
	if err != nil {
		return 0
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// listenLocal opens the socket of the local API. A socket file left by a dead daemon is replaced, one that somebody answers on is not.
func listenLocal(path string, mode os.FileMode) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("creating the folder of the local API's socket: %w", err)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("%s (%sSOCKET) exists and is no socket: remove it or choose another path", path, EnvPrefix)
		}
		if c, err := net.Dial("unix", path); err == nil {
			c.Close()
			return nil, &AlreadyRunningError{PID: listenerPID(path), What: "answers on " + path}
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("removing the stale socket: %w", err)
		}
	}
	// The permissions must be right from the first moment: bind(2) applies the umask, so bind under another name nobody may open first.
	tmp := path + ".new"
	_ = os.Remove(tmp)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("opening the local API's socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(tmp, mode); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		l.Close()
		_ = os.Remove(tmp)
		return nil, fmt.Errorf("opening the local API's socket: %w", err)
	}
	return l, nil
}
