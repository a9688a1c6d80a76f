package guest

import (
	"fmt"
	"os"

	"github.com/sandboxd/sandboxd/pkg/osthread"
)

// newForker makes a thread that is in the workload's control group, where nothing else of the agent is, and answers with what has it
// fork. Its children are there from their first instruction, and once the group is full the kernel refuses it one more; the threads
// that the agent needs are none of that group's. Were both in one group, a workload that forks to the limit would leave the
// agent without: Go ends a program that is refused a thread, and with PID 1 all of the sandbox ends.
//
// door is closed: whoever takes the agent over finds nothing of the host's in it.
func newForker(door *os.File) (within func(func() (int, error)) (int, error), err error) {
	defer door.Close()
	type answer struct {
		pid int
		err error
	}
	entered, forks, answers := make(chan error, 1), make(chan func() (int, error)), make(chan answer)
	go osthread.Run(func() error { //nolint:errcheck // says itself what fails
		_, err := door.Write([]byte("0"))
		entered <- err
		if err != nil {
			return err
		}
		for fork := range forks {
			pid, err := fork()
			answers <- answer{pid, err}
		}
		return nil
	})
	if err := <-entered; err != nil {
		return nil, fmt.Errorf("cannot enter the workload's control group: %w", err)
	}
	// Called under the lock of children: one at a time.
	return func(fork func() (int, error)) (int, error) {
		forks <- fork
		a := <-answers
		return a.pid, a.err
	}, nil
}
