package tap

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/dataplane/port"
)

func TestErrors(t *testing.T) {
	needRoot(t)
	ns := newNetNS(t)
	pools := []*port.Pool{newPool(t, 1, 0)}
	ip(t, "-n", ns, "tuntap", "add", "single", "mode", "tap")
	ip(t, "-n", ns, "tuntap", "add", "layer3", "mode", "tun", "multi_queue")
	ip(t, "-n", ns, "link", "add", "dummy0", "type", "veth", "peer", "name", "dummy1")
	in(t, ns, func() error { // held by somebody else, single-queue
		fd, err := openDevice()
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		ifr, err := unix.NewIfreq("single")
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	})
	for _, tc := range []struct {
		name   string
		open   func(Config) (*Port, error)
		cfg    Config
		target error
		text   string
	}{
		{"name too long", Create, Config{Name: "sixteen-bytes-xx", Pools: pools}, nil, "too long: 16 bytes, the kernel takes 15"},
		{"name with a slash", Create, Config{Name: "a/b", Pools: pools}, nil, `"a/b"`},
		{"name that is a template", Create, Config{Name: "tap%d", Pools: pools}, nil, `"tap%d"`},
		{"no name", Create, Config{Pools: pools}, nil, `""`},
		{"no pool", Create, Config{Name: "tapx"}, nil, "no frame pool"},
		{"too many queues", Create, Config{Name: "tapx", Pools: pools, Queues: 257}, nil, "257 queues: want 1 to 256"},
		{"negative buffer", Create, Config{Name: "tapx", Pools: pools, SendBuffer: -1}, nil, "send buffer"},
		{"exists, a TAP", Create, Config{Name: "single", Pools: pools}, ErrExists, "single"},
		{"exists, no TAP", Create, Config{Name: "dummy0", Pools: pools}, ErrExists, "dummy0"},
		{"re-open nothing", Reopen, Config{Name: "tapx", Pools: pools}, ErrNotExist, "tapx"},
		{"re-open a single-queue TAP", Reopen, Config{Name: "single", Pools: pools}, ErrMode, "multi-queue"},
		{"re-open a TUN", Reopen, Config{Name: "layer3", Pools: pools}, ErrMode, "multi-queue"},
		{"re-open no TUN/TAP device", Reopen, Config{Name: "dummy0", Pools: pools}, ErrMode, "multi-queue"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := inErr(ns, func() error {
				p, err := tc.open(tc.cfg)
				if err == nil {
					_ = p.Destroy()
				}
				return err
			})
			require.Error(t, err)
			require.ErrorContains(t, err, tc.text)
			if tc.target != nil {
				require.ErrorIs(t, err, tc.target)
			}
		})
	}
	// Failures leave nothing behind.
	out, err := exec.Command("ip", "-n", ns, "-br", "link").CombinedOutput()
	require.NoError(t, err)
	require.NotContains(t, string(out), "tapx")
}

func TestNoDriver(t *testing.T) {
	restore := devicePath
	t.Cleanup(func() { devicePath = restore })
	cfg := Config{Name: "tapx", Pools: []*port.Pool{newPool(t, 1, 0)}}

	devicePath = filepath.Join(t.TempDir(), "tun")
	_, err := Create(cfg)
	require.ErrorIs(t, err, ErrNoTUN)
	require.ErrorContains(t, err, devicePath)

	if os.Geteuid() != 0 {
		t.Skip("the rest needs root: makes device nodes")
	}
	// A device number that no driver has.
	if err := unix.Mknod(devicePath, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 254))); err != nil {
		t.Skipf("cannot make device nodes: %v", err)
	}
	_, err = Create(cfg)
	if errors.Is(err, ErrPermission) {
		t.Skipf("device nodes may not be opened here: %v", err)
	}
	require.ErrorIs(t, err, ErrNoTUN)
	require.ErrorContains(t, err, "load the kernel module tun")
}

func TestMissingCapability(t *testing.T) {
	needRoot(t)
	ns := newNetNS(t)
	err := inErr(ns, func() error {
		// This thread only, which ends with the goroutine.
		var caps [2]unix.CapUserData
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		if err := unix.Capget(&hdr, &caps[0]); err != nil {
			return err
		}
		caps[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&hdr, &caps[0]); err != nil {
			return err
		}
		_, err := Create(Config{Name: "tapx", Pools: []*port.Pool{newPool(t, 1, 0)}})
		return err
	})
	require.ErrorIs(t, err, ErrPermission)
	require.ErrorContains(t, err, "CAP_NET_ADMIN")
}
