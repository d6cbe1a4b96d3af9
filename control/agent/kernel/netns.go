package kernel

import (
	"errors"
	"fmt"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// InNetNS runs f in the network namespace that path names, on a thread of its own, and returns f's error. Sockets and files that f opens stay in that
// namespace; goroutines that f starts do not run in it. f must not outlive the call. The caller's thread is not touched.
//
// No such path, or one that is no network namespace, is ErrNoNetNS.
func InNetNS(path string, f func() error) error {
	// Opened here, so that paths relative to the calling thread mean what they say.
	ns, err := openNetNS(path)
	if err != nil {
		return err
	}
	defer func() { _ = ns.Close() }()
	done := make(chan error, 1)
	go func() {
		result := errors.New("kernel: function in another network namespace ended its goroutine")
		defer func() { done <- result }()
		runtime.LockOSThread()
		own, err := netns.GetFromPath("/proc/thread-self/ns/net")
		if err != nil {
			runtime.UnlockOSThread()
			result = fmt.Errorf("kernel: finding the own network namespace: %w", err)
			return
		}
		defer func() {
			// A thread that cannot go back stays locked, and the runtime ends it with this goroutine.
			if netns.Set(own) == nil {
				runtime.UnlockOSThread()
			}
			_ = own.Close()
		}()
		if err := netns.Set(ns); err != nil {
			result = fmt.Errorf("kernel: entering network namespace %s: %w", path, explainSetns(err))
			return
		}
		result = f()
	}()
	return <-done
}

func explainSetns(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: CAP_SYS_ADMIN is needed here and in the namespace's user namespace", err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: it is a namespace of another kind", ErrNoNetNS)
	}
	return err
}

// openNetNS opens a path that must be a namespace.
func openNetNS(path string) (netns.NsHandle, error) {
	ns, err := netns.GetFromPath(path)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ESRCH) {
		return ns, fmt.Errorf("kernel: %s: %w", path, ErrNoNetNS)
	}
	if err != nil {
		return ns, fmt.Errorf("kernel: opening network namespace %s: %w", path, err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(ns), &fs); err != nil {
		_ = ns.Close()
		return ns, fmt.Errorf("kernel: opening network namespace %s: %w", path, err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		// What remains of a namespace's name when it was unmounted and not removed is an empty file.
		_ = ns.Close()
		return ns, fmt.Errorf("kernel: %s: %w: it is an ordinary file", path, ErrNoNetNS)
	}
	return ns, nil
}

// Identity tells network namespaces apart. The kernel reuses inode numbers soon after a namespace is gone; the cookie (SO_NETNS_COOKIE, kernel
// 5.14) is unique for a boot. Identities are compared with ==.
type Identity struct {
	Dev, Inode uint64 // of the namespace's file in nsfs
	Cookie     uint64 // 0 on older kernels
}

// String is the identity's form in files and messages. Equal strings are equal identities.
func (id Identity) String() string { return fmt.Sprintf("net:[%d:%d:%d]", id.Dev, id.Inode, id.Cookie) }

// Identify reads the identity of the namespace that path names. No namespace is ErrNoNetNS.
func Identify(path string) (Identity, error) {
	id, err := statIdentity(path)
	if err != nil {
		return Identity{}, err
	}
	err = InNetNS(path, func() error {
		// The path may have changed hands since; what counts is where this thread is.
		var st unix.Stat_t
		if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
			return err
		}
		id.Dev, id.Inode = st.Dev, st.Ino
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		if id.Cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); errors.Is(err, unix.ENOPROTOOPT) {
			return nil
		}
		return err
	})
	if err != nil {
		return Identity{}, fmt.Errorf("kernel: identity of %s: %w", path, err)
	}
	return id, nil
}

// statIdentity is the identity without the cookie, by one stat(2).
func statIdentity(path string) (Identity, error) {
	var st unix.Stat_t
	err := unix.Stat(path, &st)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ESRCH):
		return Identity{}, fmt.Errorf("kernel: %s: %w", path, ErrNoNetNS)
	case err != nil:
		return Identity{}, fmt.Errorf("kernel: %s: %w", path, err)
	}
	return Identity{Dev: st.Dev, Inode: st.Ino}, nil
}
