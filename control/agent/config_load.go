package agent

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caarlos0/env/v11"

	"github.com/overplane/overplane/control/agent/kernel"
	"github.com/overplane/overplane/control/api"
)

// ConfigError is one variable with a value that cannot be used.
type ConfigError struct {
	Variable string // with its prefix
	Value    string
	Allowed  string
	Reason   string // what is wrong, if the list of what is allowed does not say it
}

func (e *ConfigError) Error() string {
	s := fmt.Sprintf("%s=%q: allowed: %s", e.Variable, e.Value, e.Allowed)
	if e.Reason != "" {
		s = fmt.Sprintf("%s=%q: %s; allowed: %s", e.Variable, e.Value, e.Reason, e.Allowed)
	}
	return s
}

// Load reads a Config from an environment of NAME=value strings (os.Environ). The error joins one *ConfigError for every
// variable that is wrong. Warnings name variables with the daemon's prefix that it does not know. Only the environment and the host name are
// read: what the machine can grant is found out at start.
func Load(environ []string) (cfg Config, warnings []string, err error) {
	vars := make(map[string]string)
	for _, kv := range environ {
		if name, value, ok := strings.Cut(kv, "="); ok && strings.HasPrefix(name, EnvPrefix) {
			vars[name] = value
		}
	}
	var errs []error
	bad := make(map[string]bool) // fields that did not even parse
	parseErr := env.ParseWithOptions(&cfg, env.Options{Environment: vars, Prefix: EnvPrefix, FuncMap: map[reflect.Type]env.ParserFunc{
		reflect.TypeFor[FileMode](): func(s string) (any, error) {
			v, err := strconv.ParseUint(s, 8, 12)
			return FileMode(v), err
		},
	}})
	var all env.AggregateError
	switch {
	case errors.As(parseErr, &all):
		for _, e := range all.Errors {
			var pe env.ParseError
			if !errors.As(e, &pe) {
				errs = append(errs, e)
				continue
			}
			bad[pe.Name] = true
			errs = append(errs, configError(vars, pe.Name, ""))
		}
	case parseErr != nil:
		errs = append(errs, parseErr)
	}
	if cfg.NodeName == "" {
		host, err := os.Hostname()
		cfg.NodeName = strings.ToLower(host) // as Kubernetes does
		if err != nil {
			errs = append(errs, fmt.Errorf("%sNODE_NAME is not set and the host name cannot be read: %w", EnvPrefix, err))
			bad["NodeName"] = true
		}
	}
	for _, p := range cfg.check() {
		if !bad[p.field] {
			errs = append(errs, configErrorValue(p.field, cfg.value(p.field), p.reason))
		}
	}
	return cfg, unknownVariables(vars), errors.Join(errs...)
}

// problem is one field that is wrong.
type problem struct{ field, reason string }

var ifNamePattern = regexp.MustCompile(`^[^/\s:%]{1,15}$`)

// check lists every field that is wrong.
func (c *Config) check() []problem {
	var out []problem
	bad := func(field, format string, args ...any) {
		out = append(out, problem{field, fmt.Sprintf(format, args...)})
	}
	oneOf := func(field, value string, allowed ...string) {
		if !slices.Contains(allowed, value) {
			bad(field, "")
		}
	}
	within := func(field string, v, lo, hi int, power bool) {
		if v < lo || v > hi || power && v&(v-1) != 0 {
			bad(field, "")
		}
	}
	path := func(field, v string) {
		if !filepath.IsAbs(v) {
			bad(field, "")
		}
	}

	if err := api.ValidateNodeName(c.NodeName); err != nil {
		bad("NodeName", "")
	}
	if c.Uplink != "" && !validIfName(c.Uplink) {
		bad("Uplink", "")
	}
	if !validIfName(c.HostPort) {
		bad("HostPort", "")
	} else if c.HostPort == c.Uplink {
		bad("HostPort", "it is the uplink")
	}
	if c.Uplink == kernel.UplinkDeviceName || c.HostPort == kernel.UplinkDeviceName {
		field := "HostPort"
		if c.Uplink == kernel.UplinkDeviceName {
			field = "Uplink"
		}
		bad(field, "it is the name of the device that stands for the uplink")
	}
	oneOf("UplinkMode", c.UplinkMode, ModeAuto, ModeXDP, ModeXDPZeroCopy, ModeXDPCopy, ModeTun, ModePlain)
	oneOf("PodPort", c.PodPort, KindTAP, KindVeth)
	oneOf("Underlay", c.Underlay, UnderlayDirect, UnderlayRouted)
	oneOf("StateSource", c.StateSource, SourceFile, SourceAPI, SourceController)
	oneOf("LogLevel", c.LogLevel, "debug", "info", "warn", "error")
	oneOf("LogFormat", c.LogFormat, "text", "json")
	within("Workers", c.Workers, 0, 64, false)
	within("Frames", c.Frames, 4096, 524288, true)
	within("LargeFrames", c.LargeFrames, 8, 8192, false)
	within("PodRingSize", c.PodRingSize, 64, 32768, true)
	within("RingSize", c.RingSize, 256, 32768, true)
	if c.TXBudget != 0 && (c.TXBudget < 32 || c.TXBudget > 4096 || c.TXBudget > c.RingSize) {
		bad("TXBudget", "")
	}
	if c.RingSize >= 256 && c.Frames < 4*c.RingSize {
		bad("Frames", "fewer than four times %sRING_SIZE (%d), so that rings would starve each other", EnvPrefix, c.RingSize)
	}
	if c.MTU != 0 {
		within("MTU", c.MTU, 1280, 9216, false)
	}
	path("StateDir", c.StateDir)
	if c.MasqDir != masqNone {
		path("MasqDir", c.MasqDir)
	}
	path("BPFDir", c.BPFDir)
	if c.StateSource == SourceFile {
		path("StateFile", c.StateFile)
	}
	if c.StateSource == SourceController {
		c.checkSync(bad)
	}
	if path("Socket", c.Socket); len(c.Socket) > 107 {
		bad("Socket", "%d bytes long", len(c.Socket))
	}
	if _, _, err := net.SplitHostPort(c.MetricsListen); err != nil && c.MetricsListen != metricsNone {
		bad("MetricsListen", "")
	}
	if m := os.FileMode(c.SocketMode); m&0o600 != 0o600 || m > 0o777 {
		bad("SocketMode", "")
	}
	if c.HeartbeatLimit < 500*time.Millisecond || c.HeartbeatLimit > time.Minute {
		bad("HeartbeatLimit", "")
	}
	if a, err := netip.ParseAddr(c.NodeIPv4); c.NodeIPv4 != "" && (err != nil || !a.Is4() || !a.IsGlobalUnicast()) {
		bad("NodeIPv4", "")
	}
	if a, err := netip.ParseAddr(c.NodeIPv6); c.NodeIPv6 != "" && (err != nil || !a.Is6() || a.Is4In6() || a.Zone() != "" || !a.IsGlobalUnicast()) {
		bad("NodeIPv6", "")
	}
	if _, err := ParseCPUs(c.PodCPUs); err != nil && c.PodCPUs != cpuAuto {
		bad("PodCPUs", "%v", err)
	}
	if cpus, err := ParseCPUs(c.CPUs); err != nil {
		bad("CPUs", "%v", err)
	} else if c.Workers > 0 && len(cpus) > 0 && len(cpus) < c.Workers {
		bad("CPUs", "%d cores for %d workers", len(cpus), c.Workers)
	}
	return out
}

