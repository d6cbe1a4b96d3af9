package agent

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// allowedCPUs are the cores the process may run on.
func allowedCPUs() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, fmt.Errorf("reading the allowed cores: %w", err)
	}
	var out []int
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			out = append(out, i)
		}
	}
	return out, nil
}

// assignCPUs gives each worker its core, -1 for none.
func assignCPUs(setting string, allowed []int, workers int) ([]int, error) {
	cpus := make([]int, workers)
	list, err := ParseCPUs(setting)
	if err != nil {
		return nil, err
	}
	bad := func(reason string) error {
		return configErrorValue("CPUs", setting, reason)
	}
	switch {
	case setting == cpuNone:
		for i := range cpus {
			cpus[i] = -1
		}
		return cpus, nil
	case len(list) == 0:
		list = allowed
	case len(list) < workers:
		return nil, bad(fmt.Sprintf("%d cores for %d workers", len(list), workers))
	default:
		for _, c := range list {
			if !slices.Contains(allowed, c) {
				return nil, bad(fmt.Sprintf("core %d is not among those that the daemon may run on: %v", c, allowed))
			}
		}
	}
	for i := range cpus {
		cpus[i] = list[i%len(list)]
	}
	return cpus, nil
}
