package agent

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// notifier tells the service manager how the daemon is (sd_notify(3)). The zero value tells nobody.
type notifier struct {
	addr     *net.UnixAddr
	watchdog time.Duration // how often the manager wants to hear; 0: never
}

// newNotifier reads NOTIFY_SOCKET and WATCHDOG_USEC (sd_watchdog_enabled(3)).
func newNotifier(getenv func(string) string) notifier {
	n := notifier{}
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return n
	}
	n.addr = &net.UnixAddr{Name: path, Net: "unixgram"}
	if pid := getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return n
	}
	if usec, err := strconv.ParseInt(getenv("WATCHDOG_USEC"), 10, 64); err == nil && usec > 0 {
		n.watchdog = time.Duration(usec) * time.Microsecond
	}
	return n
}

// send is best effort: a manager that does not listen is no reason to stop forwarding.
func (n notifier) send(state string) {
	if n.addr == nil {
		return
	}
	c, err := net.DialUnix("unixgram", nil, n.addr)
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = c.Write([]byte(state))
}

func (n notifier) Ready(status string) { n.send("READY=1\nSTATUS=" + status) }
func (n notifier) Stopping()           { n.send("STOPPING=1") }
func (n notifier) Watchdog()           { n.send("WATCHDOG=1") }

// Reloading must carry the monotonic time (Type=notify-reload, systemd 253).
func (n notifier) Reloading() {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	n.send(fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", ts.Nano()/1000))
}
