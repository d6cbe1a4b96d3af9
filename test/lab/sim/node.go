package sim

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
	syncclient "github.com/overplane/overplane/control/client/sync"
	"github.com/overplane/overplane/control/pki"
)

// Ledger knows by which blocks nodes forward, and what must not be. The zero value is empty. Its methods may be called concurrently.
type Ledger struct {
	mu      sync.Mutex
	holders map[string]string // block -> node
	wrong   []error
}

// take makes blocks a node's, in place of those that it had. A block of another node's is noted as wrong.
func (l *Ledger) take(node string, blocks []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.holders == nil {
		l.holders = make(map[string]string)
	}
	for b, n := range l.holders {
		if n == node && !slices.Contains(blocks, b) {
			delete(l.holders, b)
		}
	}
	for _, b := range blocks {
		if other := l.holders[b]; other != "" && other != node {
			l.wrong = append(l.wrong, fmt.Errorf("block %s was given to %s while %s has it", b, node, other))
		}
		l.holders[b] = node
	}
}

// Note adds to what is wrong.
func (l *Ledger) Note(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wrong = append(l.wrong, fmt.Errorf(format, args...))
}

// Wrong is everything that should not have been.
func (l *Ledger) Wrong() []error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.wrong)
}

// NodeOptions are what is particular about a node. The zero value is complete.
type NodeOptions struct {
	Dir    string  // where it keeps its table; empty: nowhere
	Ledger *Ledger // where its blocks are entered; nil: nowhere
	// Apply, if set, is the data plane's answer to a state.
	Apply func(*controlv1.NodeState) error
	// Change, if set, changes the client's configuration.
	Change func(*syncclient.Config)
}

// Node is a simulated node. Its methods may be called concurrently.
type Node struct {
	Name   string
	Client *syncclient.Client
	ledger *Ledger
	stop   context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex
	state *controlv1.NodeState
	apply func(*controlv1.NodeState) error
	news  chan struct{} // closed and replaced when the state changes
}

// NodeName is the name of node number i.
func NodeName(i int) string { return fmt.Sprintf("n%d", i) }

// NodeFacts are what node number i says of itself.
func NodeFacts(i int) syncclient.Facts {
	return syncclient.Facts{IPv4: fmt.Sprintf("10.240.%d.%d", i/250, i%250+1), IPv6: fmt.Sprintf("fd00:240::%x", i+1), MAC: fmt.Sprintf("02:00:00:00:%02x:%02x", i/256, i%256)}
}

// StartNode starts node number i, which follows the controllers at the addresses until Stop.
func (c *Cluster) StartNode(i int, addresses []string, o NodeOptions) (*Node, error) {
	f, err := c.Issue(pki.Request{Role: pki.Node, Name: NodeName(i)})
	if err != nil {
		return nil, err
	}
	cfg := syncclient.Config{
		Node: NodeName(i), Addresses: addresses, TLS: f, Dir: o.Dir, MinBackoff: 20 * time.Millisecond, MaxBackoff: 200 * time.Millisecond,
		Facts: func() (syncclient.Facts, error) { return NodeFacts(i), nil },
	}
	if o.Change != nil {
		o.Change(&cfg)
	}
	client, err := syncclient.New(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &Node{Name: NodeName(i), Client: client, ledger: o.Ledger, stop: cancel, done: make(chan struct{}), apply: o.Apply, news: make(chan struct{})}
	go func() {
		defer close(n.done)
		_ = client.Run(ctx, n.program) // returns nil, when it is stopped
	}()
	return n, nil
}

func (n *Node) program(_ context.Context, s *controlv1.NodeState) error {
	if err := api.Validate(s); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.apply != nil {
		if err := n.apply(s); err != nil {
			return err
		}
	}
	n.state = s
	if n.ledger != nil {
		n.ledger.take(n.Name, blocksOf(s))
	}
	close(n.news)
	n.news = make(chan struct{})
	return nil
}

func blocksOf(s *controlv1.NodeState) (out []string) {
	for _, b := range s.GetOwnBlocks() {
		out = append(out, b.GetCidr())
	}
	slices.Sort(out)
	return out
}

// Stop ends the node as a crash would: it forwards no more, and tells nobody. Its blocks stay its own in the ledger until Forget.
func (n *Node) Stop() {
	n.stop()
	<-n.done
}

// Forget says that the node is known to be dead.
func (n *Node) Forget() {
	if n.ledger != nil {
		n.ledger.take(n.Name, nil)
	}
}

// State is what the node forwards by; nil: nothing yet.
func (n *Node) State() *controlv1.NodeState {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state
}

// Blocks are the node's own, sorted.
func (n *Node) Blocks() []string { return blocksOf(n.State()) }

// Wait returns when what the node forwards by is as asked for.
func (n *Node) Wait(ctx context.Context, ok func(*controlv1.NodeState) bool) error {
	for {
		n.mu.Lock()
		s, news := n.state, n.news
		n.mu.Unlock()
		if s != nil && ok(s) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s, which has blocks %v and %d routes: %w; its client says: %+v", n.Name, blocksOf(s), len(s.GetRoutes()), ctx.Err(), n.Client.Status())
		case <-news:
		}
	}
}

// HasRouteTo reports whether a state leads to a block by a node.
func HasRouteTo(s *controlv1.NodeState, block, node string) bool {
	return slices.ContainsFunc(s.GetRoutes(), func(r *controlv1.Route) bool { return r.GetPrefix() == block && r.GetNode() == node })
}

func dialNode(ctx context.Context, f pki.Files, address string) (controlv1.ControlService_SyncClient, *grpc.ClientConn, error) {
	tc, err := f.Client("127.0.0.1")
	if err != nil {
		return nil, nil, err
	}
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(tc)))
	if err != nil {
		return nil, nil, err
	}
	s, err := controlv1.NewControlServiceClient(conn).Sync(ctx)
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return s, conn, nil
}
