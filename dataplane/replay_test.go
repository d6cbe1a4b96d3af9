package dataplane

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/dataplane/port"
	"github.com/overplane/overplane/snat"
	"github.com/overplane/overplane/test/captures"
)

// comparable is a copy of a frame without what may differ from run to run: identifications, and the header checksum that covers one.
func comparable(b []byte) []byte {
	b = append([]byte(nil), b...)
	switch {
	case b[12] == 0x08:
		clear(b[18:20])
		clear(b[24:26])
	case b[20] == packet.ProtoFragment:
		clear(b[58:62])
	}
	return b
}

// tcpData tells TCP segments with much data. On their way to the pod two became one in the lab.
func tcpData(b []byte) bool {
	protocol := map[bool]byte{true: b[23], false: b[20]}[b[12] == 0x08]
	return protocol == packet.ProtoTCP && len(b) > 200
}

// What a pod sent in the lab, and what came back to its node, becomes here byte for byte what it became there.
func TestCapturedTranslationIsReplayed(t *testing.T) {
	n := newNode(t, withPodCaps(noCaps), func(n *node) {
		a, err := snat.NewAllocator(snat.AllocatorConfig{First: 10000, Last: 29999, MaxPods: 4})
		require.NoError(t, err)
		n.translator, err = snat.New(snat.Config{Sessions4: 256, Sessions6: 256, FragmentedDatagrams: 64, HeldFragments: 16, Choice: snat.ChoosePreserve}, a)
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, n.translator.Close()) })
	})
	var out, in [][]byte // as captured
	var sent, received [][]byte
	protocols := map[byte]int{}
	for _, f := range captures.Outside() {
		switch src := packet.MAC(f.Bytes[6:12]); {
		case !f.Wire && src == podMACs[0]:
			require.NoError(t, n.pods[0].Inject(0, f.Bytes, port.Offload{}))
		case f.Wire && src == routerMAC:
			require.NoError(t, n.uplink.Inject(0, f.Bytes, port.Offload{}))
		case f.Wire && src == uplinkMAC:
			out = append(out, comparable(f.Bytes))
			continue
		case !f.Wire && src == gatewayMAC:
			if !tcpData(f.Bytes) {
				in = append(in, comparable(f.Bytes))
			}
			continue
		default:
			t.Fatalf("whose frame is this? %x", f.Bytes)
		}
		n.poll()
		for _, s := range n.uplink.Sent(0) {
			sent = append(sent, comparable(s.Bytes))
		}
		for _, s := range n.pods[0].Sent(0) {
			if !tcpData(s.Bytes) {
				received = append(received, comparable(s.Bytes))
			}
			var p packet.Packet
			packet.Parse(&p, s.Bytes, len(s.Bytes))
			protocols[p.Proto]++
		}
	}
	require.Equal(t, len(out), len(sent))
	for i := range out {
		require.Equal(t, out[i], sent[i], "packet %d to outside", i)
	}
	require.Equal(t, len(in), len(received))
	for i := range in {
		require.Equal(t, in[i], received[i], "packet %d to the pod", i)
	}
	require.Empty(t, n.host.Sent(0))
	for _, proto := range []byte{packet.ProtoTCP, packet.ProtoUDP, packet.ProtoICMP, packet.ProtoICMPv6} {
		require.Positive(t, protocols[proto])
	}
	require.GreaterOrEqual(t, n.translator.Counts().ErrorsIn, uint64(8), "two from a router and two from the host, of each family")
}
