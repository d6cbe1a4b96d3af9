package agent

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestConfigDefaultsAreValid(t *testing.T) {
	cfg, warnings, err := Load([]string{"OVERPLANE_NODE_NAME=n1", "PATH=/bin", "OVERPLANE_RING_SIZE="})
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, "n1", cfg.NodeName)
	require.Equal(t, 4096, cfg.RingSize, "an empty variable is one that is not set")
	require.Equal(t, FileMode(0o660), cfg.SocketMode)
	require.Equal(t, ModeAuto, cfg.UplinkMode)
}

func TestConfigNodeNameDefaultsToHostName(t *testing.T) {
	host, err := os.Hostname()
	require.NoError(t, err)
	cfg, _, _ := Load(nil)
	require.Equal(t, strings.ToLower(host), cfg.NodeName)
}

func TestConfigReportsAllMistakesAtOnce(t *testing.T) {
	wrong := map[string]string{
		"NODE_NAME": "Node_1", "UPLINK": "a/b", "UPLINK_MODE": "dpdk", "UNDERLAY": "flat", "WORKERS": "many", "CPUS": "3-1",
		"STATE_SOURCE": "etcd", "STATE_DIR": "var", "SOCKET": "sock", "SOCKET_MODE": "0888", "BPF_DIR": "bpf", "FRAMES": "5000", "LARGE_FRAMES": "1",
		"RING_SIZE": "1000", "TX_BUDGET": "7", "HOST_PORT": "a name that is too long", "MTU": "100", "NODE_IPV4": "fd00::1", "NODE_IPV6": "10.0.0.1",
		"HEARTBEAT_LIMIT": "1ms", "POD_PORT": "macvlan", "POD_RING_SIZE": "500", "POD_CPUS": "many", "LOG_LEVEL": "loud", "LOG_FORMAT": "xml",
	}
	var environ []string
	for name, value := range wrong {
		environ = append(environ, EnvPrefix+name+"="+value)
	}
	_, _, err := Load(environ)
	require.Error(t, err)
	found := make(map[string]*ConfigError)
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		var ce *ConfigError
		require.True(t, errors.As(e, &ce), "%v", e)
		require.Nil(t, found[ce.Variable], "%s is reported twice", ce.Variable)
		found[ce.Variable] = ce
	}
	for name, value := range wrong {
		ce := found[EnvPrefix+name]
		require.NotNil(t, ce, "%s=%s is not reported", name, value)
		require.Equal(t, value, ce.Value, "%s", name)
		require.NotEmpty(t, ce.Allowed, "%s", name)
		require.Contains(t, ce.Error(), EnvPrefix+name+`="`+value+`"`)
	}
	require.Len(t, found, len(wrong))
}

func TestConfigBounds(t *testing.T) {
	for _, c := range []struct {
		name    string
		environ []string
		reason  string // "": valid
	}{
		{"rung tun", []string{"UPLINK_MODE=tun"}, ""},
		{"rung plain", []string{"UPLINK_MODE=plain"}, ""},
		{"no such rung", []string{"UPLINK_MODE=ladder"}, "xdp-copy, tun or plain"},
		{"uplink is the device for it", []string{"UPLINK=ovp-up0"}, "stands for the uplink"},
		{"host port is that device", []string{"HOST_PORT=ovp-up0"}, "stands for the uplink"},
		{"frames for the rings", []string{"FRAMES=4096", "RING_SIZE=2048"}, "starve"},
		{"cores for the workers", []string{"WORKERS=3", "CPUS=0-1"}, "2 cores for 3 workers"},
		{"cores in ranges", []string{"WORKERS=4", "CPUS=0-1,4,6-8"}, ""},
		{"core twice", []string{"CPUS=0-2,2"}, "core 2 is listed twice"},
		{"no pinning", []string{"CPUS=none"}, ""},
		{"host port is the uplink", []string{"UPLINK=eth0", "HOST_PORT=eth0"}, "it is the uplink"},
		{"budget above the ring", []string{"RING_SIZE=256", "TX_BUDGET=512"}, "allowed"},
		{"budget of the kernel", []string{"TX_BUDGET=0"}, ""},
		{"long socket path", []string{"SOCKET=/" + strings.Repeat("x", 107)}, "108 bytes long"},
		{"jumbo", []string{"MTU=9000"}, ""},
		{"state file matters only to source file", []string{"STATE_SOURCE=api", "STATE_FILE=relative"}, ""},
		{"link-local node address", []string{"NODE_IPV6=fe80::1"}, "allowed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			environ := []string{"OVERPLANE_NODE_NAME=n1"}
			for _, e := range c.environ {
				environ = append(environ, EnvPrefix+e)
			}
			_, _, err := Load(environ)
			if c.reason == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.reason)
		})
	}
}

func TestConfigUnknownVariableNamesTheNearest(t *testing.T) {
	_, warnings, err := Load([]string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_WORKER=2", "OVERPLANE_STATEFILE=/x", "OVER=1"})
	require.NoError(t, err)
	require.Len(t, warnings, 2)
	require.Contains(t, warnings[0], "OVERPLANE_STATEFILE has no effect; the nearest known one is OVERPLANE_STATE_FILE")
	require.Contains(t, warnings[1], "OVERPLANE_WORKER has no effect; the nearest known one is OVERPLANE_WORKERS")
}

func TestPrintedConfigReadsBack(t *testing.T) {
	cfg, _, err := Load([]string{"OVERPLANE_NODE_NAME=n1", "OVERPLANE_SOCKET_MODE=0600", "OVERPLANE_HEARTBEAT_LIMIT=3s", "OVERPLANE_CPUS=1"})
	require.NoError(t, err)
	var environ []string
	for _, v := range cfg.Variables() {
		environ = append(environ, v.Name+"="+v.Value)
	}
	again, warnings, err := Load(environ)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, cfg, again)
}

func TestWorkersGetTheirCores(t *testing.T) {
	for _, c := range []struct {
		setting string
		allowed []int
		workers int
		want    []int
		err     string
	}{
		{"", []int{2, 5}, 3, []int{2, 5, 2}, ""},
		{"none", []int{0, 1}, 2, []int{-1, -1}, ""},
		{"5,2", []int{2, 5}, 2, []int{5, 2}, ""},
		{"0-3", []int{0, 1, 2, 3}, 2, []int{0, 1}, ""},
		{"7", []int{0, 1}, 1, nil, "core 7 is not among those"},
		{"0", []int{0, 1}, 2, nil, "1 cores for 2 workers"},
	} {
		got, err := assignCPUs(c.setting, c.allowed, c.workers)
		if c.err != "" {
			require.ErrorContains(t, err, c.err)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, c.want, got, "%+v", c)
	}
}

func TestConfigurationReferenceIsFresh(t *testing.T) {
	if testing.Short() {
		t.Skip("runs the go command")
	}
	out := filepath.Join(t.TempDir(), "configuration.md")
	cmd := exec.Command("go", "run", "./gendocs", EnvPrefix, out)
	text, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", text)
	want, err := os.ReadFile(out)
	require.NoError(t, err)
	have, err := os.ReadFile("../../docs/reference/configuration.md")
	require.NoError(t, err)
	require.Equal(t, string(want), string(have), "run go generate ./control/agent")
}
