package client

import (
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// lingerLimit is how long output may stay silent, after the process has ended, before it is no longer waited for: a
	// descendant may hold it open for ever.
	lingerLimit = 5 * time.Second
	// copyBytes is what is read at once where the kernel can't move it.
	copyBytes = 256 << 10
)

// pipes bring a process's output past the daemon: see ExecStart.output_pipes.
type pipes struct {
	name   []byte
	ends   [2]*os.File // to read from: standard output, standard error
	ended  atomic.Bool // whether the process has
	closed atomic.Bool
	done   sync.WaitGroup
	mu     sync.Mutex // guards err
	err    error      // the first
}

// carry starts to write what comes out of the pipes; failed is called when that can't go on.
func (p *pipes) carry(stdout, stderr io.Writer, failed func()) {
	for i, w := range []io.Writer{stdout, stderr} {
		p.done.Go(func() {
			if err := p.carryOne(p.ends[i], w); err != nil {
				p.mu.Lock()
				if p.err == nil {
					p.err = err
				}
				p.mu.Unlock()
				failed()
			}
		})
	}
}

// finish is called when the process has ended: it returns when all its output is written.
func (p *pipes) finish() error {
	p.ended.Store(true)
	for _, f := range p.ends {
		p.await(f)
	}
	return p.wait()
}

// drop closes the pipes of a process that did not start; there may be none.
func (p *pipes) drop() {
	if p != nil {
		p.close()
	}
}

// giveUp closes the pipes, so that whoever writes to them ends.
func (p *pipes) giveUp() error {
	p.close()
	return p.wait()
}

func (p *pipes) close() {
	p.closed.Store(true)
	for _, f := range p.ends {
		if f != nil {
			f.Close()
		}
	}
}

func (p *pipes) wait() error {
	p.done.Wait()
	p.close()
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// await is called before each wait for output: once the process has ended there is a limit to it.
func (p *pipes) await(f *os.File) {
	if p.ended.Load() {
		_ = f.SetReadDeadline(time.Now().Add(lingerLimit)) // closed: the read says so
	}
}

// carryOne ends without an error when the output does: it is no fault that nobody closes it.
func (p *pipes) carryOne(from *os.File, to io.Writer) error {
	if f, ok := to.(*os.File); ok {
		if done, err := p.move(from, f); done {
			return err
		}
	}
	buf := make([]byte, copyBytes)
	for {
		p.await(from)
		n, err := from.Read(buf)
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return err
			}
		}
		if err != nil {
			return nil
		}
	}
}
