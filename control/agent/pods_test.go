package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func record(name string) PodRecord {
	return PodRecord{
		Name: name, NetNS: "/run/netns/" + name, NetNSID: "4:1", Interface: "eth0", IPv4: netip.MustParseAddr("10.244.1.2"), MAC: "0a:00:00:00:00:01",
		AttachedAt: time.Unix(1000, 0).UTC(),
	}
}

func TestPodStoreReadsBackWhatItWrote(t *testing.T) {
	s := podStore{path: filepath.Join(t.TempDir(), "pods.json"), node: "n1"}
	none, err := s.Load()
	require.NoError(t, err)
	require.Empty(t, none, "no file is no pods")
	a, b := record("a"), record("b")
	b.IPv4, b.IPv6, b.Pending = netip.Addr{}, netip.MustParseAddr("fd00::2"), true
	require.NoError(t, s.Save([]PodRecord{a, b}))
	got, err := s.Load()
	require.NoError(t, err)
	require.Equal(t, []PodRecord{a, b}, got)
}

// A crash while the file is written leaves a part of the new file beside the old one, which stays in force.
func TestPodStoreSurvivesACrashWhileWriting(t *testing.T) {
	s := podStore{path: filepath.Join(t.TempDir(), "pods.json"), node: "n1"}
	require.NoError(t, s.Save([]PodRecord{record("a")}))
	whole, err := os.ReadFile(s.path)
	require.NoError(t, err)
	for _, n := range []int{0, 1, len(whole) / 2, len(whole) - 1} {
		require.NoError(t, os.WriteFile(s.path+".tmp", whole[:n], 0o600))
		got, err := s.Load()
		require.NoError(t, err)
		require.Equal(t, []PodRecord{record("a")}, got)
	}
	require.NoError(t, s.Save([]PodRecord{record("b")}), "what a crash left does not get in the way")
	got, err := s.Load()
	require.NoError(t, err)
	require.Equal(t, []PodRecord{record("b")}, got)
	require.NoFileExists(t, s.path+".tmp")
}

func TestPodStoreKeepsTheOldFileIfItCannotWrite(t *testing.T) {
	dir := t.TempDir()
	s := podStore{path: filepath.Join(dir, "pods.json"), node: "n1"}
	require.NoError(t, s.Save([]PodRecord{record("a")}))
	require.NoError(t, os.Mkdir(s.path+".tmp", 0o700))
	require.Error(t, s.Save([]PodRecord{record("b")}))
	got, err := s.Load()
	require.NoError(t, err)
	require.Equal(t, []PodRecord{record("a")}, got)
}

func TestPodStoreRefusesWhatItCannotTrust(t *testing.T) {
	for _, c := range []struct{ name, text, err string }{
		{"half a file", `{"version":1,"node":"n1","pods":[{"na`, "move the file away"},
		{"newer version", `{"version":2,"node":"n1","pods":[]}`, "have version 2; this daemon reads 1 to 1"},
		{"no version", `{}`, "version 0"},
		{"another node", `{"version":1,"node":"n2","pods":[]}`, `those of node "n2", and this is "n1"`},
		{"twice", `{"version":1,"node":"n1","pods":[{"name":"a","netns":"/a","interface":"eth0","ipv4":"10.0.0.1","mac":"0a:00:00:00:00:01","attached_at":"2026-01-01T00:00:00Z"},
			{"name":"a","netns":"/a","interface":"eth0","ipv4":"10.0.0.1","mac":"0a:00:00:00:00:01","attached_at":"2026-01-01T00:00:00Z"}]}`, `"a" is there twice`},
		{"no address", `{"version":1,"node":"n1","pods":[{"name":"a","netns":"/a","interface":"eth0","mac":"0a:00:00:00:00:01","attached_at":"2026-01-01T00:00:00Z"}]}`, "no address"},
		{"bad MAC", `{"version":1,"node":"n1","pods":[{"name":"a","netns":"/a","interface":"eth0","ipv4":"10.0.0.1","mac":"x","attached_at":"2026-01-01T00:00:00Z"}]}`, "no 48-bit"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := podStore{path: filepath.Join(t.TempDir(), "pods.json"), node: "n1"}
			require.NoError(t, os.WriteFile(s.path, []byte(c.text), 0o600))
			_, err := s.Load()
			require.ErrorContains(t, err, c.err)
			require.ErrorContains(t, err, s.path)
		})
	}
}

func TestPodMACsAreLocalUnicastAndStable(t *testing.T) {
	seen := make(map[[6]byte]string)
	for _, name := range []string{"a", "b", "default/a", "default/b"} {
		m := podMAC("n1", name)
		require.Zero(t, m[0]&1, "unicast")
		require.NotZero(t, m[0]&2, "locally administered")
		require.Equal(t, m, podMAC("n1", name))
		require.Empty(t, seen[m])
		seen[m] = name
	}
}
