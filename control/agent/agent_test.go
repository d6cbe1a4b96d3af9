package agent

import (
	"errors"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane/packet"
)

func TestStateIsProgrammedWhenReplaceStateAnswers(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	s := n.status()
	require.False(t, s.GetReady())
	require.Contains(t, s.GetProblems()[0], "waiting for one to be pushed")

	n.push(threeNodes())
	s = n.status()
	require.Empty(t, s.GetProblems())
	require.True(t, s.GetReady())
	require.EqualValues(t, 5, s.GetProgrammed().GetRevision())
	require.EqualValues(t, 3, s.GetMemberCount())
	require.Equal(t, "xdp-copy", s.GetUplink().GetRung())
	require.Equal(t, "xdp-zerocopy", s.GetUplink().GetWhyNotMore()[0].GetRung())
	require.Len(t, s.GetWorkers(), 2)
	for _, w := range s.GetWorkers() {
		require.Equal(t, s.GetWorkers()[0].GetSnapshot(), w.GetSnapshot())
		require.NotZero(t, w.GetFramesTotal())
	}
	r := n.routes()
	require.Equal(t, "n2", r["10.244.2.0/24"].GetTarget())
	require.Equal(t, "node", r["10.244.2.0/24"].GetKind())
	require.Equal(t, "02:00:00:00:00:02", r["10.244.2.0/24"].GetMac())
	require.Equal(t, "member", r["10.240.0.13/32"].GetKind())
	require.Equal(t, "unreachable", r["10.244.0.0/16"].GetKind())
	require.Equal(t, []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd12:3456:789a::/64")}, n.plat.host.PodCIDRs)
	last := n.plat.plans[len(n.plat.plans)-1]
	require.Equal(t, []packet.MAC{{2, 0, 0, 0, 0, 2}, {2, 0, 0, 0, 0, 3}}, last.Members)
}

func TestReplaceStateRefusals(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	for _, c := range []struct {
		name   string
		change func(*controlv1.NodeState)
		code   codes.Code
		text   string
	}{
		{"another node's", func(s *controlv1.NodeState) { s.Node = "n2" }, codes.InvalidArgument, "is not this node's"},
		{"invalid pool", func(s *controlv1.NodeState) { s.Pools[0].Cidr = "10.244.0.1/16" }, codes.InvalidArgument, "10.244.0.1/16"},
		{"wrong digest", func(s *controlv1.NodeState) { s.Digest++ }, codes.InvalidArgument, "digest"},
		{"older revision", func(s *controlv1.NodeState) { s.Version.Revision = 4 }, codes.FailedPrecondition, "older"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := threeNodes()
			c.change(s)
			_, err := n.client.ReplaceState(t.Context(), &controlv1.ReplaceStateRequest{State: s})
			require.Equal(t, c.code, status.Code(err), "%v", err)
			require.ErrorContains(t, err, c.text)
			require.True(t, n.status().GetReady(), "the old state stays in force")
			require.EqualValues(t, 5, n.status().GetProgrammed().GetRevision())
		})
	}
	other := threeNodes()
	other.Version = &controlv1.Version{Incarnation: "restored", Revision: 1}
	n.push(other) // another history
	_, err := n.client.ReplaceState(t.Context(), &controlv1.ReplaceStateRequest{})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
}

