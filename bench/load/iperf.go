package load

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

// IperfInstalled reports whether there is an iperf3.
func IperfInstalled() bool {
	_, err := exec.LookPath("iperf3")
	return err == nil
}

const iperfPort = "5201"

// iperfReport is what is used of iperf3's JSON output.
type iperfReport struct {
	End struct {
		Received struct {
			Bits float64 `json:"bits_per_second"`
		} `json:"sum_received"`
	} `json:"end"`
	Error string `json:"error"`
}

// Iperf measures one TCP stream by iperf3, for whole seconds, and returns bits a second as its server received them.
func Iperf(ctx context.Context, from, to Endpoint, span time.Duration) (float64, error) {
	ctx, cancel := context.WithTimeout(ctx, span+20*time.Second)
	defer cancel()
	start := func(netns string, out *strings.Builder, args ...string) (*exec.Cmd, error) {
		cmd := exec.CommandContext(ctx, "iperf3", args...)
		cmd.Stdout, cmd.Stderr = out, out
		cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
		return cmd, lab.InNetns(netns, cmd.Start)
	}
	var said, report strings.Builder
	server, err := start(to.Netns, &said, "-s", "-1", "-B", to.Addr.String(), "-p", iperfPort)
	if err != nil {
		return 0, err
	}
	defer func() { _ = server.Process.Kill(); _ = server.Wait() }()
	seconds := fmt.Sprint(max(1, int(span/time.Second)))
	var r iperfReport
	// The server needs a moment to listen. Some versions exit with 0 nevertheless.
	for begin := time.Now(); ; {
		report.Reset()
		client, serr := start(from.Netns, &report, "-c", to.Addr.String(), "-p", iperfPort, "-t", seconds, "-C", congestion, "-J")
		if serr != nil {
			return 0, serr
		}
		r = iperfReport{}
		if err = client.Wait(); err == nil {
			err = json.Unmarshal([]byte(report.String()), &r)
		}
		if err == nil && r.Error == "" || ctx.Err() != nil || time.Since(begin) > span+10*time.Second {
			break
		}
		if werr := Wait(ctx, 50*time.Millisecond); werr != nil {
			return 0, werr
		}
	}
	if err != nil || r.Error != "" {
		return 0, fmt.Errorf("iperf3 from %s to %v: %v %s", from.Netns, to.Addr, err, strings.TrimSpace(r.Error+said.String()))
	}
	return r.End.Received.Bits, nil
}
