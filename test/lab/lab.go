package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"sort"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	runRoot    = "/run/overplane-lab"
	bpffsPath  = "/sys/fs/bpf"
	pinRoot    = bpffsPath + "/overplane-lab"
	uplinkName = "eth0"
	recordName = "lab.json"
)

// Lab is a cluster on this machine. Methods that change it take the lab's lock and are for one goroutine at a time; the others may be
// called concurrently with each other.
type Lab struct {
	Options
	// First is the number of the lab's first node: 1, or what follows the nodes of the underlay's owner.
	First int `json:"first"`
	// Incarnation and Revision are the version of the desired state last written.
	Incarnation string `json:"incarnation"`
	Revision    uint64 `json:"revision"`
	// Controller is nil in a lab that writes state files.
	Controller *Controller `json:"controller,omitempty"`
	// Nodes in the order of their numbers.
	Nodes []*Node `json:"members"`
	// Complete: every step of `up` was done.
	Complete bool `json:"complete"`
	// MountedBPF: this lab mounted the BPF file system.
	MountedBPF bool `json:"mounted_bpf"`
	// Created is when `up` began.
	Created time.Time `json:"created"`
}

// Node is a node of a lab: a namespace with a daemon in it.
type Node struct {
	Number int    `json:"number"`
	Block  int    `json:"block"`          // number of its block in each pool, where the lab writes state files
	MAC    string `json:"mac"`            // of its uplink, as the desired state says
	Pods   []*Pod `json:"pods"`           // in the order of their indexes
	Gone   bool   `json:"gone,omitempty"` // being drained: no route leads there any more
	// BlockIPv4 and BlockIPv6 are the blocks that the controller gave the node.
	BlockIPv4 netip.Prefix `json:"block_ipv4,omitzero"`
	BlockIPv6 netip.Prefix `json:"block_ipv6,omitzero"`

	lab    *Lab
	mu     sync.Mutex
	notify *notifySocket
}

// Pod is a pod of a node: a namespace whose eth0 the daemon makes.
type Pod struct {
	Number int `json:"number"` // p1 is 1
	Index  int `json:"index"`  // within the node's blocks
	// Kind of the pod's port, "tap" or "veth"; empty: what Options.PodPort says.
	Kind string `json:"kind,omitempty"`

	node *Node
}

func nodeName(n int) string { return "n" + strconv.Itoa(n) }

// Gateway is the name of the namespace with the underlay's bridge.
func (l *Lab) Gateway() string {
	if l.Underlay != "" {
		return l.Underlay + "-gw"
	}
	return l.Name + "-gw"
}

// Ext is the name of the namespace outside.
func (l *Lab) Ext() string {
	if l.Underlay != "" {
		return l.Underlay + "-ext"
	}
	return l.Name + "-ext"
}

// Dir is the folder with the lab's files.
func (l *Lab) Dir() string { return filepath.Join(runRoot, l.Name) }

// Node finds a node by name ("n2"), nil if there is none.
func (l *Lab) Node(name string) *Node {
	for _, n := range l.Nodes {
		if n.Name() == name {
			return n
		}
	}
	return nil
}

// Pods lists the pods of all nodes.
func (l *Lab) Pods() []*Pod {
	var all []*Pod
	for _, n := range l.Nodes {
		all = append(all, n.Pods...)
	}
	return all
}

// Name is the node's name in the cluster: n1.
func (n *Node) Name() string { return nodeName(n.Number) }

// Netns is the name of the node's network namespace.
func (n *Node) Netns() string { return n.lab.Name + "-" + n.Name() }

// IPv4 is the node's underlay address.
func (n *Node) IPv4() netip.Addr { return nodeIPv4(n.Number) }

// IPv6 is the node's underlay address.
func (n *Node) IPv6() netip.Addr { return nodeIPv6(n.Number) }

// block is the node's block of a family.
func (n *Node) block(family int) netip.Prefix {
	switch {
	case family == 4 && n.BlockIPv4.IsValid():
		return n.BlockIPv4
	case family == 4:
		return blockIPv4(n.Block)
	case n.BlockIPv6.IsValid():
		return n.BlockIPv6
	}
	return blockIPv6(n.Block)
}

// Addr is the node's underlay address of a family, 4 or 6.
func (n *Node) Addr(family int) netip.Addr {
	if family == 4 {
		return n.IPv4()
	}
	return n.IPv6()
}

// Dir is the folder with the node's files.
func (n *Node) Dir() string { return filepath.Join(n.lab.Dir(), n.Name()) }

// Socket is the path of the daemon's local API.
func (n *Node) Socket() string { return filepath.Join(n.Dir(), "overplaned.sock") }

// LogPath is the daemon's log.
func (n *Node) LogPath() string { return filepath.Join(n.Dir(), "overplaned.log") }