func TestPatchStateMakesBeforeItBreaks(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	n.plat.mu.Lock()
	n.plat.plans = nil
	n.plat.mu.Unlock()
	patch := &controlv1.StatePatch{
		Node: "n1", Base: &controlv1.Version{Incarnation: "store", Revision: 5}, Version: &controlv1.Version{Incarnation: "store", Revision: 6},
		UpsertMembers: []*controlv1.Member{{Name: "n2", Ipv4: "10.240.0.12", Ipv6: "fd00:240::12", Mac: "02:00:00:00:00:22"}},
		RemoveRoutes:  []string{"10.244.3.0/24"},
	}
	r, err := n.client.PatchState(t.Context(), &controlv1.PatchStateRequest{Patch: patch})
	require.NoError(t, err)
	require.EqualValues(t, 6, r.GetProgrammed().GetRevision())
	require.Equal(t, "02:00:00:00:00:22", n.routes()["10.244.2.0/24"].GetMac(), "a member's new Ethernet address")
	require.Nil(t, n.routes()["10.244.3.0/24"])
	old, new2, n3 := packet.MAC{2, 0, 0, 0, 0, 2}, packet.MAC{2, 0, 0, 0, 0, 0x22}, packet.MAC{2, 0, 0, 0, 0, 3}
	require.Len(t, n.plat.plans, 2)
	require.Equal(t, []packet.MAC{old, n3, new2}, n.plat.plans[0].Members, "both addresses are accepted while the workers move over")
	require.Equal(t, []packet.MAC{n3, new2}, n.plat.plans[1].Members)

	_, err = n.client.PatchState(t.Context(), &controlv1.PatchStateRequest{Patch: patch})
	require.Equal(t, codes.Aborted, status.Code(err), "%v", err)
	_, err = n.client.PatchState(t.Context(), &controlv1.PatchStateRequest{})
	require.Equal(t, codes.InvalidArgument, status.Code(err))
	state, err := n.client.GetState(t.Context(), &controlv1.GetStateRequest{})
	require.NoError(t, err)
	require.EqualValues(t, 6, state.GetState().GetVersion().GetRevision())
	require.NoError(t, api.Validate(state.GetState()))
}

func TestPushedStateSurvivesARestart(t *testing.T) {
	cfg, plat := testConfig(t), newFakePlatform()
	n := startNode(t, cfg, plat)
	n.push(threeNodes())
	require.NoError(t, n.stop())
	n = startNode(t, cfg, plat)
	require.True(t, n.status().GetReady())
	require.EqualValues(t, 5, n.status().GetProgrammed().GetRevision())
}

func TestAttachAndDetachAreIdempotent(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	ns := n.plat.addNetNS("a")
	pod, err := n.attach("default/a", ns, "10.244.1.7", "fd12:3456:789a:0:1::7")
	require.NoError(t, err)
	require.Equal(t, "eth0", pod.GetInterface())
	require.Equal(t, "169.254.1.1", pod.GetGatewayIpv4())
	require.Equal(t, "fe80::1", pod.GetGatewayIpv6())
	require.Equal(t, "02:4f:56:50:47:57", pod.GetGatewayMac())
	require.EqualValues(t, 1500, pod.GetMtu())
	require.Equal(t, controlv1.PodState_POD_STATE_READY, pod.GetState())
	require.Equal(t, "default/a", n.routes()["10.244.1.7/32"].GetTarget())
	require.Equal(t, "default/a", n.routes()["fd12:3456:789a:0:1::7/128"].GetTarget())

	again, err := n.attach("default/a", ns, "10.244.1.7", "fd12:3456:789a:0:1::7")
	require.NoError(t, err)
	require.True(t, proto.Equal(pod, again))
	require.Equal(t, []string{"default/a"}, n.pods())

	for range 2 {
		r, err := n.client.DetachPod(t.Context(), &controlv1.DetachPodRequest{Name: "default/a"})
		require.NoError(t, err)
		require.Equal(t, len(n.plat.devices) == 0 && len(n.pods()) == 0, true)
		if r.GetExisted() {
			r, err = n.client.DetachPod(t.Context(), &controlv1.DetachPodRequest{Name: "default/a"})
			require.NoError(t, err)
			require.False(t, r.GetExisted())
		}
	}
	require.Nil(t, n.routes()["10.244.1.7/32"])
	require.Equal(t, 2, n.plat.open, "uplink and host port")
	require.True(t, n.status().GetReady())
}

