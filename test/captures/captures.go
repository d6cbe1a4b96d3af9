// Package captures holds packets captured in the lab (overplane lab), for tests to replay and fuzzers to start from:
//
//	pod.pcap   what pod n1-p1 sent and received: GSO frames among it, cut off after 2,000 bytes
//	wire.pcap  what crossed the wire of node n1 meanwhile
//
// Pings of pods, nodes, the gateway, outside and unused addresses, one of them fragmented; traceroutes; ARP and neighbour discovery; TCP and UDP; both families.
package captures

import (
	"bytes"
	"embed"

	"github.com/google/gopacket/pcapgo"
)

//go:embed *.pcap
var files embed.FS

// Each calls f with every captured frame, as many bytes of it as were captured. f may keep and change them. It panics if a capture cannot be read: they
// are part of the program.
func Each(f func(frame []byte)) {
	for _, name := range []string{"pod.pcap", "wire.pcap"} {
		b, err := files.ReadFile(name)
		if err != nil {
			panic(err)
		}
		r, err := pcapgo.NewReader(bytes.NewReader(b))
		if err != nil {
			panic(name + ": " + err.Error())
		}
		for frame, _, err := r.ReadPacketData(); err == nil; frame, _, err = r.ReadPacketData() {
			f(frame)
		}
	}
}
