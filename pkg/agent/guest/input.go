package guest

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"
)

// endOfTransmission is what a terminal in its usual mode takes for the end of input: it has no other half to close.
const endOfTransmission = "\x04"

// input is the agent's end of a process's standard input. Offsets make a write repeatable: bytes it already has are
// skipped. It buffers nothing; what the process does not read is not accepted.
type input struct {
	file *os.File
	// The file is a terminal's master, which its process closes.
	tty bool

	mu       sync.Mutex // held during a write: there is one at a time
	accepted uint64
	eof      bool
	closed   bool
}

var errInputGap = errors.New("offset is beyond the input accepted so far")

// write returns how many bytes are accepted in all and whether the process takes no more. It waits at most inputWait, and
// not once ctx is done.
func (in *input) write(ctx context.Context, offset uint64, data []byte, eof bool) (accepted uint64, closed bool, err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if offset > in.accepted {
		return in.accepted, false, errInputGap
	}
	skip := in.accepted - offset
	data = data[min(skip, uint64(len(data))):]
	if in.eof && len(data) == 0 {
		return in.accepted, false, nil // a repeated last write
	}
	if in.closed || in.eof {
		return in.accepted, true, nil
	}
	if len(data) > 0 {
		n, err := in.writeLocked(ctx, data)
		in.accepted += uint64(n)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return in.accepted, false, nil
		case err != nil:
			in.closeLocked()
			return in.accepted, true, nil
		}
	}
	if eof {
		in.eof = true
		if in.tty {
			_, err = in.writeLocked(ctx, []byte(endOfTransmission))
			return in.accepted, err != nil, nil
		}
		in.closeLocked()
	}
	return in.accepted, false, nil
}

func (in *input) writeLocked(ctx context.Context, data []byte) (int, error) {
	if err := in.file.SetWriteDeadline(time.Now().Add(inputWait)); err != nil {
		return 0, err
	}
	stop := context.AfterFunc(ctx, in.interrupt)
	defer stop()
	return in.file.Write(data)
}

// interrupt ends a write that waits. A write that starts at the same moment may miss it and waits its full time.
func (in *input) interrupt() { _ = in.file.SetWriteDeadline(time.Unix(1, 0)) }

func (in *input) closeLocked() {
	if !in.closed && !in.tty {
		in.file.Close()
	}
	in.closed = true
}

// close is for a process that has ended.
func (in *input) close() {
	in.interrupt()
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closeLocked()
}
