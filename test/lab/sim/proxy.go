package sim

import (
	"net"
	"sync"
)

// Proxy passes TCP connections on to an address, until it is cut. Its methods may be called concurrently.
type Proxy struct {
	l  net.Listener
	to string

	mu    sync.Mutex
	cut   bool
	moved chan struct{} // closed and replaced when cut changes
	conns map[net.Conn]struct{}
	done  sync.WaitGroup
}

// NewProxy listens on the loopback.
func NewProxy(to string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{l: l, to: to, moved: make(chan struct{}), conns: make(map[net.Conn]struct{})}
	p.done.Go(p.accept)
	return p, nil
}

// Addr is where it listens.
func (p *Proxy) Addr() string { return p.l.Addr().String() }

// Cut makes it a network that loses every packet: connections stand, new ones are made, and nothing arrives. Heal undoes that; what was written meanwhile
// arrives then, as what TCP sends again would.
func (p *Proxy) Cut() { p.set(true) }

// Heal undoes Cut.
func (p *Proxy) Heal() { p.set(false) }

func (p *Proxy) set(cut bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = cut
	close(p.moved)
	p.moved = make(chan struct{})
}

// Close ends all connections.
func (p *Proxy) Close() {
	p.l.Close()
	p.Heal()
	p.mu.Lock()
	for c := range p.conns {
		c.Close()
	}
	p.mu.Unlock()
	p.done.Wait()
}

func (p *Proxy) accept() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		p.done.Go(func() { p.serve(c) })
	}
}

func (p *Proxy) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[c] = struct{}{}
}

func (p *Proxy) drop(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

func (p *Proxy) serve(a net.Conn) {
	p.keep(a)
	defer p.drop(a)
	p.wait()
	b, err := net.Dial("tcp", p.to)
	if err != nil {
		return
	}
	p.keep(b)
	defer p.drop(b)
	var both sync.WaitGroup
	both.Go(func() { p.pass(b, a) })
	both.Go(func() { p.pass(a, b) })
	both.Wait()
}

// wait returns when nothing is cut.
func (p *Proxy) wait() {
	for {
		p.mu.Lock()
		cut, moved := p.cut, p.moved
		p.mu.Unlock()
		if !cut {
			return
		}
		<-moved
	}
}

func (p *Proxy) pass(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		p.wait()
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
