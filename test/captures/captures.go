// Package captures holds packets captured in the lab (overplane lab), for tests to replay and fuzzers to start from:
//
//	pod.pcap   what pod n1-p1 sent and received: GSO frames among it, cut off after 2,000 bytes
//	wire.pcap  what crossed the wire of node n1 meanwhile
//
// Pings of pods, nodes, the gateway, outside and unused addresses, one of them fragmented; traceroutes; ARP and neighbour discovery; TCP and UDP; both families.
//
//	outside-pod.pcap   what pod n1-p1 sent to the host outside and received, its device without offloads
//	outside-wire.pcap  what crossed the wire of node n1 meanwhile, translated
//
// Pings and datagrams, whole and in fragments; a TCP connection from SYN to FIN; a traceroute; errors about a closed port and a smaller MTU; both families. The pod's ports and
// identifiers lie in the translated range, and port choice was "preserve": whoever replays them so gets the same ports.
package captures

import (
	"bytes"
	"embed"
	"slices"
	"time"

	"github.com/google/gopacket/pcapgo"
)

//go:embed *.pcap
var files embed.FS

// Each calls f with every captured frame, as many bytes of it as were captured. f may keep and change them. It panics if a capture cannot be read: they
// are part of the program.
func Each(f func(frame []byte)) {
	for _, name := range []string{"pod.pcap", "wire.pcap", "outside-pod.pcap", "outside-wire.pcap"} {
		read(name, func(frame []byte, _ time.Time) { f(frame) })
	}
}

// Frame is a captured frame and where it was seen.
type Frame struct {
	Bytes []byte
	Wire  bool // on the node's wire; else at the pod
	at    time.Time
}

// Outside are the frames of outside-pod.pcap and outside-wire.pcap in the order of their times, which one clock gave. Like Each it panics, and what it returns is the caller's.
func Outside() (all []Frame) {
	for _, wire := range []bool{false, true} {
		name := map[bool]string{false: "outside-pod.pcap", true: "outside-wire.pcap"}[wire]
		read(name, func(frame []byte, at time.Time) { all = append(all, Frame{frame, wire, at}) })
	}
	slices.SortStableFunc(all, func(a, b Frame) int { return a.at.Compare(b.at) })
	return all
}

func read(name string, f func(frame []byte, at time.Time)) {
	b, err := files.ReadFile(name)
	if err != nil {
		panic(err)
	}
	r, err := pcapgo.NewReader(bytes.NewReader(b))
	if err != nil {
		panic(name + ": " + err.Error())
	}
	for frame, info, err := r.ReadPacketData(); err == nil; frame, info, err = r.ReadPacketData() {
		f(frame, info.Timestamp)
	}
}
