package rig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// vpp is FD.io's VPP with af_xdp interfaces, where it is installed.
var vpp = &Kind{
	Name: "vpp", About: "FD.io VPP, af_xdp interfaces in copy mode, one worker; to outside with nat44-ed",
	Topologies: []Topology{SameNode, Outside}, Links: []Link{Wire},
	Missing: func() (string, string) {
		if lack := installed("vpp", "vppctl"); len(lack) > 0 {
			return "VPP is not installed (" + strings.Join(lack, ", ") + ")", "apt-get install vpp vpp-plugin-core, from FD.io's package archive (Debian has none); then systemctl disable --now vpp"
		}
		return "", ""
	},
	Build: buildVPP,
}

func buildVPP(ctx context.Context, env *Env, spec Spec) (*System, error) {
	s := env.space(ctx)
	sys := &System{Name: "vpp", close: []func() error{s.close}, Placement: fmt.Sprintf("worker on core %d, polling", ForwardCore())}
	node := s.add("n1", false)
	sys.From = s.pod(1, 1, defaultMTU)
	s.finishedFrames(sys.From)
	script := []string{
		"create interface af_xdp host-if " + nodePort + "1 name p1 num-rx-queues 1 no-zero-copy",
		"set interface mac address p1 " + portMAC(1, 1), "set interface state p1 up", "set interface ip address p1 192.0.2.1/32",
		"ip neighbor p1 " + podAddr(1, 1) + " " + podMAC(1, 1) + " static", "ip route add " + podAddr(1, 1) + "/32 via " + podAddr(1, 1) + " p1",
	}
	if spec.Topology == SameNode {
		sys.To = s.pod(1, 2, defaultMTU)
		s.finishedFrames(sys.To)
		script = append(script,
			"create interface af_xdp host-if "+nodePort+"2 name p2 num-rx-queues 1 no-zero-copy",
			"set interface mac address p2 "+portMAC(1, 2), "set interface state p2 up", "set interface ip address p2 192.0.2.2/32",
			"ip neighbor p2 "+podAddr(1, 2)+" "+podMAC(1, 2)+" static", "ip route add "+podAddr(1, 2)+"/32 via "+podAddr(1, 2)+" p2")
	} else {
		s.underlay(1, spec.Link)
		sys.To, sys.Exit = s.outside(spec.Link)
		s.run("ip -n %s addr flush dev %s", node, uplink)
		script = append(script,
			"create interface af_xdp host-if "+uplink+" name up num-rx-queues 1 no-zero-copy",
			"set interface mac address up "+nodeMAC(1), "set interface state up up", "set interface ip address up "+nodeAddr(1)+"/24",
			"ip neighbor up "+gatewayAddr+" "+gatewayMACText+" static", "ip route add 0.0.0.0/0 via "+gatewayAddr+" up",
			"nat44 plugin enable sessions 1000000", "set interface nat44 in p1 out up", "nat44 add interface address up")
	}
	dir := filepath.Join(env.Dir, s.name)
	if s.err() == nil {
		s.fail(os.MkdirAll(dir, 0o755))
	}
	conf := fmt.Sprintf(`unix { nodaemon cli-listen %[1]s/cli.sock runtime-dir %[1]s pidfile %[1]s/pid }
cpu { main-core %[2]d corelist-workers %[3]d }
buffers { buffers-per-numa 65536 }
plugins { plugin dpdk_plugin.so { disable } }
`, dir, LoadCore(), ForwardCore())
	if s.err() == nil {
		s.fail(os.WriteFile(dir+"/vpp.conf", []byte(conf), 0o644))
	}
	cmd, log := s.start(node, nil, "vpp", "-c", dir+"/vpp.conf")
	s.waitFile(dir+"/cli.sock", log)
	for _, line := range script {
		if out := s.exec(append([]string{"vppctl", "-s", dir + "/cli.sock"}, strings.Fields(line)...), ""); s.err() == nil && (strings.Contains(out, "failed") || strings.Contains(out, "unknown")) {
			s.fail(fmt.Errorf("vppctl %s: %s", line, strings.TrimSpace(out)))
		}
	}
	if err := s.err(); err != nil {
		return nil, fail(sys, err)
	}
	sys.Pids = []int{cmd.Process.Pid}
	sys.pause = func() error { return cmd.Process.Signal(unix.SIGSTOP) }
	sys.resume = func() error { return cmd.Process.Signal(unix.SIGCONT) }
	sys.Drops = spaceDrops(s.netns, nil, nil)
	return sys, nil
}