func TestAttachRefusals(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	ns, other := n.plat.addNetNS("a"), n.plat.addNetNS("b")
	_, err := n.attach("a", ns, "10.244.1.7", "")
	require.Equal(t, codes.InvalidArgument, status.Code(err), "no state, so no own block: %v", err)
	n.push(threeNodes())
	_, err = n.attach("a", ns, "10.244.1.7", "fd12:3456:789a:0:1::7")
	require.NoError(t, err)
	for _, c := range []struct {
		name, pod, netns, a4, a6 string
		code                     codes.Code
		text                     string
	}{
		{"outside the own blocks", "b", other, "10.244.2.1", "", codes.InvalidArgument, "none of this node's blocks"},
		{"different indexes", "b", other, "10.244.1.8", "fd12:3456:789a:0:1::9", codes.InvalidArgument, "same index"},
		{"address in use", "b", other, "10.244.1.7", "", codes.AlreadyExists, "belongs to pod a"},
		{"IPv6 address in use", "b", other, "", "fd12:3456:789a:0:1::7", codes.AlreadyExists, "belongs to pod a"},
		{"other values", "a", ns, "10.244.1.8", "", codes.AlreadyExists, "attached with other values"},
		{"interface in use", "b", ns, "10.244.1.8", "", codes.AlreadyExists, "belongs to pod a"},
		{"no such namespace", "b", "/run/netns/none", "10.244.1.8", "", codes.InvalidArgument, "gone"},
		{"no address", "b", other, "", "", codes.InvalidArgument, "at least one address"},
		{"families mixed up", "b", other, "fd12:3456:789a:0:1::9", "10.244.1.9", codes.InvalidArgument, "is no IPv4 address"},
		{"bad name", "a b", other, "10.244.1.8", "", codes.InvalidArgument, "want 1 to 253 characters"},
		{"relative path", "b", "netns/b", "10.244.1.8", "", codes.InvalidArgument, "absolute path"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := n.attach(c.pod, c.netns, c.a4, c.a6)
			require.Equal(t, c.code, status.Code(err), "%v", err)
			require.ErrorContains(t, err, c.text)
			require.Equal(t, []string{"a"}, n.pods())
		})
	}
	n.plat.createErr = errors.New("no room")
	_, err = n.attach("b", other, "10.244.1.8", "")
	require.Equal(t, codes.Internal, status.Code(err))
	n.plat.createErr = nil
	_, err = n.attach("b", other, "10.244.1.8", "")
	require.NoError(t, err, "a failed attachment leaves nothing behind")
}

func TestPodsSurviveARestartUntouched(t *testing.T) {
	cfg, plat := testConfig(t), newFakePlatform()
	n := startNode(t, cfg, plat)
	n.push(threeNodes())
	kept, lost := plat.addNetNS("a"), plat.addNetNS("b")
	pod, err := n.attach("a", kept, "10.244.1.7", "")
	require.NoError(t, err)
	_, err = n.attach("b", lost, "10.244.1.8", "")
	require.NoError(t, err)
	require.NoError(t, n.stop())
	require.Zero(t, plat.open, "every port is closed")
	require.Zero(t, plat.steering)
	require.Len(t, plat.devices, 2, "devices stay")
	require.NoFileExists(t, cfg.Socket)

	plat.deleteNetNS(lost)
	plat.createErr = errors.New("a re-adopted pod's device must not be made anew")
	n = startNode(t, cfg, plat)
	require.Equal(t, []string{"a"}, n.pods())
	require.True(t, n.status().GetReady(), "%v", n.status().GetProblems())
	require.Equal(t, "a", n.routes()["10.244.1.7/32"].GetTarget())
	again, err := n.attach("a", kept, "10.244.1.7", "")
	require.NoError(t, err)
	require.Equal(t, pod.GetMac(), again.GetMac())
	require.True(t, pod.GetAttachedAt().AsTime().Equal(again.GetAttachedAt().AsTime()))
}

func TestInterruptedAttachmentIsUndoneByTheNextStart(t *testing.T) {
	cfg, plat := testConfig(t), newFakePlatform()
	ns := plat.addNetNS("a")
	rec := record("a")
	rec.NetNS, rec.NetNSID, rec.Pending = ns, "", true
	require.NoError(t, os.MkdirAll(cfg.StateDir, 0o700))
	require.NoError(t, podStore{path: cfg.StateDir + "/pods.json", node: "n1"}.Save([]PodRecord{rec}))
	plat.devices[ns+" eth0"] = rec.device(1500)
	n := startNode(t, cfg, plat)
	require.Empty(t, n.pods())
	require.Empty(t, plat.devices)
	n.push(threeNodes())
	_, err := n.attach("a", ns, "10.244.1.7", "")
	require.NoError(t, err)
}

func TestPodThatCannotBeReopenedIsAProblemUntilAttachedAgain(t *testing.T) {
	cfg, plat := testConfig(t), newFakePlatform()
	n := startNode(t, cfg, plat)
	n.push(threeNodes())
	ns := plat.addNetNS("a")
	_, err := n.attach("a", ns, "10.244.1.7", "")
	require.NoError(t, err)
	require.NoError(t, n.stop())
	plat.reopenErr = errors.New("device is busy")
	n = startNode(t, cfg, plat)
	require.False(t, n.status().GetReady())
	require.True(t, n.hasProblem("pod a has no device: device is busy"))
	plat.reopenErr = nil
	_, err = n.attach("a", ns, "10.244.1.7", "")
	require.NoError(t, err)
	require.True(t, n.status().GetReady())
}

