package crash

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	running  = sandboxdv1.WorkloadState_WORKLOAD_STATE_RUNNING
	paused   = sandboxdv1.WorkloadState_WORKLOAD_STATE_PAUSED
	stopping = sandboxdv1.WorkloadState_WORKLOAD_STATE_STOPPING
	exited   = sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED
	failed   = sandboxdv1.WorkloadState_WORKLOAD_STATE_FAILED
	created  = sandboxdv1.WorkloadState_WORKLOAD_STATE_CREATED
)

var isolations = map[string]sandboxdv1.Isolation{
	"container": sandboxdv1.Isolation_ISOLATION_CONTAINER,
	"vm":        sandboxdv1.Isolation_ISOLATION_VM,
}

// waiter is what a workload of the suite does: it says so, waits to be let go, and ends with a code of its own.
const (
	waiter     = `echo hello; while [ ! -e /go ]; do sleep 0.02; done; echo end; exit 7`
	waiterLog  = "hello\nend\n"
	waiterCode = 7
)

// scene is one workload and what its caller knows of it: what was asked for, and what was answered. What was answered must
// hold whoever dies; what was asked for without an answer may have come about or not.
type scene struct {
	ctx  context.Context
	d    *harness.Daemon
	c    *client.Client
	wall string
	name string
	// Its size is one that no other has had, so that a template is made for it.
	disk uint64

	asked, told map[string]bool
	// The exit code that was told, and how often a start was asked for.
	code   *int32
	starts int
	// Its process does not wait to be let go.
	endsItself bool
	// Files of the workload, as they were copied into it.
	files map[string]string
}

// verbs of a scene.
const (
	create  = "create"
	start   = "start"
	pause   = "pause"
	resume  = "resume"
	update  = "update"
	release = "let it go"
	stop    = "stop"
	murder  = "kill its sandbox"
	remove  = "delete"
)

func (s *scene) workloads() sandboxdv1.WorkloadServiceClient {
	return sandboxdv1.NewWorkloadServiceClient(s.c.Conn())
}

// do asks for something and notes the answer.
func (s *scene) do(verb string, call func() error) error {
	s.asked[verb] = true
	if err := call(); err != nil {
		return fmt.Errorf("%s: %w", verb, err)
	}
	s.told[verb] = true
	return nil
}

func (s *scene) create(change func(*sandboxdv1.WorkloadSpec)) error {
	spec := &sandboxdv1.WorkloadSpec{
		Image: harness.Busybox, Isolation: isolations[s.wall],
		Process:   &sandboxdv1.ProcessSpec{Command: []string{"sh", "-c", waiter}},
		Resources: &sandboxdv1.Resources{MemoryBytes: 128 << 20, DiskBytes: s.disk},
	}
	if change != nil {
		change(spec)
	}
	return s.do(create, func() error {
		_, err := s.workloads().CreateWorkload(s.ctx, &sandboxdv1.CreateWorkloadRequest{Name: s.name, Spec: spec})
		return err
	})
}

func (s *scene) start() error {
	s.code, s.told[start], s.told[stop], s.asked[stop] = nil, false, false, false
	return s.do(start, func() error {
		s.starts++
		_, err := s.workloads().StartWorkload(s.ctx, &sandboxdv1.StartWorkloadRequest{Id: s.name})
		return err
	})
}

func (s *scene) get() (*sandboxdv1.Workload, error) {
	r, err := s.workloads().GetWorkload(s.ctx, &sandboxdv1.GetWorkloadRequest{Id: s.name})
	return r.GetWorkload(), err
}

// exec runs a command in the workload and answers with what it wrote.
func (s *scene) exec(command ...string) (string, error) {
	var out bytes.Buffer
	p, err := s.c.Exec(s.ctx, &sandboxdv1.ExecStart{Id: s.name, Command: command}, client.Stdio{Stdout: &out, Stderr: &out})
	if err != nil {
		return "", fmt.Errorf("exec: %w", err)
	}
	defer p.Close()
	exit, err := p.Wait()
	if err != nil {
		return "", fmt.Errorf("exec: %w", err)
	}
	if exit.GetCode() != 0 {
		return "", &codeError{exit.GetCode(), fmt.Errorf("exec: %q ended with code %d: %s", command, exit.GetCode(), out.String())}
	}
	return out.String(), nil
}

