package microvm

import (
	"time"

	"github.com/sandboxd/sandboxd/pkg/console"
	"github.com/sandboxd/sandboxd/pkg/runtime"
)

var _ runtime.ConsoleKeeper = (*Runtime)(nil)

// ReadConsole implements runtime.ConsoleKeeper.
func (*Runtime) ReadConsole(path string, fn func(at time.Time, line string) error) error {
	return console.Read(path, func(e console.Entry) error { return fn(e.Time, e.Text) })
}
