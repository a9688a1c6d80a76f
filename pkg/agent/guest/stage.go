package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// StageName is the argv[0] by which the agent's program knows that it is to do a copy.
const StageName = "sandbox-stage"

// Descriptors a stage is started with, beside 0 and 1, which are the copy's tar stream in and out.
const (
	stageJobFD    = 3 // a memfd with the copyJob as JSON
	stageStatusFD = 4 // a pipe the agent reads: a stageFailure, if it failed
)

// stageFailure is why a stage, or a process that was to become the workload, gave up.
type stageFailure struct {
	Reason  agentv1.ExecFailure_Reason `json:"reason"`
	Message string                     `json:"message"`
}

// stageFailedCode is what a failed stage, or child, exits with. Nobody looks at it, but a copy's at copyMissingCode: the pipe
// says why.
const stageFailedCode = 1

// RunStage is the whole life of a stage: a copy of a tree, by the agent's own program with the agent's capabilities. It never
// returns.
func RunStage() {
	fail := func(code int, err error) {
		// If this can't be written the agent sees a stage that died, which is a failure too.
		if b, err := json.Marshal(&stageFailure{Message: err.Error()}); err == nil {
			_, _ = unix.Write(stageStatusFD, b)
		}
		unix.Exit(code)
	}
	// Nobody is to trace it: a guest's agent is a program that anybody may read. execve has undone what the agent did.
	if err := undumpable(); err != nil {
		fail(stageFailedCode, err)
	}
	job, err := readCopyJob()
	if err != nil {
		fail(stageFailedCode, err)
	}
	if err := job.run(os.NewFile(0, "in"), os.NewFile(1, "out")); err != nil {
		fail(copyExitCode(job, err), err)
	}
	unix.Exit(0)
}

func readCopyJob() (*copyJob, error) {
	var st unix.Stat_t
	if err := unix.Fstat(stageJobFD, &st); err != nil {
		return nil, fmt.Errorf("cannot find the copy's orders: %w", err)
	}
	b := make([]byte, st.Size)
	if n, err := unix.Pread(stageJobFD, b, 0); err != nil || n != len(b) {
		return nil, fmt.Errorf("cannot read the copy's orders: %d of %d bytes, %w", n, len(b), err)
	}
	job := &copyJob{}
	if err := json.Unmarshal(b, job); err != nil {
		return nil, fmt.Errorf("cannot decode the copy's orders: %w", err)
	}
	if job.Path == "" {
		return nil, errors.New("cannot follow the copy's orders: they name no path")
	}
	return job, nil
}
