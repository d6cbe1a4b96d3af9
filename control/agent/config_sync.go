package agent

import (
	"net"
	"strconv"
)

// checkSync checks what the state source controller needs.
func (c *Config) checkSync(bad func(field, format string, args ...any)) {
	if len(c.SyncAddresses) == 0 {
		bad("SyncAddresses", "a node with the state source %s needs one", SourceController)
	}
	for _, a := range c.SyncAddresses {
		host, port, err := net.SplitHostPort(a)
		if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" {
			bad("SyncAddresses", "%q is not host:port", a)
			break
		}
	}
	if c.SyncRemovalPercent < 1 || c.SyncRemovalPercent > 100 {
		bad("SyncRemovalPercent", "")
	}
	for _, f := range []struct{ field, path string }{{"TLSCA", c.TLSCA}, {"TLSCert", c.TLSCert}, {"TLSKey", c.TLSKey}} {
		if len(f.path) == 0 || f.path[0] != '/' {
			bad(f.field, "")
		}
	}
}
