package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// ReadFile reads a state from a JSON file (proto3's JSON mapping) and completes it. Fields it does not know are refused: in a file they are
// mistakes. Errors name the file and the place. It is not validated.
func ReadFile(path string) (*controlv1.NodeState, error) {
	s := &controlv1.NodeState{}
	if err := readFile(path, "a node's state", s); err != nil {
		return nil, err
	}
	Complete(s)
	return s, nil
}

// Read is ReadFile for a stream; name is what errors call it.
func Read(r io.Reader, name string) (*controlv1.NodeState, error) {
	s := &controlv1.NodeState{}
	if err := readJSON(r, name, "a node's state", s); err != nil {
		return nil, err
	}
	Complete(s)
	return s, nil
}

// ReadPatchFile reads a patch as ReadFile reads a state. What it leaves out stays out.
func ReadPatchFile(path string) (*controlv1.StatePatch, error) {
	p := &controlv1.StatePatch{}
	if err := readFile(path, "a patch", p); err != nil {
		return nil, err
	}
	return p, nil
}

// ReadPatch is ReadPatchFile for a stream; name is what errors call it.
func ReadPatch(r io.Reader, name string) (*controlv1.StatePatch, error) {
	p := &controlv1.StatePatch{}
	if err := readJSON(r, name, "a patch", p); err != nil {
		return nil, err
	}
	return p, nil
}

// WriteFile writes a state as JSON: sorted, one entry a line, the same bytes for the same state. The file is replaced as a whole and is on
// disk when WriteFile returns: after a crash there is the old file or the new one. It is readable by everybody.
func WriteFile(path string, s *controlv1.NodeState) (err error) {
	text, err := Format(s)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close() // the first error is the one to report
			_ = os.Remove(f.Name())
		}
	}()
	if _, err = f.Write(text); err != nil {
		return err
	}
	if err = f.Chmod(0o644); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	// The name is in the directory, which has to reach the disk as well.
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Format is a state as WriteFile writes it.
func Format(s *controlv1.NodeState) ([]byte, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(sorted(s))
	if err != nil {
		return nil, err
	}
	// protojson varies its white space on purpose; what is written here is laid out anew.
	var compact bytes.Buffer
	if err := json.Compact(&compact, text); err != nil {
		return nil, err
	}
	return layOut(compact.Bytes(), 2), nil
}

// layOut breaks compact JSON into lines: containers nested less than deep levels have an element a line, others are on one.
func layOut(compact []byte, deep int) []byte {
	out := make([]byte, 0, len(compact)*5/4)
	depth, inString := 0, false
	newline := func() {
		out = append(out, '\n')
		for range depth {
			out = append(out, "  "...)
		}
	}
	for i := 0; i < len(compact); i++ {
		c := compact[i]
		switch {
		case inString:
			out = append(out, c)
			if c == '\\' {
				i++
				out = append(out, compact[i])
			}
			inString = c != '"'
		case c == '"':
			out = append(out, c)
			inString = true
		case (c == '{' || c == '[') && (compact[i+1] == '}' || compact[i+1] == ']'):
			out = append(out, c, compact[i+1])
			i++
		case c == '{' || c == '[':
			depth++
			out = append(out, c)
			if depth <= deep {
				newline()
			}
		case c == '}' || c == ']':
			depth--
			if depth < deep {
				newline()
			}
			out = append(out, c)
		case c == ',' && depth <= deep:
			out = append(out, c)
			newline()
		case c == ',' || c == ':':
			out = append(out, c, ' ')
		default:
			out = append(out, c)
		}
	}
	return append(out, '\n')
}

func readFile(path, what string, m proto.Message) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // only read from
	return readJSON(f, path, what, m)
}

func readJSON(r io.Reader, name, what string, m proto.Message) error {
	text, err := io.ReadAll(io.LimitReader(r, MaxMessageBytes+1))
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if len(text) > MaxMessageBytes {
		return fmt.Errorf("%s: longer than %d bytes, the most %s can be", name, MaxMessageBytes, what)
	}
	if len(bytes.TrimSpace(text)) == 0 {
		return fmt.Errorf("%s: empty: want %s as JSON", name, what)
	}
	if err := protojson.Unmarshal(text, m); err != nil {
		return fmt.Errorf("%s: %w", name, jsonError(err))
	}
	return nil
}

// position is how protojson says where, with a space in front and perhaps a colon behind.
var position = regexp.MustCompile(`^(.*?)\s*\(line (\d+):(\d+)\):?\s*(.*)$`)

// jsonError is protojson's error with the place in front, in words, and without the marks that change from build to build.
func jsonError(err error) error {
	text := strings.ReplaceAll(err.Error(), "\u00a0", " ")
	text = strings.TrimSpace(strings.TrimPrefix(text, "proto:"))
	if strings.HasSuffix(text, "unexpected EOF") {
		return errors.New("the JSON ends too early")
	}
	m := position.FindStringSubmatch(text)
	if m == nil {
		return errors.New(text)
	}
	what := strings.TrimSpace(strings.TrimSuffix(m[1], ":"))
	if what != "" && m[4] != "" {
		what += ": "
	}
	return fmt.Errorf("line %s, column %s: %s%s", m[2], m[3], what, m[4])
}
