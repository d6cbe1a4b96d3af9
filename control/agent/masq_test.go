package agent

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/snat"
)

func TestMasqFolder(t *testing.T) {
	list, files, err := readMasq(filepath.Join(t.TempDir(), "missing"))
	require.NoError(t, err)
	require.Empty(t, list)
	require.Empty(t, files)

	dir := t.TempDir()
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	write("b.yaml", "nonMasqueradeCIDRs:\n- 192.0.2.0/24\nresyncInterval: 5s\n")
	write("a.json", `{"nonMasqueradeCIDRs": ["198.51.100.0/24", "192.0.2.0/24"], "masqLinkLocal": true}`)
	require.NoError(t, os.Mkdir(filepath.Join(dir, "..2026_11_25"), 0o700)) // a mounted ConfigMap's generation
	write("..data", "not meant")
	list, files, err = readMasq(dir)
	require.NoError(t, err)
	require.Equal(t, []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("fe80::/10")}, list)
	require.Equal(t, []string{filepath.Join(dir, "a.json"), filepath.Join(dir, "b.yaml")}, files)
	stamp := masqStamp(dir)
	require.Equal(t, stamp, masqStamp(dir))

	write("b.yaml", "nonMasqueradeCIDRs:\n- 192.0.2.0/24\n- 10.0.0.0/40\n")
	require.NotEqual(t, stamp, masqStamp(dir))
	_, _, err = readMasq(dir)
	require.ErrorContains(t, err, filepath.Join(dir, "b.yaml")+":3: ")
	require.ErrorContains(t, err, "10.0.0.0/40")
}

// snatOf asks a node how its translation stands.
func (n *node) snatOf(t *testing.T) *controlv1.GetSnatResponse {
	r, err := n.client.GetSnat(t.Context(), &controlv1.GetSnatRequest{})
	require.NoError(t, err)
	return r
}

func TestMasqFilesAreFollowed(t *testing.T) {
	cfg := testConfig(t)
	cfg.MasqDir = t.TempDir()
	file := filepath.Join(cfg.MasqDir, "config")
	write := func(text string) { require.NoError(t, os.WriteFile(file, []byte(text), 0o600)) }
	write("nonMasqueradeCIDRs: [192.0.2.0/24]")
	plat := newFakePlatform()
	n := startNode(t, cfg, plat)
	n.push(threeNodes())
	waits := func(ok func() bool) { t.Helper(); require.Eventually(t, ok, 10*time.Second, 20*time.Millisecond) }
	cidrs := func() []string { return n.snatOf(t).GetNoMasqueradeCidrs() }
	require.Equal(t, []string{"169.254.0.0/16", "192.0.2.0/24", "fe80::/10"}, cidrs())
	require.Equal(t, []string{file}, n.snatOf(t).GetNoMasqueradeFiles())
	lastPlan := func() SteeringPlan {
		plat.mu.Lock()
		defer plat.mu.Unlock()
		return plat.plans[len(plat.plans)-1]
	}
	require.True(t, lastPlan().OutsideSeesPods, "whom pods show their addresses may answer")
	require.NotEmpty(t, lastPlan().GatewayMACs)

	write("nonMasqueradeCIDRs: [198.51.100.0/24]\n")
	waits(func() bool { return len(cidrs()) == 3 && cidrs()[1] == "198.51.100.0/24" })
	require.True(t, n.status().GetReady())

	write("nonMasqueradeCIDRs:\n- 198.51.100.0/24\n- 198.51.100.300/24\n")
	waits(func() bool { return len(n.status().GetProblems()) == 1 })
	require.Contains(t, n.status().GetProblems()[0], file+":3: ")
	require.Contains(t, n.status().GetProblems()[0], "198.51.100.300/24")
	require.Equal(t, "198.51.100.0/24", cidrs()[1], "the rules before stay in force")

	n.stop()
	n = startNode(t, cfg, plat)
	require.Equal(t, "198.51.100.0/24", cidrs()[1], "also after a restart")

	require.NoError(t, os.Remove(file))
	waits(func() bool { return len(cidrs()) == 0 && n.status().GetReady() })
	waits(func() bool { return !lastPlan().OutsideSeesPods })
}

func TestMasqFilesThatChangeNothingAreNotCalledOut(t *testing.T) {
	p := netip.MustParsePrefix
	d, err := parseDesired(threeNodes())
	require.NoError(t, err)
	d.rulesConfig.NoMasquerade = []netip.Prefix{p("10.0.0.0/8")}
	a := &Agent{state: d}
	a.masq.list = []netip.Prefix{p("10.1.0.0/16"), p("10.244.0.0/16"), p("10.244.1.0/24"), p("169.254.0.0/16"), p("192.0.2.0/24"), p("fe80::/10"), p("fd12::/16")}
	require.Equal(t, []netip.Prefix{p("192.0.2.0/24"), p("fd12::/16")}, a.changedByMasq())
	d.noSNAT = true
	require.Empty(t, a.changedByMasq(), "nobody is translated anyway")
}

func TestSaturationIsToldOnce(t *testing.T) {
	var s saturation
	now := time.Now()
	d := snat.Destination{Pod: 1, Proto: 6, Port: 443, Ports: 80, Limit: 100}
	other := d
	other.Port = 80
	require.Equal(t, []snat.Destination{d}, s.due([]snat.Destination{d}, now))
	more := d
	more.Ports = 90
	require.Equal(t, []snat.Destination{other}, s.due([]snat.Destination{more, other}, now.Add(time.Minute)))
	require.Empty(t, s.due([]snat.Destination{d}, now.Add(9*time.Minute)))
	require.Equal(t, []snat.Destination{other}, s.due([]snat.Destination{d, other}, now.Add(12*time.Minute)), "it had ports enough for a while")
}
