package xdp

import (
	"encoding/binary"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// attachedProgram returns the id of the XDP program on an interface of the current network namespace, 0 if it has none. BPF_PROG_QUERY does
// not know XDP and links show only what was attached as one: the link's route attributes are the only place where the kernel tells. The standard
// library's reader, the one under package net, is enough for that.
func attachedProgram(ifindex int) (uint32, error) {
	rib, err := syscall.NetlinkRIB(syscall.RTM_GETLINK, syscall.AF_UNSPEC)
	if err != nil {
		return 0, fmt.Errorf("xdp: asking for attached programs: %w", err)
	}
	msgs, err := syscall.ParseNetlinkMessage(rib)
	if err != nil {
		return 0, fmt.Errorf("xdp: asking for attached programs: %w", err)
	}
	for i := range msgs {
		m := &msgs[i]
		if m.Header.Type != syscall.RTM_NEWLINK || len(m.Data) < syscall.SizeofIfInfomsg ||
			int(int32(binary.NativeEndian.Uint32(m.Data[4:]))) != ifindex {
			continue
		}
		attrs, err := syscall.ParseNetlinkRouteAttr(m)
		if err != nil {
			return 0, fmt.Errorf("xdp: asking for attached programs: %w", err)
		}
		for _, a := range attrs {
			if a.Attr.Type&^unix.NLA_F_NESTED == unix.IFLA_XDP {
				return xdpAttrProgram(a.Value), nil
			}
		}
		return 0, nil
	}
	return 0, fmt.Errorf("xdp: no interface with index %d", ifindex)
}

// xdpAttrProgram reads the first program id out of a nested IFLA_XDP attribute.
func xdpAttrProgram(b []byte) uint32 {
	for len(b) >= 4 {
		n := int(binary.NativeEndian.Uint16(b))
		if n < 4 || n > len(b) {
			return 0
		}
		switch binary.NativeEndian.Uint16(b[2:]) {
		case unix.IFLA_XDP_PROG_ID, unix.IFLA_XDP_DRV_PROG_ID, unix.IFLA_XDP_SKB_PROG_ID, unix.IFLA_XDP_HW_PROG_ID:
			if n >= 8 {
				if id := binary.NativeEndian.Uint32(b[4:]); id != 0 {
					return id
				}
			}
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return 0
}
