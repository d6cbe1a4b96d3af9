package kernel

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// BoundPorts lists the ports, TCP's and UDP's, that sockets in the caller's namespace hold, of both families, by sock_diag. A port may appear more than once. A
// TCP socket that is bound and neither listens nor connects is not listed: the kernel has it in no table that it shows.
func BoundPorts() (tcp, udp []uint16, err error) {
	list := func(out *[]uint16, what string, ask func(uint8) ([]*netlink.Socket, error)) {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			sockets, e := ask(family)
			if e != nil && !errors.Is(e, netlink.ErrDumpInterrupted) {
				err = errors.Join(err, fmt.Errorf("kernel: listing %s sockets: %w", what, e))
				continue
			}
			for _, s := range sockets {
				if s.ID.SourcePort != 0 {
					*out = append(*out, s.ID.SourcePort)
				}
			}
		}
	}
	list(&tcp, "TCP", netlink.SocketDiagTCP)
	list(&udp, "UDP", netlink.SocketDiagUDP)
	return tcp, udp, err
}

const reservedPorts = "/proc/sys/net/ipv4/ip_local_reserved_ports"

// ReservePorts adds a range to net.ipv4.ip_local_reserved_ports of the caller's namespace, so that the kernel chooses none of them for sockets that name no port. Ranges that
// are there stay.
func ReservePorts(first, last uint16) error {
	have, err := os.ReadFile(reservedPorts)
	if err != nil {
		return fmt.Errorf("kernel: reading reserved ports: %w", err)
	}
	want := fmt.Sprintf("%d-%d", first, last)
	ranges := strings.Split(strings.TrimSpace(string(have)), ",")
	if ranges[0] == "" {
		ranges = nil
	}
	for _, r := range ranges {
		if r == want {
			return nil
		}
	}
	if err := os.WriteFile(reservedPorts, []byte(strings.Join(append(ranges, want), ",")), 0o644); err != nil {
		return fmt.Errorf("kernel: reserving ports %s: %w", want, err)
	}
	return nil
}
