package agent

import (
	"log/slog"
	"net/netip"
	"os"
	"time"
)

//go:generate go run ./gendocs OVERPLANE_ ../../docs/reference/configuration.md

// EnvPrefix is what every variable of the daemon starts with.
const EnvPrefix = "OVERPLANE_"

// Config is what the daemon takes from its environment. Each field is the variable EnvPrefix + its env tag; the allowed tag
// says what may be in it, for errors and people. The comments are the reference documentation: docs/reference/configuration.md is made of
// them.
type Config struct {
	// This node's name, as the desired state calls it. Empty: the host name, in lower case.
	NodeName string `env:"NODE_NAME" allowed:"a DNS name of lower-case letters, digits, '-' and '.', at most 253 characters"`

	// The interface of the underlay. Empty: the one that the default route leaves by, IPv4 first.
	Uplink string `env:"UPLINK" allowed:"the name of an interface, at most 15 characters"`

	// How the uplink is driven. `auto` takes the first rung that can be had; a rung that is named and cannot be had is an error.
	// From best to last they are `xdp-zerocopy`, `xdp-copy`, `tun` and `plain`; `xdp` is whichever of the first two the driver grants. docs/reference/ports.md
	// says what each needs and when to choose it.
	UplinkMode string `env:"UPLINK_MODE" envDefault:"auto" allowed:"auto, xdp, xdp-zerocopy, xdp-copy, tun or plain"`

	// What the underlay does with pod addresses. `direct`: all nodes are on one link, and frames go to the other node's Ethernet address.
	// `routed`: the fabric carries routes for the pod CIDRs, and every frame goes to the gateway.
	Underlay string `env:"UNDERLAY" envDefault:"direct" allowed:"direct or routed"`

	// Forwarding threads. 0: as many as the node has cores for the daemon, but not more than the uplink has queues.
	Workers int `env:"WORKERS" envDefault:"0" allowed:"0 (automatic) to 64"`

	// The cores that workers are pinned to, worker by worker, e.g. `2-3,6`. Empty: the cores that the daemon may run on, in turn.
	// `none`: workers are not pinned.
	CPUs string `env:"CPUS" allowed:"empty, none, or a list of cores and ranges such as 2-3,6 without repetition"`

	// Where the desired state comes from. `file`: STATE_FILE. `api`: pushed to the local API by ReplaceState and PatchState. `controller`: from the
	// controllers at SYNC_ADDRESSES, which the node introduces itself to.
	StateSource string `env:"STATE_SOURCE" envDefault:"file" allowed:"file, api or controller"`

	// The desired state as JSON, for the state source `file`. It is read at start, on SIGHUP and whenever it changes.
	StateFile string `env:"STATE_FILE" envDefault:"/etc/overplane/state.json" allowed:"an absolute path"`

	// The controllers' addresses, for the state source `controller`. They are tried in turn; the node has a stream to one of them.
	SyncAddresses []string `env:"SYNC_ADDRESSES" allowed:"for the state source controller a list of host:port, such as 10.0.0.5:7443,10.0.0.6:7443"`

	// The name that the controllers' certificates must have. Empty: the host that is dialled.
	SyncServerName string `env:"SYNC_SERVER_NAME" allowed:"empty, a DNS name or an address"`

	// The share of the table, in percent, that a controller may remove at once without having declared that it means it. A few entries may always be.
	SyncRemovalPercent int `env:"SYNC_REMOVAL_PERCENT" envDefault:"20" allowed:"1 to 100"`

	// The certificates of the authority that issued the controllers' certificates, for the state source `controller`. This file and the next two are read again
	// when they change.
	TLSCA string `env:"TLS_CA" envDefault:"/etc/overplane/pki/ca.crt" allowed:"an absolute path"`

	// This node's certificate: its common name is NODE_NAME.
	TLSCert string `env:"TLS_CERT" envDefault:"/etc/overplane/pki/node.crt" allowed:"an absolute path"`

	// The certificate's key.
	TLSKey string `env:"TLS_KEY" envDefault:"/etc/overplane/pki/node.key" allowed:"an absolute path"`

	// What the daemon remembers: attached pods, the last desired state, the lock that keeps a second daemon away.
	StateDir string `env:"STATE_DIR" envDefault:"/var/lib/overplane" allowed:"an absolute path"`

	// The unix socket of the local API.
	Socket string `env:"SOCKET" envDefault:"/run/overplane/overplaned.sock" allowed:"an absolute path, at most 107 bytes"`

	// The socket's permissions, octal. Who may open the socket may attach pods and change routes.
	SocketMode FileMode `env:"SOCKET_MODE" envDefault:"0660" allowed:"octal permissions, 0600 to 0777"`

	// Where metrics (/metrics) and probes (/livez, /readyz) are answered, over plain HTTP. `none`: nowhere. docs/reference/metrics.md lists the metrics.
	MetricsListen string `env:"METRICS_LISTEN" envDefault:"127.0.0.1:7446" allowed:"host:port, :port or none"`

	// Where the steering programs and maps are pinned. It must be on a BPF file system, and each node of a shared one needs its own.
	BPFDir string `env:"BPF_DIR" envDefault:"/sys/fs/bpf/overplane" allowed:"an absolute path"`

	// Ordinary frames of memory per worker.
	Frames int `env:"FRAMES" envDefault:"16384" allowed:"4096 to 524288, a power of two"`

	// Buffers of 64 KiB per worker, which whole GSO frames are read into.
	LargeFrames int `env:"LARGE_FRAMES" envDefault:"64" allowed:"8 to 8192"`

	// Descriptors in each ring of the uplink. Every worker needs frames for the rings of all its queues.
	RingSize int `env:"RING_SIZE" envDefault:"4096" allowed:"256 to 32768, a power of two"`

	// Packets the kernel transmits in one system call in copy mode (XDP_MAX_TX_SKB_BUDGET, Linux 6.17). 0: the kernel's own default, 32.
	TXBudget int `env:"TX_BUDGET" envDefault:"64" allowed:"0, or 32 to 4096 and at most RING_SIZE"`

	// The kind of device a pod gets whose attachment does not name one. `tap` keeps 64 KiB frames whole; `veth` is a veth pair driven through
	// AF_XDP, for small packets at high rates. Attached pods keep theirs.
	PodPort string `env:"POD_PORT" envDefault:"tap" allowed:"tap or veth"`

	// Frames of a `veth` pod that wait for their worker, per worker. Each takes 2 KiB of locked memory, 4 KiB when the MTU is above 1778.
	PodRingSize int `env:"POD_RING_SIZE" envDefault:"512" allowed:"64 to 32768, a power of two"`

	// The cores that do the receiving work of `veth` pods' stacks (RPS), which is otherwise done on the worker's, while it sends. `auto`: all cores but
	// the workers', if there are any.
	PodCPUs string `env:"POD_CPUS" envDefault:"auto" allowed:"auto, none, or a list of cores and ranges such as 2-3,6 without repetition"`

	// The device between the data plane and the node's kernel.
	HostPort string `env:"HOST_PORT" envDefault:"ovp0" allowed:"the name of an interface, at most 15 characters"`

	// The largest IP packet, bytes, of the pods and of the host port. 0: the uplink's, followed when it changes. A larger one than the uplink's is not used.
	MTU int `env:"MTU" envDefault:"0" allowed:"0 (as the uplink), or 1280 to 9216"`

	// The node's primary IPv4 address on the uplink. Empty: the uplink's first global one.
	NodeIPv4 string `env:"NODE_IPV4" allowed:"empty or an IPv4 address"`

	// The node's primary IPv6 address on the uplink. Empty: the uplink's first global one.
	NodeIPv6 string `env:"NODE_IPV6" allowed:"empty or a global IPv6 address"`

	// A folder with files as ip-masq-agent reads them (`nonMasqueradeCIDRs`, `masqLinkLocal`, `masqLinkLocalIPv6`; YAML or JSON): destinations that see pods' own
	// addresses, beside those of the desired state. All its files count together, hidden ones aside, and are read again whenever they change. `none`: no folder.
	MasqDir string `env:"MASQ_DIR" envDefault:"/etc/overplane/masq.d" allowed:"an absolute path, or none"`

	// How old a worker's heartbeat may be before the steering program takes it for dead: packets for pods are then dropped and all others
	// pass to the kernel.
	HeartbeatLimit time.Duration `env:"HEARTBEAT_LIMIT" envDefault:"2s" allowed:"a duration from 500ms to 60s"`

	// The least level that is logged.
	LogLevel string `env:"LOG_LEVEL" envDefault:"info" allowed:"debug, info, warn or error"`

	// The log's form.
	LogFormat string `env:"LOG_FORMAT" envDefault:"text" allowed:"text or json"`
}

