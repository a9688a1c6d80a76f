package e2e

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

func TestExec(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "-e", "KEPT=yes", "-w", "/var", busybox, "sleep", "600")
		for _, c := range []struct {
			what  string
			flags []string
			run   []string
			stdin string
			out   string
			code  int
		}{
			{"output", nil, []string{"echo", "hi"}, "", "hi\n", 0},
			{"exit code", nil, []string{"sh", "-c", "exit 9"}, "", "", 9},
			{"signal", nil, []string{"sh", "-c", "kill -9 $$"}, "", "", 137},
			{"not found", nil, []string{"no-such-program"}, "", "", 127},
			{"not executable", nil, []string{"/etc/not-executable"}, "", "", 126},
			{"the workload's environment and directory", nil, []string{"sh", "-c", "echo $KEPT $PWD"}, "", "yes /var\n", 0},
			{"its own", []string{"-e", "KEPT=no", "-w", "/tmp", "-u", "app"}, []string{"sh", "-c", "echo $KEPT $PWD $(id -un)"}, "", "no /tmp app\n", 0},
			{"stdin", []string{"-i"}, []string{"tr", "a-z", "A-Z"}, "shout", "SHOUT", 0},
			{"standard output by its name", []string{"-u", "app"}, []string{"sh", "-c", "echo named > /proc/self/fd/1"}, "", "named\n", 0},
			{"flags after the command are the command's", nil, []string{"printf", "%s ", "-e", "-i"}, "", "-e -i ", 0},
			{"sees the workload", nil, []string{"sh", "-c", "grep -l sleep /proc/[0-9]*/comm | wc -l"}, "", "1\n", 0},
		} {
			args := append(append(append([]string{"exec"}, c.flags...), id), c.run...)
			r := w.Command(args...).WithStdin(strings.NewReader(c.stdin)).Run()
			if r.Code != c.code || r.Stdout != c.out {
				t.Errorf("%s: exit code %d, wrote %q; want %d, %q; stderr: %s", c.what, r.Code, r.Stdout, c.code, c.out, r.Stderr)
			}
		}
		w.Exec("no-such-workload", "true").Run().WantError(t, 125, "no-such-workload")
		w.Call(t, "stop", "--grace", "0s", id)
		w.Exec(id, "true").Run().WantError(t, 125, "exited")
	})
}

func TestHundredExecsAtOnce(t *testing.T) {
	const crowd = 100
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		var wg sync.WaitGroup
		for i := range crowd {
			wg.Go(func() {
				e := openExec(t.Context(), w, &sandboxdv1.ExecStart{Id: id, Command: []string{"sh", "-c", fmt.Sprintf("echo %d; exit %d", i, i)}})
				out, code, err := e.all()
				if err != nil || code != i || out != fmt.Sprintf("%d\n", i) {
					t.Errorf("exec %d: wrote %q, exit code %d, error %v", i, out, code, err)
				}
			})
		}
		wg.Wait()
	})
}

// A reader that does not read holds up its own process and nothing else.
func TestSlowReaderBlocksOnlyItself(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		ctx, cancel := context.WithCancel(t.Context())
		slow := openExec(ctx, w, &sandboxdv1.ExecStart{Id: id, Command: []string{"yes"}})
		if _, err := slow.stream.Recv(); err != nil {
			t.Fatal(err)
		}
		// Its output backs up until yes itself has to wait: then its processor time stands still.
		eventually(t, time.Minute, "yes is held up", func() (bool, string) {
			r := w.Exec(id, "sh", "-c", `p=$(pidof yes); a=$(cut -d" " -f14,15 /proc/$p/stat); sleep 0.3; b=$(cut -d" " -f14,15 /proc/$p/stat); echo "$a, $b"; [ "$a" = "$b" ]`).Run()
			return r.Code == 0, r.Stdout + r.Stderr
		})
		for range 5 {
			w.Exec(id, "echo", "not held up").Run().WantOut(t, "not held up\n")
		}
		cancel()
		eventually(t, 20*time.Second, "yes is gone with its reader", func() (bool, string) {
			r := w.Exec(id, "pidof", "yes").Run()
			return r.Code == 1, r.Stdout + r.Stderr
		})
	})
}

