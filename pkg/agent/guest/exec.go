package guest

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// defaultUmask is every other runtime's.
const defaultUmask = 0o022

// Exec implements agentv1.AgentServiceService.
func (s *Service) Exec(ctx context.Context, r *agentv1.ExecRequest) (*agentv1.ExecResponse, error) {
	config := &specs.Process{}
	if err := decodeConfig(r.OciProcess, config); err != nil {
		return nil, err
	}
	return s.exec(ctx, r.ContainerId, r.ProcessId, config, wiring{stdin: r.Stdin, handed: r.HandedOutput})
}

// wiring is what a process's streams are, where it has no terminal.
type wiring struct {
	stdin  bool // whether input will be written
	handed bool // whether the daemon hands over where output goes
}

func (s *Service) exec(ctx context.Context, containerID, processID string, config *specs.Process, w wiring) (*agentv1.ExecResponse, error) {
	if err := checkID(processID); err != nil {
		return nil, err
	}
	c, err := s.find(containerID)
	if err != nil {
		return nil, err
	}
	orders, err := newConfined(config, c.filter)
	if err != nil {
		return nil, err
	}
	p, isNew, err := s.processes.add(processID)
	if err != nil {
		return nil, err
	}
	if isNew {
		// Not bound to ctx: a start that is under way when the connection is lost goes on, and the daemon asks again.
		p.started.set(s.launch(p, c, orders, config.ConsoleSize, w))
	}
	return s.answer(ctx, p)
}

// answer tells how p's start went, once it has.
func (s *Service) answer(ctx context.Context, p *process) (*agentv1.ExecResponse, error) {
	err := p.started.wait(ctx)
	if err == nil {
		return &agentv1.ExecResponse{Pid: int32(p.pid), HandedOutput: p.handed}, nil
	}
	if ctx.Err() != nil {
		return nil, err
	}
	s.processes.take(p)
	if f := asFailure(err); f != nil {
		return &agentv1.ExecResponse{Failure: f}, nil
	}
	return nil, startError(fmt.Sprintf("process %q", p.id), err)
}

// newConfined translates the daemon's wishes into what the child does.
func newConfined(p *specs.Process, filter []byte) (*confined, error) {
	if len(p.Args) == 0 || p.Args[0] == "" {
		return nil, invalid("the process has no arguments")
	}
	for _, word := range slices.Concat(p.Args, p.Env, []string{p.Cwd}) {
		if strings.ContainsRune(word, 0) {
			return nil, invalid("an argument, variable or directory has a NUL byte in it")
		}
	}
	if !strings.HasPrefix(p.Cwd, "/") {
		return nil, invalid("working directory %q is not absolute", p.Cwd)
	}
	// Refused rather than ignored: what was asked for and is not done would be a protection or a promise missing.
	if p.SelinuxLabel != "" || p.OOMScoreAdj != nil || p.Scheduler != nil || p.IOPriority != nil || p.ExecCPUAffinity != nil {
		return nil, invalid("the agent knows no SELinux label, OOM score, scheduler, I/O priority or CPU affinity of a process")
	}
	caps, err := newCapSets(p.Capabilities)
	if err != nil {
		return nil, invalid("%v", err)
	}
	limits, err := newRlimits(p.Rlimits)
	if err != nil {
		return nil, invalid("%v", err)
	}
	c := &confined{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd, User: newUserSpec(p.User), Terminal: p.Terminal, Umask: defaultUmask,
		Rlimits: limits, Caps: caps, NoNewPrivileges: p.NoNewPrivileges, Seccomp: filter,
		AppArmor: p.ApparmorProfile,
	}
	if p.User.Umask != nil {
		c.Umask = *p.User.Umask & 0o777
	}
	return c, nil
}

// launch makes p's streams and starts it.
func (s *Service) launch(p *process, c *container, orders *confined, size *specs.Box, w wiring) error {
	streams := &streams{null: c.root.null}
	var err error
	if orders.Terminal {
		err = streams.terminal(p, c.root.pts, size)
	} else {
		err = streams.pipes(p, w.stdin)
		if err == nil && w.handed {
			err = streams.handed(p, &s.handover)
		} else if err == nil {
			err = streams.output(p)
		}
	}
	if err == nil {
		p.pid, err = s.wall.spawn(orders, streams.child, p.end)
	}
	streams.close()
	if err != nil {
		p.release()
		return err
	}
	return nil
}

// streams are a new process's descriptors 0 to 2 while it is started.
type streams struct {
	null  *os.File
	child [3]*os.File
	own   []*os.File // the child's ends, closed here once it has them
}

func (st *streams) terminal(p *process, pts *os.File, size *specs.Box) error {
	master, slave, err := openTerminal(pts, size)
	if err != nil {
		return err
	}
	st.own = append(st.own, slave)
	st.child = [3]*os.File{slave, slave, slave}
	p.terminal = master
	p.input = &input{file: master, tty: true}
	p.output = newRing(1)
	p.follow(master, agentv1.Stream_STREAM_STDOUT)
	return nil
}

func (st *streams) pipes(p *process, stdin bool) error {
	st.child[0] = st.null
	if stdin {
		theirs, ours, err := newInputPipe()
		if err != nil {
			return err
		}
		st.own = append(st.own, theirs)
		st.child[0] = theirs
		p.input = &input{file: ours}
	}
	return nil
}

// handed uses what the daemon handed over: whoever holds the other ends reads what the process writes.
func (st *streams) handed(p *process, h *handover) error {
	files, err := h.take(p.id)
	if err != nil {
		return err
	}
	st.own = append(st.own, files...)
	copy(st.child[1:], files)
	p.output = newRing(0)
	p.handed = true
	return nil
}

// output has the agent read and keep what the process writes.
func (st *streams) output(p *process) error {
	p.output = newRing(2)
	for i, stream := range []agentv1.Stream{agentv1.Stream_STREAM_STDOUT, agentv1.Stream_STREAM_STDERR} {
		ours, theirs, err := newOutputPipe()
		if err != nil {
			return err
		}
		st.own = append(st.own, theirs)
		st.child[1+i] = theirs
		p.follow(ours, stream)
	}
	return nil
}

func (st *streams) close() {
	for _, f := range st.own {
		f.Close()
	}
}

func (p *process) resize(rows, columns uint32) error {
	conn, err := p.terminal.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) { failed = setTerminalSize(int(fd), rows, columns) }); err != nil {
		return err
	}
	return failed
}
