package controller

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caarlos0/env/v11"
	"google.golang.org/protobuf/encoding/protojson"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/ipam"
)

//go:generate go run ../agent/gendocs OVERPLANE_CONTROLLER_ ../../docs/reference/controller.md

// EnvPrefix is what every variable of the controller starts with.
const EnvPrefix = "OVERPLANE_CONTROLLER_"

// Config is what the controller takes from its environment: each field is the variable EnvPrefix + its env tag. The comments are its documentation.
type Config struct {
	// This controller's name, for other controllers' logs. Empty: the host name.
	Name string `env:"NAME" allowed:"any text"`

	// Where nodes dial.
	Listen string `env:"LISTEN" envDefault:":7443" allowed:"host:port or :port"`

	// Where operators dial.
	AdminListen string `env:"ADMIN_LISTEN" envDefault:"127.0.0.1:7444" allowed:"host:port or :port"`

	// Where metrics (/metrics) and probes (/livez, /readyz) are answered, over plain HTTP. `none`: nowhere.
	MetricsListen string `env:"METRICS_LISTEN" envDefault:"127.0.0.1:7445" allowed:"host:port, :port or none"`

	// The certificates of the authority that issues nodes' and administrators' certificates. This file and the next two are read again when they change.
	CAFile string `env:"CA" envDefault:"/etc/overplane/pki/ca.crt" allowed:"an absolute path"`

	// The controller's certificate, for the names and addresses that nodes and operators dial.
	CertFile string `env:"CERT" envDefault:"/etc/overplane/pki/controller.crt" allowed:"an absolute path"`

	// The certificate's key.
	KeyFile string `env:"KEY" envDefault:"/etc/overplane/pki/controller.key" allowed:"an absolute path"`

	// Where the embedded etcd keeps its files.
	StateDir string `env:"STATE_DIR" envDefault:"/var/lib/overplane-controller" allowed:"an absolute path"`

	// The most that the embedded etcd may store, MiB.
	EtcdQuota int64 `env:"ETCD_QUOTA" envDefault:"512" allowed:"16 to 8192"`

	// An external etcd's endpoints. Empty: the embedded one.
	EtcdEndpoints []string `env:"ETCD_ENDPOINTS" allowed:"a list such as https://10.0.0.5:2379,https://10.0.0.6:2379"`

	// Where this cluster's keys are in an external etcd.
	EtcdPrefix string `env:"ETCD_PREFIX" envDefault:"/overplane/" allowed:"text that starts and ends with /"`

	// The certificates of an external etcd's authority. Empty: the machine's.
	EtcdCA string `env:"ETCD_CA" allowed:"empty or an absolute path"`

	// This controller's certificate for an external etcd. Empty: none.
	EtcdCert string `env:"ETCD_CERT" allowed:"empty or an absolute path"`

	// The certificate's key.
	EtcdKey string `env:"ETCD_KEY" allowed:"empty or an absolute path"`

	// A user of an external etcd. Empty: none.
	EtcdUsername string `env:"ETCD_USERNAME" allowed:"any text"`

	// The user's password.
	EtcdPassword string `env:"ETCD_PASSWORD" allowed:"any text"`

	// The pod CIDRs: one per family, in the families' order; more may follow. They are created when they are not there yet, and never removed.
	PodCIDRs []string `env:"POD_CIDRS" envDefault:"10.244.0.0/16,fd12:3456:789a::/64" allowed:"a list of prefixes"`

	// The prefix length of each pod CIDR's blocks. Empty: 24 and 80.
	PodBlocks []int `env:"POD_BLOCKS" allowed:"empty, or a number for each of POD_CIDRS"`

	// The service CIDRs, which lead to each node's own kernel: none, or one per family in the families' order.
	ServiceCIDRs []string `env:"SERVICE_CIDRS" allowed:"empty or a list of prefixes"`

	// The DNS service's addresses.
	DNSAddresses []string `env:"DNS_ADDRESSES" allowed:"empty, or an address for each of SERVICE_CIDRS"`

	// The nodes' subnets, which other ranges may not overlap.
	NodeCIDRs []string `env:"NODE_CIDRS" allowed:"empty or a list of prefixes"`

	// Ranges that are reached from the cluster, such as peered networks, which other ranges may not overlap.
	ConnectedCIDRs []string `env:"CONNECTED_CIDRS" allowed:"empty or a list of prefixes"`

	// What pods and services may not touch.
	ReservedCIDRs []string `env:"RESERVED_CIDRS" envDefault:"169.254.0.0/16,172.30.0.0/16,172.31.0.0/16,192.0.2.0/24" allowed:"empty or a list of prefixes"`

	// Pods that a node may have.
	MaxPods int `env:"MAX_PODS" envDefault:"250" allowed:"10 to 250"`

	// How many nodes are expected, for validation. 0: not checked.
	ExpectNodes int `env:"EXPECT_NODES" envDefault:"0" allowed:"0 to 65535"`

	// Who is translated on the way out of the cluster: SnatRules of a state file, as JSON. Empty: the defaults.
	SNAT string `env:"SNAT" allowed:"empty or JSON such as {\"disabled\": true}"`

	// How long a block rests before another node may get it.
	Cooldown time.Duration `env:"COOLDOWN" envDefault:"60s" allowed:"a duration from 0s to 24h"`

	// How long nodes that do not withdraw a block's route can hold it up.
	CooldownDeadline time.Duration `env:"COOLDOWN_DEADLINE" envDefault:"10m" allowed:"a duration, at least COOLDOWN"`

	// How long a node may take to accept what it is sent, before its stream is ended.
	AckTimeout time.Duration `env:"ACK_TIMEOUT" envDefault:"30s" allowed:"a duration from 1s to 10m"`

	// The least level that is logged.
	LogLevel string `env:"LOG_LEVEL" envDefault:"info" allowed:"debug, info, warn or error"`

	// The log's form.
	LogFormat string `env:"LOG_FORMAT" envDefault:"text" allowed:"text or json"`
}

