package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// StageName is the argv[0] by which the agent's program knows that it is the child between fork and execve.
const StageName = "sandbox-stage"

// Descriptors a stage is started with, beside 0 to 2, which are the workload's own.
const (
	stageSpecFD   = 3 // a memfd with the stageSpec as JSON
	stageStatusFD = 4 // a pipe the agent reads: see stageReady
)

// stageReady is what a stage writes when everything before its last step succeeded. The pipe closes on execve, so for the
// agent this byte and then the end of the stream mean that the workload runs; the byte and then a stageFailure, or a
// stageFailure alone, that it does not; and nothing at all that the stage died.
const stageReady = 'R'

// stageFailure is why a stage gave up.
type stageFailure struct {
	Reason  agentv1.ExecFailure_Reason `json:"reason"`
	Message string                     `json:"message"`
}

// stageSpec is what a stage turns into: exactly one of its fields is set.
type stageSpec struct {
	Process *confined `json:"process,omitempty"`
	Copy    *copyJob  `json:"copy,omitempty"`
}

// RunStage is the whole life of a stage. It never returns.
//
// It runs as the sandbox's root with the agent's capabilities, on the program's main thread, and uses raw system calls
// only.
func RunStage() {
	debug.SetGCPercent(-1) // it lives for milliseconds
	status, code := stageStatusFD, stageFailedCode
	fail := func(f *stageFailure) {
		// If this can't be written the agent sees a stage that died, which is a failure too.
		if b, err := json.Marshal(f); err == nil {
			_, _ = unix.Write(status, b)
		}
		unix.Exit(code)
	}
	// Before anything is given up: a process of the workload may trace one that has no more than itself, if that is dumpable,
	// as a guest's agent is whose program anybody may read. execve resets it.
	if err := undumpable(); err != nil {
		fail(&stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, err.Error()})
	}
	spec, err := readStageSpec()
	if err != nil {
		fail(&stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, err.Error()})
	}
	if spec.Process != nil {
		weaken.Adopt(spec.Process.Env)
	}
	if status, err = closeOthers(stageStatusFD); err != nil {
		fail(&stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, err.Error()})
	}
	if spec.Copy != nil {
		debug.SetGCPercent(100) // a copy may be long
		if err := spec.Copy.run(os.NewFile(0, "in"), os.NewFile(1, "out")); err != nil {
			code = copyExitCode(spec.Copy, err)
			fail(&stageFailure{Message: err.Error()})
		}
		unix.Exit(0)
	}
	fail(spec.Process.become(status))
}

// stageFailedCode is what a failed stage exits with. Nobody looks at it, but a copy's at copyMissingCode: the pipe says why.
const stageFailedCode = 1

func readStageSpec() (*stageSpec, error) {
	var st unix.Stat_t
	if err := unix.Fstat(stageSpecFD, &st); err != nil {
		return nil, fmt.Errorf("cannot find the stage's orders: %w", err)
	}
	b := make([]byte, st.Size)
	if n, err := unix.Pread(stageSpecFD, b, 0); err != nil || n != len(b) {
		return nil, fmt.Errorf("cannot read the stage's orders: %d of %d bytes, %w", n, len(b), err)
	}
	spec := &stageSpec{}
	if err := json.Unmarshal(b, spec); err != nil {
		return nil, fmt.Errorf("cannot decode the stage's orders: %w", err)
	}
	if (spec.Process == nil) == (spec.Copy == nil) {
		return nil, fmt.Errorf("cannot follow the stage's orders: they name no process and no copy, or both")
	}
	return spec, nil
}

// closeOthers has execve close every descriptor but 0 to 2; keep becomes 3. Not at once: Go's runtime may have some of its
// own by now (its poller, when a timer was set), and ends the program when it finds them closed.
func closeOthers(keep int) (int, error) {
	const to = 3
	if err := unix.Dup3(keep, to, unix.O_CLOEXEC); err != nil {
		return keep, fmt.Errorf("cannot move the status pipe: %w", err)
	}
	if weaken.Without("close inherited descriptors") {
		// A descriptor of something outside the root, as runc once left one.
		if _, err := unix.Open(".", unix.O_PATH, 0); err != nil {
			return to, err
		}
		unix.CloseOnExec(stageStatusFD)
		return to, nil
	}
	if err := unix.CloseRange(to+1, ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return to, fmt.Errorf("cannot have inherited descriptors closed: %w", err)
	}
	return to, nil
}