// FileMode is file permissions written in octal.
type FileMode os.FileMode

// Values of Config.UplinkMode.
const (
	ModeAuto        = "auto"
	ModeXDP         = "xdp"
	ModeXDPZeroCopy = "xdp-zerocopy"
	ModeXDPCopy     = "xdp-copy"
	ModeTun         = "tun"
	ModePlain       = "plain"
)

// Values of Config.PodPort.
const (
	KindTAP  = "tap"
	KindVeth = "veth"
)

// Values of Config.Underlay.
const (
	UnderlayDirect = "direct"
	UnderlayRouted = "routed"
)

// Values of Config.StateSource.
const (
	SourceFile       = "file"
	SourceAPI        = "api"
	SourceController = "controller"
)

// metricsNone is the value of Config.MetricsListen that turns it off.
const metricsNone = "none"

// cpuNone is the value of Config.CPUs that leaves workers where the scheduler puts them.
const cpuNone = "none"

// cpuAuto is the value of Config.PodCPUs that leaves the workers' cores out.
const cpuAuto = "auto"

// Routed reports whether every frame for another node goes to the gateway.
func (c *Config) Routed() bool { return c.Underlay == UnderlayRouted }

// Node4 is the configured IPv4 address, invalid if none is.
func (c *Config) Node4() netip.Addr { return addrOrNone(c.NodeIPv4) }

// Node6 is the configured IPv6 address, invalid if none is.
func (c *Config) Node6() netip.Addr { return addrOrNone(c.NodeIPv6) }

// Level is LogLevel for package slog.
func (c *Config) Level() slog.Level {
	var l slog.Level
	if l.UnmarshalText([]byte(c.LogLevel)) != nil {
		return slog.LevelInfo
	}
	return l
}

func addrOrNone(s string) netip.Addr {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return netip.Addr{}
	}
	return a
}
