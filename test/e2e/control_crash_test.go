package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	"github.com/overplane/overplane/test/lab/sim"
)

// churn is nodes that join and leave, several at once, with a history of it.
type churn struct {
	t       *testing.T
	ctx     context.Context
	cluster *sim.Cluster
	v       *sim.Controller
	ledger  sim.Ledger
	start   time.Time
	steps   atomic.Int64

	mu      sync.Mutex
	history []porcupine.Operation
}

// step is one entry of the history: a node has the block from when a join returned until a leave was called.
type step struct {
	join        bool
	node, block string
}

// blockIsALock is what the history of every block must be one order of: who joins gets a block that nobody has.
var blockIsALock = porcupine.Model{
	Partition: func(history []porcupine.Operation) (parts [][]porcupine.Operation) {
		index := map[string]int{}
		for _, o := range history {
			b := o.Input.(step).block
			i, ok := index[b]
			if !ok {
				i = len(parts)
				index[b], parts = i, append(parts, nil)
			}
			parts[i] = append(parts[i], o)
		}
		return parts
	},
	Init: func() any { return "" },
	Step: func(state, in, _ any) (bool, any) {
		owner, s := state.(string), in.(step)
		if s.join {
			return owner == "", s.node
		}
		return owner == s.node, ""
	},
}

func (c *churn) record(client int, s step, begin time.Duration) {
	c.steps.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.history = append(c.history, porcupine.Operation{ClientId: client, Input: s, Call: int64(begin), Return: int64(time.Since(c.start))})
}

