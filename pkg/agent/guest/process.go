package guest

import (
	"context"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// process is a row of the process table: a process of the workload, or a copy, which looks like one.
//
//	starting ─▶ running ─▶ ended ─▶ (released: no row)
//	    └─▶ failed: no row, so that the daemon may try again
type process struct {
	id      string
	started outcome

	// What follows is set before started is done and constant from then on.
	pid      int
	output   *ring
	handed   bool       // whether the agent has no part in its output
	input    *input     // nil when it reads /dev/null
	terminal *os.File   // the master, which is also in files; nil without a terminal
	files    []*os.File // the agent's ends of its output
	pumps    sync.WaitGroup

	// Closed when exit is set.
	ended chan struct{}
	exit  exit
}

// outcome is the result of something done once that many may wait for.
type outcome struct {
	done chan struct{}
	err  error // constant once done is closed
}

func (o *outcome) set(err error) {
	o.err = err
	close(o.done)
}

func (o *outcome) wait(ctx context.Context) error {
	select {
	case <-o.done:
		return o.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// exit is how a process ended.
type exit struct {
	code, signal int
	time         time.Time
	err          string
}

func newProcess(id string) *process {
	return &process{id: id, started: outcome{done: make(chan struct{})}, ended: make(chan struct{})}
}

// end records how the process ended. It is called once, by whoever reaped it.
func (p *process) end(status unix.WaitStatus) { p.endCopy(status, "") }

// endCopy is end for a copy, with what went wrong.
func (p *process) endCopy(status unix.WaitStatus, complaint string) {
	e := exit{time: time.Now(), code: status.ExitStatus(), err: complaint}
	if status.Signaled() {
		e.signal = int(status.Signal())
		e.code = 128 + e.signal
	}
	p.exit = e
	close(p.ended)
}

// wait reports whether the process ended before ctx was done.
func (p *process) wait(ctx context.Context) bool {
	select {
	case <-p.ended:
		return true
	default:
	}
	select {
	case <-p.ended:
		return true
	case <-ctx.Done():
		return false
	}
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// follow starts to carry the process's output. Each file is one stream and has one writer in the ring.
func (p *process) follow(f *os.File, stream agentv1.Stream) {
	p.files = append(p.files, f)
	p.pumps.Go(func() { pump(f, stream, p.output) })
}

// release frees everything an ended process held and waits for its goroutines. Descendants that still write to its
// output get SIGPIPE.
func (p *process) release() {
	if p.output != nil {
		p.output.forget()
	}
	if p.input != nil {
		p.input.close()
	}
	for _, f := range p.files {
		f.Close()
	}
	p.pumps.Wait()
}

// table holds the processes by id.
type table struct {
	mu   sync.Mutex
	byID map[string]*process
	full bool // no further process: the sandbox ends
	// The last ids that were released, or would have been. A call to start one of them was overtaken by its caller's
	// change of mind.
	released     map[string]struct{}
	releaseOrder []string
}

// add answers with the process of that id, and whether it is new.
func (t *table) add(id string) (*process, bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.byID[id]; p != nil {
		return p, false, nil
	}
	if _, over := t.released[id]; over {
		return nil, false, wrongState("process %q was released", id)
	}
	if t.full {
		return nil, false, wrongState("the sandbox is shutting down")
	}
	if len(t.byID) >= maxProcesses {
		return nil, false, exhausted("the agent keeps %d processes: release some", maxProcesses)
	}
	p := newProcess(id)
	if t.byID == nil {
		t.byID = map[string]*process{}
	}
	t.byID[id] = p
	return p, true, nil
}

// take removes p's row and reports whether it was there. p has started or failed to; in the latter case the daemon may try
// again.
func (t *table) take(p *process) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byID[p.id] != p {
		return false
	}
	delete(t.byID, p.id)
	if p.started.err == nil {
		t.retireLocked(p.id)
	}
	return true
}

// release answers with the process of that id, which its caller is to take; nil if there is none. Then none will be.
func (t *table) release(id string) *process {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.byID[id]; p != nil {
		return p
	}
	t.retireLocked(id)
	return nil
}

// retire has id never started again.
func (t *table) retire(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retireLocked(id)
}

func (t *table) retireLocked(id string) {
	if _, known := t.released[id]; known {
		return
	}
	if t.released == nil {
		t.released = map[string]struct{}{}
	}
	if len(t.releaseOrder) == maxReleased {
		delete(t.released, t.releaseOrder[0])
		t.releaseOrder = append(t.releaseOrder[:0], t.releaseOrder[1:]...)
	}
	t.released[id] = struct{}{}
	t.releaseOrder = append(t.releaseOrder, id)
}

// get answers with a process that has started, waiting for one that is about to.
func (t *table) get(ctx context.Context, id string) (*process, error) {
	t.mu.Lock()
	p := t.byID[id]
	t.mu.Unlock()
	if p == nil {
		return nil, notFound("process %q is not known", id)
	}
	if err := p.started.wait(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, notFound("process %q did not start", id)
	}
	return p, nil
}

// others are the processes whose ids are not among keep.
func (t *table) others(keep []string) []*process {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*process
	for id, p := range t.byID {
		if !slices.Contains(keep, id) {
			out = append(out, p)
		}
	}
	return out
}

// close refuses further processes.
func (t *table) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.full = true
}
