package view

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

func TestSessions(t *testing.T) {
	var out strings.Builder
	require.NoError(t, Sessions(&out, &controlv1.ListSessionsResponse{}))
	require.Equal(t, "no sessions\n", out.String())
	out.Reset()
	require.NoError(t, Sessions(&out, &controlv1.ListSessionsResponse{Truncated: true, Sessions: []*controlv1.Session{
		{Pod: "b", Protocol: "udp", Inside: "10.244.1.3:1", External: "10.240.0.11:10001", Remote: "192.0.2.1:53", State: "active", AgeSeconds: 5, LeftSeconds: 295, PacketsOut: 2, PacketsIn: 1},
		{Pod: "a", Protocol: "tcp", Inside: "10.244.1.2:1", External: "10.240.0.11:10002", Remote: "192.0.2.1:80", State: "established", AgeSeconds: 61, LeftSeconds: 7440},
	}}))
	lines := strings.Split(out.String(), "\n")
	require.Len(t, lines, 5)
	require.Regexp(t, `^a +tcp +10.244.1.2:1 +10.240.0.11:10002 +192.0.2.1:80 +established +1m1s +2h4m0s +0 +0$`, lines[1])
	require.Regexp(t, `^b +udp .* 5s +4m55s +2 +1$`, lines[2])
	require.Equal(t, "2 sessions, and there are more: filter, or raise --limit", lines[3])
}

func TestSNAT(t *testing.T) {
	var out strings.Builder
	require.NoError(t, SNAT(&out, &controlv1.GetSnatResponse{Enabled: true, Mapping: "address-and-port-dependent", Ipv4: "10.240.0.11", FirstPort: 10000, LastPort: 29999, HostTcpPorts: []uint32{10250},
		Workers:   []*controlv1.SnatWorker{{SessionsIpv4: 3, CapacityIpv4: 100, CapacityIpv6: 100, HandedOver: 7}},
		Pods:      []*controlv1.SnatPod{{Pod: "a", SessionsIpv4: 3, TcpPorts: 16, TcpLimit: 20000}},
		Saturated: []*controlv1.SnatDestination{{Pod: "a", Protocol: "tcp", Remote: "192.0.2.1:80", Ports: 18000, Limit: 20000}}}))
	for _, want := range []string{"translation  on\n", "TCP [10250], UDP []", "3 of 100", "16 of 20000", "a has 18000 of 20000 tcp ports in use towards 192.0.2.1:80\n"} {
		require.Contains(t, out.String(), want)
	}
	out.Reset()
	require.NoError(t, SNAT(&out, &controlv1.GetSnatResponse{}))
	require.Contains(t, out.String(), "off: pods leave with their own addresses")
}
