package syncclient

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	"github.com/overplane/overplane/control/api"
	controlv1 "github.com/overplane/overplane/control/api/overplane/control/v1"
)

// protocol is the newest version of the protocol that this client speaks.
const protocol = 1

// Sizes of a connection's buffers, bytes.
const (
	readBuffer  = 16 << 10
	writeBuffer = 4 << 10
)

// keepaliveTime is after how long without a word the connection is tested; the controller's least is 10 s.
const (
	keepaliveTime    = 30 * time.Second
	keepaliveTimeout = 20 * time.Second
)

// session is one stream.
type session struct {
	stream grpc.BidiStreamingClient[controlv1.SyncRequest, controlv1.SyncResponse]
	mu     sync.Mutex // of sending
}

// send sends, as far as the stream still stands; its end is seen by who receives.
func (s *session) send(m *controlv1.SyncRequest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.stream.Send(m)
}

// connect follows one controller until the stream ends, and returns why it did.
func (c *Client) connect(ctx context.Context, address string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("address %q: want host:port", address)
	}
	if c.cfg.ServerName != "" {
		host = c.cfg.ServerName
	}
	tls, err := c.cfg.TLS.Client(host)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(tls)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		grpc.WithReadBufferSize(readBuffer), grpc.WithWriteBufferSize(writeBuffer),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(api.MaxMessageBytes)),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry(),
	)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := controlv1.NewControlServiceClient(conn).Sync(ctx)
	if err != nil {
		return err
	}
	s := &session{stream: stream}
	if err := c.hello(s); err != nil {
		return err
	}
	if c.cfg.FactsChanged != nil {
		go func() {
			for {
				select {
				case <-ctx.Done():
					return
				case <-c.cfg.FactsChanged:
				}
				if err := c.hello(s); err != nil {
					c.log.Warn("the node's new facts cannot be told", "error", err)
				}
			}
		}()
	}
	defer func() {
		c.mu.Lock()
		c.session = nil
		c.mu.Unlock()
	}()
	// The headers come when the controller has taken the node in.
	if _, err := stream.Header(); err != nil {
		return err
	}
	if ack := c.connected(address, s); ack != nil {
		s.send(&controlv1.SyncRequest{Message: &controlv1.SyncRequest_Ack{Ack: ack}})
	}
	return c.receive(s)
}

// hello says who the node is and what it has.
func (c *Client) hello(s *session) error {
	f, err := c.cfg.Facts()
	if err != nil {
		return fmt.Errorf("what the node is to say of itself is not known yet: %w", err)
	}
	c.mu.Lock()
	h := &controlv1.Hello{
		Node: c.cfg.Node, Ipv4: f.IPv4, Ipv6: f.IPv6, Mac: f.MAC, DaemonVersion: c.cfg.Version, Protocol: protocol,
		Have: c.table.version(), Programmed: c.programmed,
	}
	h.Digest, h.EntryCount = c.table.digest()
	c.mu.Unlock()
	s.send(&controlv1.SyncRequest{Message: &controlv1.SyncRequest_Hello{Hello: h}})
	return nil
}

// receive takes groups of batches until the stream ends.
func (c *Client) receive(s *session) error {
	var g group
	for {
		b, err := s.stream.Recv()
		if err != nil {
			return err
		}
		complete, err := g.add(b)
		if err == nil && !complete {
			continue
		}
		var next *table
		if err == nil {
			next, err = c.judge(&g)
		}
		g = group{}
		ack := &controlv1.Ack{Level: controlv1.Ack_LEVEL_ACCEPTED, Nonce: b.GetNonce(), Version: b.GetVersion()}
		if err != nil {
			ack.Level, ack.Rejection, ack.Reason = controlv1.Ack_LEVEL_REJECTED, controlv1.Rejection_REJECTION_INVALID, err.Error()
			var r *rejection
			if errors.As(err, &r) {
				ack.Rejection = r.kind
			}
			c.log.Error("the controller's table is refused; the old one stays in force", "version", api.FormatVersion(b.GetVersion()), "reason", ack.Reason)
		}
		c.mu.Lock()
		c.status.Refused = ack.GetReason()
		c.mu.Unlock()
		s.send(&controlv1.SyncRequest{Message: &controlv1.SyncRequest_Ack{Ack: ack}})
		if next != nil {
			c.setTable(next)
		}
	}
}

// judge makes the next table of a group, or says why not.
func (c *Client) judge(g *group) (*table, error) {
	c.mu.Lock()
	have := c.table
	c.mu.Unlock()
	next, err := g.next(c.cfg.Node, have, c.cfg.RemovalPercent, c.cfg.Shared)
	if err != nil {
		return nil, err
	}
	if c.cfg.Check != nil {
		if err := c.cfg.Check(c.stateOf(next)); err != nil {
			return nil, reject(controlv1.Rejection_REJECTION_INVALID, "%w", err)
		}
	}
	if c.cfg.Shared != nil {
		c.cfg.Shared.intern(next)
	}
	return next, nil
}
