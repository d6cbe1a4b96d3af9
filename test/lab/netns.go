package lab

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"sort"
	"strconv"

	"golang.org/x/sys/unix"
)

// netnsDir is where iproute2 keeps named network namespaces.
const netnsDir = "/run/netns"

// NetnsPath is the file that stands for a named network namespace.
func NetnsPath(name string) string { return filepath.Join(netnsDir, name) }

// createNetns makes a named network namespace with lo up, as `ip netns add` does.
func createNetns(name string) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	path := NetnsPath(name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	f.Close()
	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind mount: %w", err)
		}
		return setLoopbackUp()
	})
	if err != nil {
		_ = deleteNetns(name)
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	return nil
}

// deleteNetns removes the name. The namespace itself goes when the last process and descriptor in it do. Removing what is not there succeeds.
func deleteNetns(name string) error {
	path := NetnsPath(name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("network namespace %s: unmount: %w", name, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	return nil
}

// InNetns runs fn on a thread that is in the named network namespace. Sockets that fn opens and processes that it starts belong to that
// namespace for life, whoever uses them afterwards; goroutines that fn starts do not run in it.
func InNetns(name string, fn func() error) error {
	target, err := os.Open(NetnsPath(name))
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", name, err)
	}
	defer target.Close()
	return onOwnThread(func() error {
		if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("network namespace %s: setns: %w", name, err)
		}
		return fn()
	})
}

// onOwnThread runs fn on a locked thread and puts the thread back into the caller's network namespace afterwards. A thread that cannot
// be put back ends with its goroutine.
func onOwnThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		err = fn()
		if unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	return <-done
}

// netnsInode identifies a network namespace by the inode of its file.
func netnsInode(path string) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// labNetns lists the named namespaces that belong to the lab by their names: <lab>-gw, -ext, -n<i>, -n<i>-p<j>.
func labNetns(lab string) ([]string, error) {
	pattern := regexp.MustCompile(`^` + regexp.QuoteMeta(lab) + `-(gw|ext|n[0-9]+(-p[0-9]+)?)$`)
	entries, err := os.ReadDir(netnsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if pattern.MatchString(e.Name()) {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}

// processesIn lists the processes whose main thread is in one of the namespaces, by inode. Never the caller itself.
func processesIn(inodes map[uint64]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		ino, err := netnsInode(filepath.Join("/proc", e.Name(), "ns/net"))
		if err == nil && inodes[ino] {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// setSysctl writes a /proc/sys value; net.* keys are those of the calling thread's network namespace.
func setSysctl(path, value string) error {
	if err := os.WriteFile(filepath.Join("/proc/sys", path), []byte(value), 0o644); err != nil {
		return fmt.Errorf("sysctl %s=%s: %w", path, value, err)
	}
	return nil
}

// SetSysctl writes a /proc/sys/net value in the named network namespace. path is relative to /proc/sys, e.g. "net/ipv4/ip_forward".
func SetSysctl(netns, path, value string) error {
	return InNetns(netns, func() error { return setSysctl(path, value) })
}
