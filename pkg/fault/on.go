//go:build sandboxd_fault

// Package fault is described in off.go.
package fault

import (
	"fmt"
	"io"
	"net"
	"os"
)

// Variable names the Unix socket on which a test wants to be asked at each point; "list" prints the points and ends.
const Variable = "SANDBOXD_FAULT"

// unknown is the exit status of a program that came to a point without a row.
const unknown = 70

var known = map[[2]string]bool{}

// init, so that every program that has points in it can list them.
func init() {
	for _, p := range points {
		for _, s := range p.steps {
			known[[2]string{p.place, s}] = true
		}
	}
	if os.Getenv(Variable) != "list" {
		return
	}
	for _, p := range points {
		for _, s := range p.steps {
			fmt.Printf("%s\t%s\t%s\n", p.place, s, p.wall)
		}
	}
	os.Exit(0)
}

// At is for a test build: see off.go. It returns when the test says so, at once if there is none. A test that does not answer
// ends the program: a point that passes unseen is not tried.
func At(place, step string) {
	if !known[[2]string{place, step}] {
		// Not a panic, which somebody may recover from: the test must see it.
		fmt.Fprintf(os.Stderr, "fault: the point %q of %q has no row in pkg/fault/points.go\n", step, place)
		os.Exit(unknown)
	}
	socket := os.Getenv(Variable)
	if socket == "" {
		return
	}
	// On another thread: this one may be in a mount namespace, or have a root, where there is no such socket.
	asked := make(chan error)
	go func() { asked <- ask(socket, place, step) }()
	if err := <-asked; err != nil {
		fmt.Fprintf(os.Stderr, "fault: cannot ask the test at the point %q of %q: %v\n", step, place, err)
		os.Exit(unknown)
	}
}

func ask(socket, place, step string) error {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "%s\t%s\n", place, step); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, conn) // the test closes it
	return err
}

// Instead is for a test build: see off.go.
func Instead[T any](value, inTests T) T { return inTests }
