package xdp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"

	"github.com/overplane/overplane/dataplane/port/xdp/bpf"
)

// MaxFlows is how many flows the steering recognises by their far end.
const MaxFlows = 65536

// Flow is a translated flow of a protocol whose packets show no port of ours: SCTP, by its ports, or ESP and GRE, by the far end's address alone.
type Flow struct {
	Proto                uint8
	Remote               netip.Addr
	RemotePort, NodePort uint16 // SCTP; else 0
}

func (f *Flow) key() bpf.SteerSteerFlow {
	k := bpf.SteerSteerFlow{Proto: f.Proto, Family: 4}
	var a [16]byte
	if f.Remote.Is4() {
		copy(a[:], f.Remote.AsSlice())
	} else {
		a, k.Family = f.Remote.As16(), 6
	}
	k.Remote[0], k.Remote[1] = binary.NativeEndian.Uint64(a[:]), binary.NativeEndian.Uint64(a[8:])
	var p [4]byte
	binary.BigEndian.PutUint16(p[:], f.RemotePort)
	binary.BigEndian.PutUint16(p[2:], f.NodePort)
	k.RemotePort, k.NodePort = binary.NativeEndian.Uint16(p[:]), binary.NativeEndian.Uint16(p[2:])
	return k
}

// AddFlow gives the data plane the packets that the far end of a flow sends to the node's address. It may be called by a worker: it is one system call that does not block, and
// takes no lock that anything slow holds. A full table is an error.
func (s *Steering) AddFlow(f Flow) error {
	k, one := f.key(), uint32(1)
	if err := s.flows.Put(&k, &one); err != nil {
		return fmt.Errorf("xdp: steering: adding a flow of protocol %d with %s: %w", f.Proto, f.Remote, err)
	}
	return nil
}

// RemoveFlow is the reverse of AddFlow; a flow that is not there is no error.
func (s *Steering) RemoveFlow(f Flow) error {
	k := f.key()
	if err := s.flows.Delete(&k); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("xdp: steering: removing a flow of protocol %d with %s: %w", f.Proto, f.Remote, err)
	}
	return nil
}

// Flows lists the flows, also those that an earlier process added. While workers add some it may miss those.
func (s *Steering) Flows() (out []Flow, err error) {
	var k bpf.SteerSteerFlow
	var value uint32
	it := s.flows.Iterate()
	for it.Next(&k, &value) {
		out = append(out, flowOf(&k))
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("xdp: steering: reading the flows: %w", err)
	}
	return out, nil
}

func flowOf(k *bpf.SteerSteerFlow) Flow {
	var a [16]byte
	binary.NativeEndian.PutUint64(a[:], k.Remote[0])
	binary.NativeEndian.PutUint64(a[8:], k.Remote[1])
	var p [4]byte
	binary.NativeEndian.PutUint16(p[:], k.RemotePort)
	binary.NativeEndian.PutUint16(p[2:], k.NodePort)
	f := Flow{Proto: k.Proto, Remote: netip.AddrFrom16(a), RemotePort: binary.BigEndian.Uint16(p[:]), NodePort: binary.BigEndian.Uint16(p[2:])}
	if k.Family == 4 {
		f.Remote = netip.AddrFrom4([4]byte(a[:]))
	}
	return f
}
