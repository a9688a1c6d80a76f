// Command sandbox-agent is PID 1 of every sandbox, whichever wall it stands behind: pkg/agent/guest says what it does.
package main

import (
	"fmt"
	"os"

	"github.com/sandboxd/sandboxd/pkg/agent/guest"
)

// A container's agent runs from a memfd: its name would be a descriptor's number, where people look for what PID 1 is. It is that
// of the main thread, which Go promises for initialization alone. (Pinned to it for longer, main's goroutine would pass the
// processor through another thread whenever it waits.)
var errName = guest.NameProcess("sandbox-agent")

func main() {
	if os.Args[0] == guest.StageName {
		guest.RunStage()
		return
	}
	err := errName
	switch {
	case err != nil:
	case len(os.Args) == 2 && os.Args[1] == "container":
		err = guest.RunContainer()
	case os.Args[0] == "/init":
		guest.RunVM()
	default:
		err = fmt.Errorf("cannot run by hand: sandboxd starts it, as PID 1 of a sandbox")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sandbox-agent:", err)
		os.Exit(1)
	}
}
