package tap

import (
	"errors"
	"fmt"
	"os"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"
)

// openPlain makes or joins a device without virtio-net header, and returns the queue's descriptor. The device is persistent: see open.
func openPlain(name string, create bool) (int, error) {
	if create {
		// The library has no way to ask for a new device, so that a race with another maker of this name is not seen.
		if _, err := ifindex(name); !errors.Is(err, ErrNotExist) {
			return -1, errors.Join(err, fmt.Errorf("%w in this network namespace", ErrExists))
		}
	}
	dev, err := water.New(water.Config{
		DeviceType:             water.TAP,
		PlatformSpecificParams: water.PlatformSpecificParams{Name: name, Persist: true, MultiQueue: true},
	})
	if err != nil {
		if _, statErr := os.Stat(devicePath); statErr != nil {
			return -1, openError(statErr)
		}
		return -1, attachError(err, create)
	}
	file, ok := dev.ReadWriteCloser.(*os.File)
	if !ok {
		return -1, errors.Join(fmt.Errorf("the device is a %T, no file", dev.ReadWriteCloser), dev.Close())
	}
	// A descriptor of our own: the file's is in the runtime's epoll set, which would wake a thread for every packet.
	fd := -1
	conn, err := file.SyscallConn()
	if err == nil {
		controlErr := conn.Control(func(d uintptr) {
			if fd, err = unix.FcntlInt(d, unix.F_DUPFD_CLOEXEC, 0); err == nil {
				err = unix.SetNonblock(fd, true)
			}
		})
		err = errors.Join(err, controlErr)
	}
	if err = errors.Join(err, dev.Close()); err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return -1, fmt.Errorf("taking over the descriptor: %w", err)
	}
	return fd, nil
}

// configurePlain takes back what an earlier daemon, which had the header, told the device. A driver that refuses it has nothing to take back.
func configurePlain(fd, sendBuffer int) {
	_ = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0)
	_ = unix.IoctlSetPointerInt(fd, unix.TUNSETSNDBUF, sendBuffer)
}
