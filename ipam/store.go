package ipam

import (
	"context"
	"errors"
)

// KV is a record as the store keeps it.
type KV struct {
	Key      string
	Value    []byte
	Revision int64 // of the write that made it; 0: there is none
}

// Compare is a condition: the key's record is that of the revision; 0: there is none.
type Compare struct {
	Key      string
	Revision int64
}

// Tx is one transaction: if all conditions hold, all writes happen, at one revision; else none.
type Tx struct {
	If     []Compare
	Put    []KV // Revision is ignored
	Delete []string
}

// Empty reports whether the transaction writes nothing.
func (t *Tx) Empty() bool { return len(t.Put) == 0 && len(t.Delete) == 0 }

// Errors of Store.Commit.
var (
	// ErrConflict: a condition did not hold; nothing was written. Plan anew.
	ErrConflict = errors.New("the records changed meanwhile")
	// ErrNotLeader: this process does not lead, or no longer; nothing was written.
	ErrNotLeader = errors.New("this controller does not lead")
	// ErrUnknownOutcome: the transaction may or may not have happened. Read again.
	ErrUnknownOutcome = errors.New("it is not known whether the write happened")
)

// Store keeps a cluster's records. Its methods may be called concurrently.
type Store interface {
	// Read calls f with a table that is at least as new as the revision, waiting for it if need be. f may not keep or change the table; the records in it
	// are immutable and may be kept.
	Read(ctx context.Context, least int64, f func(*Table)) error
	// Latest is a revision at least as new as every transaction that ended before the call, whoever made it.
	Latest(ctx context.Context) (int64, error)
	// Commit runs a transaction under the leader's fence and returns its revision. Its errors wrap ErrConflict, ErrNotLeader or ErrUnknownOutcome.
	Commit(ctx context.Context, tx Tx) (int64, error)
}
