package guest

import (
	"errors"
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// fallbackPath is searched when the workload's environment has no PATH.
const fallbackPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// execute turns the stage into the workload. A name without a slash is looked for in the workload's own PATH by trying,
// as execvp(3) does, so that what is found and what is run can't differ. It returns only if that failed.
func (c *confined) execute() *stageFailure {
	name := c.Args[0]
	if strings.Contains(name, "/") {
		err := syscall.Exec(name, c.Args, c.Env)
		return execFailure(name, err, "no such file, or its interpreter is missing")
	}
	denied := error(nil)
	for _, dir := range strings.Split(searchPath(c.Env), ":") {
		if dir == "" {
			dir = "." // POSIX: an empty element is the working directory
		}
		err := syscall.Exec(dir+"/"+name, c.Args, c.Env)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		case errors.Is(err, unix.EACCES):
			denied = err
		default:
			return execFailure(name, err, "")
		}
	}
	if denied != nil {
		return execFailure(name, denied, "")
	}
	return execFailure(name, unix.ENOENT, "not found in $PATH")
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
