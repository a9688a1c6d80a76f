package agent_test

import (
	"context"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TestCalledOff: a start or a copy whose caller gave up at any moment leaves no process.
func TestCalledOff(t *testing.T) {
	s := newSandbox(t)
	const name = "4711" // of the sleeps
	config := *s.base
	config.Cwd, config.Args = "/", []string{"sleep", name}
	for range 60 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rand.IntN(20_000))*time.Microsecond)
		p, err := s.Client.Start(ctx, theContainer, <-processIDs, &config, false)
		if err == nil {
			if err := p.Signal(t.Context(), 9, false); err != nil {
				t.Fatal(err)
			}
			if _, err := s.finish(p); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.CopyIn(ctx, theContainer, "/tmp", endless{ctx})
		_ = s.CopyOut(ctx, theContainer, "/", io.Discard)
		cancel()
	}
	deadline := time.Now().Add(patience)
	for {
		processes := s.sh("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")
		if !strings.Contains(processes, name) && !strings.Contains(processes, "sandbox-stage") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("these stay: %s", processes)
		}
	}
}

// endless is input that comes until ctx is done.
type endless struct{ ctx context.Context }

func (e endless) Read(b []byte) (int, error) {
	clear(b)
	return len(b), e.ctx.Err()
}

// TestOvertakenStart: a start that arrives after its process was released starts nothing.
func TestOvertakenStart(t *testing.T) {
	s := newSandbox(t)
	config := *s.base
	config.Cwd, config.Args = "/", []string{"sleep", "100"}
	id := <-processIDs
	if err := s.Process(id).Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client.Start(t.Context(), theContainer, id, &config, false); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("got %v", err)
	}
	// One that failed to start may be tried again.
	config.Args = []string{"nosuchprogram"}
	id = <-processIDs
	for range 2 {
		if _, err := s.Client.Start(t.Context(), theContainer, id, &config, false); spec.ReasonOf(err) != spec.ReasonProcessNotFound {
			t.Errorf("got %v", err)
		}
	}
}
