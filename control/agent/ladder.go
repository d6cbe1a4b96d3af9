package agent

import (
	"errors"
	"fmt"
	"strings"
)

// rung is a step of the ladder: one way of driving the uplink. AF_XDP's two rungs are one step, since a socket says by itself what it was granted.
type rung struct {
	names []string // what a refusal is said of, best first
	needs string   // what it takes of the machine, each with the Linux that has it
	never string   // why it is not even tried; empty: it is
	open  func() (UplinkGrant, error)
}

// finalError ends the climb: the reason is not one to take a lower rung for.
type finalError struct{ error }

func (e *finalError) Unwrap() error { return e.error }

// climb returns the first rung that opens, with the reasons against those before it. The error has the reasons against all.
func climb(rungs []rung) (UplinkGrant, error) {
	var refused []Refusal
	for _, r := range rungs {
		reason := r.never
		if reason == "" {
			grant, err := r.open()
			if err == nil {
				grant.Refused = append(refused, grant.Refused...)
				return grant, nil
			}
			var final *finalError
			if errors.As(err, &final) {
				return UplinkGrant{}, final.error
			}
			reason = fmt.Sprintf("%s (it takes %s)", strings.ReplaceAll(err.Error(), "\n", "; "), r.needs)
		}
		for _, name := range r.names {
			refused = append(refused, Refusal{Rung: name, Reason: reason})
		}
	}
	var errs []error
	for _, r := range refused {
		errs = append(errs, fmt.Errorf("%s: %s", r.Rung, r.Reason))
	}
	return UplinkGrant{}, errors.Join(errs...)
}

// onlyMode leaves of the ladder what the mode allows: all of it for auto. Better rungs stay as ones that were not asked for.
func onlyMode(mode string, rungs []rung) []rung {
	if mode == ModeAuto {
		return rungs
	}
	var out []rung
	for _, r := range rungs {
		asked := false
		for _, name := range r.names {
			asked = asked || name == mode || mode == ModeXDP && (name == ModeXDPZeroCopy || name == ModeXDPCopy)
		}
		if asked {
			return append(out, r)
		}
		r.never = "not asked for: " + EnvPrefix + "UPLINK_MODE=" + mode
		out = append(out, r)
	}
	return out
}