// insist has an operator's call answered, however often the controller dies meanwhile.
func (c *churn) insist(call func(controlv1.AdminServiceClient) error) error {
	for {
		err := c.v.Call(call)
		if err == nil || c.ctx.Err() != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// member is one node of the churn while it is up.
type member struct {
	*sim.Node
	number  int
	block   string
	leaving atomic.Bool
}

func (c *churn) join(client, number int, again bool) (*member, error) {
	begin := time.Since(c.start)
	if again {
		if err := c.insist(func(a controlv1.AdminServiceClient) error {
			_, err := a.DrainNode(c.ctx, &controlv1.DrainNodeRequest{Node: sim.NodeName(number), Undo: true})
			return err
		}); err != nil {
			return nil, err
		}
	}
	m := &member{number: number}
	first := ""
	n, err := c.cluster.StartNode(number, []string{c.v.Address}, sim.NodeOptions{Ledger: &c.ledger, Apply: func(s *controlv1.NodeState) error {
		now := ""
		for _, b := range s.GetOwnBlocks() {
			now = b.GetCidr()
		}
		if first != "" && now != first && !m.leaving.Load() {
			c.ledger.Note("block %s of %s was lost: it has %q now", first, s.GetNode(), now)
		}
		first = now
		return nil
	}})
	if err != nil {
		return nil, err
	}
	m.Node = n
	if err := n.Wait(c.ctx, hasBlocks); err != nil {
		n.Stop()
		return nil, err
	}
	m.block = n.Blocks()[0]
	c.record(client, step{true, n.Name, m.block}, begin)
	return m, nil
}

// leave takes a node's block away: with its consent, or because an operator says that it is dead.
func (c *churn) leave(client int, m *member, fenced bool) error {
	begin := time.Since(c.start)
	m.leaving.Store(true)
	if fenced {
		m.Stop()
		m.Forget()
	}
	if err := c.insist(func(a controlv1.AdminServiceClient) error {
		_, err := a.ReleaseNode(c.ctx, &controlv1.ReleaseNodeRequest{Node: m.Name, Fenced: fenced})
		return err
	}); err != nil {
		return err
	}
	if !fenced {
		if err := m.Wait(c.ctx, func(s *controlv1.NodeState) bool { return !hasBlocks(s) }); err != nil {
			return err
		}
		// It ends before the controller hears that it gave the block up, or after.
		m.Stop()
		if err := c.insist(func(a controlv1.AdminServiceClient) error {
			_, err := a.ReleaseNode(c.ctx, &controlv1.ReleaseNodeRequest{Node: m.Name, Fenced: true})
			return err
		}); err != nil {
			return err
		}
	}
	c.record(client, step{false, m.Name, m.block}, begin)
	return nil
}

// run has one client's nodes join and leave until stop says so, and returns those that are up.
func (c *churn) run(client, identities int, stop func() bool) (up []*member, err error) {
	r := rand.New(rand.NewPCG(uint64(c.start.UnixNano()), uint64(client)))
	var down []int
	known := map[int]bool{}
	for i := range identities {
		down = append(down, client*identities+i)
	}
	for !stop() {
		if len(up) > 0 && (len(down) <= identities/2 || r.IntN(2) == 0) {
			i := r.IntN(len(up))
			m := up[i]
			if err := c.leave(client, m, r.IntN(2) == 0); err != nil {
				return up, fmt.Errorf("%s leaves: %w", m.Name, err)
			}
			up = append(up[:i], up[i+1:]...)
			down = append(down, m.number)
			continue
		}
		i := r.IntN(len(down))
		m, err := c.join(client, down[i], known[down[i]])
		if err != nil {
			return up, fmt.Errorf("%s joins: %w", sim.NodeName(down[i]), err)
		}
		known[down[i]] = true
		up = append(up, m)
		down = append(down[:i], down[i+1:]...)
	}
	return up, nil
}

// The controller is killed at random points, also while it starts, and nodes join and leave all the time: what a node was told that it has stays its own until
// it left, and nobody else is told that it has it.
func TestControllerKilledDuringJoinsAndLeaves(t *testing.T) {
	t.Parallel()
	const steps, clients, identities = 200, 8, 5
	eachStore(t, func(t *testing.T, env []string) {
		kills := 8
		if len(env) > 0 {
			kills = 2 // each costs the lease of the lead
		}
		if full() {
			kills *= 5
		}
		c := &churn{t: t, ctx: limit(t, 3*time.Minute), cluster: newSim(t), start: time.Now()}
		// Fewer blocks than nodes; dead nodes hold blocks up for no longer than the deadline.
		c.v = newController(t, c.cluster, "a", append(env, "POD_CIDRS=10.244.0.0/19", "COOLDOWN=100ms", "COOLDOWN_DEADLINE=1s")...)
		require.NoError(t, c.v.Start(c.ctx))
		var killed atomic.Int64
		done := func() bool { return c.ctx.Err() != nil || c.steps.Load() >= steps && killed.Load() >= int64(kills) }
		var all sync.WaitGroup
		var mu sync.Mutex
		var up []*member
		var failures []error
		for client := range clients {
			all.Go(func() {
				left, err := c.run(client, identities, done)
				mu.Lock()
				defer mu.Unlock()
				up = append(up, left...)
				if err != nil {
					failures = append(failures, err)
				}
			})
		}
		for !done() {
			time.Sleep(rand.N(700 * time.Millisecond))
			if killed.Load() >= int64(kills) {
				continue
			}
			require.NoError(t, c.v.Kill())
			killed.Add(1)
			require.NoError(t, c.v.Launch())
			if rand.N(3) == 0 && killed.Load() < int64(kills) {
				continue // again, before it serves
			}
			require.NoError(t, c.v.WaitLeads(c.ctx))
		}
		all.Wait()
		for _, m := range up {
			t.Cleanup(m.Stop)
		}
		require.Empty(t, failures)
		require.NoError(t, c.v.WaitLeads(c.ctx))
		var nodes []*sim.Node
		for _, m := range up {
			nodes = append(nodes, m.Node)
		}
		requireJoined(t, nodes...)
		requireOwned(t, c.v, nodes...)
		require.Empty(t, c.ledger.Wrong())
		require.Equal(t, porcupine.Ok, porcupine.CheckOperationsTimeout(blockIsALock, c.history, 30*time.Second))
		t.Logf("%d joins and leaves, %d kills, %d nodes up at the end, %v", c.steps.Load(), killed.Load(), len(up), time.Since(c.start).Round(time.Millisecond))
	})
}
