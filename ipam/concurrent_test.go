package ipam_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	"github.com/stretchr/testify/require"

	"github.com/overplane/overplane/control/store"
	"github.com/overplane/overplane/ipam"
)

// operation is what a history of concurrent calls is made of.
type operation struct {
	kind string // register, release
	node string
}

type result struct {
	block string
	err   string
}

// blockModel is what a history must be one order of: blocks and their owners; a released block may be had by anybody at once.
func blockModel(blocks int) porcupine.Model {
	type owners = map[string]string // block -> owner
	return porcupine.Model{
		Init: func() any { return owners{} },
		Step: func(state, in, out any) (bool, any) {
			s, op, r := state.(owners), in.(operation), out.(result)
			mine := ""
			for b, o := range s {
				if o == op.node {
					mine = b
				}
			}
			next := make(owners, len(s)+1)
			for b, o := range s {
				next[b] = o
			}
			if op.kind == "release" {
				delete(next, mine)
				return true, next
			}
			switch {
			case r.err == "exhausted":
				return mine == "" && len(s) == blocks, s
			case mine != "":
				return r.block == mine, s
			}
			if _, taken := s[r.block]; taken || r.block == "" {
				return false, s
			}
			next[r.block] = op.node
			return true, next
		},
		Equal: func(a, b any) bool { return fmt.Sprint(a) == fmt.Sprint(b) },
	}
}

// Several allocators on one store: as if several controllers thought that they lead, with the transactions as the only thing between them.
func TestConcurrentClaimsAreLinearizable(t *testing.T) {
	const blocks, nodes, each = 4, 8, 25
	m := store.NewMemory()
	m.Fault = func(ipam.Tx) (bool, error) {
		time.Sleep(rand.N(300 * time.Microsecond)) // between reading and writing, so that calls do overlap
		return true, nil
	}
	first, _ := leader(t, m, ipam.Config{Cooldown: 1})
	_, _, err := first.AddPool(t.Context(), pool(22))
	require.NoError(t, err)
	var mu sync.Mutex
	var history []porcupine.Operation
	start := time.Now()
	record := func(client int, op operation, call func() result) {
		begin := time.Since(start).Nanoseconds()
		r := call()
		end := time.Since(start).Nanoseconds()
		mu.Lock()
		defer mu.Unlock()
		history = append(history, porcupine.Operation{ClientId: client, Input: op, Output: r, Call: begin, Return: end})
	}
	var wg sync.WaitGroup
	for n := range nodes {
		s, err := m.Open(t.Context())
		require.NoError(t, err)
		s.Adopt(m)
		a := ipam.NewAllocator(s, ipam.Config{Cooldown: 1})
		wg.Go(func() {
			f := facts(n)
			for i := range each {
				record(n, operation{"register", f.Name}, func() result {
					revision, err := a.Register(t.Context(), f)
					var e *ipam.ExhaustedError
					if errors.As(err, &e) {
						return result{err: "exhausted"}
					}
					if err != nil {
						t.Errorf("register: %v", err)
						return result{err: err.Error()}
					}
					var r result
					_ = s.Read(t.Context(), revision, func(tb *ipam.Table) {
						for _, b := range tb.Owned(f.Name) {
							if b.Held() {
								r.block = b.CIDR.String()
							}
						}
					})
					return r
				})
				if (i+n)%3 == 0 {
					record(n, operation{"release", f.Name}, func() result {
						_, err := a.Release(t.Context(), f.Name, true)
						var unknown *ipam.UnknownNodeError
						if err != nil && !errors.As(err, &unknown) {
							t.Errorf("release: %v", err)
						}
						// Free at once: the model has no cooldown.
						for i := 0; i < 2; i++ {
							if _, err := a.Tick(t.Context(), everybody(ipam.Progress{})); err != nil {
								t.Errorf("tick: %v", err)
							}
						}
						return result{}
					})
				}
			}
		})
	}
	wg.Wait()
	exhausted := 0
	for _, o := range history {
		if o.Output.(result).err == "exhausted" {
			exhausted++
		}
	}
	t.Logf("%d operations, %d of them found no block", len(history), exhausted)
	require.Equal(t, porcupine.Ok, porcupine.CheckOperationsTimeout(blockModel(blocks), history, 30*time.Second))
}
