package agent

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"strconv"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane"
	"github.com/overplane/overplane/dataplane/packet"
	"github.com/overplane/overplane/snat"
)

const (
	defaultSessions = 10000
	// sessionPiece is how many records a worker looks at between two polls: some tens of microseconds' work.
	sessionPiece = 1024
	// saturatedShare of the ports that a pod may have makes a destination worth a word.
	saturatedShare = 0.8
)

var protocols = map[uint8]string{packet.ProtoTCP: "tcp", packet.ProtoUDP: "udp", packet.ProtoICMP: "icmp", packet.ProtoICMPv6: "icmpv6",
	packet.ProtoSCTP: "sctp", packet.ProtoESP: "esp", 47: "gre"}

func protocolName(p uint8) string { return cmp.Or(protocols[p], strconv.Itoa(int(p))) }

// eachSession calls f for all sessions of all workers until it returns false.
func (a *Agent) eachSession(ctx context.Context, workers int, f func(worker int, s *snat.Session) bool) error {
	for w := range workers {
		var at snat.Cursor
		for !at.Done {
			piece := make([]snat.Session, 0, sessionPiece)
			if err := a.dp.Ask(ctx, w, func(t *snat.Translator, _ *dataplane.WorkerStats) {
				if t == nil {
					at.Done = true
					return
				}
				piece, at = t.Snapshot(piece, at, sessionPiece)
			}); err != nil {
				return err
			}
			for i := range piece {
				if !f(w, &piece[i]) {
					return nil
				}
			}
		}
	}
	return nil
}

// podsByIndex are the pods' names by their index for translation, and the number of workers.
func (s *service) podsByIndex(ctx context.Context) (names map[int]string, workers int, err error) {
	names = map[int]string{}
	err = s.do(ctx, func() error {
		for _, p := range s.a.pods {
			names[p.slot-dataplane.FirstPodSlot] = p.rec.Name
		}
		workers = len(s.a.pools)
		return nil
	})
	return names, workers, err
}

func (s *service) ListSessions(ctx context.Context, r *controlv1.ListSessionsRequest) (*controlv1.ListSessionsResponse, error) {
	var address packet.Addr
	if r.GetAddress() != "" {
		a, err := netip.ParseAddr(r.GetAddress())
		if err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "address: %v", err)
		}
		address = packet.AddrFrom(a.Unmap())
	}
	names, workers, err := s.podsByIndex(ctx)
	if err != nil {
		return nil, err
	}
	limit := int(cmp.Or(r.GetLimit(), defaultSessions))
	out := &controlv1.ListSessionsResponse{}
	err = s.a.eachSession(ctx, workers, func(worker int, x *snat.Session) bool {
		proto, pod := protocolName(x.Proto), names[x.Pod]
		if r.GetPod() != "" && pod != r.GetPod() || r.GetProtocol() != "" && proto != r.GetProtocol() ||
			address != (packet.Addr{}) && address != x.Inside && address != x.Remote {
			return true
		}
		if len(out.Sessions) == limit {
			out.Truncated = true
			return false
		}
		if x.Pin {
			x.State = "pinned"
		}
		out.Sessions = append(out.Sessions, &controlv1.Session{
			Protocol: proto, Inside: endpoint(x.Inside, x.InsidePort), External: endpoint(x.External, x.ExternalPort), Remote: endpoint(x.Remote, x.RemotePort),
			Pod: pod, State: x.State, AgeSeconds: uint64(x.Age.Seconds()), LeftSeconds: uint64(x.Left.Seconds()),
			PacketsOut: x.PacketsOut, PacketsIn: x.PacketsIn, Worker: uint32(worker),
		})
		return true
	})
	if err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return out, nil
}

func endpoint(a packet.Addr, port uint16) string {
	if a == (packet.Addr{}) {
		return ""
	}
	return netip.AddrPortFrom(a.Netip(), port).String()
}

