package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// victims are pods that go on opening connections to outside while somebody else misbehaves.
type victims struct {
	t    *testing.T
	lab  *lab.Lab
	tcp  map[int]*net.TCPListener // echo servers outside, by family
	udp  map[int]*net.UDPConn
	mu   sync.Mutex
	took []time.Duration // of TCP connections
}

func newVictims(t *testing.T, l *lab.Lab, families []int) *victims {
	t.Helper()
	v := &victims{t: t, lab: l, tcp: map[int]*net.TCPListener{}, udp: map[int]*net.UDPConn{}}
	for _, family := range families {
		server, err := lab.ListenTCP(l.ExtEnd(), family)
		require.NoError(t, err)
		t.Cleanup(func() { server.Close() })
		v.tcp[family] = server
		go func() {
			for {
				c, err := server.AcceptTCP()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					_ = c.SetDeadline(time.Now().Add(30 * time.Second))
					_, _ = io.Copy(c, c)
				}()
			}
		}()
		echo, err := lab.ListenUDP(l.ExtEnd(), family)
		require.NoError(t, err)
		t.Cleanup(func() { echo.Close() })
		v.udp[family] = echo
		go func() {
			buf := make([]byte, 2048)
			for {
				n, from, err := echo.ReadFromUDPAddrPort(buf)
				if err != nil {
					return
				}
				_, _ = echo.WriteToUDPAddrPort(buf[:n], from)
			}
		}()
	}
	return v
}

// victimPatience is how long a connection may take: retransmissions after packets that were lost where queues are full.
const victimPatience = 20 * time.Second

// connect opens connections, of each family from each of the first three pods, one after the other for a while. Each must succeed.
func (v *victims) connect(span time.Duration) {
	until := time.Now().Add(span)
	var wg sync.WaitGroup
	var errs []error
	for family := range v.tcp {
		for _, pod := range v.lab.Nodes[0].Pods[:3] {
			wg.Go(func() {
				ctx := testContext(v.t)
				for i := 0; i < 3 || time.Now().Before(until); i++ {
					if err := v.one(ctx, pod, family); err != nil {
						v.mu.Lock()
						errs = append(errs, fmt.Errorf("%s, IPv%d, round %d: %w", pod.Name(), family, i, err))
						v.mu.Unlock()
						return
					}
				}
			})
		}
	}
	wg.Wait()
	require.NoError(v.t, errors.Join(errs...))
}

// one opens one connection of each kind.
func (v *victims) one(ctx context.Context, pod *lab.Pod, family int) error {
	begin := time.Now()
	var c net.Conn
	err := lab.InNetns(pod.Netns(), func() (err error) {
		c, err = (&net.Dialer{Timeout: victimPatience}).DialContext(ctx, "tcp", v.tcp[family].Addr().String())
		return err
	})
	if err != nil {
		return fmt.Errorf("TCP: %w", err)
	}
	defer c.Close()
	buf := make([]byte, 64)
	_ = c.SetDeadline(begin.Add(victimPatience))
	if _, err = c.Write([]byte("new connection")); err == nil {
		_, err = io.ReadFull(c, buf[:14])
	}
	if err != nil {
		return fmt.Errorf("TCP: %w", err)
	}
	took := time.Since(begin)
	var u net.Conn
	if err := lab.InNetns(pod.Netns(), func() (err error) {
		u, err = net.Dial("udp", v.udp[family].LocalAddr().String())
		return err
	}); err != nil {
		return fmt.Errorf("UDP: %w", err)
	}
	defer u.Close()
	for wait := 250 * time.Millisecond; ; wait *= 2 {
		if _, err := u.Write([]byte("datagram")); err != nil {
			return fmt.Errorf("UDP: %w", err)
		}
		_ = u.SetReadDeadline(time.Now().Add(wait))
		if _, err = u.Read(buf); err == nil {
			break
		}
		if wait > victimPatience/4 {
			return fmt.Errorf("UDP: %w", err)
		}
	}
	p, err := lab.NewPinger(pod.Netns(), v.lab.ExtEnd().Addr(family))
	if err != nil {
		return fmt.Errorf("ping: %w", err)
	}
	defer p.Close()
	for wait := 250 * time.Millisecond; ; wait *= 2 {
		if _, _, err = p.Once(56, wait); err == nil {
			break
		}
		if !errors.Is(err, lab.ErrNoReply) || wait > victimPatience/4 {
			return fmt.Errorf("ping: %w", err)
		}
	}
	v.mu.Lock()
	v.took = append(v.took, took)
	v.mu.Unlock()
	return nil
}

// said sums up.
func (v *victims) said(rate float64) string {
	slices.Sort(v.took)
	return fmt.Sprintf("%.0f k packets/s; the others: %d connections, as many datagrams and pings, none failed; TCP took %v, at most %v",
		rate/1000, len(v.took), v.took[len(v.took)/2].Round(100*time.Microsecond), v.took[len(v.took)-1].Round(time.Millisecond))
}
