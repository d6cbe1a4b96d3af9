// Package pipeline measures the data plane's stages in memory, without devices: nanoseconds a packet, and beside each the same machine's nanoseconds for a reference loop, the least a router
// can do. Ratios to the loop in the same run are what can be compared between machines and days.
//
//	reference        parse, verify, look up, count the hop, rewrite, note: a plain loop over frames at random places
//	parse, lookup    one function of the data plane each
//	translate        the view and the translation of an established session
//	open             a new session
//	poll, poll-snat  one whole Worker.Poll, in-memory ports included, to pods of 5,000 other nodes; to outside through translation
package pipeline

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/fib"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/snat"
)

// Stage is one thing measured. Run does at least n packets' work and returns how many it did; it prepares whatever must not be measured outside of Run's time by stopping
// the clock it is given.
type Stage struct {
	Name string
	Run  func(c *Clock, n int) int
	Done func()
}

// Clock is the time that the calling thread ran (CLOCK_THREAD_CPUTIME_ID), which others on the machine disturb less than they do the wall clock's. It is stopped while a stage prepares.
type Clock struct {
	total, since time.Duration
}

func (c *Clock) start() { c.since = ran() }
func (c *Clock) stop()  { c.total += ran() - c.since }

func ran() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// Measure runs a stage for about a span of the thread's time, which must stay the same, and returns nanoseconds a packet.
func Measure(s *Stage, span time.Duration) (nanoseconds float64, packets int) {
	n := 4096
	var c Clock
	for c.total < span {
		c.start()
		packets += s.Run(&c, n)
		c.stop()
		if c.total < span/8 {
			n *= 2
		}
	}
	return float64(c.total.Nanoseconds()) / float64(packets), packets
}

// Stages builds all stages.
func Stages() (stages []*Stage, err error) {
	stages = []*Stage{reference(), parse()}
	for _, build := range []func() (*Stage, error){lookup, translate, open, func() (*Stage, error) { return poll(false) }, func() (*Stage, error) { return poll(true) }} {
		s, err := build()
		if err != nil {
			return nil, err
		}
		stages = append(stages, s)
	}
	return stages, nil
}

const (
	blocks = 5000
	chunk  = 2048
)

// blockAddr is the address with host part h of block i.
func blockAddr(i int, h byte) uint32 { return 10<<24 | uint32(i)<<8 | uint32(h) }

// ipv4 writes a UDP datagram of 64 bytes.
func ipv4(f []byte, src, dst uint32, sport, dport uint16) {
	clear(f[:64])
	binary.BigEndian.PutUint16(f[12:], 0x0800)
	h := f[14:34]
	h[0], h[8], h[9] = 0x45, 64, packet.ProtoUDP
	binary.BigEndian.PutUint16(h[2:], 50)
	binary.BigEndian.PutUint32(h[12:], src)
	binary.BigEndian.PutUint32(h[16:], dst)
	binary.BigEndian.PutUint16(h[10:], packet.Checksum(h, 0))
	binary.BigEndian.PutUint16(f[34:], sport)
	binary.BigEndian.PutUint16(f[36:], dport)
	binary.BigEndian.PutUint16(f[38:], 30)
}

// reference is a loop without ports, counters, source checks or reasons.
func reference() *Stage {
	const frames = 1024
	memory := make([]byte, frames*chunk)
	var slots [8192]uint32
	var headers [blocks][12]byte
	random := rand.New(rand.NewPCG(1, 2))
	order := random.Perm(frames)
	reset := func() {
		for i := range frames {
			block := random.IntN(blocks)
			ipv4(memory[i*chunk+256:], blockAddr(0, 2), blockAddr(block, 7), 1, 2)
			memory[i*chunk+256+14+8] = 250
			h := memory[i*chunk+256+14:][:20]
			binary.BigEndian.PutUint16(h[10:], 0)
			binary.BigEndian.PutUint16(h[10:], sum16(h))
			slots[block] = uint32(random.IntN(blocks))
		}
	}
	reset()
	var out [256]uint32
	at, bad := 0, 0
	return &Stage{Name: "reference", Run: func(c *Clock, n int) int {
		for range n {
			if at++; at%(frames*200) == 0 {
				c.stop()
				reset()
				c.start()
			}
			off := order[at&(frames-1)] * chunk
			f := memory[off+256 : off+256+64]
			h := f[14:34]
			if h[0] != 0x45 || sum16(h) != 0 || h[8] <= 1 {
				bad++
				continue
			}
			*(*[12]byte)(f) = headers[slots[binary.BigEndian.Uint32(h[16:])>>8&8191]]
			h[8]--
			sum := uint32(binary.BigEndian.Uint16(h[10:])) + 0x100
			binary.BigEndian.PutUint16(h[10:], uint16(sum+sum>>16))
			out[at&255] = uint32(off)
		}
		if bad > 0 {
			panic(fmt.Sprintf("%d frames of the reference loop were bad", bad))
		}
		return n
	}}
}

