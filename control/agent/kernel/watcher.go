package kernel

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// GoneNetNS is a namespace that a Watcher lost.
type GoneNetNS struct {
	Key, Path string // as they were given to Watcher.Add
}

// Watcher tells when paths no longer refer to the namespaces they referred to. A port that re-opened its device keeps the device and the whole
// namespace alive, so neither the device nor its descriptors tell: somebody has to look at the name.
//
// It compares device and inode of every path each interval, and looks at once, comparing the cookie too, when a watched path's directory changes
// (inotify; not for /proc). It holds no reference to the namespaces. Methods may be called from any goroutine, also from the callback.
type Watcher struct {
	gone     func(GoneNetNS)
	interval time.Duration
	stop     chan struct{}
	done     chan struct{}
	strict   chan string // paths whose directory entry changed; "" = all

	inotify *os.File // nil: polling only

	mu      sync.Mutex
	entries map[string]watched // by key
	dirs    map[string]int32   // inotify descriptors by directory
}

type watched struct {
	path string
	id   Identity
}

// WatchNetNS starts a watcher. Gone is called on the watcher's goroutine, once for each Add whose namespace went; interval 0 means one second.
func WatchNetNS(interval time.Duration, gone func(GoneNetNS)) *Watcher {
	if interval <= 0 {
		interval = time.Second
	}
	w := &Watcher{
		gone: gone, interval: interval,
		stop: make(chan struct{}), done: make(chan struct{}), strict: make(chan string, 64),
		entries: map[string]watched{}, dirs: map[string]int32{},
	}
	if fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC); err == nil {
		w.inotify = os.NewFile(uintptr(fd), "inotify")
		go w.readInotify(w.inotify)
	}
	go w.run()
	return w
}

// Add watches path, which names the namespace id; if it does not any more, gone is called soon. Adding a key again replaces it.
func (w *Watcher) Add(key, path string, id Identity) {
	w.mu.Lock()
	w.entries[key] = watched{path, id}
	dir := filepath.Dir(path)
	if _, ok := w.dirs[dir]; !ok && w.inotify != nil && !strings.HasPrefix(dir, "/proc") {
		if conn, err := w.inotify.SyscallConn(); err == nil {
			_ = conn.Control(func(fd uintptr) {
				if wd, err := unix.InotifyAddWatch(int(fd), dir, unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO|unix.IN_ONLYDIR); err == nil {
					w.dirs[dir] = int32(wd)
				}
			})
		}
	}
	w.mu.Unlock()
	w.look(path)
}

// Remove stops watching. A callback that is under way may still arrive.
func (w *Watcher) Remove(key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.entries, key)
}

// Close ends the watcher and waits for its goroutine; not to be called from the callback.
func (w *Watcher) Close() {
	close(w.stop)
	if w.inotify != nil {
		_ = w.inotify.Close()
	}
	<-w.done
}

// look asks for a strict look at a path. When too many are waiting, at all.
func (w *Watcher) look(path string) {
	select {
	case w.strict <- path:
	case <-w.stop:
	default:
		go func() {
			select {
			case w.strict <- "":
			case <-w.stop:
			}
		}()
	}
}

func (w *Watcher) run() {
	defer close(w.done)
	tick := time.NewTicker(w.interval)
	defer tick.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-tick.C:
			w.check(func(e watched) bool { return sameInode(e) })
		case path := <-w.strict:
			w.check(func(e watched) bool { return path != "" && e.path != path || same(e) })
		}
	}
}

// check calls gone for the entries that are not alive.
func (w *Watcher) check(alive func(watched) bool) {
	w.mu.Lock()
	entries := make(map[string]watched, len(w.entries))
	for key, e := range w.entries {
		entries[key] = e
	}
	w.mu.Unlock()
	for key, e := range entries {
		if alive(e) {
			continue
		}
		w.mu.Lock()
		ours := w.entries[key] == e // removed or replaced meanwhile?
		if ours {
			delete(w.entries, key)
		}
		w.mu.Unlock()
		if ours {
			w.gone(GoneNetNS{Key: key, Path: e.path})
		}
	}
}

func sameInode(e watched) bool {
	id, err := statIdentity(e.path)
	return err == nil && id.Dev == e.id.Dev && id.Inode == e.id.Inode
}

func same(e watched) bool {
	id, err := Identify(e.path)
	return err == nil && id == e.id
}

// readInotify turns directory events into paths to look at. It ends when f is closed.
func (w *Watcher) readInotify(f *os.File) {
	buf := make([]byte, 64*(unix.SizeofInotifyEvent+unix.NAME_MAX+1))
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			// struct inotify_event: wd, mask, cookie, len, name padded with zeros to len bytes.
			wd, mask := int32(binary.NativeEndian.Uint32(b)), binary.NativeEndian.Uint32(b[4:])
			end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
			name := unix.ByteSliceToString(b[unix.SizeofInotifyEvent:end])
			b = b[end:]
			w.mu.Lock()
			path := ""
			for dir, d := range w.dirs {
				if d == wd && mask&unix.IN_Q_OVERFLOW == 0 {
					path = filepath.Join(dir, name)
					if mask&unix.IN_IGNORED != 0 { // the directory itself is gone
						delete(w.dirs, dir)
						path = ""
					}
				}
			}
			w.mu.Unlock()
			w.look(path)
		}
	}
}
