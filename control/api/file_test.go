package api

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func TestWriteFileIsForPeople(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	s := cluster()
	slices.Reverse(s.Routes)
	s.Snat.NoMasqueradeCidrs = nil
	require.NoError(t, WriteFile(path, s))
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, `{
  "node": "n1",
  "version": {
    "incarnation": "2c1e0a5e-6d1c-4f0b-9c6f-0d6c2f9a7e11",
    "revision": "7"
  },
  "pools": [
    {"cidr": "10.244.0.0/16", "block_prefix_length": 24},
    {"cidr": "fd12:3456:789a::/64", "block_prefix_length": 80}
  ],
  "own_blocks": [
    {"cidr": "10.244.1.0/24"},
    {"cidr": "fd12:3456:789a:0:1::/80"}
  ],
  "members": [
    {"name": "n1", "ipv4": "10.240.0.11", "ipv6": "fd00:240::11", "mac": "02:00:0a:f0:00:0b"},
    {"name": "n2", "ipv4": "10.240.0.12", "ipv6": "fd00:240::12", "mac": "02:00:0a:f0:00:0c"},
    {"name": "n3", "ipv4": "10.240.0.13", "mac": "02:00:0a:f0:00:0d"}
  ],
  "routes": [
    {"prefix": "10.0.0.0/16", "host": true},
    {"prefix": "10.244.2.0/24", "node": "n2"},
    {"prefix": "10.244.3.0/24", "node": "n3"},
    {"prefix": "10.244.7.0/24", "unreachable": true},
    {"prefix": "fd12:3456:789a:0:2::/80", "node": "n2"}
  ],
  "snat": {}
}
`, string(got))
	require.Equal(t, "10.244.7.0/24", s.Routes[0].Prefix, "WriteFile sorted the caller's state")
}

func TestFileRoundTrip(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	s := cluster()
	Seal(s)
	Sort(s)
	s.Routes[0].Hash ^= 5 // somebody else's hash
	s.Digest ^= 5
	s.Version.Incarnation = `odd "quoted" \ {name}, [x]: é`
	require.NoError(t, WriteFile(path, s))
	got, err := ReadFile(path)
	require.NoError(t, err)
	requireSame(t, s, got)

	// Written again over the old one: the same bytes, and nothing else in the directory.
	first, err := os.ReadFile(path)
	require.NoError(t, err)
	require.NoError(t, WriteFile(path, got))
	second, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, string(first), string(second))
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1)
}

func TestReadFileCompletesAHandWrittenState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	require.NoError(t, os.WriteFile(path, []byte(`{"node": "n1", "ownBlocks": [{"cidr": "10.244.1.0/24"}], "pools": [{"cidr": "10.244.0.0/16", "block_prefix_length": 24}]}`), 0o600))
	s, err := ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, uint32(2), s.EntryCount)
	require.Equal(t, hashOwnBlock(s.OwnBlocks[0])^hashPool(s.Pools[0]), s.Digest)
	require.NoError(t, Validate(s))
}

func TestReadFileSaysWhereAndWhat(t *testing.T) {
	dir := t.TempDir()
	tests := []struct{ name, text, want string }{
		{"unknown field", "{\n  \"node\": \"n1\",\n  \"pool\": []\n}", `FILE: line 3, column 3: unknown field "pool"`},
		{"unknown field of an entry", `{"pools": [{"cidr": "10.0.0.0/8", "blocks": 24}]}`, `FILE: line 1, column 35: unknown field "blocks"`},
		{"wrong type", `{"node": 7}`, `FILE: line 1, column 10: invalid value for string field node: 7`},
		{"two targets", `{"routes": [{"prefix": "10.0.0.0/8", "node": "n2", "host": true}]}`, `FILE: line 1, column 52: error parsing "host", oneof overplane.control.v1.Route.target is already set`},
		{"unknown enum", `{"snat": {"mapping": "FULL_CONE"}}`, `FILE: line 1, column 22: invalid value for enum field mapping: "FULL_CONE"`},
		{"a field twice", `{"node": "a", "node": "b"}`, `FILE: line 1, column 15: duplicate field "node"`},
		{"syntax", "{\n  \"node\": \"n1\"\n  \"pools\": []}", `FILE: line 3, column 3: syntax error: unexpected token "pools"`},
		{"cut off", `{"node": "n1"`, `FILE: the JSON ends too early`},
		{"more behind", `{} {}`, `FILE: line 1, column 4: syntax error: unexpected token {`},
		{"empty", " \n", `FILE: empty: want a node's state as JSON`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, "state.json")
			require.NoError(t, os.WriteFile(path, []byte(tt.text), 0o600))
			_, err := ReadFile(path)
			require.Error(t, err)
			require.Equal(t, strings.ReplaceAll(tt.want, "FILE", path), err.Error())
		})
	}
	_, err := ReadFile(filepath.Join(dir, "none.json"))
	require.ErrorIs(t, err, os.ErrNotExist)
	_, err = Read(endless{}, "standard input")
	require.ErrorContains(t, err, "standard input: longer than 67108864 bytes")
}

// endless is a stream without an end, of whatever the buffers hold.
type endless struct{}

func (endless) Read(p []byte) (int, error) { return len(p), nil }

func TestWriteFileLeavesTheOldOneWhenItCannot(t *testing.T) {
	require.Error(t, WriteFile(filepath.Join(t.TempDir(), "none", "state.json"), cluster()))

	// A directory in the place of the file cannot be replaced; the temporary file goes.
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	require.NoError(t, os.MkdirAll(filepath.Join(path, "x"), 0o700))
	require.Error(t, WriteFile(path, cluster()))
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, files, 1)

	// What is no text cannot be written as JSON.
	bad := &controlv1.NodeState{Node: "\xff"}
	require.ErrorContains(t, WriteFile(filepath.Join(dir, "x.json"), bad), "UTF-8")
}

func TestReadPatchFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "patch.json")
	require.NoError(t, os.WriteFile(path, []byte(`{"node": "n1", "base": {"revision": 1}, "version": {"revision": "2"}, "remove_routes": ["10.0.0.0/8"]}`), 0o600))
	p, err := ReadPatchFile(path)
	require.NoError(t, err)
	require.True(t, proto.Equal(&controlv1.StatePatch{
		Node: "n1", Base: &controlv1.Version{Revision: 1}, Version: &controlv1.Version{Revision: 2}, RemoveRoutes: []string{"10.0.0.0/8"},
	}, p))
	_, err = ReadPatch(strings.NewReader(`{"pools": []}`), "standard input")
	require.EqualError(t, err, `standard input: line 1, column 2: unknown field "pools"`)
}

// Reading never fails badly, and what can be read and written reads back as the same.
func FuzzRead(f *testing.F) {
	text, err := Format(cluster())
	require.NoError(f, err)
	f.Add(text)
	f.Add([]byte(`{"node":"n1","routes":[{"prefix":"::/0","host":true}],"snat":{"no_masquerade_cidrs":["a\"\\,{}[]:"]}}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := Read(strings.NewReader(string(text)), "fuzz")
		if err != nil {
			return
		}
		_ = Validate(s)
		out, err := Format(s)
		require.NoError(t, err)
		again, err := Read(strings.NewReader(string(out)), "fuzz")
		require.NoError(t, err)
		requireSame(t, sorted(s), again)
	})
}
