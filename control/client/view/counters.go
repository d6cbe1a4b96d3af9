package view

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"

	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// DropFilter selects drops. The zero filter selects all.
type DropFilter struct {
	Pod     string   // of this pod's port only
	Reasons []string // of these reasons only
}

// Select returns the drops that pass the filter, in a new slice.
func (f DropFilter) Select(drops []*controlv1.DropCount) []*controlv1.DropCount {
	var out []*controlv1.DropCount
	for _, d := range drops {
		if f.Pod != "" && (d.GetKind() != "pod" || d.GetPort() != f.Pod) {
			continue
		}
		if len(f.Reasons) > 0 && !slices.Contains(f.Reasons, d.GetReason()) {
			continue
		}
		out = append(out, d)
	}
	return out
}

// dropKey is what a drop counter is known by. Without workers, worker is 0.
type dropKey struct {
	kind, port, direction, reason string
	worker                        uint32
}

func keyOf(d *controlv1.DropCount, workers bool) dropKey {
	k := dropKey{kind: d.GetKind(), port: d.GetPort(), direction: d.GetDirection(), reason: d.GetReason()}
	if workers {
		k.worker = d.GetWorker()
	}
	return k
}

// SumDrops adds up the workers' counters. The result shares nothing with drops; its worker fields mean nothing.
func SumDrops(drops []*controlv1.DropCount) []*controlv1.DropCount {
	sums := make(map[dropKey]*controlv1.DropCount)
	var out []*controlv1.DropCount
	for _, d := range drops {
		k := keyOf(d, false)
		if sum, ok := sums[k]; ok {
			sum.Packets += d.GetPackets()
			continue
		}
		sums[k] = proto.CloneOf(d)
		sums[k].Worker = 0
		out = append(out, sums[k])
	}
	return out
}

// DropsSince returns what was dropped between two answers, per worker: their difference, without zeros. A counter that went back belongs to
// a daemon that was started again, and counts from 0. The result shares nothing with its arguments.
func DropsSince(before, after []*controlv1.DropCount) []*controlv1.DropCount {
	had := make(map[dropKey]uint64, len(before))
	for _, d := range before {
		had[keyOf(d, true)] = d.GetPackets()
	}
	var out []*controlv1.DropCount
	for _, d := range after {
		n := d.GetPackets()
		if h := had[keyOf(d, true)]; h <= n {
			n -= h
		}
		if n > 0 {
			d = proto.CloneOf(d)
			d.Packets = n
			out = append(out, d)
		}
	}
	return out
}

// Drops writes a table of drops, most packets first, per worker or summed over them, and their total.
func Drops(w io.Writer, drops []*controlv1.DropCount, workers bool) error {
	if len(drops) == 0 {
		_, err := io.WriteString(w, "no drops\n")
		return err
	}
	headings := []string{"PORT", "KIND", "DIRECTION", "REASON", ">PACKETS", "DESCRIPTION"}
	if workers {
		headings = slices.Insert(headings, 0, ">WORKER")
		drops = slices.Clone(drops)
	} else {
		drops = SumDrops(drops)
	}
	slices.SortStableFunc(drops, func(a, b *controlv1.DropCount) int {
		return cmp.Or(cmp.Compare(b.GetPackets(), a.GetPackets()), cmp.Compare(a.GetPort(), b.GetPort()), cmp.Compare(a.GetDirection(), b.GetDirection()),
			cmp.Compare(a.GetReason(), b.GetReason()), cmp.Compare(a.GetWorker(), b.GetWorker()))
	})
	t := newTable(headings...)
	var total uint64
	for _, d := range drops {
		cells := []string{d.GetPort(), d.GetKind(), d.GetDirection(), d.GetReason(), number(d.GetPackets()), d.GetDescription()}
		if workers {
			cells = slices.Insert(cells, 0, number(d.GetWorker()))
		}
		t.row(cells...)
		total += d.GetPackets()
	}
	if err := t.write(w); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "%d packets dropped\n", total)
	return err
}

// SumPorts adds up the workers' counters of each port, in the order in which the ports come first. The result shares nothing with
// ports; its worker fields mean nothing.
func SumPorts(ports []*controlv1.PortCounters) []*controlv1.PortCounters {
	type key struct{ kind, port string }
	sums := make(map[key]*controlv1.PortCounters)
	var out []*controlv1.PortCounters
	for _, p := range ports {
		k := key{p.GetKind(), p.GetPort()}
		sum, ok := sums[k]
		if !ok {
			sum = &controlv1.PortCounters{Port: p.GetPort(), Kind: p.GetKind(), In: &controlv1.Traffic{}, Out: &controlv1.Traffic{}}
			sums[k] = sum
			out = append(out, sum)
		}
		add(sum.In, p.GetIn())
		add(sum.Out, p.GetOut())
		sum.DroppedIn += p.GetDroppedIn()
		sum.DroppedOut += p.GetDroppedOut()
	}
	return out
}

func add(sum, t *controlv1.Traffic) {
	sum.Frames += t.GetFrames()
	sum.Packets += t.GetPackets()
	sum.Bytes += t.GetBytes()
}

// Counters writes a table of the ports' counters, per worker or summed over them, and what the data plane answered and sent itself.
func Counters(w io.Writer, c *controlv1.GetCountersResponse, workers bool) error {
	headings := []string{"PORT", "KIND", ">IN FRAMES", ">PACKETS", ">BYTES", ">DROPPED", ">OUT FRAMES", ">PACKETS", ">BYTES", ">DROPPED"}
	ports := c.GetPorts()
	if workers {
		headings = slices.Insert(headings, 0, ">WORKER")
	} else {
		ports = SumPorts(ports)
	}
	t := newTable(headings...)
	for _, p := range ports {
		in, out := p.GetIn(), p.GetOut()
		cells := []string{p.GetPort(), p.GetKind(), number(in.GetFrames()), number(in.GetPackets()), number(in.GetBytes()), number(p.GetDroppedIn()),
			number(out.GetFrames()), number(out.GetPackets()), number(out.GetBytes()), number(p.GetDroppedOut())}
		if workers {
			cells = slices.Insert(cells, 0, number(p.GetWorker()))
		}
		t.row(cells...)
	}
	var p page
	if len(ports) == 0 {
		p.item("ports")
	} else if err := t.write(w); err != nil {
		return err
	} else {
		p.linef("")
	}
	for _, group := range []struct {
		name   string
		counts map[string]uint64
	}{{"answered", c.GetAnswered()}, {"icmp errors", c.GetIcmpErrors()}} {
		var lines []string
		for _, name := range slices.Sorted(maps.Keys(group.counts)) {
			if n := group.counts[name]; n > 0 {
				lines = append(lines, fmt.Sprintf("%s %d", name, n))
			}
		}
		p.item(group.name, lines...)
	}
	_, err := io.WriteString(w, p.String())
	return err
}