// Load reads a Config from an environment of NAME=value strings. The error joins one for every variable that is wrong; warnings name variables that
// it does not know.
func Load(environ []string) (cfg Config, warnings []string, err error) {
	vars := make(map[string]string)
	for _, kv := range environ {
		if name, value, ok := strings.Cut(kv, "="); ok && strings.HasPrefix(name, EnvPrefix) {
			vars[name] = value
		}
	}
	var errs []error
	bad := make(map[string]bool)
	parseErr := env.ParseWithOptions(&cfg, env.Options{Environment: vars, Prefix: EnvPrefix})
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
			f, _ := reflect.TypeFor[Config]().FieldByName(pe.Name)
			errs = append(errs, wrong(f, vars[EnvPrefix+f.Tag.Get("env")], ""))
		}
	case parseErr != nil:
		errs = append(errs, parseErr)
	}
	if cfg.Name == "" {
		cfg.Name, _ = os.Hostname() // for logs only
	}
	for field, reason := range cfg.check() {
		if !bad[field] {
			f, _ := reflect.TypeFor[Config]().FieldByName(field)
			errs = append(errs, wrong(f, fmt.Sprint(reflect.ValueOf(cfg).FieldByName(field).Interface()), reason))
		}
	}
	if len(errs) == 0 {
		r, err := cfg.Ranges()
		if err == nil {
			var w []string
			w, err = r.Validate()
			warnings = append(warnings, w...)
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	known := make(map[string]bool)
	for _, v := range cfg.Variables() {
		known[v.Name] = true
	}
	for name := range vars {
		if !known[name] {
			warnings = append(warnings, fmt.Sprintf("unknown variable %s has no effect", name))
		}
	}
	return cfg, warnings, errors.Join(errs...)
}

func wrong(f reflect.StructField, value, reason string) error {
	text := fmt.Sprintf("%s%s=%q: ", EnvPrefix, f.Tag.Get("env"), value)
	if reason != "" {
		text += reason + "; "
	}
	return errors.New(text + "allowed: " + f.Tag.Get("allowed"))
}

// check says which fields are wrong, and why if the list of what is allowed does not say it.
func (c *Config) check() map[string]string {
	out := make(map[string]string)
	for field, v := range map[string]string{"Listen": c.Listen, "AdminListen": c.AdminListen, "MetricsListen": c.MetricsListen} {
		if _, _, err := net.SplitHostPort(v); err != nil && (field != "MetricsListen" || v != none) {
			out[field] = ""
		}
	}
	for field, v := range map[string]string{"CAFile": c.CAFile, "CertFile": c.CertFile, "KeyFile": c.KeyFile, "StateDir": c.StateDir} {
		if !filepath.IsAbs(v) {
			out[field] = ""
		}
	}
	for field, v := range map[string]string{"EtcdCA": c.EtcdCA, "EtcdCert": c.EtcdCert, "EtcdKey": c.EtcdKey} {
		if v != "" && !filepath.IsAbs(v) {
			out[field] = ""
		}
	}
	if !strings.HasPrefix(c.EtcdPrefix, "/") || !strings.HasSuffix(c.EtcdPrefix, "/") {
		out["EtcdPrefix"] = ""
	}
	if c.EtcdQuota < 16 || c.EtcdQuota > 8192 {
		out["EtcdQuota"] = ""
	}
	if len(c.PodBlocks) != 0 && len(c.PodBlocks) != len(c.PodCIDRs) {
		out["PodBlocks"] = fmt.Sprintf("%d numbers for %d pod CIDRs", len(c.PodBlocks), len(c.PodCIDRs))
	}
	if c.Cooldown < 0 || c.Cooldown > 24*time.Hour {
		out["Cooldown"] = ""
	}
	if c.CooldownDeadline < c.Cooldown {
		out["CooldownDeadline"] = ""
	}
	if c.AckTimeout < time.Second || c.AckTimeout > 10*time.Minute {
		out["AckTimeout"] = ""
	}
	if c.ExpectNodes < 0 || c.ExpectNodes > 65535 {
		out["ExpectNodes"] = ""
	}
	if c.SNAT != "" {
		if err := protojson.Unmarshal([]byte(c.SNAT), &controlv1.SnatRules{}); err != nil {
			out["SNAT"] = strings.ReplaceAll(err.Error(), "\u00a0", " ")
		}
	}
	if !slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel) {
		out["LogLevel"] = ""
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		out["LogFormat"] = ""
	}
	return out
}

