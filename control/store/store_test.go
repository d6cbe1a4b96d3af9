package store

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/overplane/overplane/ipam"
)

// kinds are the stores that the suite runs on. Each makes a store and returns how to open it; shared says whether several may have it open at once.
var kinds = []struct {
	name   string
	shared bool
	make   func(t *testing.T) func() *Store
}{
	{"memory", true, func(t *testing.T) func() *Store {
		m := NewMemory()
		return func() *Store {
			s, err := m.Open(t.Context())
			require.NoError(t, err)
			return s
		}
	}},
	{"embedded", false, func(t *testing.T) func() *Store {
		dir := t.TempDir()
		return func() *Store { return openStore(t, Config{Dir: dir}) }
	}},
	{"external", true, func(t *testing.T) func() *Store {
		c := Config{Endpoints: []string{listeningEtcd(t)}}
		return func() *Store { return openStore(t, c) }
	}},
	{"etcd-server", true, func(t *testing.T) func() *Store {
		c := Config{Endpoints: []string{etcdProgram(t)}}
		return func() *Store { return openStore(t, c) }
	}},
}

func openStore(t *testing.T, c Config) *Store {
	s, err := Open(t.Context(), c)
	require.NoError(t, err)
	return s
}

func local(t *testing.T) url.URL {
	u, err := url.Parse("http://127.0.0.1:0")
	require.NoError(t, err)
	return *u
}

// listeningEtcd is an etcd of this module's version that is spoken to over TCP.
func listeningEtcd(t *testing.T) string {
	e := embed.NewConfig()
	e.Name, e.Dir, e.ListenPeerUrls = "external", t.TempDir(), nil
	e.ListenClientUrls = []url.URL{local(t)}
	e.AdvertiseClientUrls = e.ListenClientUrls
	e.InitialCluster = e.InitialClusterFromName(e.Name)
	e.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	s, err := embed.StartEtcd(e)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	<-s.Server.ReadyNotify()
	return "http://" + s.Clients[0].Addr().String()
}

// etcdProgram is the etcd that the machine has: Debian's etcd-server for one.
func etcdProgram(t *testing.T) string {
	path, err := exec.LookPath("etcd")
	if err != nil {
		t.Skip("there is no etcd in PATH (Debian: etcd-server)")
	}
	client, peer := "http://127.0.0.1:42379", "http://127.0.0.1:42380"
	c := exec.Command(path, "--data-dir", t.TempDir(), "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
		"--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer, "--log-level", "error")
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, c.Start())
	t.Cleanup(func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	})
	return client
}

// each runs a test on every kind.
func each(t *testing.T, f func(t *testing.T, shared bool, open func() *Store)) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			open := k.make(t)
			f(t, k.shared, func() *Store {
				s := open()
				t.Cleanup(func() { _ = s.Close() })
				return s
			})
		})
	}
}

