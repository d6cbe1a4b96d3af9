package rig

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/overplane/overplane/bench/load"
	"github.com/overplane/overplane/test/lab"
)

// deviceCounters reads what the devices of a namespace dropped, from /proc/net/dev: "device NETNS NAME rx dropped" is the name. Of two ends of a veth pair the receiving one counts what
// it had no room for, the sending one the same packets again, so that what was dropped in sending counts only where tap says that the device is no end of a pair.
func deviceCounters(netns, short string, tap func(device string) bool, into map[string]uint64) error {
	return eachDevice(netns, func(name string, f []uint64) {
		into[fmt.Sprintf("device %s %s rx errors", short, name)] = f[2]
		into[fmt.Sprintf("device %s %s rx dropped", short, name)] = f[3]
		if tap(name) {
			into[fmt.Sprintf("device %s %s tx dropped", short, name)] = f[11]
		}
	})
}

// eachDevice calls f with the 16 counters of /proc/net/dev of every device of a namespace but lo.
func eachDevice(netns string, f func(name string, counters []uint64)) error {
	return lab.InNetns(netns, func() error {
		data, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(data)) {
			name, rest, ok := strings.Cut(line, ":")
			fields := strings.Fields(rest)
			if name = strings.TrimSpace(name); !ok || name == "lo" || len(fields) < 16 {
				continue
			}
			counters := make([]uint64, 16)
			for i := range counters {
				if counters[i], err = strconv.ParseUint(fields[i], 10, 64); err != nil {
					return err
				}
			}
			f(name, counters)
		}
		return nil
	})
}

// Taken is how many packets the endpoint's device has handed on.
func Taken(e load.Endpoint) (packets uint64, err error) {
	err = eachDevice(e.Netns, func(name string, f []uint64) {
		if name == e.Device {
			packets = f[9]
		}
	})
	return packets, err
}

func noTAP(string) bool { return false }

// spaceDrops counts what the devices of all namespaces dropped, and more that is the system's own.
func spaceDrops(names []string, tap func(netns, device string) bool, more func(context.Context, map[string]uint64) error) func(context.Context) (map[string]uint64, error) {
	return func(ctx context.Context) (map[string]uint64, error) {
		drops := map[string]uint64{}
		for _, ns := range names {
			_, short, _ := strings.Cut(ns, "-")
			is := noTAP
			if tap != nil {
				is = func(device string) bool { return tap(short, device) }
			}
			if err := deviceCounters(ns, short, is, drops); err != nil {
				return nil, err
			}
		}
		if more != nil {
			if err := more(ctx, drops); err != nil {
				return nil, err
			}
		}
		return drops, nil
	}
}