func (s *service) GetSnat(ctx context.Context, _ *controlv1.GetSnatRequest) (*controlv1.GetSnatResponse, error) {
	names, workers, err := s.podsByIndex(ctx)
	if err != nil {
		return nil, err
	}
	out := &controlv1.GetSnatResponse{}
	var alloc *snat.Allocator
	err = s.do(ctx, func() error {
		a, t := s.a, s.a.translation
		node4, node6 := primaryAddresses(a.facts, a.cfg.Node4(), a.cfg.Node6())
		out.Enabled = a.state != nil && !a.state.noSNAT
		out.Mapping, out.FirstPort, out.LastPort = t.settings.mapping.String(), uint32(t.settings.first), uint32(t.settings.last)
		out.Ipv4, out.Ipv6 = addressList(node4), addressList(node6)
		for _, p := range t.hostTCP {
			out.HostTcpPorts = append(out.HostTcpPorts, uint32(p))
		}
		for _, p := range t.hostUDP {
			out.HostUdpPorts = append(out.HostUdpPorts, uint32(p))
		}
		for _, p := range a.noMasquerade() {
			out.NoMasqueradeCidrs = append(out.NoMasqueradeCidrs, p.String())
		}
		out.NoMasqueradeFiles = slices.Clone(a.masq.files)
		alloc = t.alloc
		return nil
	})
	if err != nil {
		return nil, err
	}
	pods := map[int]*controlv1.SnatPod{}
	for i, name := range names {
		pods[i] = &controlv1.SnatPod{Pod: name}
	}
	for w := range workers {
		m := &controlv1.SnatWorker{Worker: uint32(w)}
		var st snat.Stats
		var counts snat.Counts
		if err := s.a.dp.Ask(ctx, w, func(t *snat.Translator, ws *dataplane.WorkerStats) {
			st, counts = t.Stats(), t.Counts()
			m.HandedOver = ws.HandedOver
			m.Pins, m.Flushed, m.HostPort = uint32(st.Pins), counts.Flushed, counts.HostPort
		}); err != nil {
			return nil, status.Error(codes.Unavailable, err.Error())
		}
		m.SessionsIpv4, m.SessionsIpv6, m.CapacityIpv4, m.CapacityIpv6 = uint32(st.Sessions4), uint32(st.Sessions6), uint32(st.Capacity4), uint32(st.Capacity6)
		m.HalfOpen, m.Fragmented, m.HeldFragments = uint32(st.HalfOpen4+st.HalfOpen6), uint32(st.Fragmented), uint32(st.Held)
		m.Created, m.Expired, m.Ended, m.ErrorsIn, m.ErrorsOut = counts.Created, counts.Expired, counts.Ended, counts.ErrorsIn, counts.ErrorsOut
		out.Workers = append(out.Workers, m)
		for i, p := range pods {
			if i < len(st.PodSessions4)-1 {
				p.SessionsIpv4 += uint32(st.PodSessions4[i])
				p.SessionsIpv6 += uint32(st.PodSessions6[i])
			}
		}
	}
	for class := range snat.NumClasses {
		u := alloc.Usage(class)
		for i, p := range pods {
			if i >= len(u.PerPod) {
				continue
			}
			ports, limit := uint32(u.PerPod[i]), uint32(u.Limit[i])
			switch class {
			case snat.ClassTCP:
				p.TcpPorts, p.TcpLimit = ports, limit
			case snat.ClassUDP:
				p.UdpPorts, p.UdpLimit = ports, limit
			case snat.ClassICMP:
				p.IcmpIdentifiers, p.IcmpLimit = ports, limit
			}
		}
	}
	for _, p := range pods {
		out.Pods = append(out.Pods, p)
	}
	slices.SortFunc(out.Pods, func(a, b *controlv1.SnatPod) int { return cmp.Compare(a.Pod, b.Pod) })
	var list []snat.Session
	if err := s.a.eachSession(ctx, workers, func(_ int, x *snat.Session) bool { list = append(list, *x); return true }); err != nil {
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	for _, d := range snat.Saturation(list, alloc, saturatedShare) {
		out.Saturated = append(out.Saturated, &controlv1.SnatDestination{Pod: names[d.Pod], Protocol: protocolName(d.Proto),
			Remote: endpoint(d.Remote, d.Port), Ports: uint32(d.Ports), Limit: uint32(d.Limit)})
	}
	slices.SortFunc(out.Saturated, func(a, b *controlv1.SnatDestination) int {
		return cmp.Or(cmp.Compare(b.Ports, a.Ports), cmp.Compare(a.Pod, b.Pod), cmp.Compare(a.Remote, b.Remote))
	})
	return out, nil
}
