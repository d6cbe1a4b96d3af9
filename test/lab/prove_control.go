package lab

import (
	"context"
	"errors"
	"fmt"
	"time"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// outage is for how long the controller is away in the demonstration.
const outage = 3 * time.Second

// ControlProofs are what `overplane lab run` shows of the controller, in order. They change the lab, put it back, and serve both families at once.
func ControlProofs() []Proof {
	return []Proof{
		{"a node joins under traffic, is drained, its block rests and is free", proveComeAndGo},
		{"controller killed under traffic, started again", proveOutage},
	}
}

// underTraffic does something while the pods of the nodes that are there talk, and counts what is lost.
func (l *Lab) underTraffic(do func() error) (string, error) {
	t, err := l.StartTraffic()
	if err != nil {
		return "", err
	}
	err = do()
	sent, lost := t.Stop()
	return fmt.Sprintf("0 of %d lost", sent), errors.Join(err, lost)
}

func proveOutage(ctx context.Context, l *Lab, _ int) (string, error) {
	return l.underTraffic(func() error {
		if err := l.KillController(); err != nil {
			return err
		}
		if err := sleep(ctx, outage); err != nil {
			return errors.Join(err, l.StartController(context.WithoutCancel(ctx)))
		}
		if err := l.StartController(ctx); err != nil {
			return err
		}
		return l.WaitProgrammed(ctx)
	})
}

func proveComeAndGo(ctx context.Context, l *Lab, _ int) (string, error) {
	block, rest := "", time.Duration(0)
	lost, err := l.underTraffic(func() error {
		n, err := l.AddNode(ctx)
		if err != nil {
			return err
		}
		for _, family := range []int{4, 6} {
			if err := EchoTCP(ctx, l.Nodes[0].Pods[0].End(), n.Pods[0].End(), family); err != nil {
				return err
			}
			if err := EchoTCP(ctx, n.Pods[0].End(), l.Nodes[1].Pods[0].End(), family); err != nil {
				return err
			}
		}
		if err := l.Drain(ctx, n.Name()); err != nil {
			return err
		}
		drained := time.Now()
		defer func() { block, rest = n.BlockIPv4.String(), time.Since(drained) }()
		return l.waitFor(ctx, "the blocks of "+n.Name()+" are free", func(ctx context.Context) (bool, error) {
			blocks, err := l.Blocks(ctx, n.Name())
			for _, b := range blocks {
				if b.GetState() != controlv1.BlockState_BLOCK_STATE_FREE {
					return false, err
				}
			}
			return err == nil, err
		})
	})
	return fmt.Sprintf("%s; %s free after %.1f s", lost, block, rest.Seconds()), err
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
