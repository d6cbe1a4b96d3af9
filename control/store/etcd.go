package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/overplane/overplane/ipam"
)

// etcd is a backend in etcd. Records are at prefix + "data/" + key, the leader's key at prefix + "leader".
type etcd struct {
	c      *clientv3.Client
	prefix string
	sole   bool // nobody else can lead: whose key there is is dead
	closes func() error
	leases sync.Map // of this process's keys: create revision -> clientv3.LeaseID
}

// leaseTTL is after how many seconds another controller leads if the leader is silent.
const leaseTTL = 5

// loadPage is how many records one read asks for.
const loadPage = 2000

func (e *etcd) data() string   { return e.prefix + "data/" }
func (e *etcd) leader() string { return e.prefix + "leader" }

func (e *etcd) load(ctx context.Context) (out []ipam.KV, revision int64, err error) {
	from, end := e.data(), clientv3.GetPrefixRangeEnd(e.data())
	for {
		opts := []clientv3.OpOption{clientv3.WithRange(end), clientv3.WithLimit(loadPage)}
		if revision != 0 {
			opts = append(opts, clientv3.WithRev(revision)) // all pages of one revision
		}
		r, err := e.c.Get(ctx, from, opts...)
		if err != nil {
			return nil, 0, err
		}
		if revision == 0 {
			revision = r.Header.GetRevision()
		}
		for _, kv := range r.Kvs {
			out = append(out, ipam.KV{Key: strings.TrimPrefix(string(kv.Key), e.data()), Value: kv.Value, Revision: kv.ModRevision})
		}
		if !r.More {
			return out, revision, nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

func (e *etcd) watch(ctx context.Context, after int64, f func(int64, []ipam.KV)) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for r := range e.c.Watch(ctx, e.data(), clientv3.WithPrefix(), clientv3.WithRev(after+1)) {
		if err := r.Err(); err != nil {
			return err
		}
		var writes []ipam.KV
		for i, ev := range r.Events {
			kv := ipam.KV{Key: strings.TrimPrefix(string(ev.Kv.Key), e.data()), Revision: ev.Kv.ModRevision}
			if ev.Type == clientv3.EventTypePut {
				kv.Value = ev.Kv.Value
			}
			writes = append(writes, kv)
			// An answer has whole revisions, perhaps several.
			if i+1 == len(r.Events) || r.Events[i+1].Kv.ModRevision != ev.Kv.ModRevision {
				f(ev.Kv.ModRevision, writes)
				writes = nil
			}
		}
	}
	return errors.Join(errors.New("the watch was closed"), ctx.Err())
}

func (e *etcd) revision(ctx context.Context) (int64, error) {
	r, err := e.c.Get(ctx, e.leader(), clientv3.WithKeysOnly()) // linearizable
	if err != nil {
		return 0, err
	}
	return r.Header.GetRevision(), nil
}

func (e *etcd) commit(ctx context.Context, tx ipam.Tx, fence int64) (int64, error) {
	var conditions []clientv3.Cmp
	if fence != 0 {
		conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(e.leader()), "=", fence))
	}
	for _, c := range tx.If {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(e.data()+c.Key), "=", c.Revision))
	}
	var writes []clientv3.Op
	for _, kv := range tx.Put {
		writes = append(writes, clientv3.OpPut(e.data()+kv.Key, string(kv.Value)))
	}
	for _, k := range tx.Delete {
		writes = append(writes, clientv3.OpDelete(e.data()+k))
	}
	r, err := e.c.Txn(ctx).If(conditions...).Then(writes...).Else(clientv3.OpGet(e.leader(), clientv3.WithKeysOnly())).Commit()
	if err != nil {
		return 0, explain(err)
	}
	if r.Succeeded {
		return r.Header.GetRevision(), nil
	}
	leader := r.Responses[0].GetResponseRange().GetKvs()
	if fence != 0 && (len(leader) == 0 || leader[0].CreateRevision != fence) {
		return 0, ipam.ErrNotLeader
	}
	return 0, ipam.ErrConflict
}

// explain says whether a write that failed may have happened, and what to do where that is known.
func explain(err error) error {
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return fmt.Errorf("the store is full and takes no more writes (etcd's NOSPACE alarm): make room or raise its quota, then disarm the alarm: %w", err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return fmt.Errorf("%w: %w", ipam.ErrUnknownOutcome, err)
	}
	var e rpctypes.EtcdError
	code := status.Code(err)
	if errors.As(err, &e) {
		code = e.Code()
	}
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Unknown, codes.Internal:
		return fmt.Errorf("%w: %w", ipam.ErrUnknownOutcome, err)
	}
	return err
}

func (e *etcd) campaign(ctx context.Context, name string) (fence int64, lost <-chan struct{}, err error) {
	if e.sole {
		if _, err := e.c.Delete(ctx, e.leader()); err != nil {
			return 0, nil, err
		}
	}
	for {
		lease, err := e.c.Grant(ctx, leaseTTL)
		if err != nil {
			return 0, nil, err
		}
		r, err := e.c.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(e.leader()), "=", 0)).
			Then(clientv3.OpPut(e.leader(), name, clientv3.WithLease(lease.ID))).Commit()
		if err != nil {
			return 0, nil, err
		}
		if r.Succeeded {
			e.leases.Store(r.Header.GetRevision(), lease.ID)
			lost, err := e.keep(lease.ID)
			return r.Header.GetRevision(), lost, err
		}
		if _, err := e.c.Revoke(ctx, lease.ID); err != nil {
			return 0, nil, err
		}
		if err := e.awaitVacancy(ctx, r.Header.GetRevision()); err != nil {
			return 0, nil, err
		}
	}
}

// keep keeps the lease alive until that fails.
func (e *etcd) keep(lease clientv3.LeaseID) (<-chan struct{}, error) {
	ctx, cancel := context.WithCancel(context.Background())
	answers, err := e.c.KeepAlive(ctx, lease)
	if err != nil {
		cancel()
		return nil, err
	}
	lost := make(chan struct{})
	go func() {
		defer close(lost)
		defer cancel()
		for range answers { // closed when the lease is gone, or the client is
		}
	}()
	return lost, nil
}

// awaitVacancy returns when the leader's key was removed after the revision.
func (e *etcd) awaitVacancy(ctx context.Context, after int64) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for r := range e.c.Watch(ctx, e.leader(), clientv3.WithRev(after+1)) {
		if err := r.Err(); err != nil {
			return err
		}
		for _, ev := range r.Events {
			if ev.Type == clientv3.EventTypeDelete {
				return nil
			}
		}
	}
	return errors.Join(errors.New("the watch of the leader's key was closed"), ctx.Err())
}

// resign ends the lease, and the key with it.
func (e *etcd) resign(ctx context.Context, fence int64) error {
	lease, ok := e.leases.LoadAndDelete(fence)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := e.c.Revoke(ctx, lease.(clientv3.LeaseID))
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		err = nil // it ended by itself
	}
	return err
}

func (e *etcd) close() error { return e.closes() }
