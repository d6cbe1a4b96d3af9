package snat

import "github.com/overplane/overplane/dataplane/packet"

const (
	// maxPrefetch is how many packets are looked at together.
	maxPrefetch = 64
	// prefetchFrom is how many sessions there must be for prefetching to pay: below, their megabyte of records stays in a second-level cache.
	prefetchFrom = 16384
)

// PrefetchPays reports whether there are so many sessions that the caches do not hold them.
func (t *Translator) PrefetchPays() bool { return t.v4.used+t.v6.used >= prefetchFrom }

// Prefetch loads into the caches what Outbound (out) or Inbound will look at for the packets: index slots of all of them first, then records. No load waits
// for another packet's, so that the memory works on all at once; Outbound would wait for two, one after the other, for each packet. Packets that will not be asked
// about are better left out; of more than 64 the rest are. Nothing is written that means anything.
func (t *Translator) Prefetch(ps []*packet.Packet, out bool) {
	var hashes4, hashes6 [maxPrefetch]uint64
	n4, n6 := 0, 0
	for _, p := range ps[:min(len(ps), maxPrefetch)] {
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
