package agent_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent"
)

// bigOutput is how much the test of large output moves, in bytes; SANDBOXD_TEST_BIG_OUTPUT says otherwise.
const bigOutput = 256 << 20

// TestBigOutput compares the hash of what a process says it wrote with what arrived, while the connection is cut again and
// again.
func TestBigOutput(t *testing.T) {
	size := int64(bigOutput)
	if v := os.Getenv("SANDBOXD_TEST_BIG_OUTPUT"); v != "" {
		var err error
		if size, err = strconv.ParseInt(v, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	s := newSandbox(t)
	const block = 1 << 20
	script := fmt.Sprintf(`dd if=/dev/urandom of=/tmp/block bs=%d count=4 2>/dev/null; i=0; while [ $i -lt %d ]; do cat /tmp/block; i=$((i+4)); done | tee /tmp/fifo`, block, size/block)
	script = "mkfifo /tmp/fifo; sha256sum /tmp/fifo >&2 & " + script + "; wait"
	p := s.mustStart("sh", "-c", script)
	hash := sha256.New()
	var offset uint64
	var stderr strings.Builder
	began := time.Now()
	var got int64
	nextCut := uint64(10 << 20)
	for {
		chunks, eof, err := p.ReadOutput(t.Context(), offset)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chunks {
			offset += uint64(len(c.Data))
			if c.Stream == 1 {
				got += int64(len(c.Data))
				hash.Write(c.Data)
			} else {
				stderr.Write(c.Data)
			}
		}
		if eof {
			break
		}
		if offset > nextCut {
			nextCut += 10 << 20
			s.proxy.cut()
		}
	}
	if got != size/block*block {
		t.Errorf("got %d bytes of %d", got, size)
	}
	sum := fmt.Sprintf("%x", hash.Sum(nil))
	if !strings.HasPrefix(stderr.String(), sum) {
		t.Errorf("hash %s of what arrived, %s of what was written", sum, stderr.String())
	}
	t.Logf("%d MiB in %v, %d cuts", got>>20, time.Since(began), s.proxy.cuts)
	if s.proxy.cuts < 10 {
		t.Errorf("only %d cuts", s.proxy.cuts)
	}
}

// TestCutWhileWaiting cuts connections while calls wait at the agent.
func TestCutWhileWaiting(t *testing.T) {
	s := newSandbox(t)
	p := s.mustStart("sh", "-c", `i=0; while [ $i -lt 300 ]; do echo $i; usleep 3000; i=$((i+1)); done`)
	stop := make(chan struct{})
	var cutter sync.WaitGroup
	cutter.Go(func() {
		tick := time.NewTicker(7 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				s.proxy.cut()
			case <-stop:
				return
			}
		}
	})
	r, err := s.finish(p)
	close(stop)
	cutter.Wait()
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i := range 300 {
		fmt.Fprintln(&want, i)
	}
	if r.stdout != want.String() {
		t.Errorf("got %d bytes, want %d: %q", len(r.stdout), want.Len(), r.stdout)
	}
	t.Logf("%d cuts", s.proxy.cuts)
}

func TestHundredAtOnce(t *testing.T) {
	s := newSandbox(t)
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			r := s.run(process{args: []string{"sh", "-c", fmt.Sprintf("echo out%d; echo err%d >&2; exit %d", i, i, i)}})
			if r.stdout != fmt.Sprintf("out%d\n", i) || r.stderr != fmt.Sprintf("err%d\n", i) || r.exit.Code != i {
				t.Errorf("%d: %+v", i, r)
			}
		})
	}
	all.Wait()
}

