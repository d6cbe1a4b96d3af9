package load

import (
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/overplane/overplane/bench/load/bpf"
	"github.com/overplane/overplane/test/lab"
)

const buckets = 1024

// tally is the value of the sink's map, by core: struct tally of bench.c.
type tally struct {
	Packets, Bytes uint64
	Age            [buckets]uint64
}

// Sink counts the generators' packets at a device and drops them before the stack sees them. It is a tc program (tcx, Linux 6.6): the same for every system, cheaper than one of XDP,
// which would have every socket buffer copied first.
type Sink struct {
	link link.Link
	objs bpf.BenchObjects
}

// NewSink attaches a sink to an endpoint's device.
func NewSink(at Endpoint) (*Sink, error) {
	s := &Sink{}
	if err := bpf.LoadBenchObjects(&s.objs, nil); err != nil {
		return nil, fmt.Errorf("loading the sink: %w", err)
	}
	err := lab.InNetns(at.Netns, func() error {
		index, err := interfaceIndex(at.Device)
		if err != nil {
			return err
		}
		s.link, err = link.AttachTCX(link.TCXOptions{Interface: index, Program: s.objs.BenchSink, Attach: ebpf.AttachTCXIngress})
		return err
	})
	if err != nil {
		s.objs.Close()
		return nil, fmt.Errorf("attaching the sink to %s of %s (tcx, Linux 6.6): %w", at.Device, at.Netns, err)
	}
	return s, nil
}

// Close detaches the sink.
func (s *Sink) Close() error {
	err := s.link.Close()
	s.objs.Close()
	return err
}

// Tally is what a sink has received. Counters of packets that are on their way may still grow.
type Tally struct {
	Packets, Bytes uint64
	age            [buckets]uint64
}

// Read returns what was received so far.
func (s *Sink) Read() (Tally, error) {
	var t Tally
	var cores []tally
	if err := s.objs.Tallies.Lookup(uint32(0), &cores); err != nil {
		return t, fmt.Errorf("reading the sink: %w", err)
	}
	for i := range cores {
		t.Packets += cores[i].Packets
		t.Bytes += cores[i].Bytes
		for b, n := range cores[i].Age {
			t.age[b] += n
		}
	}
	return t, nil
}

// Settle waits until nothing arrives any more, and returns the count.
func (s *Sink) Settle() (Tally, error) {
	last, err := s.Read()
	for quiet, end := 0, time.Now().Add(2*time.Second); err == nil && quiet < 3 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		var now Tally
		if now, err = s.Read(); now.Packets == last.Packets {
			quiet++
		} else {
			quiet = 0
		}
		last = now
	}
	return last, err
}

// Since is what came after an earlier reading.
func (t Tally) Since(earlier Tally) Tally {
	t.Packets -= earlier.Packets
	t.Bytes -= earlier.Bytes
	for b := range t.age {
		t.age[b] -= earlier.age[b]
	}
	return t
}

// Quantile is the age of packets on arrival below which the share q of them was, to within 6 %; 0 if there were none.
func (t Tally) Quantile(q float64) time.Duration {
	total := uint64(0)
	for _, n := range t.age {
		total += n
	}
	if total == 0 {
		return 0
	}
	rank := min(uint64(q*float64(total)), total-1)
	for b, n := range t.age {
		if rank < n {
			return bucketTop(b)
		}
		rank -= n
	}
	return bucketTop(buckets - 1)
}

// bucketTop is the largest value that bench.c sorts into a bucket, 16 of which there are for each power of two.
func bucketTop(b int) time.Duration {
	if b < 16 {
		return time.Duration(b)
	}
	e := b/16 - 1
	return time.Duration((uint64(b%16)+17)<<e - 1)
}
