package server

import (
	"context"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// askForPipes is what ExecStart.output_pipes tells callers to do.
func askForPipes(t *testing.T, socket, hello string) (name []byte, files []*os.File) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, hello); err != nil {
		t.Fatal(err)
	}
	name, control := make([]byte, 64), make([]byte, 256)
	n, cn, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(name, control)
	if err != nil || n == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(control[:cn])
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			f := os.NewFile(uintptr(fd), "pipe")
			t.Cleanup(func() { f.Close() })
			files = append(files, f)
		}
	}
	return name[:n], files
}

func TestExecIntoPipes(t *testing.T) {
	session := &fakeSession{
		output: func(context.Context, func(workload.Stream, []byte) error) error { return nil },
		wait:   func(context.Context) (spec.Exit, error) { return spec.Exit{Code: 3}, nil },
	}
	fakes := withSession(session)
	fakes.execInto = func(_ context.Context, _ string, _ spec.Process, p *workload.OutputPipes) (workload.Session, error) {
		p.Stdout.WriteString("out")
		p.Stderr.WriteString("err")
		p.Close()
		return session, nil
	}
	h := serve(t, Config{Workloads: fakes})
	name, files := askForPipes(t, h.socket, pipesHello)
	if len(name) != pipesNameLen || len(files) != 2 {
		t.Fatalf("a name of %d bytes and %d descriptors, want %d and 2", len(name), len(files), pipesNameLen)
	}
	start := &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}, OutputPipes: name}
	stdout, stderr, exit := collect(t, startExec(t, h, start))
	if stdout != "" || stderr != "" || exit.GetCode() != 3 {
		t.Errorf("the stream brought %q, %q, %v; want nothing but exit code 3", stdout, stderr, exit)
	}
	for i, want := range []string{"out", "err"} {
		got, err := io.ReadAll(files[i])
		if err != nil || string(got) != want {
			t.Errorf("pipe %d brought %q, %v; want %q", i, got, err, want)
		}
	}
	// They were for one exec.
	stream, err := h.workloads.Exec(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: start}})
	if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("the second exec: %v, want INVALID_ARGUMENT", err)
	}
}

func TestPipesAreTheirCallersOnly(t *testing.T) {
	p := newPipes()
	var ends []*workload.OutputPipes
	for i := range maxPipesPerCaller {
		o, err := newOutputPipe(0)
		if err != nil {
			t.Fatal(err)
		}
		defer o.r.Close()
		e := &workload.OutputPipes{Stdout: o.w, Stderr: o.w}
		ends = append(ends, e)
		if err := p.put(string(rune('A'+i)), "uid:1", e); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.put("more", "uid:1", ends[0]); codeOf(toStatus(t.Context(), err)) != codes.ResourceExhausted {
		t.Errorf("one too many: %v, want RESOURCE_EXHAUSTED", err)
	}
	if _, err := p.take([]byte("A"), "uid:2"); codeOf(toStatus(t.Context(), err)) != codes.InvalidArgument {
		t.Errorf("another caller took them: %v, want INVALID_ARGUMENT", err)
	}
	if got, err := p.take([]byte("A"), "uid:1"); err != nil || got != ends[0] {
		t.Errorf("their caller: %v", err)
	}
	for i := range maxPipesPerCaller {
		p.drop(string(rune('A' + i)))
	}
	if len(p.waiting) != 0 || len(p.count) != 0 {
		t.Errorf("%d pipes of %d callers are kept", len(p.waiting), len(p.count))
	}
	if _, err := ends[1].Stdout.Write([]byte("x")); err == nil {
		t.Error("pipes that nobody wanted are open")
	}
	ends[0].Close()
}

// What is neither HTTP/2 nor a request for pipes gets nothing, and others are served.
func TestGarbageAtTheSocket(t *testing.T) {
	h := serve(t, Config{Workloads: withSession(&fakeSession{})})
	for _, hello := range []string{"sandboxd-pipes/2", "\x00\x00\x00\x00aaaaaaaaaaaaaaaaaa", "PRI * nonsense nonsense nonsense"} {
		if _, files := askForPipes(t, h.socket, hello); len(files) != 0 {
			t.Errorf("%q: %d descriptors", hello, len(files))
		}
	}
	if len(h.server.pipes.waiting) != 0 {
		t.Error("pipes were made")
	}
	if _, files := askForPipes(t, h.socket, pipesHello); len(files) != 2 {
		t.Errorf("afterwards: %d descriptors, want 2", len(files))
	}
}
