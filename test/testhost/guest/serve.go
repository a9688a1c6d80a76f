package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/test/testhost/wire"
)

// How long udev may take to name the port.
const portPatience = 20 * time.Second

// serve runs scripts one after the other until the test's end of the port is closed; then the machine goes too.
func serve() error {
	port, err := openPort()
	if err != nil {
		return err
	}
	out := &sender{enc: json.NewEncoder(port)}
	in := json.NewDecoder(port)
	if err := out.send(wire.Event{Ready: true}); err != nil {
		return err
	}
	for {
		var c wire.Command
		if err := in.Decode(&c); err != nil {
			return fmt.Errorf("the test has gone: %w", err)
		}
		code, err := run(c, out)
		e := wire.Event{Done: true, ExitCode: code}
		if err != nil {
			e.Error = err.Error()
		}
		if err := out.send(e); err != nil {
			return err
		}
	}
}

func openPort() (*os.File, error) {
	for end := time.Now().Add(portPatience); ; time.Sleep(20 * time.Millisecond) {
		port, err := os.OpenFile("/dev/virtio-ports/"+wire.Port, os.O_RDWR, 0)
		if err == nil || time.Now().After(end) {
			return port, err
		}
	}
}

// sender is the way back, shared by what a script writes and its end.
type sender struct {
	mu  sync.Mutex
	enc *json.Encoder // guarded by mu
}

func (s *sender) send(e wire.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.enc.Encode(e)
}

func (s *sender) Write(b []byte) (int, error) {
	if err := s.send(wire.Event{Output: b}); err != nil {
		return 0, err
	}
	return len(b), nil
}

// run runs a script with bash. What it leaves in the background doesn't hold its end up.
func run(c wire.Command, out io.Writer) (int, error) {
	cmd := exec.Command("/bin/bash", "-c", c.Script)
	cmd.Dir = "/data"
	cmd.Env = append(os.Environ(), "HOME=/root", "LC_ALL=C.UTF-8")
	cmd.Stdout, cmd.Stderr = out, out
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return -1, err
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) || errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	return cmd.ProcessState.ExitCode(), err
}
