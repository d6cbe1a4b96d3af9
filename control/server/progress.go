package server

import (
	"context"
	"slices"
	"sync"
	"time"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/ipam"
)

// progress is who is connected and how far every node is. Its methods may be called concurrently.
type progress struct {
	now func() time.Time

	mu    sync.Mutex
	led   time.Time // when this process came to lead
	grace time.Duration
	nodes map[string]*nodeProgress
	ahead map[string]uint64 // revision that a node has and the store never came to
}

// nodeProgress is one node's, also after its stream ended.
type nodeProgress struct {
	stream     *stream // nil: not connected
	facts      ipam.Facts
	since      time.Time // of being connected, or not
	accepted   *controlv1.Version
	programmed *controlv1.Version
	behind     time.Time // since when it has not what was issued; zero: it has
	problem    string
	failures   []*controlv1.EntryFailure
	more       uint32 // failures that are not in the list
}

// lead starts anew: what a node has is known when it says hello. Until grace has passed, nodes that have not are taken to be on their way.
func (p *progress) lead(grace time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.led, p.grace, p.nodes = p.now(), grace, make(map[string]*nodeProgress)
}

// attach makes s its node's stream, and ends the one that was.
func (p *progress) attach(s *stream, have, programmed *controlv1.Version) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nodes[s.node]
	if n == nil {
		n = &nodeProgress{}
		p.nodes[s.node] = n
	}
	if n.stream != nil {
		n.stream.end(errReplaced)
	}
	*n = nodeProgress{stream: s, facts: s.facts, since: p.now(), accepted: have, programmed: programmed, behind: p.now()}
}

// lost remembers that a node has a revision that the store never came to, unless it is 0, and returns the one that is remembered.
func (p *progress) lost(node string, revision uint64) uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if revision != 0 {
		if p.ahead == nil {
			p.ahead = make(map[string]uint64)
		}
		p.ahead[node] = revision
	}
	return p.ahead[node]
}

func (p *progress) detach(s *stream) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := p.nodes[s.node]; n != nil && n.stream == s {
		n.stream, n.since = nil, p.now()
	}
}

// update changes what is known of a stream's node.
func (p *progress) update(s *stream, f func(*nodeProgress)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := p.nodes[s.node]; n != nil && n.stream == s {
		f(n)
	}
}

// of is a node's progress for the allocator.
func (p *progress) of(incarnation string) func(node string) ipam.Progress {
	return func(node string) ipam.Progress {
		p.mu.Lock()
		defer p.mu.Unlock()
		n := p.nodes[node]
		if n == nil {
			return ipam.Progress{Waited: p.now().Sub(p.led) < p.grace}
		}
		out := ipam.Progress{Connected: n.stream != nil, Waited: n.stream != nil}
		if n.programmed.GetIncarnation() == incarnation {
			out.Programmed = int64(n.programmed.GetRevision())
		}
		return out
	}
}

// withdrawn is up to which revision the node has given up what it was told to: programmed, unless it failed to take an own block away.
func (p *progress) withdrawn(node, incarnation string) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.nodes[node]
	if n == nil || n.programmed.GetIncarnation() != incarnation || n.more > 0 ||
		slices.ContainsFunc(n.failures, func(f *controlv1.EntryFailure) bool { return f.GetKind() == "own_block" || f.GetKind() == "" }) {
		return 0
	}
	return int64(n.programmed.GetRevision())
}

// connected are the facts of the nodes that have a stream.
func (p *progress) connected() (out []ipam.Facts) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.nodes {
		if n.stream != nil {
			out = append(out, n.facts)
		}
	}
	return out
}

// endAll ends every stream.
func (p *progress) endAll(cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, n := range p.nodes {
		if n.stream != nil {
			n.stream.end(cause)
		}
	}
}

// get is a copy of what is known of a node; the zero value if nothing is.
func (p *progress) get(node string) nodeProgress {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := p.nodes[node]; n != nil {
		return *n
	}
	return nodeProgress{}
}

// converged reports whether the node has programmed the version, in full.
func (n *nodeProgress) converged(v *controlv1.Version) bool {
	return n.stream != nil && n.programmed.GetIncarnation() == v.GetIncarnation() && n.programmed.GetRevision() >= v.GetRevision() &&
		len(n.failures) == 0 && n.more == 0
}

// endFunc ends a stream with a cause.
type endFunc = context.CancelCauseFunc
