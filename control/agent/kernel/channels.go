package kernel

import (
	"encoding/binary"
	"errors"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// genlHeader is struct genlmsghdr: command, version, and two reserved bytes that are zero. (The library's own type is two bytes short and sends what lies
// behind it.)
type genlHeader [4]byte

func (h genlHeader) Len() int          { return len(h) }
func (h genlHeader) Serialize() []byte { return h[:] }

// genl sends one generic netlink request and returns the attributes of the answer.
func genl(family uint16, h genlHeader, attr *nl.RtAttr) ([]syscall.NetlinkRouteAttr, error) {
	req := nl.NewNetlinkRequest(int(family), 0)
	req.AddData(h)
	req.AddData(attr)
	msgs, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil {
		return nil, err
	}
	if len(msgs) != 1 || len(msgs[0]) < len(h) {
		return nil, errors.New("generic netlink: unexpected answer")
	}
	return nl.ParseRouteAttr(msgs[0][len(h):])
}

// ethtoolFamily is the number of the generic netlink family, the same in all namespaces.
var ethtoolFamily = sync.OnceValues(func() (uint16, error) {
	attrs, err := genl(unix.GENL_ID_CTRL, genlHeader{unix.CTRL_CMD_GETFAMILY, 1}, nl.NewRtAttr(unix.CTRL_ATTR_FAMILY_NAME, nl.ZeroTerminated(unix.ETHTOOL_GENL_NAME)))
	if err != nil {
		return 0, err
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.CTRL_ATTR_FAMILY_ID && len(a.Value) >= 2 {
			return binary.NativeEndian.Uint16(a.Value), nil
		}
	}
	return 0, errors.New("generic netlink: family without a number")
})

// channels asks for the queues in use (ETHTOOL_MSG_CHANNELS_GET). Drivers without the notion answer EOPNOTSUPP.
func channels(index int) (rx, tx int, err error) {
	id, err := ethtoolFamily()
	if err != nil {
		return 0, 0, err
	}
	header := nl.NewRtAttr(unix.ETHTOOL_A_CHANNELS_HEADER|unix.NLA_F_NESTED, nil)
	header.AddRtAttr(unix.ETHTOOL_A_HEADER_DEV_INDEX, nl.Uint32Attr(uint32(index)))
	attrs, err := genl(id, genlHeader{unix.ETHTOOL_MSG_CHANNELS_GET, unix.ETHTOOL_GENL_VERSION}, header)
	if err != nil {
		return 0, 0, err
	}
	for _, a := range attrs {
		if len(a.Value) < 4 {
			continue
		}
		n := int(binary.NativeEndian.Uint32(a.Value))
		switch a.Attr.Type {
		case unix.ETHTOOL_A_CHANNELS_RX_COUNT:
			rx += n
		case unix.ETHTOOL_A_CHANNELS_TX_COUNT:
			tx += n
		case unix.ETHTOOL_A_CHANNELS_COMBINED_COUNT:
			rx += n
			tx += n
		}
	}
	if rx == 0 || tx == 0 {
		return 0, 0, errors.New("the driver reports no queues")
	}
	return rx, tx, nil
}

// setChannels sets the queues in use, receiving and transmitting (ETHTOOL_MSG_CHANNELS_SET), if they are others.
func setChannels(index, n int) error {
	if rx, tx, err := channels(index); err == nil && rx == n && tx == n {
		return nil
	}
	return ethtoolSet(unix.ETHTOOL_MSG_CHANNELS_SET, index, unix.ETHTOOL_A_CHANNELS_HEADER,
		nl.NewRtAttr(unix.ETHTOOL_A_CHANNELS_RX_COUNT, nl.Uint32Attr(uint32(n))),
		nl.NewRtAttr(unix.ETHTOOL_A_CHANNELS_TX_COUNT, nl.Uint32Attr(uint32(n))))
}

// disableFeatures turns offloads off that are named as ethtool(8) names them (ETHTOOL_MSG_FEATURES_SET, Linux 5.8). Those that are off, or that the
// device does not have, stay so.
func disableFeatures(index int, names ...string) error {
	wanted := nl.NewRtAttr(unix.ETHTOOL_A_FEATURES_WANTED|unix.NLA_F_NESTED, nil)
	bits := wanted.AddRtAttr(unix.ETHTOOL_A_BITSET_BITS|unix.NLA_F_NESTED, nil)
	for _, name := range names {
		// A bit that is listed without ETHTOOL_A_BITSET_BIT_VALUE is to be cleared; one that is not listed stays.
		bit := bits.AddRtAttr(unix.ETHTOOL_A_BITSET_BITS_BIT|unix.NLA_F_NESTED, nil)
		bit.AddRtAttr(unix.ETHTOOL_A_BITSET_BIT_NAME, nl.ZeroTerminated(name))
	}
	return ethtoolSet(unix.ETHTOOL_MSG_FEATURES_SET, index, unix.ETHTOOL_A_FEATURES_HEADER, wanted)
}

// ethtoolSet sends a request that changes the interface with an index. header is the type of the attribute that says which it is.
func ethtoolSet(command uint8, index, header int, attrs ...*nl.RtAttr) error {
	id, err := ethtoolFamily()
	if err != nil {
		return err
	}
	req := nl.NewNetlinkRequest(int(id), unix.NLM_F_ACK)
	req.AddData(genlHeader{command, unix.ETHTOOL_GENL_VERSION})
	which := nl.NewRtAttr(header|unix.NLA_F_NESTED, nil)
	which.AddRtAttr(unix.ETHTOOL_A_HEADER_DEV_INDEX, nl.Uint32Attr(uint32(index)))
	req.AddData(which)
	for _, a := range attrs {
		req.AddData(a)
	}
	_, err = req.Execute(unix.NETLINK_GENERIC, 0)
	return err
}
