package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// bootTimeout bounds how long an agent may take from its first instruction to its answer; it takes milliseconds, and
	// seconds on a host that is out of memory.
	bootTimeout = 20 * time.Second
	// launchTimeout is bootTimeout where the agent is to start the workload before it answers, which may have to wait for files
	// of the image on a slow disk.
	launchTimeout = 2 * time.Minute
	// endTimeout bounds the wait for the spawner to say why an agent has ended, which it does at once.
	endTimeout = 5 * time.Second
	// maxBootResult bounds the agent's answer: base64 of spec.MaxLaunchBytes, and the rest.
	maxBootResult = 2 * spec.MaxLaunchBytes
	// maxRefusal bounds what is shown of an agent's reason, in bytes of its own.
	maxRefusal = 1024
	// smallBootResult is maxBootResult where nothing is launched.
	smallBootResult = 4096
	// crashLogSize is how much of an agent's standard error is kept: the head of a Go crash.
	crashLogSize = 64 << 10
	// backlog of the agent's socket: connections of the daemon that it has not accepted yet.
	backlog = 128

	socketFile = "agent.sock"
)

// namespaces of a sandbox, and what each keeps apart. The cgroup namespace is made after the child is in its cgroup, or its root
// would be the daemon's.
const namespaces = unix.CLONE_NEWUSER | // ids and capabilities
	unix.CLONE_NEWPID | // processes: when PID 1 ends, the kernel ends them all
	unix.CLONE_NEWNS | // mounts
	unix.CLONE_NEWNET | // network: only loopback
	unix.CLONE_NEWIPC | // System V IPC, POSIX message queues
	unix.CLONE_NEWUTS // host name

// agentProcess is an agent that was forked and has not been told its sandbox yet.
type agentProcess struct {
	// Until it has arrived, when the rest but boot and crash is not there.
	spawning *spawning

	pid   int
	pidfd *os.File
	// The daemon's end of the boot socket.
	boot *net.UnixConn
	// What the agent writes to standard error: a memory file that cannot grow, so that an agent taken over cannot fill
	// the host's disk.
	crash *os.File
}

// startAgent asks the spawner for an agent. What it answers with has no pid until arrived was called.
func (s *spawner) startAgent(program *os.File, req spawnRequest, unified *os.File) (_ *agentProcess, err error) {
	ours, theirs, err := messageSockets()
	if err != nil {
		return nil, err
	}
	defer theirs.Close() //nolint:errcheck // the agent's
	p := &agentProcess{boot: ours}
	defer func() {
		if err != nil {
			_ = p.boot.Close() // nothing was sent
			if p.crash != nil {
				_ = p.crash.Close() // nothing was written
			}
		}
	}()
	if p.crash, err = boundedFile("agent-stderr", crashLogSize); err != nil {
		return nil, err
	}
	if p.spawning, err = s.request(req, program, p.crash, theirs, unified); err != nil {
		return nil, fmt.Errorf("cannot start the agent in new namespaces: %w", err)
	}
	return p, nil
}

// arrived waits until there is a process, which waits for the word to go.
func (p *agentProcess) arrived() (err error) {
	p.pid, p.pidfd, err = p.spawning.answer()
	p.spawning = nil
	if err != nil {
		return fmt.Errorf("cannot start the agent in new namespaces: %w", err)
	}
	return nil
}

// goOn lets the process enter the cgroups behind the doors and become the agent.
func (p *agentProcess) goOn(ctx context.Context, doors []*os.File) error {
	if _, _, err := p.boot.WriteMsgUnix([]byte{wordToGo}, rightsOf(doors), nil); err != nil {
		return p.explain(ctx, "cannot have the agent go on", err)
	}
	return nil
}

// rightsOf passes descriptors on, none if there are no files.
func rightsOf(files []*os.File) []byte {
	if len(files) == 0 {
		return nil
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	return unix.UnixRights(fds...)
}

// boundedFile is a memory file that can be written to, but never past size.
func boundedFile(label string, size int64) (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(label, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before 6.3
		fd, err = unix.MemfdCreate(label, flags)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make a memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd:"+label)
	err = f.Truncate(size)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = f.Close() // nothing was written
		return nil, fmt.Errorf("cannot bound a memory file: %w", err)
	}
	return f, nil
}

// listen makes the socket that the agent will serve. It is bound through a descriptor of its directory: a socket's path
// has only 108 bytes.
func listen(dir string) (*os.File, error) {
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the run directory: %w", err)
	}
	defer d.Close() //nolint:errcheck // a path descriptor
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot make the agent's socket: %w", err)
	}
	s := os.NewFile(uintptr(fd), socketFile)
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(fdPath(d), socketFile)})
	if err == nil {
		err = unix.Listen(fd, backlog)
	}
	if err != nil {
		_ = s.Close() // nothing was sent
		return nil, fmt.Errorf("cannot bind the agent's socket: %w", err)
	}
	return s, nil
}

