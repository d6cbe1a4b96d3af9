package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/overplane/overplane/dataplane/packet"
)

// PodRecord is what the daemon remembers of an attached pod.
type PodRecord struct {
	Name       string     `json:"name"`
	NetNS      string     `json:"netns"`
	NetNSID    string     `json:"netns_id,omitempty"`
	Interface  string     `json:"interface"`
	Kind       string     `json:"kind,omitempty"` // of the device: KindTAP or KindVeth; empty, as older daemons wrote it: a TAP
	IPv4       netip.Addr `json:"ipv4,omitzero"`
	IPv6       netip.Addr `json:"ipv6,omitzero"`
	MAC        string     `json:"mac"`
	AttachedAt time.Time  `json:"attached_at"`
	// Pending: the device was about to be made when this was written. Such a pod was never answered for; a new daemon removes it.
	Pending bool `json:"pending,omitempty"`
}

// podsVersion is the version of the file's form. A newer one is refused, so that an older daemon does not lose what it cannot read.
const podsVersion = 1

type podsFile struct {
	Version int         `json:"version"`
	Node    string      `json:"node"`
	Pods    []PodRecord `json:"pods"`
}

// podStore is the file of remembered pods. Writes are atomic: a crash leaves the old file or the new one, and the new one is on
// disk when Save returns.
type podStore struct {
	path string
	node string
}

// Load reads the file. No file is no pods.
func (s podStore) Load() ([]PodRecord, error) {
	data, err := os.ReadFile(s.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the remembered pods: %w", err)
	}
	var f podsFile
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("remembered pods in %s: %w; move the file away to start without them", s.path, err)
	}
	if f.Version < 1 || f.Version > podsVersion {
		return nil, fmt.Errorf("remembered pods in %s have version %d; this daemon reads 1 to %d", s.path, f.Version, podsVersion)
	}
	if f.Node != s.node {
		return nil, fmt.Errorf("remembered pods in %s are those of node %q, and this is %q: give each node its own %sSTATE_DIR, or move the file away",
			s.path, f.Node, s.node, EnvPrefix)
	}
	seen := make(map[string]bool)
	for _, p := range f.Pods {
		if err := p.check(); err != nil {
			return nil, fmt.Errorf("remembered pods in %s: pod %q: %w", s.path, p.Name, err)
		}
		if seen[p.Name] {
			return nil, fmt.Errorf("remembered pods in %s: pod %q is there twice", s.path, p.Name)
		}
		seen[p.Name] = true
	}
	return f.Pods, nil
}

func (p *PodRecord) check() error {
	if !podNamePattern.MatchString(p.Name) || p.NetNS == "" || !validIfName(p.Interface) {
		return errors.New("name, network namespace or interface cannot be right")
	}
	if !p.IPv4.IsValid() && !p.IPv6.IsValid() {
		return errors.New("no address")
	}
	if p.Kind != "" && p.Kind != KindTAP && p.Kind != KindVeth {
		return fmt.Errorf("kind of port %q: want %s or %s", p.Kind, KindTAP, KindVeth)
	}
	_, err := parseMAC(p.MAC)
	return err
}

// Save replaces the file.
func (s podStore) Save(pods []PodRecord) error {
	data, err := json.MarshalIndent(podsFile{Version: podsVersion, Node: s.node, Pods: pods}, "", "  ")
	if err == nil {
		err = writeFileSync(s.path, append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("remembering pods: %w", err)
	}
	return nil
}

// writeFileSync replaces a file by a new one: written beside it, synced, renamed over it, and the folder synced, so that after a
// crash of the machine the file is wholly the old or wholly the new one.
func writeFileSync(path string, data []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	return err
}

// podMAC derives a pod's Ethernet address from its name: locally administered, the same each time, so that neighbours of
// a pod that is attached again need not forget anything. Only the pod and the data plane ever see it.
func podMAC(node, name string) packet.MAC {
	h := fnv64(node + "\x00" + name)
	return packet.MAC{0x0a, byte(h >> 32), byte(h >> 24), byte(h >> 16), byte(h >> 8), byte(h)}
}

// fnv64 is FNV-1a (draft-eastlake-fnv).
func fnv64(s string) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h ^ h>>40
}