// none is the value of Config.MetricsListen that turns it off.
const none = "none"

// Ranges are the cluster's ranges as the configuration has them.
func (c *Config) Ranges() (ipam.Ranges, error) {
	var errs []error
	prefixes := func(name string, list []string) []netip.Prefix {
		out := make([]netip.Prefix, 0, len(list))
		for _, s := range list {
			p, err := netip.ParsePrefix(strings.TrimSpace(s))
			if err != nil {
				errs = append(errs, fmt.Errorf("%s%s: %q is no prefix: want an address and a length, e.g. 10.244.0.0/16", EnvPrefix, name, s))
				continue
			}
			out = append(out, p)
		}
		return out
	}
	r := ipam.Ranges{
		Services: prefixes("SERVICE_CIDRS", c.ServiceCIDRs), Nodes: prefixes("NODE_CIDRS", c.NodeCIDRs),
		Connected: prefixes("CONNECTED_CIDRS", c.ConnectedCIDRs), Reserved: prefixes("RESERVED_CIDRS", c.ReservedCIDRs),
		MaxPods: c.MaxPods, NodeCount: c.ExpectNodes,
	}
	for i, p := range prefixes("POD_CIDRS", c.PodCIDRs) {
		f := ipam.FamilyOf(p)
		bits := ipam.DefaultBlockBits(f)
		if i < len(c.PodBlocks) {
			bits = c.PodBlocks[i]
		}
		if !slices.Contains(r.Families, f) {
			r.Families = append(r.Families, f)
		}
		r.Pods = append(r.Pods, ipam.PodRange{CIDR: p, BlockBits: bits})
	}
	for _, s := range c.DNSAddresses {
		a, err := netip.ParseAddr(strings.TrimSpace(s))
		if err != nil {
			errs = append(errs, fmt.Errorf("%sDNS_ADDRESSES: %q is no address", EnvPrefix, s))
		}
		r.DNS = append(r.DNS, a)
	}
	return r, errors.Join(errs...)
}

// snat is the SNAT rules in the form in which they are stored, the same for the same rules.
func (c *Config) snat() []byte {
	if c.SNAT == "" {
		return nil
	}
	var v any
	if json.Unmarshal([]byte(c.SNAT), &v) != nil {
		return nil
	}
	text, _ := json.Marshal(v) // it was JSON
	return text
}

// NewLog is the log that the configuration asks for.
func (c *Config) NewLog() *slog.Logger {
	var l slog.Level
	_ = l.UnmarshalText([]byte(c.LogLevel)) // checked
	o := &slog.HandlerOptions{Level: l}
	if c.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, o))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, o))
}

// Variable is one setting, for people.
type Variable struct{ Name, Value, Default, Allowed string }

// Variables lists every setting with its value in c, in the order of the struct.
func (c *Config) Variables() (out []Variable) {
	v := reflect.ValueOf(c).Elem()
	for f := range reflect.TypeFor[Config]().Fields() {
		value := fmt.Sprint(v.FieldByName(f.Name).Interface())
		switch list := v.FieldByName(f.Name).Interface().(type) {
		case []string:
			value = strings.Join(list, ",")
		case []int:
			var s []string
			for _, n := range list {
				s = append(s, strconv.Itoa(n))
			}
			value = strings.Join(s, ",")
		}
		out = append(out, Variable{EnvPrefix + f.Tag.Get("env"), value, f.Tag.Get("envDefault"), f.Tag.Get("allowed")})
	}
	return out
}