func validIfName(s string) bool { return ifNamePattern.MatchString(s) && s != "." && s != ".." }

// ParseCPUs reads a list of cores and ranges. The empty list and "none" have no cores.
func ParseCPUs(s string) ([]int, error) {
	if s == "" || s == cpuNone {
		return nil, nil
	}
	var out []int
	for part := range strings.SplitSeq(s, ",") {
		lo, hi, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			hi = lo
		}
		from, err1 := strconv.ParseUint(lo, 10, 10)
		to, err2 := strconv.ParseUint(hi, 10, 10)
		if err1 != nil || err2 != nil || to < from {
			return nil, fmt.Errorf("%q is no core and no range of cores", part)
		}
		for n := from; n <= to; n++ {
			if slices.Contains(out, int(n)) {
				return nil, fmt.Errorf("core %d is listed twice", n)
			}
			out = append(out, int(n))
		}
	}
	return out, nil
}

// configError describes a field whose text did not parse.
func configError(vars map[string]string, field, reason string) error {
	f, _ := reflect.TypeFor[Config]().FieldByName(field)
	return configErrorValue(field, vars[EnvPrefix+f.Tag.Get("env")], reason)
}

func configErrorValue(field, value, reason string) error {
	f, _ := reflect.TypeFor[Config]().FieldByName(field)
	return &ConfigError{Variable: EnvPrefix + f.Tag.Get("env"), Value: value, Allowed: f.Tag.Get("allowed"), Reason: reason}
}

// value is a field in the form in which it is set.
func (c *Config) value(field string) string {
	switch v := reflect.ValueOf(c).Elem().FieldByName(field).Interface().(type) {
	case []string:
		return strings.Join(v, ",")
	case FileMode:
		return fmt.Sprintf("%#o", uint32(v))
	default:
		return fmt.Sprint(v)
	}
}

// Variable is one setting, for --help and --print-config.
type Variable struct {
	Name, Value, Default, Allowed string
}

// Variables lists every setting with the value it has in c, in the order of the struct.
func (c *Config) Variables() []Variable {
	var out []Variable
	for f := range reflect.TypeFor[Config]().Fields() {
		out = append(out, Variable{
			Name: EnvPrefix + f.Tag.Get("env"), Value: c.value(f.Name),
			Default: f.Tag.Get("envDefault"), Allowed: f.Tag.Get("allowed"),
		})
	}
	return out
}

// others are the variables of the other programs; one that ends in '_' stands for all that begin with it.
var others = []string{EnvPrefix + "CONTROLLER", EnvPrefix + "CONTROLLER_", EnvPrefix + "ADMIN_", EnvPrefix + "BIN"}

// unknownVariables warns of every variable that has the prefix and is no program's.
func unknownVariables(vars map[string]string) []string {
	var known, out []string
	for f := range reflect.TypeFor[Config]().Fields() {
		known = append(known, EnvPrefix+f.Tag.Get("env"))
	}
	for name := range vars {
		if slices.Contains(known, name) || slices.ContainsFunc(others, func(o string) bool { return name == o || strings.HasSuffix(o, "_") && strings.HasPrefix(name, o) }) {
			continue
		}
		nearest := slices.MinFunc(known, func(a, b string) int { return editDistance(name, a) - editDistance(name, b) })
		out = append(out, fmt.Sprintf("unknown variable %s has no effect; the nearest known one is %s", name, nearest))
	}
	slices.Sort(out)
	return out
}

// editDistance is the Levenshtein distance of two names.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
