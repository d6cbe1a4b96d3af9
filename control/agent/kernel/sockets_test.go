package kernel

import (
	"net"
	"testing"

	"github.com/stretchr/testify/require"
)

// Sockets on the loopback interface are found by what they are: no root is needed for one's own namespace.
func TestPortsOfSockets(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		listener, err := net.Listen("tcp", address)
		require.NoError(t, err)
		defer listener.Close()
		client, err := net.Dial("tcp", listener.Addr().String())
		require.NoError(t, err)
		defer client.Close()
		packets, err := net.ListenPacket("udp", address)
		require.NoError(t, err)
		defer packets.Close()
		port := func(a net.Addr) uint16 {
			switch a := a.(type) {
			case *net.TCPAddr:
				return uint16(a.Port)
			case *net.UDPAddr:
				return uint16(a.Port)
			}
			return 0
		}
		tcp, udp, err := BoundPorts()
		require.NoError(t, err)
		require.Contains(t, tcp, port(listener.Addr()))
		require.NotContains(t, tcp, port(client.LocalAddr()))
		require.Contains(t, udp, port(packets.LocalAddr()))
		connections, err := ConnectionPorts()
		require.NoError(t, err)
		require.Contains(t, connections, port(client.LocalAddr()))
	}
}
