package tap

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Capability is one thing that the package makes use of.
type Capability struct {
	Name   string
	Kernel string // first Linux version that has it
	Err    error  // nil: granted. Else why not
}

// Capabilities asks the driver what it grants, without making a device. UDP segmentation offload (Linux 6.2) is granted to a device and therefore not
// among them: see Port.Caps.
func Capabilities() []Capability {
	fd, err := openDevice()
	out := []Capability{{"TUN/TAP driver", "2.4", err}}
	if err != nil {
		return out
	}
	defer func() { _ = unix.Close(fd) }()
	features, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES)
	has := func(bit uint32) error {
		if err != nil {
			return fmt.Errorf("tap: asking the driver for its features: %w", err)
		}
		if features&bit == 0 {
			return fmt.Errorf("tap: the driver does not offer it (features %#x)", features)
		}
		return nil
	}
	return append(out,
		Capability{"virtio-net header", "2.6.27", has(unix.IFF_VNET_HDR)},
		Capability{"several queues to a device", "3.8", has(unix.IFF_MULTI_QUEUE)})
}
