package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
)

// trafficInterval is the pause between two datagrams of a flow.
const trafficInterval = 10 * time.Millisecond

// trafficSettle is how long datagrams may be on their way after the last one was sent.
const trafficSettle = 500 * time.Millisecond

// Traffic is sequence-numbered datagrams, a hundred a second in each flow, from StartTraffic to Stop.
type Traffic struct {
	flows []*trafficFlow
	stop  context.CancelFunc
	done  sync.WaitGroup
}

// trafficFlow is datagrams from one end to another.
type trafficFlow struct {
	name     string
	from, to *net.UDPConn
	sent     uint64
	got      []bool // by sequence number; the receiver's until it ends
}

// StartTraffic starts a flow of each family between the first pods of every two of the nodes, both ways; none named: all nodes of the lab.
func (l *Lab) StartTraffic(nodes ...*Node) (*Traffic, error) {
	if len(nodes) == 0 {
		nodes = l.Nodes
	}
	t := &Traffic{stop: func() {}}
	for _, a := range nodes {
		for _, b := range nodes {
			if a == b || len(a.Pods) == 0 || len(b.Pods) == 0 {
				continue
			}
			for _, family := range []int{4, 6} {
				from, to := a.Pods[0].End(), b.Pods[0].End()
				f := &trafficFlow{name: fmt.Sprintf("%s to %s, IPv%d", from.Name, to.Name, family)}
				t.flows = append(t.flows, f)
				var err1, err2 error
				f.to, err1 = ListenUDP(to, family)
				f.from, err2 = ListenUDP(from, family)
				if err := errors.Join(err1, err2); err != nil {
					t.close()
					return nil, err
				}
			}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.stop = cancel
	for _, f := range t.flows {
		t.done.Go(f.receive)
		t.done.Go(func() { f.send(ctx) })
	}
	return t, nil
}

func (f *trafficFlow) send(ctx context.Context) {
	to := f.to.LocalAddr().(*net.UDPAddr).AddrPort()
	tick := time.NewTicker(trafficInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			time.Sleep(trafficSettle)
			_ = f.to.SetReadDeadline(time.Now())
			return
		case <-tick.C:
		}
		// What cannot be sent is lost as well.
		_, _ = f.from.WriteToUDPAddrPort(binary.BigEndian.AppendUint64(nil, f.sent), to)
		f.sent++
	}
}

func (f *trafficFlow) receive() {
	buf := make([]byte, 64)
	for {
		n, err := f.to.Read(buf)
		if err != nil {
			return
		}
		if n != 8 {
			continue
		}
		i := binary.BigEndian.Uint64(buf)
		for uint64(len(f.got)) <= i {
			f.got = append(f.got, false)
		}
		f.got[i] = true
	}
}

func (t *Traffic) close() {
	for _, f := range t.flows {
		for _, c := range []*net.UDPConn{f.from, f.to} {
			if c != nil {
				c.Close()
			}
		}
	}
}

// Stop ends the traffic and says how many datagrams were sent. It is an error if one was lost: it says in which flows, and for how long.
func (t *Traffic) Stop() (sent uint64, err error) {
	t.stop()
	t.done.Wait()
	t.close()
	var lossy []string
	lost := uint64(0)
	for _, f := range t.flows {
		sent += f.sent
		n, first, last := uint64(0), uint64(0), uint64(0)
		for i := range f.sent {
			if i < uint64(len(f.got)) && f.got[i] {
				continue
			}
			if n == 0 {
				first = i
			}
			n, last = n+1, i
		}
		if lost += n; n > 0 {
			lossy = append(lossy, fmt.Sprintf("%s: %d of %d, number %d to %d", f.name, n, f.sent, first, last))
		}
	}
	if lost > 0 {
		return sent, fmt.Errorf("%d of %d datagrams were lost: %s", lost, sent, strings.Join(lossy, "; "))
	}
	return sent, nil
}
