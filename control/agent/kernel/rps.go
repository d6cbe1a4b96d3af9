package kernel

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// SetReceiveCPUs says which processors do the receiving work of the pod's stack for a veth pair (receive packet steering, RPS; a flow keeps its
// processor). None: whichever sends, which is a worker. It takes a kernel with CONFIG_RPS, and CAP_SYS_ADMIN to look into the pod's sysfs; a
// pod does well without it.
func SetReceiveCPUs(dev PodDevice, cpus []int) error {
	err := InNetNS(dev.NetNS, func() error {
		sysfs, err := openSysfs()
		if err != nil {
			return err
		}
		defer unix.Close(sysfs)
		queues := path.Join("class/net", dev.Name, "queues")
		names, err := readDir(sysfs, queues)
		if err != nil {
			return err
		}
		for _, name := range names {
			if !strings.HasPrefix(name, "rx-") {
				continue
			}
			if err := writeFile(sysfs, path.Join(queues, name, "rps_cpus"), cpuMask(cpus)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("pod device %s in %s: choosing the processors that receive (RPS): %w", dev.Name, dev.NetNS, err)
	}
	return nil
}

// openSysfs opens the root of a sysfs that shows the calling thread's network namespace: a mount that is attached nowhere (Linux 5.2).
func openSysfs() (int, error) {
	fs, err := unix.Fsopen("sysfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("opening sysfs (fsopen): %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("opening sysfs (fsconfig): %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("opening sysfs (fsmount): %w", err)
	}
	return fd, nil
}

func readDir(root int, name string) ([]string, error) {
	fd, err := unix.Openat(root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	defer unix.Close(fd)
	var names []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if n == 0 {
			return names, nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

func writeFile(root int, name, value string) error {
	fd, err := unix.Openat(root, name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	_, err = unix.Write(fd, []byte(value))
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// cpuMask is a set of processors as the kernel reads one: hexadecimal words of 32 bits, the highest first (bitmap_parse).
func cpuMask(cpus []int) string {
	var words []uint32
	for _, c := range cpus {
		for len(words) <= c/32 {
			words = append(words, 0)
		}
		words[c/32] |= 1 << (c % 32)
	}
	if len(words) == 0 {
		return "0"
	}
	var b strings.Builder
	for i := len(words) - 1; i >= 0; i-- {
		fmt.Fprintf(&b, "%08x", words[i])
		if i > 0 {
			b.WriteByte(',')
		}
	}
	return b.String()
}