// namespace opens one of the agent's namespaces, named as in /proc/PID/ns. The agent was there before and after.
func (p *agentProcess) namespace(ctx context.Context, kind string) (*os.File, error) {
	what := "cannot open the sandbox's " + kind + " namespace"
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", p.pid, kind))
	// One that has ended: the number may have been another's. One that is about to has no namespaces any more.
	if ended(p.pidfd) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		if err == nil {
			_ = f.Close() // only looked at
		}
		return nil, p.explainEnd(ctx, what)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return f, nil
}

// introduce tells the agent its sandbox, with bootFiles, and what to launch in it, if anything; it answers with what the agent says
// of that.
func (p *agentProcess) introduce(ctx context.Context, files []*os.File, launch []byte) ([]byte, error) {
	return p.tell(ctx, files, spec.ContainerBoot{Launch: launch})
}

// prepare has the agent make a root ahead of time, and introducePrepared tells it whose that is.
func (p *agentProcess) prepare(ctx context.Context, files []*os.File, preparation []byte) error {
	_, err := p.tell(ctx, files, spec.ContainerBoot{Prepare: preparation})
	return err
}

func (p *agentProcess) introducePrepared(ctx context.Context, launch []byte) ([]byte, error) {
	return p.tell(ctx, nil, spec.ContainerBoot{Launch: launch})
}

// tell sends a boot message, and files with it, and answers with what was launched.
func (p *agentProcess) tell(ctx context.Context, files []*os.File, boot spec.ContainerBoot) ([]byte, error) {
	limit, size := bootTimeout, smallBootResult
	launch := boot.Launch
	if launch != nil {
		limit, size = launchTimeout, maxBootResult
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = p.boot.SetDeadline(time.Unix(1, 0)) }) // wakes both calls below
	defer stop()
	boot.Version, boot.Trace = spec.ProtocolVersion, phase.On()
	msg, err := json.Marshal(boot)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the boot message: %w", err)
	}
	if _, _, err := p.boot.WriteMsgUnix(msg, rightsOf(files), nil); err != nil {
		return nil, p.explain(ctx, "cannot send the boot message", err)
	}
	buf := make([]byte, size)
	n, err := p.boot.Read(buf)
	if err != nil || n == 0 {
		return nil, p.explain(ctx, "cannot read the agent's answer", err)
	}
	launched, err := parseBootResult(buf[:n], launch != nil)
	if err != nil {
		return nil, p.explain(ctx, "cannot boot the agent", err)
	}
	return launched, nil
}

// parseBootResult reads an agent's answer. After a launch the workload runs, and it may be the one who answers: what it says is
// bounded, and holds nothing that a terminal would obey.
func parseBootResult(b []byte, launched bool) ([]byte, error) {
	var result spec.BootResult
	if err := json.Unmarshal(b, &result); err != nil {
		return nil, fmt.Errorf("cannot decode its answer of %d bytes", len(b)) // the decoder's words quote it
	}
	if said := result.Error; said != "" {
		return nil, fmt.Errorf("it refused its sandbox: %q", said[:min(len(said), maxRefusal)])
	}
	if launched && len(result.Launched) == 0 {
		return nil, errors.New("it was told what to launch, and says nothing of that")
	}
	return result.Launched, nil
}

// agentError is of the agent itself, in whatever step it showed.
type agentError struct{ error }

func (e *agentError) Unwrap() error { return e.error }

// explainEnd is explain for an agent that was found to have ended. What there is to say of that has been said when its end of the boot
// socket is closed.
func (p *agentProcess) explainEnd(ctx context.Context, what string) error {
	_ = p.boot.SetReadDeadline(time.Now().Add(endTimeout)) // nothing is read from it afterwards
	_, _ = p.boot.Read(make([]byte, smallBootResult))      // the end, or the last words of who spoke without being asked
	return p.explain(ctx, what, nil)
}

// explain adds what the agent left on its standard error, and the reason when time was up.
func (p *agentProcess) explain(ctx context.Context, what string, err error) error {
	if err == nil || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, io.EOF) {
		err = errors.New("agent has ended")
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	const shown = 2048
	if said := crashText(p.crash, shown); said != "" {
		return &agentError{fmt.Errorf("%s: %w; it said %q", what, err, said)}
	}
	return &agentError{fmt.Errorf("%s: %w", what, err)}
}

// crashText is the beginning of what an agent wrote to standard error.
func crashText(f *os.File, limit int) string {
	buf := make([]byte, limit)
	n, _ := f.ReadAt(buf, 0) // nothing to read is nothing to say
	for n > 0 && buf[n-1] == 0 {
		n--
	}
	return string(buf[:n])
}

// abandon ends an agent that never got its sandbox.
func (p *agentProcess) abandon() {
	_ = p.boot.Close()
	_ = p.crash.Close()
	if p.spawning != nil {
		_ = p.arrived() // if it does not, there is nothing to end
	}
	if p.pidfd == nil {
		return
	}
	_ = signalProcess(p.pidfd, unix.SIGKILL) // it may have ended
	waitProcess(p.pidfd)
	waitReaped(context.Background(), p.pidfd)
	_ = p.pidfd.Close()
}
