package lab

import (
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
)

// notifySocket plays the service manager's end of sd_notify(3) for one daemon.
type notifySocket struct {
	conn      *net.UnixConn
	path      string
	ready     chan struct{} // closed at the first READY=1
	once      sync.Once
	watchdogs atomic.Int64
	mu        sync.Mutex
	status    string
	seen      []string // state assignments in order, WATCHDOG=1 left out
}

func newNotifySocket(path string) (*notifySocket, error) {
	_ = os.Remove(path)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	s := &notifySocket{conn: conn, path: path, ready: make(chan struct{})}
	go s.serve()
	return s, nil
}

func (s *notifySocket) serve() {
	buf := make([]byte, 4096)
	for {
		n, err := s.conn.Read(buf)
		if err != nil {
			return
		}
		for line := range strings.SplitSeq(string(buf[:n]), "\n") {
			switch {
			case line == "READY=1":
				s.once.Do(func() { close(s.ready) })
			case line == "WATCHDOG=1":
				s.watchdogs.Add(1)
				continue
			case strings.HasPrefix(line, "STATUS="):
				s.mu.Lock()
				s.status = strings.TrimPrefix(line, "STATUS=")
				s.mu.Unlock()
			}
			s.mu.Lock()
			if line != "" && len(s.seen) < 1000 {
				s.seen = append(s.seen, line)
			}
			s.mu.Unlock()
		}
	}
}

func (s *notifySocket) close() {
	s.conn.Close()
	_ = os.Remove(s.path)
}

// Watchdogs is how many WATCHDOG=1 messages the daemon has sent to this process since it started it; 0 if another process did.
func (n *Node) Watchdogs() int64 {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.notify == nil {
		return 0
	}
	return n.notify.watchdogs.Load()
}

// Notified lists the other sd_notify assignments the daemon has sent to this process, oldest first.
func (n *Node) Notified() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.notify == nil {
		return nil
	}
	n.notify.mu.Lock()
	defer n.notify.mu.Unlock()
	return append([]string(nil), n.notify.seen...)
}
