package guest

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/rawfork"
)

// fallbackPath is searched when the workload's environment has no PATH.
const fallbackPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// execute turns the child into the workload. A name without a slash is looked for in the workload's own PATH by trying,
// as execvp(3) does, so that what is found and what is run can't differ.
func (c *confined) execute(calls *rawfork.Calls) error {
	args, err := syscall.SlicePtrFromStrings(c.Args)
	if err != nil {
		return fmt.Errorf("cannot pass the arguments: %w", err)
	}
	env, err := syscall.SlicePtrFromStrings(c.Env)
	if err != nil {
		return fmt.Errorf("cannot pass the environment: %w", err)
	}
	candidates := []string{c.Args[0]}
	if !c.named() {
		candidates = nil
		for dir := range strings.SplitSeq(searchPath(c.Env), ":") {
			if dir == "" {
				dir = "." // POSIX: an empty element is the working directory
			}
			candidates = append(candidates, dir+"/"+c.Args[0])
		}
	}
	for _, name := range candidates {
		file, err := calls.Text(name)
		if err != nil {
			return fmt.Errorf("cannot look for %q: %w", name, err)
		}
		calls.Execute(name, unix.SYS_EXECVE, file, rawfork.Address(calls, &args[0]), rawfork.Address(calls, &env[0])).Step = executeStep
	}
	return nil
}

// named reports whether the program is given by its path and not looked for.
func (c *confined) named() bool { return strings.Contains(c.Args[0], "/") }

// missing is what it means when there is no such file.
func (c *confined) missing() string {
	if c.named() {
		return "no such file, or its interpreter is missing"
	}
	return "not found in $PATH"
}

func searchPath(env []string) string {
	path := fallbackPath
	for _, e := range env {
		if p, ok := strings.CutPrefix(e, "PATH="); ok {
			path = p
		}
	}
	return path
}

// execFailure tells a missing program from one that can't be executed: exit codes 127 and 126.
func execFailure(name string, err error, missing string) *stageFailure {
	switch {
	case errors.Is(err, unix.ENOENT):
		return &stageFailure{agentv1.ExecFailure_REASON_NOT_FOUND, fmt.Sprintf("cannot execute %q: %s", name, missing)}
	case errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENAMETOOLONG):
		return &stageFailure{agentv1.ExecFailure_REASON_NOT_FOUND, fmt.Sprintf("cannot execute %q: %v", name, err)}
	default:
		return &stageFailure{agentv1.ExecFailure_REASON_NOT_EXECUTABLE, fmt.Sprintf("cannot execute %q: %v", name, err)}
	}
}
