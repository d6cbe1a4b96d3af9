package lab

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands of linux/ethtool.h that x/sys does not name.
const (
	ethtoolSetTxChecksum = 0x17 // ETHTOOL_STXCSUM
	ethtoolSetTSO        = 0x1f // ETHTOOL_STSO
	ethtoolSetGSO        = 0x24 // ETHTOOL_SGSO
)

// ethtoolValue is struct ethtool_value.
type ethtoolValue struct {
	cmd, data uint32
}

// ifreqData is struct ifreq with a pointer in its union; the union is 24 bytes long on 64-bit Linux.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [24 - unsafe.Sizeof(uintptr(0))]byte
}

// disableTxOffloads makes a device of the calling thread's namespace behave like a wire: checksums are finished and segments are
// cut before a frame enters it. What stands behind an AF_XDP socket would otherwise see unfinished sums and 64 KiB frames.
func disableTxOffloads(ifname string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, c := range []struct {
		cmd  uint32
		what string
	}{
		{ethtoolSetTSO, "tso"},
		{ethtoolSetGSO, "gso"},
		{ethtoolSetTxChecksum, "tx checksum"},
	} {
		value := ethtoolValue{cmd: c.cmd}
		// value and req live on this stack frame until the call returns, and the kernel keeps neither pointer.
		req := ifreqData{data: unsafe.Pointer(&value)}
		copy(req.name[:unix.IFNAMSIZ-1], ifname)
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 && errno != unix.EOPNOTSUPP { // what a device has not is off
			return fmt.Errorf("%s: turning %s offload off: %w", ifname, c.what, errno)
		}
	}
	return nil
}
