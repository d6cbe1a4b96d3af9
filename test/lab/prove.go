package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Proof is one thing that must be true of a lab that is up, for each address family.
type Proof struct {
	Name string
	// Check returns what it found, for people. It sends traffic but changes nothing.
	Check func(ctx context.Context, l *Lab, family int) (detail string, err error)
}

// demoTransferBytes is what the bulk proof copies.
const demoTransferBytes = 64 << 20

// Proofs are what `overplane lab run` shows, in order.
func Proofs() []Proof {
	return []Proof{
		{"every pod pings every pod", provePing},
		{"TCP from every pod to every pod", proveTCP},
		{"UDP from every pod to every pod", proveUDP},
		{"nodes and their own pods, both ways", proveNodes(true)},
		{"nodes and remote pods, both ways", proveNodes(false)},
		{"64 MiB from pod to remote pod, same SHA-256", proveTransfer},
		{"pod addresses in the only IP header on the wire", proveNoEncapsulation},
		{"traceroute shows node, node, pod", proveTrace},
		{"pods reach the outside with their node's address", proveOutside},
		{"the outside cannot open to a pod", proveClosed},
		{"the nodes' own traffic is left alone", proveNodesOutside},
	}
}

// podPair is an ordered pair of ends.
type podPair struct{ from, to End }

func (l *Lab) podPairs() []podPair {
	var pairs []podPair
	for _, a := range l.Pods() {
		for _, b := range l.Pods() {
			if a != b {
				pairs = append(pairs, podPair{a.End(), b.End()})
			}
		}
	}
	return pairs
}

// remotePair is a pair of pods on different nodes.
func (l *Lab) remotePair() (a, b *Pod, err error) {
	for _, a := range l.Pods() {
		for _, b := range l.Pods() {
			if a.node != b.node {
				return a, b, nil
			}
		}
	}
	return nil, nil, errors.New("there are no pods on two nodes")
}

// enoughFailures is how many pairs of a proof may fail before the others are not tried any more.
const enoughFailures = 3

// forPairs runs check for all pairs, a few at a time, and sums up.
func forPairs(ctx context.Context, pairs []podPair, check func(context.Context, podPair) (lost int, err error)) (string, error) {
	var (
		mu   sync.Mutex
		wg   sync.WaitGroup
		errs []error
		lost int
	)
	slots := make(chan struct{}, 8)
	tried := 0
	for _, p := range pairs {
		slots <- struct{}{}
		mu.Lock()
		enough := len(errs) >= enoughFailures
		mu.Unlock()
		if enough {
			break
		}
		tried++
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer func() { <-slots }()
			n, err := check(ctx, p)
			mu.Lock()
			defer mu.Unlock()
			lost += n
			if err != nil {
				errs = append(errs, fmt.Errorf("%s to %s: %w", p.from.Name, p.to.Name, err))
			}
		}()
	}
	wg.Wait()
	if n := len(errs); n > enoughFailures {
		errs = append(errs[:enoughFailures], fmt.Errorf("and %d more", n-enoughFailures))
	}
	if tried < len(pairs) {
		errs = append(errs, fmt.Errorf("%d of %d pairs were not tried", len(pairs)-tried, len(pairs)))
	}
	detail := fmt.Sprintf("%d pairs", len(pairs))
	if lost > 0 {
		detail += fmt.Sprintf(", %d probes lost", lost)
	}
	return detail, errors.Join(errs...)
}

func provePing(ctx context.Context, l *Lab, family int) (string, error) {
	return forPairs(ctx, l.podPairs(), func(ctx context.Context, p podPair) (int, error) {
		return Ping(ctx, p.from.Netns, p.to.Addr(family))
	})
}

func proveTCP(ctx context.Context, l *Lab, family int) (string, error) {
	return forPairs(ctx, l.podPairs(), func(ctx context.Context, p podPair) (int, error) {
		return 0, EchoTCP(ctx, p.from, p.to, family)
	})
}

func proveUDP(ctx context.Context, l *Lab, family int) (string, error) {
	return forPairs(ctx, l.podPairs(), func(ctx context.Context, p podPair) (int, error) {
		return EchoUDP(ctx, p.from, p.to, family, nil)
	})
}

// proveNodes checks ping, TCP and UDP between nodes and pods, of the same node (local) or of others.
func proveNodes(local bool) func(context.Context, *Lab, int) (string, error) {
	return func(ctx context.Context, l *Lab, family int) (string, error) {
		var pairs []podPair
		for _, n := range l.Nodes {
			for _, p := range l.Pods() {
				if (p.node == n) == local {
					pairs = append(pairs, podPair{n.End(), p.End()}, podPair{p.End(), n.End()})
				}
			}
		}
		return proveEchoes(ctx, pairs, family, nil)
	}
}

// proveEchoes checks ping, TCP and UDP between pairs. datagram is what is sent by UDP; nil: a few bytes.
func proveEchoes(ctx context.Context, pairs []podPair, family int, datagram []byte) (string, error) {
	return forPairs(ctx, pairs, func(ctx context.Context, p podPair) (int, error) {
		lost, err := Ping(ctx, p.from.Netns, p.to.Addr(family))
		if err != nil {
			return lost, fmt.Errorf("ping: %w", err)
		}
		if err := EchoTCP(ctx, p.from, p.to, family); err != nil {
			return lost, fmt.Errorf("TCP: %w", err)
		}
		n, err := EchoUDP(ctx, p.from, p.to, family, datagram)
		if err != nil {
			err = fmt.Errorf("UDP, %d bytes: %w", len(datagram), err)
		}
		return lost + n, err
	})
}

