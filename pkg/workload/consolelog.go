package workload

import (
	"path/filepath"
	"time"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// consolePath is where the runtime keeps what the sandbox's kernel and its virtual machine monitor say, beside the output:
// it outlives every one of the workload's sandboxes.
func (e *entry) consolePath() string { return filepath.Join(e.dir(), "console.log") }

// consoleLog calls fn with each line of the console that o selects.
func (e *entry) consoleLog(o LogOptions, fn func(LogEntry) error) error {
	keeper, ok := e.runtime().(runtime.ConsoleKeeper)
	if !ok {
		return spec.Errorf(spec.KindUnsupported, "workload %q has no console: a container runs on the host's kernel, whose messages dmesg shows", e.name)
	}
	if o.Follow {
		return spec.Invalidf("follow", "a console cannot be followed: leave follow out, and ask again")
	}
	var lines []LogEntry
	err := keeper.ReadConsole(e.consolePath(), func(at time.Time, line string) error {
		if !at.Before(o.Since) {
			lines = append(lines, LogEntry{Time: at, Stream: Stdout, Data: []byte(line + "\n")})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if o.Tail >= 0 {
		lines = lines[max(0, len(lines)-o.Tail):]
	}
	for _, line := range lines {
		if err := fn(line); err != nil {
			return err
		}
	}
	return nil
}
