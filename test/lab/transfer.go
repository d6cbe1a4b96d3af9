package lab

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"net"
	"time"
)

// transferBlock is how much a bulk transfer writes at once.
const transferBlock = 1 << 20

// Transfer copies size bytes over TCP from one end to another and compares SHA-256 sums. It returns how long the copy took.
func Transfer(ctx context.Context, from, to End, family int, size int64) (time.Duration, error) {
	l, err := ListenTCP(to, family)
	if err != nil {
		return 0, err
	}
	defer l.Close()
	type result struct {
		sum [sha256.Size]byte
		n   int64
		err error
	}
	received := make(chan result, 1)
	go func() {
		var r result
		_ = l.SetDeadline(time.Now().Add(probeTimeout))
		c, err := l.AcceptTCP()
		if err != nil {
			received <- result{err: err}
			return
		}
		defer c.Close()
		defer context.AfterFunc(ctx, func() { c.Close() })()
		h := sha256.New()
		r.n, r.err = io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{idleConn{c}}, make([]byte, transferBlock))
		h.Sum(r.sum[:0])
		received <- r
	}()
	c, err := DialTCP(ctx, from, l.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		return 0, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	begin := time.Now()
	h := sha256.New()
	if err := sendBulk(idleConn{c}, h, size); err != nil {
		return 0, fmt.Errorf("sending: %w", err)
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	r := <-received
	if r.err != nil {
		return 0, fmt.Errorf("receiving: after %d of %d bytes: %w", r.n, size, r.err)
	}
	if want := [sha256.Size]byte(h.Sum(nil)); r.n != size || r.sum != want {
		return 0, fmt.Errorf("received %d bytes with SHA-256 %x, sent %d with %x", r.n, r.sum, size, want)
	}
	return time.Since(begin), nil
}

// sendBulk writes size bytes, of which no two blocks of 4 KiB are the same, and adds them to the sum.
func sendBulk(w io.Writer, sum hash.Hash, size int64) error {
	block := make([]byte, transferBlock)
	if _, err := rand.Read(block); err != nil {
		return err
	}
	for sent := int64(0); sent < size; {
		for i := 0; i < len(block); i += 4096 {
			binary.BigEndian.PutUint64(block[i:], uint64(sent)+uint64(i))
		}
		b := block[:min(int64(len(block)), size-sent)]
		sum.Write(b)
		n, err := w.Write(b)
		if err != nil {
			return err
		}
		sent += int64(n)
	}
	return nil
}

// idleConn is a connection on which nothing may stand still for more than a while.
type idleConn struct{ *net.TCPConn }

const idleLimit = 20 * time.Second

func (c idleConn) Read(b []byte) (int, error) {
	_ = c.SetReadDeadline(time.Now().Add(idleLimit))
	return c.TCPConn.Read(b)
}

func (c idleConn) Write(b []byte) (int, error) {
	_ = c.SetWriteDeadline(time.Now().Add(idleLimit))
	return c.TCPConn.Write(b)
}
