package ipam

import (
	"context"
	"time"
)

// Progress is how far a node is, for Tick.
type Progress struct {
	// Waited is that the node counts: it has a stream, or may be about to get one.
	Waited bool
	// Connected is that it has a stream.
	Connected bool
	// Programmed is the revision of the table that it forwards by.
	Programmed int64
}

// Resting is a block in COOLDOWN, as of now.
type Resting struct {
	Block     *Block
	Remaining time.Duration // of its time; 0: passed
	WaitsFor  []string      // nodes that have not withdrawn its route
}

// Freed is a block that came out of COOLDOWN. Laggards are nodes that had not withdrawn its route when the deadline passed.
type Freed struct {
	Block    *Block
	Laggards []string
}

// Resting says what the blocks in COOLDOWN wait for, by address.
func (a *Allocator) Resting(ctx context.Context, progress func(node string) Progress) (out []Resting, err error) {
	err = a.store.Read(ctx, 0, func(t *Table) { out = a.resting(t, progress) })
	return out, err
}

func (a *Allocator) resting(t *Table, progress func(node string) Progress) (out []Resting) {
	a.restMu.Lock()
	defer a.restMu.Unlock()
	now, still := a.cfg.Now(), make(map[rested]time.Time)
	var nodes []*Node
	for _, b := range t.Blocks() {
		if b.State != Cooldown {
			continue
		}
		k := rested{b.key(), b.Revision}
		first, known := a.rest[k]
		if !known {
			first = now
		}
		still[k] = first
		if nodes == nil {
			nodes = t.Nodes()
		}
		r := Resting{Block: b, Remaining: max(a.cfg.Cooldown-now.Sub(first), 0)}
		for _, n := range nodes {
			if p := progress(n.Name); !n.Gone && p.Waited && p.Programmed < b.Revision {
				r.WaitsFor = append(r.WaitsFor, n.Name)
			}
		}
		out = append(out, r)
	}
	a.rest = still
	return out
}

// Tick does what is due: blocks that rested long enough become free, nodes that are drained, without blocks and without a stream are no members any
// more, and nodes that are gone for long are forgotten. progress may not call the allocator.
func (a *Allocator) Tick(ctx context.Context, progress func(node string) Progress) (freed []Freed, err error) {
	for {
		more := false
		var batch []Freed
		_, err := a.commit(ctx, func(t *Table, tx *Tx) error {
			batch, more = nil, false
			a.freeRested(t, tx, progress, &batch, &more)
			a.forget(t, tx, progress, &more)
			return nil
		})
		if err != nil {
			return freed, err
		}
		freed = append(freed, batch...)
		if !more {
			return freed, nil
		}
	}
}

// maxWrites is how many writes Tick puts into one transaction; etcd takes 128 operations.
const maxWrites = 50

func (a *Allocator) freeRested(t *Table, tx *Tx, progress func(string) Progress, batch *[]Freed, more *bool) {
	for _, r := range a.resting(t, progress) {
		overdue := a.restedFor(r.Block) >= a.cfg.Deadline
		if r.Remaining > 0 || len(r.WaitsFor) > 0 && !overdue {
			continue
		}
		if len(tx.Put) == maxWrites {
			*more = true
			return
		}
		a.move(tx, r.Block, Free, r.Block.Fenced)
		*batch = append(*batch, Freed{Block: r.Block, Laggards: r.WaitsFor})
	}
}

func (a *Allocator) restedFor(b *Block) time.Duration {
	a.restMu.Lock()
	defer a.restMu.Unlock()
	first, known := a.rest[rested{b.key(), b.Revision}]
	if !known {
		return 0
	}
	return a.cfg.Now().Sub(first)
}

func (a *Allocator) forget(t *Table, tx *Tx, progress func(string) Progress, more *bool) {
	for _, n := range t.nodes {
		held := false
		for _, b := range t.owned[n.Name] {
			held = held || b.Held()
		}
		leaves := n.Draining && !n.Gone && !held && !progress(n.Name).Waited
		forgotten := n.Gone && !n.Draining && a.cfg.Now().Sub(n.Left) >= a.cfg.Remember
		if !leaves && !forgotten {
			continue
		}
		if len(tx.Put)+len(tx.Delete) == maxWrites {
			*more = true
			return
		}
		tx.must(n.key(), n.Revision)
		if forgotten {
			tx.Delete = append(tx.Delete, n.key())
			continue
		}
		c := *n
		c.Gone, c.Left = true, a.cfg.Now().UTC()
		tx.put(&c)
	}
}
