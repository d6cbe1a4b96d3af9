package snat

import (
	"fmt"
	"time"
)

// Mapping says how external ports are given to inside endpoints (RFC 4787 section 4.1).
type Mapping uint8

// The mappings.
const (
	// AddressAndPortDependent gives each flow an external port of its own, which is used again towards other destinations.
	AddressAndPortDependent Mapping = iota
	// EndpointIndependent gives an inside address and port one external port, whatever the destination.
	EndpointIndependent
)

// String is the mapping's name as it is configured.
func (m Mapping) String() string {
	if m == EndpointIndependent {
		return "endpoint-independent"
	}
	return "address-and-port-dependent"
}

// Filtering says whose packets a mapping admits (RFC 4787 section 5). It matters with EndpointIndependent only: an address-and-port-dependent
// mapping admits its one peer.
type Filtering uint8

// The filterings, the strictest first.
const (
	FilterAddressAndPort Filtering = iota // only from addresses and ports that the inside endpoint has sent to
	FilterAddress                         // only from addresses that it has sent to
	FilterNone                            // from anybody: RFC 4787's "endpoint-independent filtering"
)

// Choice says how a new mapping's external port is picked from those that the pod holds.
type Choice uint8

// The choices.
const (
	ChooseRandom   Choice = iota // unpredictably (RFC 6056 algorithm 1)
	ChooseHash                   // by a keyed hash of the flow: the same flow gets the same port again while it is free
	ChoosePreserve               // the inside port if it may be had, else at random
)

// Timers are how long sessions live without traffic. A zero field means its default.
type Timers struct {
	UDP            time.Duration // 300 s; RFC 4787 REQ-5 wants at least 2 minutes
	ICMP           time.Duration // echo: 60 s (RFC 5508 REQ-2)
	TCPOpening     time.Duration // until both sides have opened: 240 s (RFC 5382 REQ-5)
	TCPEstablished time.Duration // 7,440 s (RFC 5382 REQ-5)
	TCPClosing     time.Duration // after both FINs: 240 s (RFC 5382 REQ-5, RFC 7857 section 2.1)
	TCPReset       time.Duration // after a RST, unless traffic follows: 240 s (RFC 7857 section 2.2)
	Other          time.Duration // SCTP, ESP, GRE: 600 s
	PortRest       time.Duration // a port freed by anything but a closed TCP connection rests: 120 s (RFC 6888 REQ-8). Endpoint-independent only
	Fragment       time.Duration // what is known of a fragmented datagram: 15 s
	FragmentHold   time.Duration // how long fragments wait for their first: 2 s
}

// maxTimer is the longest timer the wheel takes without revisiting a session early.
const maxTimer = 4 * time.Hour

func (t *Timers) setDefaults() {
	for _, f := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&t.UDP, 300 * time.Second}, {&t.ICMP, 60 * time.Second}, {&t.TCPOpening, 240 * time.Second}, {&t.TCPEstablished, 7440 * time.Second},
		{&t.TCPClosing, 240 * time.Second}, {&t.TCPReset, 240 * time.Second}, {&t.Other, 600 * time.Second}, {&t.PortRest, 120 * time.Second},
		{&t.Fragment, 15 * time.Second}, {&t.FragmentHold, 2 * time.Second},
	} {
		if *f.v == 0 {
			*f.v = f.def
		}
	}
}

func (t *Timers) validate() error {
	for _, f := range []struct {
		name string
		v    time.Duration
	}{
		{"UDP", t.UDP}, {"ICMP", t.ICMP}, {"TCP opening", t.TCPOpening}, {"TCP established", t.TCPEstablished}, {"TCP closing", t.TCPClosing},
		{"TCP reset", t.TCPReset}, {"other", t.Other}, {"port rest", t.PortRest}, {"fragment", t.Fragment}, {"fragment hold", t.FragmentHold},
	} {
		if f.v < time.Second || f.v > maxTimer {
			return fmt.Errorf("snat: the %s timer is %v: want 1 s to %v", f.name, f.v, maxTimer)
		}
	}
	return nil
}

// NoPod is the pod index of flows that belong to no pod of this node.
const NoPod = -1

// Config is how a Translator works. Zero fields mean the defaults given.
type Config struct {
	// Worker is the index of the worker that owns the translator.
	Worker int
	// Sessions4 and Sessions6 are the records reserved for each family: 262,144. At most 1<<24-2. With EndpointIndependent a mapping takes one, too.
	Sessions4, Sessions6 int

	Mapping   Mapping
	Filtering Filtering
	Choice    Choice
	// RefreshInbound lets packets from outside extend UDP and ICMP sessions, too (RFC 4787 REQ-6; off by default, as it recommends).
	RefreshInbound bool
	Timers         Timers

	// SessionGuarantee is how many sessions of each family a pod gets however greedy the others are: half the records / maximum of pods, so that half
	// of them is for whoever needs them.
	SessionGuarantee int
	// HalfOpen is how many connections of each family may be half open at once: a quarter of the records.
	HalfOpen int
	// FragmentedDatagrams is how many fragmented datagrams are tracked at once: 4,096. HeldFragments is how many fragments may wait for
	// their first: 256.
	FragmentedDatagrams, HeldFragments int

	// RSS, if not nil, makes the translator prefer ports whose replies the NIC delivers to one of the worker's own queues.
	RSS *RSS
}

func (c *Config) setDefaults(maxPods int) {
	set := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	set(&c.Sessions4, 1<<18)
	set(&c.Sessions6, 1<<18)
	set(&c.SessionGuarantee, max(1, min(c.Sessions4, c.Sessions6)/(2*(maxPods+1))))
	set(&c.HalfOpen, max(1, min(c.Sessions4, c.Sessions6)/4))
	set(&c.FragmentedDatagrams, 4096)
	set(&c.HeldFragments, 256)
	c.Timers.setDefaults()
}

func (c *Config) validate() error {
	switch {
	case c.Sessions4 < 1 || c.Sessions4 > maxRecords || c.Sessions6 < 1 || c.Sessions6 > maxRecords:
		return fmt.Errorf("snat: %d IPv4 and %d IPv6 sessions: want 1 to %d of each", c.Sessions4, c.Sessions6, maxRecords)
	case c.Mapping > EndpointIndependent, c.Filtering > FilterNone, c.Choice > ChoosePreserve:
		return fmt.Errorf("snat: unknown mapping %d, filtering %d or choice %d", c.Mapping, c.Filtering, c.Choice)
	case c.SessionGuarantee < 0 || c.HalfOpen < 1 || c.FragmentedDatagrams < 1 || c.FragmentedDatagrams > 1<<16 || c.HeldFragments < 0 || c.HeldFragments > 1<<16:
		return fmt.Errorf("snat: a limit is out of range: guarantee %d, half-open %d, fragmented datagrams %d, held fragments %d",
			c.SessionGuarantee, c.HalfOpen, c.FragmentedDatagrams, c.HeldFragments)
	}
	return c.Timers.validate()
}
