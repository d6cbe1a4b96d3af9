package packet

import "encoding/binary"

// Fragmenter cuts an IPv4 packet into fragments (RFC 791 section 3.2): Init, then Next until there is no more. It is a value without memory of
// its own, to be reused; it borrows head and rest from Init until the last Next. For one goroutine.
type Fragmenter struct {
	head []byte // the rest of the payload in the first buffer
	rest []byte

	header  [EthernetHeaderLen + VLANTagLen + 60]byte // Ethernet and IP header of the next fragment, checksum not yet right
	l3      int
	size    int // bytes of Ethernet and IP header in header
	mtu     int
	offset  int    // of the next fragment's data in the datagram, bytes
	flags   uint16 // of the original: reserved bit and DF
	more    bool   // the original has MF set
	options bool   // header is still the original's, options not yet reduced to the copied ones
}

// Init prepares for cutting the packet whose first buffer is head and whose payload may continue in rest into IP packets of at most mtu bytes each.
// The packet was parsed without a Reason and its L4 checksum is finished. False: it is not IPv4, it has no payload, its buffers are
// shorter than it, or mtu leaves no room for 8 bytes of data. DF is not looked at, only copied: whether to fragment at all is the caller's decision.
func (f *Fragmenter) Init(p *Packet, head, rest []byte, mtu int) bool {
	payload := int(p.Length) - int(p.L4-p.L3)
	if p.Kind != KindIPv4 || payload == 0 || int(p.L4)+payload > len(head)+len(rest) || mtu < int(p.L4-p.L3)+8 {
		return false
	}
	inHead := min(payload, len(head)-int(p.L4))
	f.head = head[p.L4:][:inHead]
	f.rest = rest[:payload-inHead]
	f.l3 = int(p.L3)
	f.size = copy(f.header[:], head[:p.L4])
	f.mtu = mtu
	f.offset = int(p.FragmentOffset)
	f.flags = binary.BigEndian.Uint16(f.header[f.l3+6:]) &^ (ipv4MF | ipv4OffsetMask)
	f.more = p.Flags&FlagMore != 0
	f.options = f.size-f.l3 > IPv4HeaderLen
	return true
}

// Next writes the next fragment, Ethernet header (as in the original, with its VLAN tag) included, to dst, which has room for
// the Ethernet header and mtu bytes and does not overlap the original. It returns the bytes written and whether another fragment follows.
// n is 0 if nothing is left, or if dst is too short; then nothing was consumed.
func (f *Fragmenter) Next(dst []byte) (n int, more bool) {
	left := len(f.head) + len(f.rest)
	if left == 0 {
		return 0, false
	}
	data := f.mtu - (f.size - f.l3)
	flags := f.flags | uint16(f.offset/8)
	if more = left > data; more {
		data &^= 7
	} else {
		data = left
	}
	if more || f.more {
		flags |= ipv4MF
	}
	n = f.size + data
	if len(dst) < n {
		return 0, false
	}

	copy(dst, f.header[:f.size])
	h := dst[f.l3:f.size]
	binary.BigEndian.PutUint16(h[2:4], uint16(f.size-f.l3+data))
	binary.BigEndian.PutUint16(h[6:8], flags)
	h[10], h[11] = 0, 0
	binary.BigEndian.PutUint16(h[10:12], Checksum(h, 0))

	k := copy(dst[f.size:n], f.head)
	f.head = f.head[k:]
	k = copy(dst[f.size+k:n], f.rest)
	f.rest = f.rest[k:]
	f.offset += data
	if f.options {
		f.keepCopiedOptions()
	}
	return n, more
}

// keepCopiedOptions reduces the options to those that every fragment carries: the ones whose type has the copied flag (RFC 791 section 3.1).
func (f *Fragmenter) keepCopiedOptions() {
	f.options = false
	o := f.header[f.l3+IPv4HeaderLen : f.size]
	w := 0
	for r := 0; r < len(o); {
		if o[r] == ipv4OptionEnd {
			break
		}
		if o[r] == ipv4OptionNop {
			r++
			continue
		}
		size := int(o[r+1]) // Parse has seen that it is at least 2 and within the options
		if o[r]&ipv4OptionCopyFlag != 0 {
			w += copy(o[w:], o[r:r+size])
		}
		r += size
	}
	for ; w%4 != 0; w++ {
		o[w] = ipv4OptionEnd
	}
	f.size = f.l3 + IPv4HeaderLen + w
	f.header[f.l3] = 4<<4 | byte((IPv4HeaderLen+w)/4)
}
