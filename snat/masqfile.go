package snat

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// MasqFile is what an ip-masq-agent configuration file says. Its other keys mean nothing here.
type MasqFile struct {
	NonMasqueradeCIDRs               []netip.Prefix
	MasqLinkLocal, MasqLinkLocalIPv6 bool
}

var linkLocalPrefixes = [2]netip.Prefix{netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10")}

// ParseMasqFile reads a file in YAML or JSON. Unknown keys are ignored. Errors name the file, the line and the value. An empty file says nothing, which is no
// error.
func ParseMasqFile(name string, data []byte) (MasqFile, error) {
	var f MasqFile
	if json.Valid(data) {
		data = bytes.ReplaceAll(data, []byte{'\t'}, []byte{' '}) // YAML knows no tabs; in JSON they stand between values only
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(data, &doc); err != nil {
		return f, fmt.Errorf("%s: %w", name, err)
	}
	if doc.Kind == 0 || len(doc.Content) == 0 {
		return f, nil
	}
	root := doc.Content[0]
	if root.Kind == yaml.ScalarNode && root.Tag == "!!null" {
		return f, nil
	}
	if root.Kind != yaml.MappingNode {
		return f, fmt.Errorf("%s:%d: want keys and values, such as nonMasqueradeCIDRs: [10.0.0.0/8]", name, root.Line)
	}
	for i := 0; i+1 < len(root.Content); i += 2 {
		key, value := root.Content[i], root.Content[i+1]
		var err error
		switch {
		case strings.EqualFold(key.Value, "nonMasqueradeCIDRs"):
			f.NonMasqueradeCIDRs, err = masqCIDRs(name, key.Value, value)
		case strings.EqualFold(key.Value, "masqLinkLocal"):
			f.MasqLinkLocal, err = masqBool(name, key.Value, value)
		case strings.EqualFold(key.Value, "masqLinkLocalIPv6"):
			f.MasqLinkLocalIPv6, err = masqBool(name, key.Value, value)
		}
		if err != nil {
			return MasqFile{}, err
		}
	}
	return f, nil
}

func masqCIDRs(name, key string, v *yaml.Node) (out []netip.Prefix, err error) {
	if v.Kind == yaml.ScalarNode && v.Tag == "!!null" {
		return nil, nil
	}
	if v.Kind != yaml.SequenceNode {
		return nil, fmt.Errorf("%s:%d: %s: %q is no list", name, v.Line, key, v.Value)
	}
	for _, item := range v.Content {
		p, err := netip.ParsePrefix(item.Value)
		if err != nil || item.Kind != yaml.ScalarNode {
			return nil, fmt.Errorf("%s:%d: %s: %q is no CIDR", name, item.Line, key, item.Value)
		}
		if p != p.Masked() {
			return nil, fmt.Errorf("%s:%d: %s: %q has bits set behind its prefix: %v is meant?", name, item.Line, key, item.Value, p.Masked())
		}
		out = append(out, p)
	}
	return out, nil
}

func masqBool(name, key string, v *yaml.Node) (b bool, err error) {
	if v.Kind != yaml.ScalarNode || v.Decode(&b) != nil {
		return false, fmt.Errorf("%s:%d: %s: %q is neither true nor false", name, v.Line, key, v.Value)
	}
	return b, nil
}

// MergeMasqFiles is the no-masquerade list that the files make together: all their CIDRs, and link-local addresses unless one of the files wants
// them translated. Sorted, each once. Without files there is no list.
func MergeMasqFiles(files ...MasqFile) (list []netip.Prefix) {
	if len(files) == 0 {
		return nil
	}
	var link4, link6 bool
	for _, f := range files {
		list = append(list, f.NonMasqueradeCIDRs...)
		link4, link6 = link4 || f.MasqLinkLocal, link6 || f.MasqLinkLocalIPv6
	}
	if !link4 {
		list = append(list, linkLocalPrefixes[0])
	}
	if !link6 {
		list = append(list, linkLocalPrefixes[1])
	}
	slices.SortFunc(list, netip.Prefix.Compare)
	return slices.Compact(list)
}
