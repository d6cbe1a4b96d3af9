package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The capabilities the daemon cannot work without, and what for.
var neededCapabilities = []struct {
	bit  uint
	name string
	why  string
}{
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "to make devices and routes"},
	{unix.CAP_BPF, "CAP_BPF", "to load the steering program"},
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "to enter the pods' network namespaces"},
}

const tunPath = "/dev/net/tun"

// preflight checks what the machine must grant, and returns all that is missing at once.
func preflight(cfg *Config, frameMemory uint64) error {
	var errs []error
	caps, err := effectiveCapabilities("/proc/self/status")
	if err != nil {
		errs = append(errs, err)
	} else {
		errs = append(errs, checkCapabilities(caps)...)
		// What is left to the ladder is left to the ladder: other rungs do without AF_XDP.
		need := ""
		switch {
		case strings.HasPrefix(cfg.UplinkMode, ModeXDP):
			need = "UPLINK_MODE=" + cfg.UplinkMode
		case cfg.PodPort == KindVeth:
			need = "POD_PORT=veth"
		}
		if need != "" && caps&(1<<unix.CAP_NET_RAW) == 0 {
			errs = append(errs, missingCapability("CAP_NET_RAW", "to open AF_XDP sockets for "+EnvPrefix+need))
		}
		if sockets := need != "" || cfg.UplinkMode == ModeAuto; sockets && caps&(1<<unix.CAP_IPC_LOCK) == 0 {
			if err := checkMemlock(frameMemory); err != nil {
				errs = append(errs, err)
			}
		}
	}
	errs = append(errs, checkTun(tunPath), checkBPFFS(cfg.BPFDir))
	return errors.Join(errs...)
}

func checkCapabilities(caps uint64) []error {
	var errs []error
	for _, c := range neededCapabilities {
		if c.bit == unix.CAP_BPF && caps&(1<<unix.CAP_SYS_ADMIN) != 0 {
			continue // includes it (include/linux/capability.h, bpf_capable)
		}
		if caps&(1<<c.bit) == 0 {
			errs = append(errs, missingCapability(c.name, c.why))
		}
	}
	return errs
}

func missingCapability(name, why string) error {
	return fmt.Errorf("missing capability %s, needed %s: run as root, or grant it (CapabilityBoundingSet= in the unit)", name, why)
}

// effectiveCapabilities reads the effective set from proc_pid_status(5).
func effectiveCapabilities(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("reading this process's capabilities: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, fmt.Errorf("no CapEff in %s", path)
}

// checkMemlock makes sure that the frame memory can be locked: registering it as UMEM counts it against RLIMIT_MEMLOCK unless the process
// has CAP_IPC_LOCK (net/xdp/xdp_umem.c, xdp_umem_account_pages).
func checkMemlock(need uint64) error {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &lim); err != nil || lim.Cur >= need {
		return nil
	}
	raised := unix.Rlimit{Cur: need, Max: max(lim.Max, need)}
	if unix.Setrlimit(unix.RLIMIT_MEMLOCK, &raised) == nil {
		return nil
	}
	return fmt.Errorf("the limit of locked memory (RLIMIT_MEMLOCK) is %d KiB and cannot be raised; the frames need %d KiB: set LimitMEMLOCK=infinity in the unit, grant CAP_IPC_LOCK, or lower %sFRAMES",
		lim.Cur>>10, need>>10, EnvPrefix)
}

func checkTun(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		return f.Close()
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("no %s: pods and the host port are TAP devices; load the module (modprobe tun) or give the container the device", path)
	}
	return fmt.Errorf("%s cannot be opened: %w; pods and the host port are TAP devices", path, err)
}

// bpfMagic is BPF_FS_MAGIC of linux/magic.h.
const bpfMagic = 0xcafe4a11

// checkBPFFS makes sure that the folder for pins is, or can be made, on a BPF file system.
func checkBPFFS(dir string) error {
	at := dir
	for {
		var st unix.Statfs_t
		err := unix.Statfs(at, &st)
		switch {
		case err == nil && uint32(st.Type) == bpfMagic:
			return nil
		case err == nil:
			return fmt.Errorf("%s (%sBPF_DIR) is not on a BPF file system: mount one (mount -t bpf bpf /sys/fs/bpf) or choose a folder on one", dir, EnvPrefix)
		case !errors.Is(err, unix.ENOENT) || at == "/":
			return fmt.Errorf("%s (%sBPF_DIR): %w", at, EnvPrefix, err)
		}
		at = filepath.Dir(at)
	}
}
