package agent

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/dataplane/packet"
)

func TestUplinkDownAndUp(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	n.plat.set(func(f *Facts) { f.Up = false })
	n.eventually("down is a problem", func() bool { return n.hasProblem("uplink eth0 is down") })
	require.False(t, n.status().GetUplink().GetUp())
	n.plat.set(func(f *Facts) { f.Up = true })
	n.eventually("up again", func() bool { return n.status().GetReady() })
	require.Equal(t, 1, n.plat.opened, "sockets live through it")
}

func TestUplinkThatIsDownAtStartIsOpenedLater(t *testing.T) {
	plat := newFakePlatform()
	plat.facts.Up = false
	plat.uplinkErr = errors.New("network is down")
	n := startNode(t, testConfig(t), plat)
	n.push(threeNodes())
	require.False(t, n.status().GetReady())
	plat.mu.Lock()
	plat.uplinkErr = nil
	plat.mu.Unlock()
	plat.set(func(f *Facts) { f.Up = true })
	n.eventually("opened", func() bool { return n.status().GetReady() })
	require.Equal(t, "xdp-copy", n.status().GetUplink().GetRung())
}

func TestReplacedUplinkStartsTheDataPlaneAgain(t *testing.T) {
	plat := newFakePlatform()
	n := startNode(t, testConfig(t), plat)
	n.push(threeNodes())
	ns := plat.addNetNS("a")
	_, err := n.attach("a", ns, "10.244.1.7", "")
	require.NoError(t, err)
	plat.set(func(f *Facts) { f.Gone = true })
	n.eventually("gone", func() bool { return n.hasProblem("uplink eth0 is gone") })
	plat.set(func(f *Facts) { f.Gone, f.Index = false, 9 })
	n.eventually("open again", func() bool {
		s, err := n.client.GetStatus(t.Context(), &controlv1.GetStatusRequest{})
		return err == nil && s.GetReady() && s.GetPodCount() == 1
	})
	require.Equal(t, 2, plat.opened)
	require.Equal(t, 3, plat.open, "uplink, host port, pod")
	require.Equal(t, 1, plat.steering)
}

func TestMTUFollowsTheUplink(t *testing.T) {
	n := startNode(t, testConfig(t), newFakePlatform())
	n.push(threeNodes())
	ns := n.plat.addNetNS("a")
	_, err := n.attach("a", ns, "10.244.1.7", "")
	require.NoError(t, err)
	device := func() (pod, host int) {
		n.plat.mu.Lock()
		defer n.plat.mu.Unlock()
		return n.plat.devices[ns+" eth0"].MTU, n.plat.host.MTU
	}
	for _, c := range []struct{ mtu, opened int }{{1400, 1}, {1500, 1}, {9000, 2}, {20000, 3}} {
		mtu, want := c.mtu, min(c.mtu, 9000) // the fake rung's largest frame
		n.plat.set(func(f *Facts) { f.MTU = mtu })
		n.eventually("MTU", func() bool {
			pod, host := device()
			s, err := n.client.GetStatus(t.Context(), &controlv1.GetStatusRequest{})
			n.plat.mu.Lock()
			opened := n.plat.opened
			n.plat.mu.Unlock()
			return err == nil && opened == c.opened && s.GetReady() && pod == want && host == want && s.GetUplink().GetMtu() == uint32(mtu)
		})
		require.EqualValues(t, want, n.routes()["10.244.2.0/24"].GetMtu())
		require.EqualValues(t, want, n.routes()["10.244.1.7/32"].GetMtu())
	}
}

