package xdp

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ifreqData is struct ifreq of netdevice(7) with ifr_data: 40 bytes on 64-bit machines.
type ifreqData struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

// ethtoolChannels is struct ethtool_channels of linux/ethtool.h.
type ethtoolChannels struct {
	cmd                                      uint32
	maxRX, maxTX, maxOther, maxCombined      uint32
	rxCount, txCount, otherCount, combinedCt uint32
}

// ethtoolRxnfc is the front of struct ethtool_rxnfc, with room for the rest.
type ethtoolRxnfc struct {
	cmd, flowType uint32
	data          uint64
	_             [192]byte
}

// ethtoolDrvinfo is struct ethtool_drvinfo.
type ethtoolDrvinfo struct {
	cmd    uint32
	driver [32]byte
	_      [160]byte
}

// ethtool makes a SIOCETHTOOL request on ifname in the current network namespace. cmd points to one of the structures above.
func ethtool(ifname string, cmd unsafe.Pointer) error {
	if len(ifname) >= unix.IFNAMSIZ {
		return fmt.Errorf("xdp: interface name %q is too long", ifname)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("xdp: ethtool: %w", err)
	}
	defer unix.Close(fd)
	req := ifreqData{data: cmd}
	copy(req.name[:], ifname)
	// req is laid out as the kernel's structure and alive for the call; data points to a live structure whose first word is the command that
	// says how much of it the kernel reads and writes.
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	return nil
}

// queues returns how many receive and transmit queues an interface has.
func queues(ifname string) (rx, tx int, err error) {
	ch := ethtoolChannels{cmd: unix.ETHTOOL_GCHANNELS}
	// ch is alive and a struct ethtool_channels.
	err = ethtool(ifname, unsafe.Pointer(&ch))
	if err == nil {
		return int(ch.rxCount + ch.combinedCt), int(ch.txCount + ch.combinedCt), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) {
		return 0, 0, fmt.Errorf("xdp: asking for the queues of %s (ETHTOOL_GCHANNELS): %w", ifname, err)
	}
	rings := ethtoolRxnfc{cmd: unix.ETHTOOL_GRXRINGS}
	// rings is alive and at least a struct ethtool_rxnfc.
	if err := ethtool(ifname, unsafe.Pointer(&rings)); err == nil && rings.data > 0 {
		return int(rings.data), int(rings.data), nil
	}
	return 1, 1, nil // a driver that cannot be asked has one
}

// ethtoolValue is struct ethtool_value.
type ethtoolValue struct{ cmd, data uint32 }

// disableLRO turns large receive offload off, as the kernel does on interfaces that it forwards from: its frames cannot be sent on (netif_disable_lro).
// A driver without it has nothing to turn off.
func disableLRO(ifname string) error {
	v := ethtoolValue{cmd: unix.ETHTOOL_GFLAGS}
	// v is alive and a struct ethtool_value.
	if err := ethtool(ifname, unsafe.Pointer(&v)); err != nil || v.data&ethFlagLRO == 0 {
		return nil
	}
	v.cmd, v.data = unix.ETHTOOL_SFLAGS, v.data&^ethFlagLRO
	// As above.
	if err := ethtool(ifname, unsafe.Pointer(&v)); err != nil {
		return fmt.Errorf("xdp: turning large receive offload of %s off: %w: `ethtool -K %s lro off`", ifname, err, ifname)
	}
	return nil
}

// ethFlagLRO is ETH_FLAG_LRO of linux/ethtool.h.
const ethFlagLRO = 1 << 15

// driver returns the name of an interface's driver, "" if it does not say.
func driver(ifname string) string {
	info := ethtoolDrvinfo{cmd: unix.ETHTOOL_GDRVINFO}
	// info is alive and a struct ethtool_drvinfo.
	if err := ethtool(ifname, unsafe.Pointer(&info)); err != nil {
		return ""
	}
	return unix.ByteSliceToString(info.driver[:])
}
