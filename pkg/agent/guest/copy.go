package guest

import (
	"context"
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// copyJob is a tar stream in or out of the container's root. It runs in a stage of its own, so that a hostile tree costs the
// agent nothing and a copy is ended like any process; not confined, because it must write every owner and mode.
type copyJob struct {
	In   bool   `json:"in,omitempty"` // otherwise out
	Path string `json:"path"`
}

// run carries the stream between the root and the descriptors in and out.
func (j *copyJob) run(in, out *os.File) error {
	root, err := openDir("/")
	if err != nil {
		return err
	}
	defer root.Close()
	if j.In {
		return unpack(root, j.Path, in)
	}
	return pack(root, j.Path, out)
}

// copyMissingCode is the exit code of a copy of something that is not there, the number of the error.
const copyMissingCode = int(unix.ENOENT)

// copyExitCode is the exit code of a copy that failed with err.
func copyExitCode(j *copyJob, err error) int {
	if !j.In && isMissing(err) {
		return copyMissingCode
	}
	return stageFailedCode
}

// Copy implements agentv1.AgentServiceService.
func (s *Service) Copy(ctx context.Context, r *agentv1.CopyRequest) (*agentv1.CopyResponse, error) {
	if err := checkID(r.ProcessId); err != nil {
		return nil, err
	}
	if !path.IsAbs(r.Path) || len(r.Path) >= unix.PathMax {
		return nil, invalid("path is not absolute or longer than %d bytes", unix.PathMax)
	}
	job := &copyJob{Path: r.Path}
	switch r.Direction {
	case agentv1.CopyRequest_DIRECTION_IN:
		job.In = true
	case agentv1.CopyRequest_DIRECTION_OUT:
	default:
		return nil, invalid("direction %v is unknown", r.Direction)
	}
	c, err := s.find(r.ContainerId)
	if err != nil {
		return nil, err
	}
	p, isNew, err := s.processes.add(r.ProcessId)
	if err != nil {
		return nil, err
	}
	if isNew {
		p.started.set(s.launchCopy(p, c, job))
	}
	if err := p.started.wait(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		s.processes.take(p)
		return nil, startError("the copy", err)
	}
	return &agentv1.CopyResponse{}, nil
}

func (s *Service) launchCopy(p *process, c *container, job *copyJob) error {
	streams := &streams{null: c.root.null}
	err := streams.copyPipe(p, job.In)
	if err == nil {
		p.pid, err = s.wall.copy(job, streams.child, p.endCopy)
	}
	streams.close()
	if err != nil {
		p.release()
		return fmt.Errorf("cannot copy: %w", err)
	}
	return nil
}

// copyPipe makes the one pipe of a copy: its standard input or its standard output.
func (st *streams) copyPipe(p *process, in bool) error {
	st.child = [3]*os.File{st.null, st.null, st.null}
	if in {
		p.output = newRing(0) // ended before it began
		theirs, ours, err := newInputPipe()
		if err != nil {
			return err
		}
		st.own = append(st.own, theirs)
		st.child[0] = theirs
		p.input = &input{file: ours}
		return nil
	}
	p.output = newRing(1)
	ours, theirs, err := newPipe()
	if err != nil {
		return err
	}
	st.own = append(st.own, theirs)
	st.child[1] = theirs
	p.follow(ours, agentv1.Stream_STREAM_STDOUT)
	return nil
}
