package server

import (
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

// handshakes paces TLS handshakes. When thousands of nodes dial at once, as after an outage, and all handshakes progress alike, none may be done before its
// client loses patience (gRPC's is 20 s) and dials again: all work is lost, for ever. So a few are done at a time, those of the newest connections first, whose
// clients will wait longest, and those whose client has left meanwhile are not begun.
type handshakes struct {
	credentials.TransportCredentials
	queue *lifo
}

const (
	// handshakeSlots are for more than there are cores, since a handshake waits for the network once.
	handshakeSlots = 16
	// maxHandshake is for how long one handshake may have a slot, whatever its client does.
	maxHandshake = time.Second
	// maxQueued is how long a connection waits for its handshake: longer than any client.
	maxQueued = 30 * time.Second
)

func paced(c credentials.TransportCredentials) credentials.TransportCredentials {
	return &handshakes{c, &lifo{free: handshakeSlots}}
}

// Clone implements credentials.TransportCredentials.
func (h *handshakes) Clone() credentials.TransportCredentials {
	return &handshakes{h.TransportCredentials.Clone(), h.queue}
}

// lifo is slots, and who waits for one, the oldest first. Its methods may be called concurrently.
type lifo struct {
	mu      sync.Mutex
	free    int
	waiting []chan struct{} // closed when its owner has a slot
}

// take waits for a slot, behind whoever comes later. It reports whether there was one in time.
func (l *lifo) take(most time.Duration) bool {
	l.mu.Lock()
	if l.free > 0 {
		l.free--
		l.mu.Unlock()
		return true
	}
	mine := make(chan struct{})
	l.waiting = append(l.waiting, mine)
	l.mu.Unlock()
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-mine:
		return true
	case <-t.C:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.waiting, mine)
	if i < 0 {
		return true // just now
	}
	l.waiting = slices.Delete(l.waiting, i, i+1)
	return false
}

func (l *lifo) give() {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(l.waiting)
	if n == 0 {
		l.free++
		return
	}
	close(l.waiting[n-1])
	l.waiting = l.waiting[:n-1]
}

var (
	errLeft   = errors.New("the client has left")
	errQueued = errors.New("the handshake's turn did not come in time")
)

// ServerHandshake implements credentials.TransportCredentials.
func (h *handshakes) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	// Who says nothing waits without a slot, until gRPC's deadline.
	first := &peeked{Conn: c}
	n, err := c.Read(first.b[:])
	if err != nil {
		return nil, nil, errors.Join(err, c.Close())
	}
	first.n = n
	if !h.queue.take(maxQueued) {
		return nil, nil, errors.Join(errQueued, c.Close())
	}
	t := time.AfterFunc(maxHandshake, h.queue.give)
	defer func() {
		if t.Stop() {
			h.queue.give()
		}
	}()
	if left(c) {
		return nil, nil, errors.Join(errLeft, c.Close())
	}
	return h.TransportCredentials.ServerHandshake(first)
}

// peeked is a connection of which a byte was read already.
type peeked struct {
	net.Conn
	b [1]byte
	n int
}

func (p *peeked) Read(b []byte) (int, error) {
	if p.n > 0 && len(b) > 0 {
		p.n = 0
		b[0] = p.b[0]
		return 1, nil
	}
	return p.Conn.Read(b)
}

// tcpEstablished is TCP_ESTABLISHED of include/net/tcp_states.h: the peer has not closed its end.
const tcpEstablished = 1

func left(c net.Conn) (left bool) {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return false
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return true
	}
	if err := raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		left = err == nil && info.State != tcpEstablished
	}); err != nil {
		return true
	}
	return left
}
