package agent

import (
	"fmt"
	"os"
	"slices"
	"strings"
)

// onlineCPUs is where the kernel lists the cores that run.
const onlineCPUs = "/sys/devices/system/cpu/online"

// podCPUs are the cores that receive for veth pods' stacks; none: whichever sends to them, which are the workers'.
func podCPUs(setting, workers string, workerCount int) ([]int, error) {
	if setting != cpuAuto {
		return ParseCPUs(setting)
	}
	if workers == cpuNone {
		return nil, nil // no core is more theirs than another
	}
	allowed, err := allowedCPUs()
	if err != nil {
		return nil, err
	}
	taken, err := assignCPUs(workers, allowed, workerCount)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(onlineCPUs)
	if err != nil {
		return nil, fmt.Errorf("reading the cores that run: %w", err)
	}
	online, err := ParseCPUs(strings.TrimSpace(string(text)))
	return slices.DeleteFunc(online, func(c int) bool { return slices.Contains(taken, c) }), err
}
