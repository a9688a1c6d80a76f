package main

import (
	"io"
	"os"
	"sync"

	"golang.org/x/term"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// terminal is the terminal this program was started from, if there is one.
type terminal struct {
	fd  int
	is  bool
	raw *term.State

	once sync.Once
}

// terminalOf looks at a stream: standard input for what is typed, the outputs for how to print.
func terminalOf(stream any) *terminal {
	f, ok := stream.(*os.File)
	if !ok {
		return &terminal{}
	}
	return &terminal{fd: int(f.Fd()), is: term.IsTerminal(int(f.Fd()))}
}

func isTerminal(w io.Writer) bool { return terminalOf(w).is }

// size in characters; nil when there is no terminal.
func (t *terminal) size() *sandboxdv1.TerminalSize {
	if !t.is {
		return nil
	}
	columns, rows, err := term.GetSize(t.fd)
	if err != nil {
		return nil
	}
	return &sandboxdv1.TerminalSize{Rows: uint32(rows), Columns: uint32(columns)}
}

// makeRaw hands every key to the process in the sandbox, ctrl-C included. restore must follow.
func (t *terminal) makeRaw() error {
	if !t.is {
		return nil
	}
	state, err := term.MakeRaw(t.fd)
	t.raw = state
	return err
}

// restore gives the terminal back as it was. It may be called more than once.
func (t *terminal) restore() {
	t.once.Do(func() {
		if t.raw != nil {
			// When it fails the terminal has gone, and nothing is left to restore.
			_ = term.Restore(t.fd, t.raw)
		}
	})
}