// codeError is of a command that ended with another code than 0.
type codeError struct {
	code int32
	error
}

func (s *scene) copyIn(name, content string) error {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
		return err
	}
	if _, err := io.WriteString(w, content); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	if err := s.c.CopyIn(s.ctx, s.name, "/", &b); err != nil {
		return fmt.Errorf("copy in: %w", err)
	}
	s.files["/"+name] = content
	return nil
}

func (s *scene) copyOut(path string) error {
	var b bytes.Buffer
	if err := s.c.CopyOut(s.ctx, s.name, path, &b); err != nil {
		return fmt.Errorf("copy out: %w", err)
	}
	r := tar.NewReader(&b)
	if _, err := r.Next(); err != nil {
		return err
	}
	got, err := io.ReadAll(r)
	if err == nil && string(got) != s.files[path] {
		err = fmt.Errorf("copied out %q, want %q", got, s.files[path])
	}
	return err
}

func (s *scene) pause() error {
	return s.do(pause, func() error {
		_, err := s.workloads().PauseWorkload(s.ctx, &sandboxdv1.PauseWorkloadRequest{Id: s.name})
		return err
	})
}

func (s *scene) resume() error {
	return s.do(resume, func() error {
		_, err := s.workloads().ResumeWorkload(s.ctx, &sandboxdv1.ResumeWorkloadRequest{Id: s.name})
		return err
	})
}

// updatedCPU is what an update gives, and less than what it had.
const updatedCPU = 700

func (s *scene) update() error {
	return s.do(update, func() error {
		_, err := s.workloads().UpdateWorkload(s.ctx, &sandboxdv1.UpdateWorkloadRequest{
			Id: s.name, Resources: &sandboxdv1.Resources{CpuMillis: updatedCPU}, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"cpu_millis"}},
		})
		return err
	})
}

// release lets the waiter end, which may be quicker than the command that lets it: what is left then is killed.
func (s *scene) release() error {
	return s.do(release, func() error {
		_, err := s.exec("touch", "/go")
		if coded := (*codeError)(nil); errors.As(err, &coded) && coded.code == 128+9 {
			return nil
		}
		return err
	})
}

// wait notes the exit code that it is told.
func (s *scene) wait() error {
	r, err := s.workloads().WaitWorkload(s.ctx, &sandboxdv1.WaitWorkloadRequest{Id: s.name})
	if err != nil {
		return fmt.Errorf("wait: %w", err)
	}
	st := r.GetWorkload().GetStatus()
	if st.GetState() == exited {
		s.code = st.ExitCode
	}
	return nil
}

func (s *scene) stop(grace time.Duration) error {
	return s.do(stop, func() error {
		r, err := s.workloads().StopWorkload(s.ctx, &sandboxdv1.StopWorkloadRequest{Id: s.name, Grace: durationpb.New(grace)})
		if err == nil {
			s.code = r.GetWorkload().GetStatus().ExitCode
		}
		return err
	})
}

func (s *scene) delete(force bool) error {
	return s.do(remove, func() error {
		_, err := s.workloads().DeleteWorkload(s.ctx, &sandboxdv1.DeleteWorkloadRequest{Id: s.name, Force: force})
		return err
	})
}

// logs are all of its output.
func (s *scene) logs() (string, error) {
	var out strings.Builder
	err := s.c.Logs(s.ctx, &sandboxdv1.StreamLogsRequest{Id: s.name}, func(r *sandboxdv1.StreamLogsResponse) error {
		out.Write(r.GetData())
		return nil
	})
	return out.String(), err
}

func notFound(err error) bool {
	return status.Code(errors.Unwrap(err)) == codes.NotFound || status.Code(err) == codes.NotFound
}
