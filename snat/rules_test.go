package snat

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
)

func testRules(t *testing.T) {
	p, a := netip.MustParsePrefix, netip.MustParseAddr
	c := RulesConfig{NoMasquerade: []netip.Prefix{p("172.16.0.0/12"), p("2001:db8:5::/48")}, Nodes: []netip.Addr{a("10.240.0.11"), a("fd00:240::11")}}
	for _, tc := range []struct {
		name string
		edit func(*RulesConfig)
		want map[string]bool
	}{
		{"defaults", func(*RulesConfig) {}, map[string]bool{"172.16.0.0": false, "172.31.255.255": false, "172.32.0.0": true, "198.51.100.1": true,
			"2001:db8:5::9": false, "2001:db8:6::9": true, "10.240.0.11": false, "10.240.0.12": true, "fd00:240::11": false, "fd00:240::12": true}},
		{"nodes translated", func(c *RulesConfig) { c.TranslateNodes = true }, map[string]bool{"10.240.0.11": true, "fd00:240::11": true, "172.16.0.0": false}},
		{"off", func(c *RulesConfig) { c.Off = true }, map[string]bool{"198.51.100.1": false, "2001:db8:6::9": false}},
		{"nothing", func(c *RulesConfig) { *c = RulesConfig{} }, map[string]bool{"198.51.100.1": true, "172.16.0.0": true, "2001:db8:6::9": true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := c
			tc.edit(&c)
			r := NewRules(c)
			for addr, want := range tc.want {
				require.Equal(t, want, r.Translate(packet.AddrFrom(a(addr))), addr)
			}
		})
	}
	require.True(t, (*Rules)(nil).Translate(packet.AddrFrom4(1)))
}

func TestRules(t *testing.T) { testRules(t) }

func TestRulesAllocateNothing(t *testing.T) {
	r := NewRules(RulesConfig{NoMasquerade: []netip.Prefix{netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("2001:db8:5::/48")}})
	for _, fam := range families {
		dst := packet.AddrFrom(fam.far(0))
		require.Zero(t, testing.AllocsPerRun(100, func() { r.Translate(dst) }))
	}
}

func TestParseMasqFile(t *testing.T) {
	p := netip.MustParsePrefix
	for name, tc := range map[string]struct {
		text string
		want MasqFile
		err  string
	}{
		"yaml": {text: "nonMasqueradeCIDRs:\n  - 10.0.0.0/8\n  - \"fd00::/8\"\nmasqLinkLocal: true\nresyncInterval: 60s\n",
			want: MasqFile{NonMasqueradeCIDRs: []netip.Prefix{p("10.0.0.0/8"), p("fd00::/8")}, MasqLinkLocal: true}},
		"json": {text: "{\n\t\"nonMasqueradeCIDRs\": [\"10.0.0.0/8\"],\n\t\"masqLinkLocalIPv6\": true}",
			want: MasqFile{NonMasqueradeCIDRs: []netip.Prefix{p("10.0.0.0/8")}, MasqLinkLocalIPv6: true}},
		"other case":       {text: "NonMasqueradeCIDRs: [10.0.0.0/8]", want: MasqFile{NonMasqueradeCIDRs: []netip.Prefix{p("10.0.0.0/8")}}},
		"empty":            {},
		"comment only":     {text: "# nothing\n"},
		"null":             {text: "nonMasqueradeCIDRs:\n"},
		"unknown":          {text: "cidrLimit: 64\nfoo: {bar: [1]}\n"},
		"bad CIDR":         {text: "masqLinkLocal: false\nnonMasqueradeCIDRs:\n- 10.0.0.0/8\n- 10.0.0.0/33\n", err: `f.yaml:4: nonMasqueradeCIDRs: "10.0.0.0/33" is no CIDR`},
		"address":          {text: "nonMasqueradeCIDRs: [10.0.0.1]", err: `f.yaml:1: nonMasqueradeCIDRs: "10.0.0.1" is no CIDR`},
		"host bits":        {text: "nonMasqueradeCIDRs: [10.0.0.1/8]", err: `f.yaml:1: nonMasqueradeCIDRs: "10.0.0.1/8" has bits set behind its prefix: 10.0.0.0/8 is meant?`},
		"no list":          {text: "nonMasqueradeCIDRs: 10.0.0.0/8", err: `f.yaml:1: nonMasqueradeCIDRs: "10.0.0.0/8" is no list`},
		"nested":           {text: "nonMasqueradeCIDRs:\n- [10.0.0.0/8]", err: `f.yaml:2: nonMasqueradeCIDRs: "" is no CIDR`},
		"bad bool":         {text: "\nmasqLinkLocal: perhaps", err: `f.yaml:2: masqLinkLocal: "perhaps" is neither true nor false`},
		"no mapping":       {text: "- 10.0.0.0/8", err: "f.yaml:1: want keys and values, such as nonMasqueradeCIDRs: [10.0.0.0/8]"},
		"no YAML":          {text: "a: b: c\n", err: "f.yaml: yaml: "},
		"json bad in line": {text: "{\n\"nonMasqueradeCIDRs\": [\n\"10.0.0.0/8\",\n\"x\"]}", err: `f.yaml:4: nonMasqueradeCIDRs: "x" is no CIDR`},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseMasqFile("f.yaml", []byte(tc.text))
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.want, got)
		})
	}
}

func FuzzParseMasqFile(f *testing.F) {
	f.Add([]byte("nonMasqueradeCIDRs: [10.0.0.0/8]"))
	f.Add([]byte("{\"masqLinkLocal\": true}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := ParseMasqFile("f", b); err == nil {
			NewRules(RulesConfig{NoMasquerade: MergeMasqFiles(m)})
		}
	})
}

func TestMergeMasqFiles(t *testing.T) {
	p := netip.MustParsePrefix
	require.Nil(t, MergeMasqFiles())
	require.Equal(t, []netip.Prefix{p("169.254.0.0/16"), p("fe80::/10")}, MergeMasqFiles(MasqFile{}))
	a := MasqFile{NonMasqueradeCIDRs: []netip.Prefix{p("192.168.0.0/16"), p("10.0.0.0/8")}}
	b := MasqFile{NonMasqueradeCIDRs: []netip.Prefix{p("10.0.0.0/8"), p("fd00::/8")}, MasqLinkLocal: true, MasqLinkLocalIPv6: true}
	require.Equal(t, []netip.Prefix{p("10.0.0.0/8"), p("192.168.0.0/16"), p("fd00::/8")}, MergeMasqFiles(a, b))
}