func timeout(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func lead(t *testing.T, s *Store) <-chan struct{} {
	lost, err := s.Campaign(timeout(t), "test")
	require.NoError(t, err)
	return lost
}

func node(name string) ipam.KV {
	v, _ := json.Marshal(ipam.Node{Name: name})
	return ipam.KV{Key: "nodes/" + name, Value: v}
}

func TestCommitIsConditionalAndFenced(t *testing.T) {
	each(t, func(t *testing.T, _ bool, open func() *Store) {
		s, ctx := open(), timeout(t)
		create := ipam.Tx{If: []ipam.Compare{{Key: "nodes/a"}}, Put: []ipam.KV{node("a"), node("b")}}
		_, err := s.Commit(ctx, create)
		require.ErrorIs(t, err, ipam.ErrNotLeader)
		lead(t, s)
		r1, err := s.Commit(ctx, create)
		require.NoError(t, err)
		_, err = s.Commit(ctx, create)
		require.ErrorIs(t, err, ipam.ErrConflict)
		r2, err := s.Commit(ctx, ipam.Tx{If: []ipam.Compare{{Key: "nodes/a", Revision: r1}}, Put: []ipam.KV{node("a")}, Delete: []string{"nodes/b", "nodes/none"}})
		require.NoError(t, err)
		require.Greater(t, r2, r1)
		_, err = s.Commit(ctx, ipam.Tx{If: []ipam.Compare{{Key: "nodes/a", Revision: r1}}, Put: []ipam.KV{node("c")}})
		require.ErrorIs(t, err, ipam.ErrConflict)
		require.NoError(t, s.Read(ctx, r2, func(tb *ipam.Table) {
			require.Len(t, tb.Nodes(), 1)
			require.Equal(t, r2, tb.Node("a").Revision)
		}))
		require.NoError(t, s.Resign(ctx))
		_, err = s.Commit(ctx, ipam.Tx{Put: []ipam.KV{node("d")}})
		require.ErrorIs(t, err, ipam.ErrNotLeader)
	})
}

func TestEverythingIsThereAfterOpeningAgain(t *testing.T) {
	each(t, func(t *testing.T, _ bool, open func() *Store) {
		s, ctx := open(), timeout(t)
		lead(t, s)
		const batches, size = 25, 100 // more than a page of a read
		var last int64
		for i := range batches {
			var tx ipam.Tx
			for j := range size {
				tx.Put = append(tx.Put, node(fmt.Sprintf("n%d-%d", i, j)))
			}
			var err error
			last, err = s.Commit(ctx, tx)
			require.NoError(t, err)
		}
		incarnation := ""
		require.NoError(t, s.Read(ctx, last, func(tb *ipam.Table) { incarnation = tb.Incarnation }))
		require.Len(t, incarnation, 36)
		require.NoError(t, s.Resign(ctx))
		require.NoError(t, s.Close())
		s = open()
		require.NoError(t, s.Read(ctx, 0, func(tb *ipam.Table) {
			require.Len(t, tb.Nodes(), batches*size)
			require.Equal(t, incarnation, tb.Incarnation)
			require.GreaterOrEqual(t, tb.Revision, last)
		}))
		lead(t, s)
	})
}

func TestFollowersSeeEveryRevisionWhole(t *testing.T) {
	each(t, func(t *testing.T, shared bool, open func() *Store) {
		s, ctx := open(), timeout(t)
		other := s
		if shared {
			other = open()
		}
		type seen struct {
			revision int64
			changes  int
		}
		all := make(chan seen, 1000)
		other.Follow(func(r int64, c []ipam.Change) { all <- seen{r, len(c)} })
		lead(t, s)
		for i := range 20 {
			r, err := s.Commit(ctx, ipam.Tx{Put: []ipam.KV{node("a"), node("b"), node(fmt.Sprintf("c%d", i))}})
			require.NoError(t, err)
			require.Equal(t, seen{r, 3}, <-all)
			require.NoError(t, other.Read(ctx, r, func(tb *ipam.Table) { require.Len(t, tb.Nodes(), 3+i) }))
		}
		r, err := other.Latest(ctx)
		require.NoError(t, err)
		require.NoError(t, s.Read(ctx, r, func(*ipam.Table) {}))
	})
}

func TestOneLeadsAndTheNextOneAfterIt(t *testing.T) {
	each(t, func(t *testing.T, shared bool, open func() *Store) {
		if !shared {
			t.Skip("one process alone has it open")
		}
		a, b, ctx := open(), open(), timeout(t)
		lost := lead(t, a)
		led := make(chan error, 1)
		go func() {
			_, err := b.Campaign(ctx, "b")
			led <- err
		}()
		select {
		case err := <-led:
			t.Fatalf("two lead: %v", err)
		case <-lost:
			t.Fatal("the lead was lost")
		case <-time.After(300 * time.Millisecond):
		}
		_, err := b.Commit(ctx, ipam.Tx{Put: []ipam.KV{node("x")}})
		require.ErrorIs(t, err, ipam.ErrNotLeader)
		require.NoError(t, a.Resign(ctx))
		require.NoError(t, <-led)
		_, err = b.Commit(ctx, ipam.Tx{Put: []ipam.KV{node("x")}})
		require.NoError(t, err)
		_, err = a.Commit(ctx, ipam.Tx{Put: []ipam.KV{node("y")}})
		require.ErrorIs(t, err, ipam.ErrNotLeader)
	})
}

func TestLeaseThatEndsEndsTheLead(t *testing.T) {
	endpoint := listeningEtcd(t)
	s := openStore(t, Config{Endpoints: []string{endpoint}})
	defer s.Close()
	lost := lead(t, s)
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	require.NoError(t, err)
	defer c.Close()
	r, err := c.Get(timeout(t), DefaultPrefix+"leader")
	require.NoError(t, err)
	_, err = c.Revoke(timeout(t), clientv3.LeaseID(r.Kvs[0].Lease))
	require.NoError(t, err)
	_, err = s.Commit(timeout(t), ipam.Tx{Put: []ipam.KV{node("x")}})
	require.ErrorIs(t, err, ipam.ErrNotLeader, "who does not know yet that it lost the lead wrote")
	select {
	case <-lost:
	case <-timeout(t).Done():
		t.Fatal("it never hears that it does not lead")
	}
}

func TestTwoClustersInOneEtcd(t *testing.T) {
	endpoint := listeningEtcd(t)
	a, b := openStore(t, Config{Endpoints: []string{endpoint}, Prefix: "/a/"}), openStore(t, Config{Endpoints: []string{endpoint}, Prefix: "/b/"})
	defer a.Close()
	defer b.Close()
	lead(t, a)
	lead(t, b)
	r, err := a.Commit(timeout(t), ipam.Tx{Put: []ipam.KV{node("x")}})
	require.NoError(t, err)
	require.NoError(t, a.Read(timeout(t), r, func(tb *ipam.Table) { require.Len(t, tb.Nodes(), 1) }))
	latest, err := b.Latest(timeout(t))
	require.NoError(t, err)
	require.NoError(t, b.Read(timeout(t), latest, func(tb *ipam.Table) { require.Empty(t, tb.Nodes()) }))
}

// The quota stands for a full disk: etcd takes no more writes, and keeps what it has.
func TestFullStoreSaysSoAndKeepsWhatItHas(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, Config{Dir: dir, Quota: 4 << 20})
	lead(t, s)
	var err error
	written := 0
	for ; err == nil && written < 1000; written++ {
		kv := node(fmt.Sprintf("n%d", written))
		kv.Value = []byte(strings.Replace(string(kv.Value), "{", `{"padding":"`+strings.Repeat("x", 64<<10)+`",`, 1))
		_, err = s.Commit(timeout(t), ipam.Tx{Put: []ipam.KV{kv}})
	}
	require.ErrorContains(t, err, "the store is full")
	require.NotErrorIs(t, err, ipam.ErrUnknownOutcome)
	require.NoError(t, s.Close())
	s = openStore(t, Config{Dir: dir, Quota: 64 << 20})
	defer s.Close()
	// The write that found the quota exceeded when it was applied was applied (etcd's applierV3quota), and refused all the same.
	require.NoError(t, s.Read(timeout(t), 0, func(tb *ipam.Table) { require.Contains(t, []int{written - 1, written}, len(tb.Nodes())) }))
	lead(t, s)
	_, err = s.Commit(timeout(t), ipam.Tx{Put: []ipam.KV{node("more")}})
	require.NoError(t, err, "with room again it does not write")
}

