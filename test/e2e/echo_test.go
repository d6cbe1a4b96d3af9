package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/overplane/overplane/test/lab"
)

// echoArgument makes the test binary a TCP echo server, since a process may have too few descriptors for both ends of very many connections: it is followed by the
// address that clients must have, and by those to listen on. It says on which ports it does, and ends with its standard input.
const echoArgument = "echo"

func serveEcho(argv []string) error {
	client, err := netip.ParseAddr(argv[0])
	if err != nil {
		return err
	}
	for _, a := range argv[1:] {
		l, err := net.Listen("tcp", net.JoinHostPort(a, "0"))
		if err != nil {
			return err
		}
		fmt.Println(l.Addr())
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					fmt.Fprintln(os.Stderr, "accept:", err)
					return
				}
				if c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap() != client {
					c.Close() // not translated: its client will notice
					continue
				}
				go func() {
					defer c.Close()
					buf := make([]byte, 64)
					for {
						n, err := c.Read(buf)
						if err != nil {
							return
						}
						if _, err := c.Write(buf[:n]); err != nil {
							return
						}
					}
				}()
			}
		}()
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// startEchoServer runs an echo server outside until the test ends. It returns where.
func startEchoServer(t *testing.T, l *lab.Lab, client netip.Addr, at []netip.Addr) (servers []netip.AddrPort) {
	t.Helper()
	require.NoError(t, lab.SetSysctl(l.Ext(), "net/core/somaxconn", "4096"))
	self, err := os.Executable()
	require.NoError(t, err)
	argv := []string{echoArgument, client.String()}
	for _, a := range at {
		argv = append(argv, a.String())
	}
	cmd := exec.Command(self, argv...)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, lab.InNetns(l.Ext(), cmd.Start))
	t.Cleanup(func() {
		stdin.Close()
		require.NoError(t, cmd.Wait())
	})
	lines := bufio.NewScanner(stdout)
	for range at {
		require.True(t, lines.Scan(), "the echo server ended")
		server, err := netip.ParseAddrPort(lines.Text())
		require.NoError(t, err)
		servers = append(servers, server)
	}
	return servers
}

// requireDescriptors skips what needs more open files than the process may have.
func requireDescriptors(t *testing.T, n int) {
	t.Helper()
	var limit unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &limit))
	if limit.Cur < uint64(n) {
		t.Skipf("%d open files at once: ulimit -n says %d", n, limit.Cur)
	}
}
