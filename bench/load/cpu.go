package load

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// CPU is a reading of how long cores were busy: elapsed time less what /proc/stat has as idle or waiting for I/O. Interrupt time is not accounted for
// everywhere, so that busy time is not the sum of what ran.
type CPU struct {
	at   time.Time
	idle []time.Duration
}

// userHZ is the unit of /proc/stat: USER_HZ is 100 on every architecture that matters here.
const userHZ = 100

// ReadCPU takes a reading.
func ReadCPU() (CPU, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return CPU{}, err
	}
	return parseCPU(string(data), time.Now())
}

func parseCPU(stat string, at time.Time) (CPU, error) {
	c := CPU{at: at}
	for line := range strings.Lines(stat) {
		f := strings.Fields(line)
		if len(f) < 6 || !strings.HasPrefix(f[0], "cpu") || f[0] == "cpu" {
			continue
		}
		idle, err1 := strconv.ParseInt(f[4], 10, 64)
		iowait, err2 := strconv.ParseInt(f[5], 10, 64)
		if err1 != nil || err2 != nil {
			return c, fmt.Errorf("/proc/stat: %q", line)
		}
		c.idle = append(c.idle, time.Duration(idle+iowait)*(time.Second/userHZ))
	}
	if len(c.idle) == 0 {
		return c, fmt.Errorf("/proc/stat has no cores")
	}
	return c, nil
}

// Busy is how long all cores together were busy since an earlier reading, at least 0.
func (c CPU) Busy(earlier CPU) time.Duration {
	elapsed := c.at.Sub(earlier.at)
	busy := time.Duration(0)
	for i := range c.idle {
		if i < len(earlier.idle) {
			busy += max(0, elapsed-(c.idle[i]-earlier.idle[i]))
		}
	}
	return busy
}