// 1 GiB goes in and comes out again, byte for byte. An emulated VM takes about a minute for it.
func TestGigabyteThroughExec(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		const size = 1 << 30
		id := w.Start(t, busybox, "sleep", "600")
		in, out := sha256.New(), &counter{hash: sha256.New()}
		source := io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{1}), size), in)
		call := w.Command("exec", "-i", id, "cat").WithStdin(source).WithStdout(out)
		call.Timeout = 10 * time.Minute
		r := call.Run()
		r.Want(t, 0)
		if out.n != size || string(in.Sum(nil)) != string(out.hash.Sum(nil)) {
			t.Errorf("%d bytes went in and %d came out, hashes %x and %x", size, out.n, in.Sum(nil), out.hash.Sum(nil))
		}
		t.Logf("%s: %d MiB in and out took %s", w.Isolation, size>>20, r.Took.Round(time.Millisecond))
	})
}

type counter struct {
	hash hash.Hash
	n    int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.hash.Write(p)
}

func TestExecDiesWithItsCaller(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		ctx, cancel := context.WithCancel(t.Context())
		e := openExec(ctx, w, &sandboxdv1.ExecStart{Id: id, Command: []string{"sh", "-c", "echo ready; exec sleep 601"}})
		for out := ""; out != "ready\n"; {
			m, err := e.stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			out += string(m.GetStdout())
		}
		cancel()
		eventually(t, 20*time.Second, "its process is gone", func() (bool, string) {
			r := w.Exec(id, "sh", "-c", `grep -l '[s]leep.601' /proc/[0-9]*/cmdline`).Run()
			return r.Code != 0, r.Stdout
		})
	})
}

// Signals and the window size reach an exec'd process.
func TestExecSignalAndResize(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		e := openExec(t.Context(), w, &sandboxdv1.ExecStart{
			Id: id, Terminal: true, Stdin: true, TerminalSize: &sandboxdv1.TerminalSize{Rows: 33, Columns: 77},
			Command: []string{"sh", "-c", `trap "stty size; exit 8" USR1; trap "stty size" WINCH; stty size; while :; do sleep 0.1; done`},
		})
		if e.err != nil {
			t.Fatal(e.err)
		}
		e.readUntil(t, "33 77")
		must(t, e.stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Resize{Resize: &sandboxdv1.TerminalSize{Rows: 50, Columns: 132}}}))
		e.readUntil(t, "50 132")
		must(t, e.stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Signal{Signal: "USR1"}}))
		if _, code, err := e.all(); err != nil || code != 8 {
			t.Errorf("exit code %d, error %v, want 8", code, err)
		}
	})
}

// execution is one Exec call on the API itself.
type execution struct {
	stream sandboxdv1.WorkloadService_ExecClient
	err    error
}

func openExec(ctx context.Context, w wall, start *sandboxdv1.ExecStart) *execution {
	stream, err := w.Workloads().Exec(ctx)
	if err == nil {
		err = stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: start}})
	}
	return &execution{stream, err}
}

// all reads until the process has ended.
func (e *execution) all() (stdout string, code int, err error) {
	if e.err != nil {
		return "", 0, e.err
	}
	var out strings.Builder
	for {
		m, err := e.stream.Recv()
		if errors.Is(err, io.EOF) {
			return out.String(), 0, errors.New("the stream ended without an exit")
		} else if err != nil {
			return out.String(), 0, err
		}
		out.Write(m.GetStdout())
		if exit := m.GetExit(); exit != nil {
			return out.String(), int(exit.Code), nil
		}
	}
}

func (e *execution) readUntil(t *testing.T, text string) {
	t.Helper()
	for out := ""; !strings.Contains(out, text); {
		m, err := e.stream.Recv()
		if err != nil {
			t.Fatalf("waiting for %q: %v; so far: %q", text, err, out)
		}
		out += string(m.GetStdout())
	}
}
