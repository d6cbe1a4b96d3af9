package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// process names a process for good: a pid may be given to another one, a pid with its start time may not.
type process struct {
	pid   int
	start uint64 // field 22 of /proc/<pid>/stat: clock ticks since boot
}

// findProcess looks a pid up. A zombie is not found, unless threads of it are still on their way out: they hold its locks and sockets.
func findProcess(pid int) (process, bool) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return process{}, false
	}
	// The command's name, in parentheses, may itself contain blanks and parentheses.
	rest := string(data)
	rest = rest[strings.LastIndexByte(rest, ')')+1:]
	fields := strings.Fields(rest)
	if len(fields) < 20 || fields[0] == "X" {
		return process{}, false
	}
	if threads := fields[17]; fields[0] == "Z" && (threads == "0" || threads == "1") {
		return process{}, false
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return process{pid, start}, err == nil
}

func (p process) alive() bool {
	now, ok := findProcess(p.pid)
	return ok && now == p
}

// signal sends a signal; a process that is gone is no error.
func (p process) signal(sig unix.Signal) error {
	if !p.alive() {
		return nil
	}
	if err := unix.Kill(p.pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process %d: %w", p.pid, err)
	}
	return nil
}

// wait returns whether the process ended within the time.
func (p process) wait(limit time.Duration) bool {
	for end := time.Now().Add(limit); p.alive(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// deathPatience is how long a process may take from SIGKILL to its end. The kernel closes its descriptors first: for a daemon with hundreds of
// pods that is as many AF_XDP sockets with their memory, seconds on a busy machine. It is there for what never ends.
const deathPatience = time.Minute

// end asks a process to end and makes it if it does not.
func (p process) end(patience time.Duration) error {
	// A stopped process handles no signal but these two.
	_ = p.signal(unix.SIGCONT)
	if err := p.signal(unix.SIGTERM); err != nil {
		return err
	}
	if p.wait(patience) {
		return nil
	}
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	if !p.wait(deathPatience) {
		return fmt.Errorf("process %d does not die of SIGKILL", p.pid)
	}
	return nil
}

func (p process) write(path string) error {
	return writeAtomically(path, fmt.Appendf(nil, "%d %d\n", p.pid, p.start), 0o644)
}

// readProcess reads what write wrote. ok is false if there is no file, or the process is gone.
func readProcess(path string) (p process, ok bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return p, false
	}
	if _, err := fmt.Sscan(string(data), &p.pid, &p.start); err != nil {
		return p, false
	}
	return p, p.alive()
}
