package syncclient

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// TableFile is the file in Config.Dir that keeps the last table: a line that names the format, the SHA-256 of the rest, a NodeState.
const TableFile = "control-table.pb"

const diskMagic = "overplane-table-1\n"

// save replaces the file: after a crash there is the old one or the new one, on disk.
func save(dir string, table *controlv1.NodeState) (err error) {
	body, err := proto.Marshal(table)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, "."+TableFile+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	sum := sha256.Sum256(body)
	_, err = f.Write(append(append([]byte(diskMagic), sum[:]...), body...))
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, TableFile)); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Last is the state that a client with this directory would apply first: that of the table it kept. There being none is no error, and no state. A daemon that
// forwards by it before it runs its client is never without one.
func Last(dir, node string) (*controlv1.NodeState, error) {
	all, err := load(dir, node)
	if all == nil || err != nil {
		return nil, err
	}
	return newTable(all).state(), nil
}

// load reads the file. There being none is no error, and no table.
func load(dir, node string) (*controlv1.NodeState, error) {
	name := filepath.Join(dir, TableFile)
	text, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	rest, ok := bytes.CutPrefix(text, []byte(diskMagic))
	if !ok || len(rest) < sha256.Size {
		return nil, fmt.Errorf("%s is no table that this version knows", name)
	}
	body := rest[sha256.Size:]
	if sha256.Sum256(body) != [sha256.Size]byte(rest) {
		return nil, fmt.Errorf("%s is damaged: its checksum is wrong", name)
	}
	table := &controlv1.NodeState{}
	if err := proto.Unmarshal(body, table); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if table.GetNode() != node {
		return nil, fmt.Errorf("%s is node %q's, not %q's", name, table.GetNode(), node)
	}
	if digest, count := api.Digest(table); digest != table.GetDigest() || count != table.GetEntryCount() {
		return nil, fmt.Errorf("%s: its digest is wrong", name)
	}
	return table, nil
}
