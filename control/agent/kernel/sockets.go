package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The states of TCP sockets, as bits (enum tcp_state of include/net/tcp_states.h).
const (
	tcpListen = 1 << 10
	tcpAll    = 1<<12 - 1
)

// BoundPorts lists the ports that sockets in the caller's namespace hold, of both families, by sock_diag: TCP's that listen, and UDP's. A port may appear more than once.
func BoundPorts() (tcp, udp []uint16, err error) {
	tcp, err = socketPorts(unix.IPPROTO_TCP, tcpListen)
	udp, errUDP := socketPorts(unix.IPPROTO_UDP, tcpAll)
	return tcp, udp, errors.Join(err, errUDP)
}

// ConnectionPorts lists the ports of the other TCP sockets, likewise. It is dear: the kernel goes through a table of connections that grows with the machine's memory, whatever is in it,
// for some milliseconds. A socket that is bound and neither listens nor connects is not listed.
func ConnectionPorts() ([]uint16, error) { return socketPorts(unix.IPPROTO_TCP, tcpAll&^tcpListen) }

// socketPorts asks for the sockets of a protocol in some states.
func socketPorts(protocol uint8, states uint32) (ports []uint16, err error) {
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		r := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		r.AddData(&diagRequest{family, protocol, states})
		messages, e := r.Execute(unix.NETLINK_INET_DIAG, 0)
		if e != nil && !errors.Is(e, netlink.ErrDumpInterrupted) {
			err = errors.Join(err, fmt.Errorf("kernel: listing sockets of protocol %d, family %d: %w", protocol, family, e))
			continue
		}
		for _, m := range messages {
			// struct inet_diag_msg: four bytes, then the source port in network order.
			if len(m) < 6 {
				continue
			}
			if port := binary.BigEndian.Uint16(m[4:]); port != 0 {
				ports = append(ports, port)
			}
		}
	}
	return ports, err
}

// diagRequest is struct inet_diag_req_v2 of include/uapi/linux/inet_diag.h, for sockets between any addresses.
type diagRequest struct {
	family, protocol uint8
	states           uint32
}

const diagRequestLen = 56

func (*diagRequest) Len() int { return diagRequestLen }

func (r *diagRequest) Serialize() []byte {
	b := make([]byte, diagRequestLen)
	b[0], b[1] = r.family, r.protocol
	binary.NativeEndian.PutUint32(b[4:], r.states)
	return b
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
