package server

import (
	"slices"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	pb "google.golang.org/protobuf/proto"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// entryKind is which list of the table an entry is in: the number of its field in SyncResponse.
type entryKind uint8

const (
	kindPool   entryKind = 1
	kindMember entryKind = 2
	kindRoute  entryKind = 3
	kindSNAT   entryKind = 4
	// removal is added for the field of the keys that are removed.
	removal entryKind = 4
)

type entryKey struct {
	kind entryKind
	key  string
}

// entry is one entry of the table, encoded. Immutable.
type entry struct {
	hash uint64
	wire []byte // a field of SyncResponse, tag included
}

// newEntry encodes the one entry that s has.
func newEntry(k entryKey, s *controlv1.NodeState) *entry {
	api.Seal(s)
	var m pb.Message
	switch k.kind {
	case kindPool:
		m = s.GetPools()[0]
	case kindMember:
		m = s.GetMembers()[0]
	case kindRoute:
		m = s.GetRoutes()[0]
	case kindSNAT:
		m = s.GetSnat()
	}
	body, err := pb.Marshal(m)
	if err != nil {
		return nil // text that is not UTF-8; the records cannot have it, since JSON cannot
	}
	wire := protowire.AppendTag(nil, protowire.Number(k.kind), protowire.BytesType)
	return &entry{hash: s.GetDigest(), wire: protowire.AppendBytes(wire, body)}
}

// appendRemoval appends the field that removes an entry.
func appendRemoval(to []byte, k entryKey) []byte {
	if k.kind == kindSNAT {
		return protowire.AppendVarint(protowire.AppendTag(to, protowire.Number(k.kind+removal), protowire.VarintType), 1)
	}
	return protowire.AppendString(protowire.AppendTag(to, protowire.Number(k.kind+removal), protowire.BytesType), k.key)
}

// chunk is the common part of one batch. Immutable, shared by streams.
type chunk []byte

// chunkBytes is about how long a batch may be.
const chunkBytes = 256 << 10

// chunks collects encoded fields.
type chunks struct {
	list []chunk
	open []byte
}

func (c *chunks) add(field []byte) {
	c.open = append(c.open, field...)
	if len(c.open) >= chunkBytes {
		c.list, c.open = append(c.list, c.open), nil
	}
}

// end returns the chunks: at least one.
func (c *chunks) end() []chunk {
	if len(c.open) > 0 || len(c.list) == 0 {
		c.list = append(c.list, c.open)
	}
	return c.list
}

// cursor is what a node has, as far as is known.
type cursor struct {
	version *controlv1.Version // nil: nothing that could be built on
	digest  uint64
	count   uint32
}

// group is batches that bring a node from its cursor to the newest version.
type group struct {
	chunks  []chunk
	last    *controlv1.SyncResponse // the node's own part of the last batch, less its nonce
	removed uint32                  // removals that the records account for; snapshots: unknown
	next    cursor
}

// next is what the node is to be sent, or nil if it has the newest version. behind means that the node has a newer one than the store.
func (g *graph) next(node string, c cursor) (out *group, behind bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	digest, count := g.digest, uint32(len(g.entries))
	var blocks []*controlv1.OwnBlock
	if o := g.own[node]; o != nil {
		blocks = o.list
		digest ^= o.digest
		count += uint32(len(blocks))
	}
	version := &controlv1.Version{Incarnation: g.incarnation, Revision: g.revision}
	has := c.version != nil && c.version.GetIncarnation() == g.incarnation
	same := has && c.digest == digest && c.count == count
	if has && c.version.GetRevision() > g.revision {
		return nil, true
	}
	if same && c.version.GetRevision() == g.revision {
		return nil, false
	}
	out = &group{
		last: &controlv1.SyncResponse{Version: version, Last: true, Digest: digest, EntryCount: count, OwnBlocks: blocks},
		next: cursor{version, digest, count},
	}
	from, known := -1, false
	if has && c.version.GetRevision() != g.revision {
		from, known = slices.BinarySearchFunc(g.steps, c.version.GetRevision(), func(s step, r uint64) int {
			if s.from < r {
				return -1
			}
			return min(int(s.from-r), 1)
		})
	}
	switch {
	case same:
		out.chunks = []chunk{nil}
	case known:
		out.chunks = g.delta(from)
		for _, s := range g.steps[from:] {
			out.removed += s.removed
		}
	default:
		out.chunks = g.whole()
		out.last.Snapshot = true
	}
	return out, false
}

// delta is the difference from where step number i starts.
func (g *graph) delta(i int) []chunk {
	from := g.steps[i].from
	if c := g.deltas[from]; c != nil {
		return c
	}
	changed := make(map[entryKey]bool)
	for _, s := range g.steps[i:] {
		for _, k := range s.changed {
			changed[k] = true
		}
	}
	var c chunks
	var field []byte
	for k := range changed {
		if e := g.entries[k]; e != nil {
			c.add(e.wire)
		} else {
			field = appendRemoval(field[:0], k)
			c.add(field)
		}
	}
	g.deltas[from] = c.end()
	return g.deltas[from]
}

// whole is all of the table.
func (g *graph) whole() []chunk {
	if g.snapshot == nil {
		var c chunks
		for _, e := range g.entries {
			c.add(e.wire)
		}
		g.snapshot = c.end()
	}
	return g.snapshot
}

// encoded is a SyncResponse on its way: the common part and the node's, one after the other, which is how protobuf merges messages.
type encoded struct {
	common chunk
	own    *controlv1.SyncResponse
}

// codec is protobuf's, and lets what is encoded already pass without a copy.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2(proto.Name)} }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	e, ok := v.(*encoded)
	if !ok {
		return c.CodecV2.Marshal(v)
	}
	own, err := c.CodecV2.Marshal(e.own)
	if err != nil {
		return nil, err
	}
	if len(e.common) == 0 {
		return own, nil
	}
	return append(mem.BufferSlice{mem.SliceBuffer(e.common)}, own...), nil
}
