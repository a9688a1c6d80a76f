package workload

import (
	"path/filepath"

	"github.com/sandboxd/sandboxd/pkg/console"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// consolePath is where the runtime keeps what the sandbox's kernel and its virtual machine monitor say, beside the output:
// it outlives every one of the workload's sandboxes.
func (e *entry) consolePath() string { return filepath.Join(e.dir(), "console.log") }

// consoleLog calls fn with each line of the console that o selects.
func (e *entry) consoleLog(o LogOptions, fn func(LogEntry) error) error {
	if e.isolation() != spec.IsolationVM {
		return spec.Errorf(spec.KindUnsupported, "workload %q has no console: a container runs on the host's kernel, whose messages dmesg shows", e.name)
	}
	if o.Follow {
		return spec.Invalidf("follow", "a console cannot be followed: leave follow out, and ask again")
	}
	var lines []LogEntry
	err := console.Read(e.consolePath(), func(line console.Entry) error {
		if !line.Time.Before(o.Since) {
			lines = append(lines, LogEntry{Time: line.Time, Stream: Stdout, Data: []byte(line.Text + "\n")})
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