func TestDeletedNamespaceRemovesItsPod(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	ns := n.plat.addNetNS("a")
	_, err := n.attach("a", ns, "10.244.1.7", "")
	require.NoError(t, err)
	n.plat.gone("a") // a false alarm
	require.Equal(t, []string{"a"}, n.pods())
	n.plat.deleteNetNS(ns)
	n.plat.gone("a")
	require.Empty(t, n.pods())
	require.Nil(t, n.routes()["10.244.1.7/32"])
	require.Equal(t, 2, n.plat.open)
	recs, err := podStore{path: n.cfg.StateDir + "/pods.json", node: "n1"}.Load()
	require.NoError(t, err)
	require.Empty(t, recs)
	require.True(t, n.status().GetReady())
}

// A container runtime may use a path again before the deletion of the old namespace was noticed.
func TestPathOfADeletedNamespaceMayBeUsedAgain(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	ns := n.plat.addNetNS("a")
	_, err := n.attach("a", ns, "10.244.1.7", "")
	require.NoError(t, err)
	n.plat.deleteNetNS(ns)
	n.plat.addNetNS("x")
	require.Equal(t, ns, n.plat.addNetNS("a"))
	_, err = n.attach("a", ns, "10.244.1.9", "")
	require.NoError(t, err)
	require.Nil(t, n.routes()["10.244.1.7/32"])
	require.NotNil(t, n.routes()["10.244.1.9/32"])
	require.Len(t, n.plat.devices, 1)
}

func TestManyClientsAtOnce(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			name := string(rune('a' + i))
			ns := n.plat.addNetNS(name)
			for range 5 {
				_, err := n.attach(name, ns, netip.AddrFrom4([4]byte{10, 244, 1, byte(10 + i)}).String(), "")
				if err != nil {
					t.Errorf("attach: %v", err)
				}
				n.status()
				if _, err := n.client.DetachPod(t.Context(), &controlv1.DetachPodRequest{Name: name}); err != nil {
					t.Errorf("detach: %v", err)
				}
			}
		})
	}
	wg.Wait()
	require.Empty(t, n.pods())
	require.Equal(t, 2, n.plat.open)
	require.True(t, n.status().GetReady())
}

func TestCountersAndDropsAnswer(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	c, err := n.client.GetCounters(t.Context(), &controlv1.GetCountersRequest{})
	require.NoError(t, err)
	require.Len(t, c.GetPorts(), 4, "uplink and host port of two workers")
	require.Contains(t, c.GetAnswered(), "arp")
	require.Contains(t, c.GetIcmpErrors(), "time_exceeded")
	_, err = n.client.GetDrops(t.Context(), &controlv1.GetDropsRequest{})
	require.NoError(t, err)
}

func TestDaemonDoesNotStartOnAnyErrorAndCleansUp(t *testing.T) {
	plat := newFakePlatform()
	plat.attach = errors.New("another XDP program is attached to eth0")
	cfg := testConfig(t)
	err := Run(t.Context(), cfg, Options{Platform: plat})
	require.ErrorContains(t, err, "another XDP program")
	plat.attach, plat.uplinkErr = nil, errors.New("zero-copy is not supported")
	require.ErrorContains(t, Run(t.Context(), cfg, Options{Platform: plat}), "zero-copy is not supported")
	require.Zero(t, plat.open)
	require.Zero(t, plat.steering)
	require.NoFileExists(t, cfg.Socket)
	plat.uplinkErr = nil
	plat.facts.Gone = true
	require.ErrorContains(t, Run(t.Context(), cfg, Options{Platform: plat}), "no such interface")
	plat.facts.Gone = false
	n := startNode(t, cfg, plat)
	require.NotNil(t, n.status())
}

func TestStopDoesNotWaitForSlowClients(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	start := time.Now()
	require.NoError(t, n.stop())
	require.Less(t, time.Since(start), 8*time.Second)
	_, err := n.client.GetStatus(t.Context(), &controlv1.GetStatusRequest{})
	require.Equal(t, codes.Unavailable, status.Code(err))
}
