package agent

import (
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/control/agent/kernel"
	"github.com/overplane/overplane/control/api"
)

// testRung opens or not, and notes that it was tried.
func testRung(tried *[]string, name string, err error) rung {
	return rung{names: []string{name}, needs: "luck", open: func() (UplinkGrant, error) {
		*tried = append(*tried, name)
		return UplinkGrant{Rung: name}, err
	}}
}

func TestClimb(t *testing.T) {
	no := errors.New("no\nluck")
	var tried []string
	xdp := testRung(&tried, ModeXDPCopy, no)
	xdp.names = []string{ModeXDPZeroCopy, ModeXDPCopy}

	grant, err := climb([]rung{xdp, testRung(&tried, ModeTun, nil), testRung(&tried, ModePlain, nil)})
	require.NoError(t, err)
	require.Equal(t, []string{ModeXDPCopy, ModeTun}, tried, "the first that opens is taken")
	require.Equal(t, ModeTun, grant.Rung)
	const why = "no; luck (it takes luck)"
	require.Equal(t, []Refusal{{ModeXDPZeroCopy, why}, {ModeXDPCopy, why}}, grant.Refused)

	_, err = climb([]rung{xdp, testRung(&tried, ModeTun, no)})
	require.EqualError(t, err, "xdp-zerocopy: "+why+"\nxdp-copy: "+why+"\ntun: "+why)

	// Some reasons are none to go on.
	tried = nil
	_, err = climb([]rung{testRung(&tried, ModeXDPCopy, &finalError{no}), testRung(&tried, ModeTun, nil)})
	require.ErrorIs(t, err, no)
	require.Equal(t, []string{ModeXDPCopy}, tried)

	// A forced rung is tried alone.
	tried = nil
	all := func(err error) []rung {
		return []rung{xdp, testRung(&tried, ModeTun, err), testRung(&tried, ModePlain, nil)}
	}
	grant, err = climb(onlyMode(ModeTun, all(nil)))
	require.NoError(t, err)
	require.Equal(t, []string{ModeTun}, tried)
	const notAsked = "not asked for: OVERPLANE_UPLINK_MODE=tun"
	require.Equal(t, []Refusal{{ModeXDPZeroCopy, notAsked}, {ModeXDPCopy, notAsked}}, grant.Refused)
	tried = nil
	_, err = climb(onlyMode(ModeTun, all(no)))
	require.ErrorContains(t, err, "tun: "+why)
	require.Equal(t, []string{ModeTun}, tried)
	for _, mode := range []string{ModeXDP, ModeXDPCopy, ModeXDPZeroCopy} {
		require.Len(t, onlyMode(mode, all(nil)), 1)
	}
	require.Len(t, onlyMode(ModeAuto, all(nil)), 3)
}

// TestVLANAndBondUplinksStartAtTun says of a veth that it is one: whether the kernel has these kinds is another question.
func TestVLANAndBondUplinksStartAtTun(t *testing.T) {
	m := newMachine(t)
	for _, kind := range []kernel.Kind{kernel.KindVLAN, kernel.KindBond} {
		cfg, _, err := Load([]string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_BPF_DIR=" + m.bpf(1), "OVERPLANE_STATE_DIR=" + filepath.Join(m.path(1), "state")})
		require.NoError(t, err)
		require.NoError(t, kernel.InNetNS(netnsPath(m.ns(1)), func() error {
			plat := NewPlatform(cfg, slog.New(slog.DiscardHandler))
			pools, release, err := plat.Pools(1)
			if err != nil {
				return err
			}
			defer release()
			s, err := plat.AttachSteering("eth0", 1)
			if err != nil {
				return err
			}
			defer s.Close()
			grant, err := plat.OpenUplink(Facts{Name: "eth0", Kind: kind, MTU: 1500, Up: true}, s, pools)
			if err != nil {
				return err
			}
			defer grant.Port.Close()
			require.Equal(t, ModeTun, grant.Rung)
			require.Len(t, grant.Refused, 2)
			require.Contains(t, grant.Refused[1].Reason, "eth0 is a "+string(kind))
			require.NotEmpty(t, grant.Capabilities)
			return nil
		}))
	}
}

// TestUninstallTakesTunAway removes all that the rung leaves between daemons.
func TestUninstallTakesTunAway(t *testing.T) {
	m := newMachine(t)
	require.NoError(t, api.WriteFile(m.stateFile(1), m.state(1)))
	d := m.start(1, "OVERPLANE_UPLINK_MODE=tun")
	require.Equal(t, ModeTun, d.status().GetUplink().GetRung())
	require.NoError(t, d.end(unix.SIGTERM))
	require.Contains(t, m.in(m.ns(1), "ip", "link"), kernel.UplinkDeviceName, "it stays for the next daemon")
	require.DirExists(t, m.bpf(1))
	cmd := m.daemonCommand(1)
	cmd.Args = append(cmd.Args, "uninstall")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NotContains(t, m.in(m.ns(1), "ip", "link"), kernel.UplinkDeviceName)
	require.NoDirExists(t, m.bpf(1))
	require.NoError(t, kernel.InNetNS(netnsPath(m.ns(1)), func() error {
		i, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		attached, err := link.QueryPrograms(link.QueryOptions{Target: i.Index, Attach: ebpf.AttachTCXIngress})
		require.NoError(t, err)
		require.Empty(t, attached.Programs)
		return nil
	}))
}

// A worker without a queue of its own could receive from pods and send nothing.
func TestXDPNeedsAQueueForEachWorker(t *testing.T) {
	require.Empty(t, neverXDP(Facts{Name: "eth0", Queues: 2}, 2))
	require.Empty(t, neverXDP(Facts{Name: "eth0", Queues: 4}, 2))
	require.Contains(t, neverXDP(Facts{Name: "eth0", Queues: 1}, 2), "ethtool -L eth0 combined 2")
	require.Contains(t, neverXDP(Facts{Name: "eth0", Queues: 1}, 2), "OVERPLANE_WORKERS=1")
	require.NotEmpty(t, neverXDP(Facts{Name: "bond0", Kind: kernel.KindBond, Queues: 8}, 1))
}
