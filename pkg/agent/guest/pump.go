package guest

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// readSize is the capacity that an output pipe is given: one read empties it, and a process that writes much is not woken for
// each 64 KiB, the kernel's default.
const readSize = 256 << 10

// readBuffers are held only while a read is going on, so that idle processes cost none.
var readBuffers = sync.Pool{New: func() any { b := make([]byte, readSize); return &b }}

// pump carries what comes out of f into the ring until the last writer of f has closed it, the ring is forgotten, or f is
// closed. It runs in a goroutine of the process it belongs to.
func pump(f *os.File, stream agentv1.Stream, r *ring) {
	defer r.closeWriter()
	conn, err := f.SyscallConn()
	if err != nil {
		return
	}
	for {
		var data []byte
		var readErr error
		err := conn.Read(func(fd uintptr) bool {
			buf := readBuffers.Get().(*[]byte)
			defer readBuffers.Put(buf)
			n, err := ignoringEINTR(func() (int, error) { return unix.Read(int(fd), *buf) })
			if errors.Is(err, unix.EAGAIN) {
				return false
			}
			if n > 0 {
				data = append([]byte(nil), (*buf)[:n]...)
			}
			readErr = err
			return true
		})
		// A terminal's master answers EIO when the last slave is closed: its way to say end of file.
		if err != nil || readErr != nil || len(data) == 0 {
			return
		}
		if r.write(stream, data) != nil {
			return
		}
	}
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