// sum16 is the complement of the ones' complement sum of 20 bytes: 0 if a header's checksum is right.
func sum16(h []byte) uint16 {
	_ = h[19]
	s := uint64(binary.BigEndian.Uint64(h))>>32 + uint64(binary.BigEndian.Uint64(h))&0xffffffff +
		binary.BigEndian.Uint64(h[8:])>>32 + binary.BigEndian.Uint64(h[8:])&0xffffffff + uint64(binary.BigEndian.Uint32(h[16:]))
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

func parse() *Stage {
	const frames = 1024
	memory := make([]byte, frames*chunk)
	for i := range frames {
		ipv4(memory[i*chunk+i%4*64:], blockAddr(0, 2), blockAddr(i, 7), uint16(i), 2)
	}
	var ps [64]packet.Packet
	return &Stage{Name: "parse", Run: func(_ *Clock, n int) int {
		for i := range n {
			at := i & (frames - 1)
			packet.Parse(&ps[i&63], memory[at*chunk+at%4*64:][:64], 64)
		}
		return n
	}}
}

func lookup() (*Stage, error) {
	b, err := table()
	if err != nil {
		return nil, err
	}
	t := b.Build()
	random := rand.New(rand.NewPCG(3, 4))
	dst := make([]packet.Addr, 65536)
	for i := range dst {
		dst[i] = packet.AddrFrom4(blockAddr(1+random.IntN(blocks), 9))
	}
	var sink fib.Entry
	return &Stage{Name: "lookup", Run: func(_ *Clock, n int) int {
		for i := range n {
			sink ^= t.Lookup(dst[i&65535])
		}
		return n
	}, Done: func() { _ = sink }}, nil
}

const sessions = 100000

// translatorFor has room for sessions.
func translatorFor() (*snat.Translator, error) {
	a, err := snat.NewAllocator(snat.AllocatorConfig{})
	if err != nil {
		return nil, err
	}
	return snat.New(snat.Config{Sessions4: 1 << 18, SessionGuarantee: 1}, a)
}

// translator is one that knows its node and one pod.
func translator() (*snat.Translator, error) {
	tr, err := translatorFor()
	if err != nil {
		return nil, err
	}
	tr.Expire(int64(1000*time.Second), 1)
	tr.SetNodeAddresses(packet.AddrFrom4(0x0af0000b), packet.Addr{})
	return tr, tr.AddPod(0, packet.AddrFrom4(blockAddr(0, 2)), packet.Addr{})
}

// flow makes p packet number i of many flows.
func flow(p *packet.Packet, i int) {
	p.Dst = packet.AddrFrom4(0xc6336400 | uint32(i>>10))
	p.SrcPort = uint16(20000 + i&1023)
}

func translate() (*Stage, error) {
	tr, err := translator()
	if err != nil {
		return nil, err
	}
	frame := make([]byte, 64)
	ipv4(frame, blockAddr(0, 2), 0xc6336401, 20000, 443)
	var model packet.Packet
	packet.Parse(&model, frame, 64)
	p := model
	var v snat.View
	for i := range sessions {
		flow(&p, i)
		if tr.Outbound(&p, frame, 0, &v); v.Action == snat.Create {
			tr.Create(&p, &v)
		}
		if v.Action != snat.Translate {
			return nil, fmt.Errorf("session %d: %v", i, v.Reason)
		}
	}
	random := rand.New(rand.NewPCG(5, 6))
	order := random.Perm(sessions)
	const batch = 64
	var ps [batch]packet.Packet
	var vs [batch]snat.View
	var asked [batch]*packet.Packet
	for i := range asked {
		asked[i] = &ps[i]
	}
	scratch, at := make([]byte, batch*128), 0
	return &Stage{Name: "translate", Run: func(_ *Clock, n int) int {
		done := 0
		for ; done < n; done += batch {
			for j := range ps {
				ps[j] = model
				flow(&ps[j], order[at])
				if at++; at == sessions {
					at = 0
				}
				copy(scratch[j*128:], frame)
			}
			if tr.PrefetchPays() {
				tr.Prefetch(asked[:], true)
			}
			for j := range ps {
				tr.Outbound(&ps[j], scratch[j*128:j*128+64], 0, &vs[j])
			}
			for j := range ps {
				if vs[j].Action != snat.Translate {
					panic("a session is gone")
				}
				tr.TranslateOut(&ps[j], scratch[j*128:j*128+64], &vs[j], snat.Offload{})
			}
		}
		return done
	}, Done: func() { tr.Close() }}, nil
}

func open() (*Stage, error) {
	tr, err := translator()
	if err != nil {
		return nil, err
	}
	frame := make([]byte, 64)
	ipv4(frame, blockAddr(0, 2), 0xc6336401, 20000, 443)
	var p packet.Packet
	packet.Parse(&p, frame, 64)
	now, i := int64(1000*time.Second), 0
	var v snat.View
	return &Stage{Name: "open", Run: func(c *Clock, n int) int {
		for range n {
			if i == sessions {
				c.stop()
				now += int64(400 * time.Second)
				for tr.Expire(now, 1<<20) {
				}
				i = 0
				c.start()
			}
			flow(&p, i)
			i++
			if tr.Outbound(&p, frame, 0, &v); v.Action == snat.Create {
				tr.Create(&p, &v)
			}
			if v.Action != snat.Translate {
				panic(fmt.Sprintf("a new session was refused: %v", v.Reason))
			}
		}
		return n
	}, Done: func() { tr.Close() }}, nil
}
