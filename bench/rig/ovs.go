package rig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const ovsSchema = "/usr/share/openvswitch/vswitch.ovsschema"

// OVS is Open vSwitch's userspace datapath on AF_XDP, with a database, sockets and logs of its own.
var OVS = &Kind{
	Name: "ovs-afxdp", About: "Open vSwitch's userspace datapath, ports of type afxdp in native mode, one busy-polling PMD thread; to outside with ct and nat",
	Topologies: []Topology{SameNode, Outside}, Links: []Link{Wire},
	Missing: func() (string, string) {
		const install = "apt-get install openvswitch-switch (then stop and disable its services: the harness runs its own)"
		if lack := installed("ovsdb-tool", "ovsdb-server", "ovs-vswitchd", "ovs-vsctl", "ovs-ofctl"); len(lack) > 0 {
			return "Open vSwitch is not installed (" + strings.Join(lack, ", ") + ")", install
		}
		if _, err := os.Stat(ovsSchema); err != nil {
			return "Open vSwitch has no schema at " + ovsSchema, install
		}
		return "", ""
	},
	Build: buildOVS,
}

func buildOVS(ctx context.Context, env *Env, spec Spec) (*System, error) {
	s := env.space(ctx)
	sys := &System{Name: "ovs-afxdp", close: []func() error{s.close}, Placement: fmt.Sprintf("PMD thread on core %d, busy polling", ForwardCore())}
	node := s.add("n1", false)
	sys.From = s.pod(1, 1, defaultMTU)
	s.finishedFrames(sys.From)
	ports := []string{nodePort + "1"}
	// ct needs addresses of the node only as what it translates to: nothing of the kernel's stack is involved.
	flows := []string{}
	const toPod1 = "mod_dl_src:%s,mod_dl_dst:%s,dec_ttl,output:%s1"
	if spec.Topology == SameNode {
		sys.To = s.pod(1, 2, defaultMTU)
		s.finishedFrames(sys.To)
		ports = append(ports, nodePort+"2")
		flows = append(flows,
			fmt.Sprintf("table=0,ip,nw_dst=%s,actions=dec_ttl,mod_dl_src:%s,mod_dl_dst:%s,output:%s2", podAddr(1, 2), portMAC(1, 2), podMAC(1, 2), nodePort),
			fmt.Sprintf("table=0,ip,nw_dst=%s,actions=dec_ttl,mod_dl_src:%s,mod_dl_dst:%s,output:%s1", podAddr(1, 1), portMAC(1, 1), podMAC(1, 1), nodePort))
	} else {
		s.underlay(1, spec.Link)
		sys.To, sys.Exit = s.outside(spec.Link)
		s.run("ip -n %s addr flush dev %s", node, uplink)
		ports = append(ports, uplink)
		flows = append(flows,
			fmt.Sprintf("table=0,in_port=%s1,ip,actions=ct(commit,table=1,nat(src=%s:10000-29999))", nodePort, nodeAddr(1)),
			fmt.Sprintf("table=1,ip,actions=dec_ttl,mod_dl_src:%s,mod_dl_dst:%s,output:%s", nodeMAC(1), gatewayMACText, uplink),
			fmt.Sprintf("table=0,in_port=%s,ip,nw_dst=%s,actions=ct(table=2,nat)", uplink, nodeAddr(1)),
			fmt.Sprintf("table=2,ip,ct_state=+trk+est,actions=dec_ttl,"+strings.Replace(toPod1, "dec_ttl,", "", 1), portMAC(1, 1), podMAC(1, 1), nodePort))
	}
	dir := filepath.Join(env.Dir, s.name)
	if s.err() == nil {
		s.fail(os.MkdirAll(dir, 0o755))
	}
	own := []string{"OVS_RUNDIR=" + dir, "OVS_LOGDIR=" + dir, "OVS_DBDIR=" + dir, "OVS_SYSCONFDIR=" + dir}
	db := "unix:" + dir + "/db.sock"
	s.run("ovsdb-tool create %s/conf.db %s", dir, ovsSchema)
	_, log := s.start(node, own, "ovsdb-server", dir+"/conf.db", "--remote=p"+db, "--unixctl="+dir+"/ovsdb.ctl", "--pidfile="+dir+"/ovsdb.pid")
	s.waitFile(dir+"/db.sock", log)
	vsctl := "ovs-vsctl --retry --timeout=10 --db=" + db
	s.run("%s --no-wait init", vsctl)
	s.run("%s --no-wait set Open_vSwitch . other_config:pmd-cpu-mask=%x", vsctl, 1<<ForwardCore())
	cmd, log := s.start(node, own, "ovs-vswitchd", db, "--unixctl="+dir+"/vswitchd.ctl", "--pidfile="+dir+"/vswitchd.pid")
	s.waitFile(dir+"/vswitchd.ctl", log)
	s.run("%s add-br %s -- set bridge %s datapath_type=netdev fail-mode=secure", vsctl, bridge, bridge)
	for i, p := range ports {
		s.run("%s add-port %s %s -- set interface %s type=afxdp options:xdp-mode=native options:n_rxq=1 ofport_request=%d", vsctl, bridge, p, p, i+1)
		if problem := strings.Trim(strings.TrimSpace(s.run("%s get interface %s error", vsctl, p)), `[]"`); problem != "" && s.err() == nil {
			s.fail(fmt.Errorf("port %s: %s\n%s", p, problem, tail(log)))
		}
	}
	s.exec([]string{"ovs-ofctl", "-O", "OpenFlow13", "replace-flows", fmt.Sprintf("unix:%s/%s.mgmt", dir, bridge), "-"}, strings.Join(flows, "\n")+"\n")
	if err := s.err(); err != nil {
		return nil, fail(sys, err)
	}
	sys.Pids = []int{cmd.Process.Pid}
	// A busy-polling thread would take a core from whoever is measured in between.
	sys.pause = func() error { return cmd.Process.Signal(unix.SIGSTOP) }
	sys.resume = func() error {
		err := cmd.Process.Signal(unix.SIGCONT)
		time.Sleep(50 * time.Millisecond)
		return err
	}
	sys.Drops = spaceDrops(s.netns, nil, nil)
	return sys, nil
}

// waitFile waits until a program has made a file.
func (s *space) waitFile(path, log string) {
	for end := time.Now().Add(10 * time.Second); s.err() == nil; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		}
		if s.ctx.Err() != nil || time.Now().After(end) {
			s.fail(fmt.Errorf("%s was not made within 10 s; the log says:\n%s", path, tail(log)))
		}
	}
}

// tail is the end of a log.
func tail(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-2000):])
}
