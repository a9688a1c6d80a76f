// Command sandbox-agent is PID 1 of every sandbox, whichever wall it stands behind: pkg/agent/guest says what it does.
package main

import (
	"fmt"
	"os"
	"runtime"

	"github.com/sandboxd/sandboxd/pkg/agent/guest"
)

// A goroutine that is locked to the main thread and ends would park it for ever; and a stage must become the workload on
// one thread that it alone uses.
func init() { runtime.LockOSThread() }

func main() {
	if os.Args[0] == guest.StageName {
		guest.RunStage()
		return
	}
	// A container's agent runs from a memfd: its name would be a descriptor's number, where people look for what PID 1 is.
	err := guest.NameProcess("sandbox-agent")
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
