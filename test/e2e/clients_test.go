package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/test/lab"
)

// interfaces lists the names of a namespace's devices.
func interfaces(t *testing.T, netns string) []string {
	t.Helper()
	var names []string
	require.NoError(t, lab.InNetns(netns, func() error {
		all, err := net.Interfaces()
		for _, i := range all {
			names = append(names, i.Name)
		}
		return err
	}))
	return names
}

// The programs that people use must see what they expect: one lab, one subtest a program.
func TestRealClients(t *testing.T) {
	t.Parallel()
	l := newLab(t, lab.Options{Nodes: 2, Pods: 1})
	n1, n2 := l.Nodes[0], l.Nodes[1]
	from, to := n1.Pods[0].End(), n2.Pods[0].End()

	t.Run("ping", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			out := Exec(t, from.Netns, "ping", "-n", "-c", "5", "-i", "0.05", "-W", "2", to.Addr(family).String())
			require.Contains(t, out, "5 received")
			require.Contains(t, out, map[int]string{4: "ttl=62", 6: "ttl=62"}[family], "two routers on the way")
			require.NotContains(t, out, "DUP")
		})
	})
	t.Run("traceroute", func(t *testing.T) {
		for _, method := range []string{"-U", "-I", "-T"} { // UDP, ICMP, TCP SYN
			t.Run(method, func(t *testing.T) {
				eachFamily(t, func(t *testing.T, family int) {
					out := Exec(t, from.Netns, "traceroute", fmt.Sprintf("-%d", family), method, "-n", "-q", "2", "-w", "2", "-m", "6", to.Addr(family).String())
					require.Equal(t, []string{n1.Addr(family).String(), n2.Addr(family).String(), to.Addr(family).String()}, hopsOf(out), out)
				})
			})
		}
	})
	t.Run("tracepath", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			out := Exec(t, from.Netns, "tracepath", fmt.Sprintf("-%d", family), "-n", "-m", "6", to.Addr(family).String())
			require.Contains(t, out, "pmtu 1500")
			require.Contains(t, out, "reached")
			for _, hop := range []lab.End{n1.End(), n2.End(), to} {
				require.Contains(t, out, hop.Addr(family).String())
			}
		})
	})
	t.Run("iperf3", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			for _, args := range [][]string{{"-t", "1"}, {"-t", "1", "-R"}, {"-t", "1", "-P", "4"}, {"-u", "-b", "50M", "-t", "1"}} {
				server := exec.CommandContext(testContext(t), tool(t, "iperf3"), "-s", "-1", "-B", to.Addr(family).String(), "--forceflush")
				stdout, err := server.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, lab.InNetns(to.Netns, server.Start))
				lines := bufio.NewScanner(stdout)
				for lines.Scan() && !strings.Contains(lines.Text(), "Server listening") {
				}
				out, err := tryExec(t, from.Netns, append([]string{"iperf3", "-J", "-c", to.Addr(family).String()}, args...)...)
				if err != nil {
					_ = server.Process.Kill()
				}
				for lines.Scan() {
				}
				_ = server.Wait()
				require.NoError(t, err, out)
				var r struct {
					End struct {
						Received struct{ Bytes, Bits_per_second float64 } `json:"sum_received"`
						Sum      struct {
							Packets      float64
							Lost_percent float64
						} `json:"sum"`
					} `json:"end"`
				}
				require.NoError(t, json.Unmarshal([]byte(out), &r))
				if args[0] == "-u" {
					require.Positive(t, r.End.Sum.Packets)
					t.Logf("%v: %.0f datagrams, %.2f %% lost", args, r.End.Sum.Packets, r.End.Sum.Lost_percent)
					continue
				}
				require.Positive(t, r.End.Received.Bytes)
				t.Logf("%v: %.2f Gbit/s", args, r.End.Received.Bits_per_second/1e9)
			}
		})
	})
	t.Run("tcpdump", func(t *testing.T) {
		eachFamily(t, func(t *testing.T, family int) {
			dump := exec.CommandContext(testContext(t), tool(t, "tcpdump"), "-l", "-n", "-e", "-i", n2.Name(), "-c", "2",
				map[int]string{4: "icmp", 6: "icmp6 and (ip6[40] == 128 or ip6[40] == 129)"}[family]) // echo request and reply
			var errs strings.Builder
			stdout, err := dump.StdoutPipe()
			require.NoError(t, err)
			dump.Stderr = &errs
			require.NoError(t, lab.InNetns(l.Gateway(), dump.Start))
			t.Cleanup(func() { _ = dump.Process.Kill() })
			captured := make(chan string)
			go func() {
				out, _ := io.ReadAll(stdout)
				captured <- string(out)
			}()
			// tcpdump says that it listens before it does: ping until it has seen enough.
			var out string
			for begin := time.Now(); out == "" && time.Since(begin) < 20*time.Second; {
				requirePing(t, from, to, family)
				select {
				case out = <-captured:
				case <-time.After(100 * time.Millisecond):
				}
			}
			_ = dump.Process.Kill()
			_ = dump.Wait()
			require.Contains(t, out, fmt.Sprintf("%v > %v", from.Addr(family), to.Addr(family)), errs.String())
			require.Contains(t, out, n1.MAC+" > "+n2.MAC)
		})
	})
}

var hopPattern = regexp.MustCompile(`(?m)^ *[0-9]+ +([0-9a-f.:]+|\*)`)

// hopsOf reads the hops from what traceroute -n printed.
func hopsOf(out string) []string {
	var hops []string
	for _, m := range hopPattern.FindAllStringSubmatch(out, -1) {
		hops = append(hops, m[1])
	}
	return hops
}