func TestGatewayAndAddressChangesAreFollowed(t *testing.T) {
	n := startNode(t, testConfig(t, "OVERPLANE_UNDERLAY=routed"), newFakePlatform())
	n.push(threeNodes())
	require.Equal(t, "02:00:00:00:00:fe", n.routes()["10.244.2.0/24"].GetMac())
	n.plat.set(func(f *Facts) { f.GatewayMAC4 = packet.MAC{2, 0, 0, 0, 0, 0xaa} })
	n.eventually("the gateway's new address", func() bool { return n.routes()["10.244.2.0/24"].GetMac() == "02:00:00:00:00:aa" })
	n.plat.set(func(f *Facts) {
		f.MAC = packet.MAC{2, 0, 0, 0, 0, 0x77}
		f.Addresses = append(slices.Clone(f.Addresses), netip.MustParsePrefix("10.240.0.99/24"))
	})
	n.eventually("the node's new address", func() bool { return n.routes()["10.240.0.99/32"].GetKind() == "host" })
	require.Equal(t, "02:00:00:00:00:77", n.status().GetUplink().GetMac())
	n.plat.mu.Lock()
	defer n.plat.mu.Unlock()
	last := n.plat.plans[len(n.plat.plans)-1]
	require.Equal(t, packet.MAC{2, 0, 0, 0, 0, 0x77}, last.UplinkMAC)
	require.Equal(t, []packet.MAC{{2, 0, 0, 0, 0, 0xaa}, {2, 0, 0, 0, 0, 0xfe}}, last.GatewayMACs)
	require.Empty(t, last.Members)
}

func TestStateFile(t *testing.T) {
	cfg := testConfig(t, "OVERPLANE_STATE_SOURCE=file")
	n := startNode(t, cfg, newFakePlatform())
	require.True(t, n.hasProblem("there is no state file "+cfg.StateFile))
	_, err := n.client.ReplaceState(t.Context(), &controlv1.ReplaceStateRequest{State: threeNodes()})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))
	_, err = n.client.PatchState(t.Context(), &controlv1.PatchStateRequest{})
	require.Equal(t, codes.FailedPrecondition, status.Code(err))

	require.NoError(t, api.WriteFile(cfg.StateFile, threeNodes()))
	n.eventually("a new file is taken over", func() bool { return n.status().GetReady() })

	bad := threeNodes()
	bad.Members[1].Mac = "zz"
	api.Seal(bad)
	require.NoError(t, api.WriteFile(cfg.StateFile, bad))
	n.eventually("a bad file is a problem", func() bool { return !n.status().GetReady() })
	require.True(t, n.hasProblem(cfg.StateFile), "names the file: %v", n.status().GetProblems())
	require.True(t, n.hasProblem("mac"), "names the field")
	require.True(t, n.hasProblem(`"zz"`), "names the value")
	require.Equal(t, "02:00:00:00:00:02", n.routes()["10.244.2.0/24"].GetMac(), "the old state stays in force")

	require.NoError(t, os.WriteFile(cfg.StateFile, []byte("{"), 0o600))
	n.reload <- os.Interrupt
	n.eventually("half a file", func() bool { return n.hasProblem("the JSON ends too early") })

	good := threeNodes()
	good.Members[1].Mac = "02:00:00:00:00:99"
	api.Seal(good)
	require.NoError(t, api.WriteFile(cfg.StateFile, good))
	n.reload <- os.Interrupt
	n.eventually("reloaded", func() bool {
		return n.status().GetReady() && n.routes()["10.244.2.0/24"].GetMac() == "02:00:00:00:00:99"
	})
}

func TestRestartForwardsByTheLastGoodFile(t *testing.T) {
	cfg, plat := testConfig(t, "OVERPLANE_STATE_SOURCE=file"), newFakePlatform()
	require.NoError(t, api.WriteFile(cfg.StateFile, threeNodes()))
	n := startNode(t, cfg, plat)
	require.True(t, n.status().GetReady())
	require.NoError(t, n.stop())
	require.NoError(t, os.WriteFile(cfg.StateFile, []byte("nonsense"), 0o600))
	n = startNode(t, cfg, plat)
	require.False(t, n.status().GetReady())
	require.Equal(t, "n2", n.routes()["10.244.2.0/24"].GetTarget())
}