// StatePath is the file with the node's desired state.
func (n *Node) StatePath() string { return filepath.Join(n.Dir(), "state.json") }

// MasqDir is the folder with the node's ip-masq-agent files. It is not there until somebody makes it.
func (n *Node) MasqDir() string { return filepath.Join(n.Dir(), "masq.d") }

// BPFDir is where the daemon pins its steering.
func (n *Node) BPFDir() string { return filepath.Join(pinRoot, n.lab.Name, n.Name()) }

// Device is the name of the node's uplink in its namespace.
func (n *Node) Device() string { return uplinkName }

// Name is the pod's name on its node: n1-p1.
func (p *Pod) Name() string { return fmt.Sprintf("%s-p%d", p.node.Name(), p.Number) }

// Netns is the name of the pod's network namespace.
func (p *Pod) Netns() string { return p.node.lab.Name + "-" + p.Name() }

// Node is the node that the pod runs on.
func (p *Pod) Node() *Node { return p.node }

// IPv4 is the pod's address.
func (p *Pod) IPv4() netip.Addr { return addrAt(p.node.block(4), p.Index) }

// IPv6 is the pod's address.
func (p *Pod) IPv6() netip.Addr { return addrAt(p.node.block(6), p.Index) }

// Addr is the pod's address of a family, 4 or 6.
func (p *Pod) Addr(family int) netip.Addr {
	if family == 4 {
		return p.IPv4()
	}
	return p.IPv6()
}

func (l *Lab) save() error {
	data, err := json.MarshalIndent(l, "", "  ")
	if err != nil {
		return err
	}
	return writeAtomically(filepath.Join(l.Dir(), recordName), append(data, '\n'), 0o644)
}

// writeAtomically replaces a file: a reader sees the old content or the new one.
func writeAtomically(path string, data []byte, mode fs.FileMode) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, mode); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// ErrNoLab says that there is no lab of that name.
var ErrNoLab = errors.New("there is no such lab")

// Load reads the record of a lab that is up, or was.
func Load(name string) (*Lab, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(runRoot, name, recordName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("lab %s: %w: `overplane lab up --name %s` makes it", name, ErrNoLab, name)
	}
	if err != nil {
		return nil, err
	}
	l := &Lab{}
	if err := json.Unmarshal(data, l); err != nil {
		return nil, fmt.Errorf("lab %s: %s is damaged (%w): `overplane lab down --name %s` cleans up", name, recordName, err, name)
	}
	l.Log = func(string, ...any) {}
	l.adopt()
	return l, nil
}

// adopt sets the links from nodes to the lab and from pods to their nodes.
func (l *Lab) adopt() {
	for _, n := range l.Nodes {
		n.lab = l
		for _, p := range n.Pods {
			p.node = n
		}
	}
}

// lock takes the lab's lock, which is its folder. Commands do not wait for each other: two at once are a mistake.
func lock(name string) (unlock func(), err error) {
	release, err := lockShared()
	if err != nil {
		return nil, err
	}
	defer release()
	dir := filepath.Join(runRoot, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another overplane lab command is at work on lab %s: wait for it", name)
	}
	// Another command may have removed the folder between the open and the lock.
	mine, err1 := f.Stat()
	there, err2 := os.Stat(dir)
	if err1 != nil || err2 != nil || !os.SameFile(mine, there) {
		f.Close()
		return nil, fmt.Errorf("another overplane lab command has just removed lab %s: try again", name)
	}
	return func() { f.Close() }, nil
}

// lockShared waits for its turn to make or remove what labs have in common: the folders above theirs, and the mount of the BPF file system. One
// that goes down would otherwise take them from under one that comes up. Held for moments; nothing is left of it.
func lockShared() (unlock func(), err error) {
	f, err := os.Open(filepath.Dir(runRoot))
	if err != nil {
		return nil, err
	}
	for {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", f.Name(), err)
	}
	return func() { f.Close() }, nil
}

// joined lists the labs that live on the underlay of the named one.
func joined(name string) ([]string, error) {
	entries, err := os.ReadDir(runRoot)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if l, err := Load(e.Name()); err == nil && l.Underlay == name {
			names = append(names, e.Name())
		}
	}
	sort.Strings(names)
	return names, nil
}

// nextNode is the first free node number on an underlay: behind every port of its bridge, whoever's it is.
func nextNode(gw string) (int, error) {
	h, err := openHandle(gw)
	if err != nil {
		return 0, err
	}
	defer h.close()
	links, err := h.LinkList()
	if err != nil {
		return 0, err
	}
	next := 1
	for _, link := range links {
		if m := nodePortPattern.FindStringSubmatch(link.Attrs().Name); m != nil {
			n, _ := strconv.Atoi(m[1])
			next = max(next, n+1)
		}
	}
	return next, nil
}

var nodePortPattern = regexp.MustCompile(`^n([0-9]+)$`)
