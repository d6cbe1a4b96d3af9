package lab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
)

// The lab's address plan. IPv6 host parts of the underlay are the IPv4 ones read as text (10.240.0.11 is fd00:240::11).
const (
	underlayPrefix4 = "10.240.0.0/24"
	underlayPrefix6 = "fd00:240::/64"
	gatewayIPv4     = "10.240.0.1"
	gatewayIPv6     = "fd00:240::1"

	extGatewayIPv4 = "198.51.100.1"
	extGatewayIPv6 = "2001:db8:100::1"
	extIPv4        = "198.51.100.10"
	extIPv6        = "2001:db8:100::10"

	poolIPv4        = "10.244.0.0/16"
	poolIPv6        = "fd12:3456:789a::/64"
	blockBitsIPv4   = 24
	blockBitsIPv6   = 80
	firstNodeHost   = 11 // 10.240.0.11 is n1
	firstPodIndex   = 2  // p1's index within its block
	maxNodeNumber   = 254 - firstNodeHost + 1
	maxPodsPerNode  = 250
	workersLimit    = 16
	queuesLimit     = 64
	maxUnderlayMTU  = 65535
	minUnderlayMTU  = 1280
	defaultLabName  = "ovp"
	maxLabNameRunes = 8 // prefix of interface-length-limited names elsewhere, and of namespaces
)

// nodeIPv4 and nodeIPv6 are the underlay addresses of node number n, n >= 1.
func nodeIPv4(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 240, 0, byte(firstNodeHost - 1 + n)})
}
func nodeIPv6(n int) netip.Addr {
	return netip.MustParseAddr(fmt.Sprintf("fd00:240::%d", firstNodeHost-1+n))
}

// nodeMAC is the uplink address of node number n: locally administered, unicast, the same in every run.
func nodeMAC(n int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x4f, 0x56, 0x00, byte(n >> 8), byte(n)}
}

// gatewayMAC is the address of the bridge in the gw namespace.
func gatewayMAC() net.HardwareAddr { return net.HardwareAddr{0x02, 0x4f, 0x56, 0xff, 0x00, 0x01} }

// blockIPv4 and blockIPv6 are block number b of the default pools.
func blockIPv4(b int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(b), 0}), blockBitsIPv4)
}

func blockIPv6(b int) netip.Prefix {
	a := netip.MustParsePrefix(poolIPv6).Addr().As16()
	binary.BigEndian.PutUint16(a[8:], uint16(b))
	return netip.PrefixFrom(netip.AddrFrom16(a), blockBitsIPv6)
}

// addrAt is the address with the index within a block. Both families' addresses of a pod have the same.
func addrAt(block netip.Prefix, index int) netip.Addr {
	b := block.Addr().AsSlice()
	binary.BigEndian.PutUint16(b[len(b)-2:], binary.BigEndian.Uint16(b[len(b)-2:])+uint16(index))
	a, _ := netip.AddrFromSlice(b)
	return a
}
