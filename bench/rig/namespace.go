package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

const (
	commandTimeout = 20 * time.Second
	netnsDir       = "/run/netns"
)

// space is the namespaces and processes of one peer.
type space struct {
	env       *Env
	name      string   // prefix of its namespaces, without the dash
	netns     []string // made so far
	processes []*exec.Cmd
	errs      []error // of all commands; the first one stops the others
	ctx       context.Context
}

func (e *Env) space(ctx context.Context) *space {
	e.serial++
	return &space{env: e, name: fmt.Sprintf("%s%d", e.Prefix, e.serial), ctx: ctx}
}

// ns is the name of a namespace of this space.
func (s *space) ns(short string) string { return s.name + "-" + short }

// run executes a command, words separated by blanks, unless one has failed before.
func (s *space) run(format string, args ...any) string {
	if len(s.errs) > 0 {
		return ""
	}
	line := fmt.Sprintf(format, args...)
	return s.exec(strings.Fields(line), "")
}

func (s *space) exec(argv []string, stdin string) string {
	if len(s.errs) > 0 {
		return ""
	}
	ctx, cancel := context.WithTimeout(s.ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	// In a session of its own: Ctrl-C at the terminal is for the harness, which then cleans up.
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		s.errs = append(s.errs, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(errOut.String()+out.String())))
	}
	return out.String()
}

// fail notes an error.
func (s *space) fail(err error) {
	if err != nil {
		s.errs = append(s.errs, err)
	}
}

func (s *space) err() error {
	if len(s.errs) == 0 {
		return nil
	}
	return s.errs[0]
}

// add makes a namespace.
func (s *space) add(short string, forward bool) string {
	name := s.ns(short)
	s.run("ip netns add %s", name)
	s.netns = append(s.netns, name)
	s.run("ip -n %s link set lo up", name)
	value := map[bool]string{false: "0", true: "1"}[forward]
	for key, v := range map[string]string{
		"ipv4/ip_forward": value, "ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0",
		"ipv4/conf/all/send_redirects": "0", "ipv4/conf/default/send_redirects": "0",
		"ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1", // these rigs measure IPv4
	} {
		if s.err() == nil {
			s.fail(lab.SetSysctl(name, "net/"+key, v))
		}
	}
	return name
}

// start runs a program in a namespace until close, with what it says in a file. The path of the file is returned.
func (s *space) start(netns string, env []string, argv ...string) (*exec.Cmd, string) {
	if len(s.errs) > 0 {
		return nil, ""
	}
	path := filepath.Join(s.env.Dir, fmt.Sprintf("%s-%s.log", s.name, filepath.Base(argv[0])))
	log, err := os.Create(path)
	if err != nil {
		s.fail(err)
		return nil, ""
	}
	defer log.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := lab.InNetns(netns, cmd.Start); err != nil {
		s.fail(fmt.Errorf("%s: %w", argv[0], err))
		return nil, path
	}
	s.processes = append(s.processes, cmd)
	return cmd, path
}

// close ends the processes and removes the namespaces.
func (s *space) close() error {
	for _, cmd := range s.processes {
		_ = cmd.Process.Signal(unix.SIGCONT)
		_ = cmd.Process.Signal(unix.SIGTERM)
	}
	for _, cmd := range s.processes {
		done := make(chan struct{})
		go func() { _ = cmd.Wait(); close(done) }()
		select {
		case <-done:
		case <-time.After(3 * time.Second):
			_ = cmd.Process.Kill()
			<-done
		}
	}
	var errs []error
	for _, name := range s.netns {
		errs = append(errs, removeNetns(name))
	}
	s.processes, s.netns = nil, nil
	return errors.Join(errs...)
}

func removeNetns(name string) error {
	path := filepath.Join(netnsDir, name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	return nil
}

// maxSerial is how many systems a run makes at most; Clean looks no further.
const maxSerial = 999

// Clean removes what an earlier run with the prefix left: labs, processes, namespaces. It returns the names of what it removed.
func Clean(prefix string) (removed []string, err error) {
	var errs []error
	labs := map[string]bool{}
	entries, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	inodes, names := map[uint64]bool{}, []string{}
	for _, e := range entries {
		owner, _, _ := strings.Cut(e.Name(), "-")
		if ours(owner, prefix) {
			labs[owner] = true
			names = append(names, e.Name())
			var st unix.Stat_t
			if unix.Stat(filepath.Join(netnsDir, e.Name()), &st) == nil {
				inodes[st.Ino] = true
			}
		}
	}
	// Labs of which only files are left.
	records, _ := filepath.Glob("/run/overplane-lab/" + prefix + "*")
	for _, r := range records {
		if ours(filepath.Base(r), prefix) {
			labs[filepath.Base(r)] = true
		}
	}
	var own unix.Stat_t
	if unix.Stat("/proc/1/ns/net", &own) == nil && inodes[own.Ino] {
		return nil, errors.New("a network namespace with this prefix is the machine's own: not touching it")
	}
	errs = append(errs, endProcesses(inodes))
	for name := range labs {
		removed = append(removed, name)
		errs = append(errs, lab.Down(name))
	}
	for _, name := range names {
		errs = append(errs, removeNetns(name))
	}
	return removed, errors.Join(errs...)
}

// ours reports whether a name is the prefix and a number.
func ours(name, prefix string) bool {
	rest, ok := strings.CutPrefix(name, prefix)
	n, err := strconv.Atoi(rest)
	return ok && err == nil && n > 0 && n <= maxSerial
}

// endProcesses ends every process whose main thread is in one of the namespaces.
func endProcesses(inodes map[uint64]bool) error {
	if len(inodes) == 0 {
		return nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(filepath.Join("/proc", e.Name(), "ns/net"), &st) == nil && inodes[st.Ino] {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	return nil
}

func installed(programs ...string) (missing []string) {
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	return missing
}

// Tools names the programs that every run needs and this machine lacks, with the command that installs them; empty if none.
func Tools() string {
	packages := map[string]string{"ip": "iproute2", "ethtool": "ethtool", "nft": "nftables"}
	var need, lack []string
	for _, p := range installed("ip", "ethtool", "nft") {
		lack, need = append(lack, p), append(need, packages[p])
	}
	if len(lack) == 0 {
		return ""
	}
	return fmt.Sprintf("%s not found: apt-get install %s", strings.Join(lack, ", "), strings.Join(need, " "))
}
