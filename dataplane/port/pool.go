package port

import (
	"errors"
	"fmt"
)

// Sizes of a pool's two kinds of buffers.
const (
	// Headroom is the most that is left free in front of a newly allocated frame's first byte. AF_XDP leaves as much (XDP_PACKET_HEADROOM).
	Headroom = 256
	// stagger is how far the starts of neighbouring chunks' frames are apart within their chunks, and staggers how many there are. If all headers lay at
	// the same offset of a power of two, a batch of them would compete for two sets of the first-level cache.
	stagger, staggers = 64, 4
	// LargeSize is the size of a large buffer: the payload of a GSO frame, of which the first chunk holds the headers.
	LargeSize = 64 << 10
)

// PoolConfig says how a pool's memory is divided. The chunks come first, so that [0, Chunks*ChunkSize) can be registered as a UMEM;
// the large buffers follow.
type PoolConfig struct {
	Chunks       int // ordinary frames
	ChunkSize    int // bytes of each: 2048 or 4096
	LargeBuffers int // buffers of LargeSize bytes
}

// Size is the memory the pool needs, in bytes.
func (c PoolConfig) Size() int { return c.Chunks*c.ChunkSize + c.LargeBuffers*LargeSize }

// Pool is the frame memory of one worker and the free lists over it. Only that worker's goroutine may call its methods, except Memory
// and Config. It never grows: an empty pool refuses.
type Pool struct {
	mem    []byte
	cfg    PoolConfig
	limit  uint32 // end of the chunks, start of the large buffers
	shift  uint8  // log2 of ChunkSize
	chunks []uint32
	large  []uint32
}

// NewPool divides mem, which must be cfg.Size() bytes and stays borrowed for the life of the pool.
func NewPool(mem []byte, cfg PoolConfig) (*Pool, error) {
	p := &Pool{mem: mem, cfg: cfg, limit: uint32(cfg.Chunks * cfg.ChunkSize)}
	switch cfg.ChunkSize {
	case 2048:
		p.shift = 11
	case 4096:
		p.shift = 12
	default:
		return nil, fmt.Errorf("port: chunk size %d: want 2048 or 4096", cfg.ChunkSize)
	}
	if cfg.Chunks < 1 || cfg.LargeBuffers < 0 || cfg.Size() >= 1<<32 {
		return nil, fmt.Errorf("port: pool of %d chunks and %d large buffers: want at least one chunk and less than 4 GiB", cfg.Chunks, cfg.LargeBuffers)
	}
	if len(mem) != cfg.Size() {
		return nil, errors.New("port: the memory's size is not the configuration's")
	}
	// Stacks, lowest address on top: the most recently freed frame is the warmest.
	p.chunks = make([]uint32, 0, cfg.Chunks)
	for i := cfg.Chunks - 1; i >= 0; i-- {
		p.chunks = append(p.chunks, uint32(i)<<p.shift)
	}
	p.large = make([]uint32, 0, cfg.LargeBuffers)
	for i := cfg.LargeBuffers - 1; i >= 0; i-- {
		p.large = append(p.large, p.limit+uint32(i)*LargeSize)
	}
	return p, nil
}

// Memory is the pool's memory, chunks first. For registering it with a device.
func (p *Pool) Memory() []byte { return p.mem }

// Config is the configuration the pool was made with.
func (p *Pool) Config() PoolConfig { return p.cfg }

// Alloc takes a chunk. The frame starts up to Headroom bytes into it, at least 64, and has length 0; MaxLen says how far it may grow: at least
// ChunkSize - Headroom bytes.
func (p *Pool) Alloc() (Frame, bool) {
	n := len(p.chunks) - 1
	if n < 0 {
		return Frame{}, false
	}
	off := p.chunks[n]
	p.chunks = p.chunks[:n]
	return Frame{Off: off + stagger + off>>p.shift%staggers*stagger}, true
}

// AllocLarge takes a large buffer, LargeSize bytes from its first byte, with length 0.
func (p *Pool) AllocLarge() (Frame, bool) {
	n := len(p.large) - 1
	if n < 0 {
		return Frame{}, false
	}
	off := p.large[n]
	p.large = p.large[:n]
	return Frame{Off: off}, true
}

// Free gives a frame's memory back. The frame must have come from this pool and must not be used again.
func (p *Pool) Free(f Frame) {
	if f.Off < p.limit {
		p.chunks = append(p.chunks, f.Off>>p.shift<<p.shift)
		return
	}
	p.large = append(p.large, p.limit+(f.Off-p.limit)/LargeSize*LargeSize)
}

// FreeAll frees every frame of a slice.
func (p *Pool) FreeAll(frames []Frame) {
	for i := range frames {
		p.Free(frames[i])
	}
}

// Bytes are the frame's bytes, valid until the frame is freed or transmitted.
func (p *Pool) Bytes(f *Frame) []byte {
	return p.mem[f.Off : f.Off+f.Len : f.Off+f.Len]
}

// MaxLen is how long the frame may become without moving its start.
func (p *Pool) MaxLen(f *Frame) int {
	if f.Off < p.limit {
		return p.cfg.ChunkSize - int(f.Off&(uint32(p.cfg.ChunkSize)-1))
	}
	return LargeSize - int((f.Off-p.limit)%LargeSize)
}

// Buffer is all the memory from the frame's start to the end of its buffer, for filling a new frame.
func (p *Pool) Buffer(f *Frame) []byte {
	end := f.Off + uint32(p.MaxLen(f))
	return p.mem[f.Off:end:end]
}

// IsLarge reports whether the frame is a large buffer, outside the part of the memory that is a UMEM.
func (p *Pool) IsLarge(f *Frame) bool { return f.Off >= p.limit }

// Available is how many chunks and large buffers are free. Tests count them for leaks.
func (p *Pool) Available() (chunks, large int) { return len(p.chunks), len(p.large) }