func TestWatchThatFellBehindReadsAllAgain(t *testing.T) {
	endpoint := listeningEtcd(t)
	s := openStore(t, Config{Endpoints: []string{endpoint}})
	defer s.Close()
	lead(t, s)
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	require.NoError(t, err)
	defer c.Close()
	// As if the watch had been away: what it asks for is compacted.
	var last int64
	for i := range 10 {
		last, err = s.Commit(timeout(t), ipam.Tx{Put: []ipam.KV{node(fmt.Sprintf("n%d", i))}})
		require.NoError(t, err)
	}
	_, err = c.Compact(timeout(t), last)
	require.NoError(t, err)
	err = (&etcd{c: c, prefix: DefaultPrefix}).watch(timeout(t), 1, func(int64, []ipam.KV) {})
	require.ErrorContains(t, err, "compacted")
	require.NoError(t, s.reload(timeout(t)))
	require.NoError(t, s.Read(timeout(t), last, func(tb *ipam.Table) { require.Len(t, tb.Nodes(), 10) }))
}

func TestBackupIsForPeopleAndRestores(t *testing.T) {
	s, _ := NewMemory().Open(t.Context())
	defer s.Close()
	lead(t, s)
	_, err := s.Commit(timeout(t), ipam.Tx{Put: []ipam.KV{node("a"), node("b")}})
	require.NoError(t, err)
	text, _, err := Backup(timeout(t), s)
	require.NoError(t, err)
	require.Contains(t, string(text), `{"key":"nodes/a","value":{"name":"a"`)
	dir := filepath.Join(t.TempDir(), "new")
	to := openStore(t, Config{Dir: dir})
	defer to.Close()
	lead(t, to)
	require.NoError(t, Restore(timeout(t), to, text))
	latest, err := to.Latest(timeout(t))
	require.NoError(t, err)
	require.NoError(t, to.Read(timeout(t), latest, func(tb *ipam.Table) {
		require.Len(t, tb.Nodes(), 2)
		require.NoError(t, s.Read(timeout(t), 0, func(old *ipam.Table) { require.NotEqual(t, old.Incarnation, tb.Incarnation) }))
	}))
	require.ErrorContains(t, Restore(timeout(t), to, text), "not empty")
	require.ErrorContains(t, Restore(timeout(t), to, []byte(`{"format": "x"}`)), "no backup that this version knows")
	_, err = os.Stat(dir)
	require.NoError(t, err)
}
