package server

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

const (
	// pipesHello is what a caller sends on a connection of its own to get pipes: ExecStart.output_pipes in the API says how.
	// A connection for calls begins with HTTP/2's preface.
	pipesHello = "sandboxd-pipes/1"
	http2First = 'P'
	// pipesNameLen is the length of the name: as many random bytes.
	pipesNameLen = 16
	// pipesWait is how long pipes wait for their exec.
	pipesWait = 10 * time.Second
	// maxPipesPerCaller bounds those of one caller that wait: two descriptors each.
	maxPipesPerCaller = 64
	// outputPipeBytes is what the pipe for standard output holds. More makes it no faster.
	outputPipeBytes = 256 << 10
)

// pipes are the write ends of pipes whose callers have yet to say what is to be written to them.
type pipes struct {
	mu      sync.Mutex // guards what follows
	waiting map[string]waitingPipes
	count   map[string]int
}

type waitingPipes struct {
	*workload.OutputPipes
	caller string
}

func newPipes() *pipes {
	return &pipes{waiting: map[string]waitingPipes{}, count: map[string]int{}}
}

// offer makes pipes for a caller and sends it the ends to read from. Both are fresh: nobody holds anything else of them.
func (p *pipes) offer(conn *net.UnixConn, caller string) error {
	hello := make([]byte, len(pipesHello))
	if _, err := io.ReadFull(conn, hello); err != nil || string(hello) != pipesHello {
		return errors.Join(errors.New("cannot understand the caller: this is neither HTTP/2 nor "+pipesHello), err)
	}
	out, err := newOutputPipe(outputPipeBytes)
	if err != nil {
		return err
	}
	defer out.r.Close()
	errOut, err := newOutputPipe(0)
	if err != nil {
		out.w.Close()
		return err
	}
	defer errOut.r.Close()
	name := make([]byte, pipesNameLen)
	_, _ = rand.Read(name) // never fails
	ends := &workload.OutputPipes{Stdout: out.w, Stderr: errOut.w}
	if err := p.put(string(name), caller, ends); err != nil {
		ends.Close()
		return err
	}
	if _, _, err := conn.WriteMsgUnix(name, unix.UnixRights(int(out.r.Fd()), int(errOut.r.Fd())), nil); err != nil {
		p.drop(string(name))
		return fmt.Errorf("cannot send a caller its pipes: %w", err)
	}
	return nil
}

type outputPipe struct{ r, w *os.File }

func newOutputPipe(size int) (outputPipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return outputPipe{}, fmt.Errorf("cannot make a pipe: %w", err)
	}
	if size > 0 {
		// Where it is refused the kernel's default has to do.
		_, _ = unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, size)
	}
	return outputPipe{r: os.NewFile(uintptr(fds[0]), "output"), w: os.NewFile(uintptr(fds[1]), "output")}, nil
}

func (p *pipes) put(name, caller string, ends *workload.OutputPipes) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.count[caller] >= maxPipesPerCaller {
		return spec.Errorf(spec.KindExhausted, "%s has pipes for %d execs already that it did not ask for yet", caller, maxPipesPerCaller)
	}
	p.count[caller]++
	p.waiting[name] = waitingPipes{ends, caller}
	time.AfterFunc(pipesWait, func() { p.drop(name) })
	return nil
}

func (p *pipes) drop(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if w, ok := p.waiting[name]; ok {
		p.forgetLocked(name, w)
		w.Close()
	}
}

func (p *pipes) forgetLocked(name string, w waitingPipes) {
	delete(p.waiting, name)
	if p.count[w.caller]--; p.count[w.caller] == 0 {
		delete(p.count, w.caller)
	}
}

// take answers with the pipes of that name if they were made for that caller.
func (p *pipes) take(name []byte, caller string) (*workload.OutputPipes, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	w, ok := p.waiting[string(name)]
	if !ok || w.caller != caller {
		return nil, spec.Invalidf("start.output_pipes", "there are no such pipes of this caller: ask for new ones, or leave the field empty")
	}
	p.forgetLocked(string(name), w)
	return w.OutputPipes, nil
}

// firstByte answers with the first byte that comes on a connection, and leaves it there; io.EOF if there is none.
func firstByte(conn *net.UnixConn) (byte, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var first [1]byte
	var n int
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		for {
			n, _, failed = unix.Recvfrom(int(fd), first[:], unix.MSG_PEEK)
			if !errors.Is(failed, unix.EINTR) {
				return !errors.Is(failed, unix.EAGAIN)
			}
		}
	})
	if err := errors.Join(err, failed); err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, io.EOF
	}
	return first[0], nil
}
