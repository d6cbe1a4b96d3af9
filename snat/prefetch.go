package snat

import "github.com/overplane/overplane/dataplane/packet"

const (
	// maxPrefetch is how many packets are looked at together.
	maxPrefetch = 64
	// prefetchFrom is how many sessions there must be for prefetching to pay: below, their megabyte of records stays in a second-level cache.
	prefetchFrom = 16384
)

// PrefetchOut loads into the caches what Outbound will look at for the packets numbered in which: index slots of all of them first, then records. No load waits
// for another packet's, so that the memory works on all at once; Outbound would wait for two, one after the other, for each packet. It does
// nothing while there are so few sessions that the caches hold them. Packets that Outbound will not be asked about are
// better left out. Nothing is written that means anything.
func (t *Translator) PrefetchOut(ps []packet.Packet, which []uint16) {
	for len(which) > 0 {
		n := min(len(which), maxPrefetch)
		t.prefetch(ps, which[:n], true)
		which = which[n:]
	}
}

// PrefetchIn is PrefetchOut for Inbound.
func (t *Translator) PrefetchIn(ps []packet.Packet, which []uint16) {
	for len(which) > 0 {
		n := min(len(which), maxPrefetch)
		t.prefetch(ps, which[:n], false)
		which = which[n:]
	}
}

func (t *Translator) prefetch(ps []packet.Packet, which []uint16, out bool) {
	if t.v4.used+t.v6.used < prefetchFrom {
		return
	}
	var hashes4, hashes6 [maxPrefetch]uint64
	n4, n6 := 0, 0
	for _, x := range which {
		p := &ps[x]
		k := tuple{inside: p.Src, remote: p.Dst, inPort: p.SrcPort, remPort: p.DstPort, proto: p.Proto}
		if !out {
			k.remote, k.remPort, k.extPort = p.Src, p.SrcPort, p.DstPort
		}
		if p.Proto == packet.ProtoICMP || p.Proto == packet.ProtoICMPv6 {
			k.remPort = 0
		}
		tb, at := t.v4, &hashes4[n4&(maxPrefetch-1)]
		if p.Kind == packet.KindIPv6 {
			tb, at = t.v6, &hashes6[n6&(maxPrefetch-1)]
			n6++
		} else {
			n4++
		}
		if out {
			*at = tb.hashOut(&k)
		} else {
			*at = tb.hashIn(&k)
		}
	}
	if n4 > 0 {
		t.fetched += t.v4.fetch(hashes4[:n4], out)
	}
	if n6 > 0 {
		t.fetched += t.v6.fetch(hashes6[:n6], out)
	}
}

// fetch loads the index slots of the hashes, then the records these name. Its loops are short and have no branch that depends on what is loaded, so
// that as many loads as the memory takes are under way at once. What it returns keeps the loads.
func (t *table) fetch(hashes []uint64, out bool) (sum uint32) {
	idx, mask := t.inIdx, t.mask
	if out {
		idx = t.outIdx
	}
	for _, h := range hashes {
		sum += idx[h&mask]
	}
	var found [maxPrefetch]uint32
	n := 0
	for _, h := range hashes {
		pos, tag := h&mask, tagOf(h)
		s := idx[pos]
		for s != 0 && s&^slotMask != tag {
			pos = (pos + 1) & mask
			s = idx[pos]
		}
		if s != 0 && n < maxPrefetch {
			found[n] = s&slotMask - 1
			n++
		}
	}
	for _, r := range found[:n] {
		sum += t.recs[r].expires
	}
	if t.v6 {
		for _, r := range found[:n] {
			sum += uint32(t.addrs[r].inside.Lo)
		}
	}
	return sum
}
