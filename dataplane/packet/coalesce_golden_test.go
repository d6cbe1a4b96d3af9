package packet

import "fmt"

// arrival is one packet of a batch: its description, and what is wrong or special about it.
type arrival struct {
	gsoSpec
	out     uint32
	accept  Accept
	badSum  bool
	noSum   bool // UDP without a checksum
	padding int
}

const acceptAll = AcceptTCP4 | AcceptTCP6 | AcceptUDP

func (a arrival) frame() []byte {
	b := a.build(false)
	at := a.headerLen() - 2 // UDP's checksum
	if !a.udp {
		at = a.headerLen() - len(a.options) - 4
	}
	if a.badSum {
		b[at] ^= 1
	}
	if a.noSum {
		b[at], b[at+1] = 0, 0
	}
	return append(b, make([]byte, a.padding)...)
}

// modelTrain is a train of the golden model: indices into the batch.
type modelTrain struct {
	members []int
}

// modelCoalesce is the golden model of coalescing: the rules, one after the other, on descriptions.
func modelCoalesce(batch []arrival) []*modelTrain {
	var trains []*modelTrain
	type flow struct {
		v6, udp bool
		host    uint8
		port    uint16
	}
	open := map[flow]*modelTrain{}
	for i, a := range batch {
		f := flow{a.v6, a.udp, a.host, a.srcPort}
		t := open[f]
		if modelCandidate(a) && t != nil && modelContinues(batch, t, a) {
			t.members = append(t.members, i)
			first := batch[t.members[0]]
			if len(a.payload) < len(first.payload) || modelEnding(a) || len(t.members) == 64 {
				delete(open, f)
			}
			continue
		}
		delete(open, f)
		t = &modelTrain{members: []int{i}}
		trains = append(trains, t)
		if modelCandidate(a) && !modelEnding(a) && a.padding == 0 && (a.udp || len(a.payload) >= MinTCPSegmentSize) {
			open[f] = t
		}
	}
	return trains
}

func modelEnding(a arrival) bool { return !a.udp && a.flags&(tcpFIN|tcpPSH) != 0 }

func modelCandidate(a arrival) bool {
	kind := AcceptTCP4
	if a.v6 {
		kind = AcceptTCP6
	}
	if a.udp {
		kind = AcceptUDP
	}
	return a.accept&kind != 0 && len(a.payload) > 0 && len(a.extra) == 0 && !a.noSum &&
		(a.udp || a.flags&^(tcpFIN|tcpPSH) == tcpACK)
}

// modelContinues: the packet is what segmentation would have made next, and all sums are good.
func modelContinues(batch []arrival, t *modelTrain, a arrival) bool {
	first, last := batch[t.members[0]], batch[t.members[len(t.members)-1]]
	bytes := 0
	for _, m := range t.members {
		bytes += len(batch[m].payload)
	}
	if first.badSum || a.badSum || a.out != first.out || len(a.payload) > len(first.payload) ||
		first.headerLen()-14+bytes+len(a.payload) > 65535 {
		return false
	}
	want := last.gsoSpec
	want.seq += uint32(len(last.payload))
	want.payload, want.flags = a.payload, a.flags
	if a.udp {
		want.seq, want.ack, want.window = a.seq, a.ack, a.window
	}
	if !a.v6 {
		fixed := a.df && a.id == last.id && (len(t.members) == 1 || batch[t.members[1]].id == first.id)
		counted := a.id == last.id+1 && (len(t.members) == 1 || batch[t.members[1]].id != first.id)
		if !fixed && !counted {
			return false
		}
	}
	if want.id = a.id; a.v6 {
		want.df = a.df
	}
	return fmt.Sprint(want) == fmt.Sprint(a.gsoSpec)
}