// TestSlowReader: a process whose output nobody reads waits after 1 MiB and its pipe, loses nothing, and keeps no other up.
func TestSlowReader(t *testing.T) {
	s := newSandbox(t)
	slow := s.mustStart("sh", "-c", "dd if=/dev/zero bs=65536 count=64 2>/dev/null; echo end; echo done >/tmp/done")
	// The agent took all it will once nothing more has come for the time other processes take to run.
	for range 20 {
		if out := s.sh("[ -e /tmp/done ] && echo yes || echo no"); out != "no" {
			t.Fatal("4 MiB were written though nobody read")
		}
	}
	r, err := s.finish(slow)
	if err != nil {
		t.Fatal(err)
	}
	if want := 64*65536 + len("end\n"); len(r.stdout) != want {
		t.Errorf("got %d bytes, want %d", len(r.stdout), want)
	}
}

// TestSingleBytes: bytes written one by one to alternating streams keep their order and cost the agent no more.
func TestSingleBytes(t *testing.T) {
	s := newSandbox(t)
	r := s.run(process{args: []string{"sh", "-c", "i=0; while [ $i -lt 3000 ]; do printf o; printf e >&2; i=$((i+1)); done"}})
	if r.stdout != strings.Repeat("o", 3000) || r.stderr != strings.Repeat("e", 3000) {
		t.Errorf("got %d and %d bytes", len(r.stdout), len(r.stderr))
	}
}

func TestInput(t *testing.T) {
	s := newSandbox(t)
	p, err := s.start(process{args: []string{"sh", "-c", "cat; echo after"}, stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	var sent bytes.Buffer
	for i := range 5000 {
		fmt.Fprintf(&sent, "line %d\n", i)
	}
	var all sync.WaitGroup
	all.Go(func() {
		var offset uint64
		data := sent.Bytes()
		for n := 0; len(data) > 0; n++ {
			piece := data[:min(1000, len(data))]
			accepted, closed, err := p.WriteInput(t.Context(), offset, piece, len(piece) == len(data))
			if err != nil || closed || accepted != offset+uint64(len(piece)) {
				t.Errorf("accepted %d of %d, closed %v, %v", accepted, offset+uint64(len(piece)), closed, err)
				return
			}
			// Repeated, as after a lost answer: nothing may arrive twice.
			if again, _, err := p.WriteInput(t.Context(), offset, piece, len(piece) == len(data)); err != nil || again != accepted {
				t.Errorf("repeated: accepted %d, %v", again, err)
			}
			offset, data = accepted, data[len(piece):]
			if n%7 == 0 {
				s.proxy.cut()
			}
		}
	})
	r, err := s.finish(p)
	all.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if r.stdout != sent.String()+"after\n" {
		t.Errorf("got %d bytes, want %d", len(r.stdout), sent.Len()+6)
	}
}

// TestInputClosed: a process that reads no more is told apart from one that is slow.
func TestInputClosed(t *testing.T) {
	s := newSandbox(t)
	p, err := s.start(process{args: []string{"sh", "-c", "exec <&-; sleep 30"}, stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var offset uint64
	for closed := false; !closed; {
		var err error
		if offset, closed, err = p.WriteInput(ctx, offset, make([]byte, 64<<10), false); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Signal(ctx, 9, false); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(ctx); err != nil || exit.Code != 137 {
		t.Errorf("%+v %v", exit, err)
	}
	none := s.mustStart("cat") // without standard input it reads /dev/null
	if _, closed, err := none.WriteInput(ctx, 0, nil, false); err != nil || !closed {
		t.Errorf("closed %v, %v", closed, err)
	}
	if r, err := s.finish(none); err != nil || r.stdout != "" || r.exit.Code != 0 {
		t.Errorf("%+v %v", r, err)
	}
}

// readUntil reads a process's output until it contains want.
func readUntil(t *testing.T, p *agent.Process, offset *uint64, want string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var got strings.Builder
	for !strings.Contains(got.String(), want) {
		chunks, eof, err := p.ReadOutput(ctx, *offset)
		if err != nil {
			t.Fatalf("%v; so far %q", err, got.String())
		}
		for _, c := range chunks {
			*offset += uint64(len(c.Data))
			got.Write(c.Data)
		}
		if eof {
			break
		}
	}
	if !strings.Contains(got.String(), want) {
		t.Fatalf("output ended without %q: %q", want, got.String())
	}
	return got.String()
}
