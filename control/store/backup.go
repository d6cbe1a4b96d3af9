package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/overplane/overplane/ipam"
)

// backup is the form of a backup.
type backup struct {
	Format   string   `json:"format"`
	Revision int64    `json:"revision"`
	Records  []record `json:"records"`
}

type record struct {
	Key   string          `json:"key"`
	Value json.RawMessage `json:"value,omitempty"`
	Text  string          `json:"text,omitempty"` // where the value is no JSON
}

// backupFormat names the form. Another version of it gets another name.
const backupFormat = "overplane-backup-1"

// restoreBatch is how many records are restored in a transaction.
const restoreBatch = 100

// Backup is everything in the store as JSON, one record a line, and its revision.
func Backup(ctx context.Context, s *Store) ([]byte, int64, error) {
	list, revision, err := s.Records(ctx)
	if err != nil {
		return nil, 0, fmt.Errorf("reading the store: %w", err)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "{\"format\": %q, \"revision\": %d, \"records\": [", backupFormat, revision)
	separator := "\n"
	for _, kv := range list {
		if kv.Key == syncKey {
			continue
		}
		r := record{Key: kv.Key}
		if json.Valid(kv.Value) && kv.Key != ipam.IncarnationKey {
			r.Value = kv.Value
		} else {
			r.Text = string(kv.Value)
		}
		line, err := json.Marshal(r)
		if err != nil {
			return nil, 0, fmt.Errorf("record %s: %w", kv.Key, err)
		}
		out.WriteString(separator)
		out.Write(line)
		separator = ",\n"
	}
	out.WriteString("\n]}\n")
	return out.Bytes(), revision, nil
}

// Restore fills an empty store from a backup. Its incarnation is a new one, so that nodes do not take its revisions for the old store's. The store must
// lead.
func Restore(ctx context.Context, s *Store, content []byte) error {
	var b backup
	if err := json.Unmarshal(content, &b); err != nil {
		return fmt.Errorf("this is no backup: %w", err)
	}
	if b.Format != backupFormat {
		return fmt.Errorf("this is no backup that this version knows: its format is %q, want %q", b.Format, backupFormat)
	}
	check := ipam.NewTable()
	var all []ipam.KV
	for _, r := range b.Records {
		if r.Key == ipam.IncarnationKey {
			continue // the store has one
		}
		kv := ipam.KV{Key: r.Key, Value: r.Value}
		if r.Value == nil {
			kv.Value = []byte(r.Text)
		}
		if _, err := check.Apply(kv); err != nil {
			return fmt.Errorf("the backup cannot be used: %w", err)
		}
		all = append(all, kv)
	}
	empty := true
	if err := s.Read(ctx, 0, func(t *ipam.Table) { empty = len(t.Pools())+len(t.Nodes())+len(t.Blocks())+len(t.Routes()) == 0 }); err != nil {
		return err
	}
	if !empty {
		return errors.New("the store is not empty: restore into a new directory or prefix")
	}
	for len(all) > 0 {
		n := min(len(all), restoreBatch)
		if _, err := s.Commit(ctx, ipam.Tx{Put: all[:n]}); err != nil {
			return fmt.Errorf("writing the store: %w; it is restored in part: start again with a new directory or prefix", err)
		}
		all = all[n:]
	}
	return nil
}
