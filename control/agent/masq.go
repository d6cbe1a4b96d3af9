package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/overplane/overplane/snat"
)

// lastMasq is the file in STATE_DIR that keeps the list in force, for a start at which the files are bad.
const lastMasq = "last-masq.json"

// masqNone is the value of Config.MasqDir that reads no files.
const masqNone = "none"

// masqFiles are the destinations that ip-masq-agent files exempt from translation.
type masqFiles struct {
	list    []netip.Prefix // sorted
	files   []string       // that it is made of
	stamp   string         // of the folder when it was last read, well or not
	problem string

	rules    *snat.Rules // of ruledBy and list
	ruledBy  *desired
	ruledFor []netip.Prefix
}

// masqPaths are the files of a folder, in order. Hidden ones are not meant: a mounted ConfigMap has its generations there.
func masqPaths(dir string) (paths []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if info, err := os.Stat(path); strings.HasPrefix(e.Name(), ".") || err == nil && info.IsDir() {
			continue
		}
		paths = append(paths, path)
	}
	return paths, nil
}

// masqStamp tells whether a folder's files are still those they were.
func masqStamp(dir string) string {
	paths, err := masqPaths(dir)
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, p := range paths {
		fmt.Fprintf(&b, "%s %+v\n", p, stampOf(p))
	}
	return b.String()
}

// readMasq reads and merges a folder's files. Errors name the file, the line and the value.
func readMasq(dir string) (list []netip.Prefix, files []string, err error) {
	paths, err := masqPaths(dir)
	if err != nil {
		return nil, nil, err
	}
	var all []snat.MasqFile
	var errs []error
	for _, p := range paths {
		data, err := os.ReadFile(p)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		f, err := snat.ParseMasqFile(p, data)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		all = append(all, f)
	}
	return snat.MergeMasqFiles(all...), paths, errors.Join(errs...)
}

// startMasq reads the files before the first snapshot is built, and says so if they decide about translation: they may be left over from an earlier installation. Where they are bad, the list
// that was last in force stays.
func (a *Agent) startMasq() {
	if a.cfg.MasqDir == masqNone {
		return
	}
	if !a.readMasq() {
		last, err := loadMasq(filepath.Join(a.cfg.StateDir, lastMasq))
		if err != nil {
			a.log.Error("the no-masquerade list last in force cannot be read", "error", err)
		}
		a.masq.list = last
	}
	a.callOutMasq()
}

// callOutMasq warns of destinations whose translation the files alone decide about.
func (a *Agent) callOutMasq() {
	if changed := a.changedByMasq(); len(changed) > 0 {
		a.log.Warn("ip-masq-agent files exempt destinations from translation: they see the pods' own addresses; remove the files if they are left over", "files", a.masq.files, "destinations", changed)
	}
}

// followMasq reads the files again if they changed.
func (a *Agent) followMasq() {
	if a.cfg.MasqDir == masqNone || masqStamp(a.cfg.MasqDir) == a.masq.stamp {
		return
	}
	old := a.masq.list
	if a.readMasq() && !slices.Equal(old, a.masq.list) {
		a.log.Info("ip-masq-agent files changed", "files", a.masq.files, "no_masquerade", a.masq.list)
		a.publish()
		a.callOutMasq()
	}
}

// readMasq takes over what the files say, if it is right.
func (a *Agent) readMasq() bool {
	m := &a.masq
	m.stamp = masqStamp(a.cfg.MasqDir)
	list, files, err := readMasq(a.cfg.MasqDir)
	if err != nil {
		m.problem = fmt.Sprintf("ip-masq-agent files: %s; the rules before stay in force", strings.ReplaceAll(err.Error(), "\n", "; "))
		a.log.Error("ip-masq-agent files cannot be used; the rules before stay in force", "error", err)
		return false
	}
	m.list, m.files, m.problem = list, files, ""
	if err := saveMasq(filepath.Join(a.cfg.StateDir, lastMasq), list); err != nil {
		a.log.Error("the no-masquerade list cannot be kept for the next start", "error", err)
	}
	return true
}

func loadMasq(path string) (list []netip.Prefix, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return list, nil
}

func saveMasq(path string, list []netip.Prefix) error {
	if len(list) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	data, err := json.Marshal(list)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(path); err == nil && string(old) == string(data) {
		return nil
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// changedByMasq are the destinations that would be translated for without the files. Link-local ones never leave a pod's link.
func (a *Agent) changedByMasq() (out []netip.Prefix) {
	var plain []netip.Prefix
	if a.state != nil {
		if a.state.noSNAT {
			return nil
		}
		plain = append(a.state.podCIDRs(), a.state.rulesConfig.NoMasquerade...)
	}
	for _, p := range a.masq.list {
		covered := func(q netip.Prefix) bool { return q.Bits() <= p.Bits() && q.Contains(p.Addr()) }
		if !p.Addr().IsLinkLocalUnicast() && !slices.ContainsFunc(plain, covered) {
			out = append(out, p)
		}
	}
	return out
}

// rules are the desired state's with what the files add.
func (a *Agent) rules() *snat.Rules {
	m := &a.masq
	switch {
	case a.state == nil:
		return nil
	case len(m.list) == 0:
		return a.state.rules
	case m.rules == nil || m.ruledBy != a.state || !slices.Equal(m.ruledFor, m.list):
		c := a.state.rulesConfig
		c.NoMasquerade = slices.Concat(c.NoMasquerade, m.list)
		m.rules, m.ruledBy, m.ruledFor = snat.NewRules(c), a.state, m.list
	}
	return m.rules
}

// noMasquerade are all destinations that see pods' own addresses by configuration.
func (a *Agent) noMasquerade() []netip.Prefix {
	if a.state == nil {
		return nil
	}
	list := slices.Concat(a.state.rulesConfig.NoMasquerade, a.masq.list)
	slices.SortFunc(list, netip.Prefix.Compare)
	return slices.Compact(list)
}

// outsideSeesPods reports whether somebody outside the cluster sees pods' own addresses, and so answers to them.
func (a *Agent) outsideSeesPods() bool {
	return a.state != nil && (a.state.noSNAT || slices.ContainsFunc(a.noMasquerade(), func(p netip.Prefix) bool { return !p.Addr().IsLinkLocalUnicast() }))
}