func proveTransfer(ctx context.Context, l *Lab, family int) (string, error) {
	a, b, err := l.remotePair()
	if err != nil {
		return "", err
	}
	d, err := Transfer(ctx, a.End(), b.End(), family, demoTransferBytes)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%.1f Gbit/s", float64(demoTransferBytes)*8/d.Seconds()/1e9), nil
}

// proveNoEncapsulation sends datagrams with a unique content between pods of different nodes and finds that content on the wire: right
// behind one UDP header, behind one IP header with the pods' addresses, in a frame from node to node.
func proveNoEncapsulation(ctx context.Context, l *Lab, family int) (string, error) {
	magic := make([]byte, 32)
	_, _ = rand.Read(magic)
	capture, err := StartCapture(l.Gateway(), func(f []byte) bool { return bytes.Contains(f, magic) })
	if err != nil {
		return "", err
	}
	defer capture.Stop()
	a, b, err := l.remotePair()
	if err != nil {
		return "", err
	}
	if _, err := EchoUDP(ctx, a.End(), b.End(), family, magic); err != nil {
		return "", err
	}
	ends := map[netip.Addr]*Pod{a.Addr(family): a, b.Addr(family): b}
	directions := map[string]bool{}
	// The echo's return and the capture's thread race by microseconds.
	var frames []Frame
	for range 100 {
		if frames = capture.Frames(); len(frames) >= 2 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	for _, f := range frames {
		ip, ok := ParseOuterIP(f.Bytes)
		if !ok {
			return "", fmt.Errorf("a frame on the underlay is not plain IP: %x", f.Bytes)
		}
		src, dst := ends[ip.Src], ends[ip.Dst]
		switch {
		case src == nil || dst == nil:
			return "", fmt.Errorf("the outer addresses on the underlay are %v > %v, not the pods'", ip.Src, ip.Dst)
		case ip.Protocol != unix.IPPROTO_UDP || len(ip.Payload) != 8+len(magic) || !bytes.Equal(ip.Payload[8:], magic):
			return "", fmt.Errorf("protocol %d with %d bytes follows the IP header %v > %v: not the pod's datagram", ip.Protocol, len(ip.Payload), ip.Src, ip.Dst)
		case ip.SrcMAC.String() != src.node.MAC || ip.DstMAC.String() != dst.node.MAC:
			return "", fmt.Errorf("a frame for %v went from %v to %v, not from node to node", ip.Dst, ip.SrcMAC, ip.DstMAC)
		}
		directions[ip.Src.String()] = true
	}
	if len(directions) != 2 {
		return "", fmt.Errorf("saw %d of 2 directions on the underlay (%d frames)", len(directions), len(frames))
	}
	return fmt.Sprintf("%v > %v UDP", a.Addr(family), b.Addr(family)), nil
}

func proveTrace(ctx context.Context, l *Lab, family int) (string, error) {
	a, b, err := l.remotePair()
	if err != nil {
		return "", err
	}
	hops, err := Trace(ctx, a.Netns(), b.Addr(family), 8)
	if err != nil {
		return "", err
	}
	want := []netip.Addr{a.node.Addr(family), b.node.Addr(family), b.Addr(family)}
	if fmt.Sprint(hops) != fmt.Sprint(want) {
		return "", fmt.Errorf("hops are %v, not %v", hops, want)
	}
	return fmt.Sprintf("%s, %s, %s", a.node.Name(), b.node.Name(), b.Name()), nil
}

// KernelForwarded is how many packets of a family the kernels of all nodes have forwarded since the namespaces were made.
func (l *Lab) KernelForwarded(family int) (uint64, error) {
	var sum uint64
	for _, n := range l.Nodes {
		v, err := SNMP(n.Netns(), family)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", n.Name(), err)
		}
		sum += v
	}
	return sum, nil
}

// SNMP is a namespace's count of forwarded packets: ForwDatagrams of /proc/net/snmp, or Ip6OutForwDatagrams of /proc/net/snmp6.
func SNMP(netns string, family int) (count uint64, err error) {
	path := map[int]string{4: "/proc/thread-self/net/snmp", 6: "/proc/thread-self/net/snmp6"}[family]
	err = InNetns(netns, func() error {
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if family == 4 {
			count, err = snmpColumn(string(data), "Ip:", "ForwDatagrams")
		} else {
			count, err = snmpLine(string(data), "Ip6OutForwDatagrams")
		}
		return err
	})
	return count, err
}

// snmpColumn reads a file that has pairs of lines: names, then values, both behind the same prefix.
func snmpColumn(data, prefix, name string) (uint64, error) {
	var names []string
	for line := range strings.SplitSeq(data, "\n") {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != prefix {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i, n := range names {
			if n == name && i < len(fields) {
				return strconv.ParseUint(fields[i], 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("no %s %s", prefix, name)
}

// snmpLine reads a file with a name and a value on each line.
func snmpLine(data, name string) (uint64, error) {
	for line := range strings.SplitSeq(data, "\n") {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == name {
			return strconv.ParseUint(fields[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("no %s", name)
}
