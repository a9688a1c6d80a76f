package guest

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TestDialListener: one idle connection at a time, each beginning with the preface; lost ones are replaced.
func TestDialListener(t *testing.T) {
	dialled := make(chan net.Conn)
	refusals := 3
	preface := spec.Preface([spec.TokenLen]byte{1, 2, 3})
	l := newDialListener(func(ctx context.Context) (net.Conn, error) {
		if refusals--; refusals >= 0 {
			return nil, errors.New("not yet")
		}
		host, guest := net.Pipe()
		select {
		case dialled <- host:
			return guest, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}, preface)
	accepted := make(chan net.Conn)
	ended := make(chan error)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- conn
		}
	}()
	next := func() net.Conn {
		t.Helper()
		conn := <-dialled
		got := make([]byte, len(preface))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, preface) {
			t.Fatalf("preface %q, %v", got, err)
		}
		return conn
	}
	next().Close() // lost before it was used
	for range 3 {
		host := next()
		go func() { _, _ = host.Write([]byte("hello")) }()
		guest := <-accepted
		got := make([]byte, 5)
		if _, err := io.ReadFull(guest, got); err != nil || string(got) != "hello" {
			t.Fatalf("read %q, %v", got, err)
		}
		defer guest.Close()
	}
	last := next()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept after close: %v", err)
	}
	if _, err := last.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the idle connection is still open: %v", err)
	}
}
