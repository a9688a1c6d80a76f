package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/rawfork"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// Runs in the spawner: all of this file.

// Descriptors of an agent, from its first instruction on.
const (
	agentCrashFD = 2
	agentBootFD  = 3 // spec.ContainerBoot
	// programFD is closed by execve; so are those above it.
	programFD = 4
)

// wordToGo is what lets a forked child go on.
const wordToGo = 'G'

// forkedAgent is a child that is, or will be, an agent.
type forkedAgent struct {
	child  *rawfork.Child
	calls  *rawfork.Calls
	status *os.File // closed at the other end when the agent's program runs, or the child has ended
}

// forkAgent forks a child in namespaces and with ids of its own, which waits for the word to go.
func forkAgent(msg []byte, files []*os.File) (*forkedAgent, error) {
	var req spawnRequest
	if err := json.Unmarshal(msg, &req); err != nil {
		return nil, fmt.Errorf("cannot decode a request: %w", err)
	}
	want := fdUnified
	if req.Unified {
		want++
	}
	if len(files) != want {
		return nil, fmt.Errorf("%d descriptors came with a request, not %d", len(files), want)
	}
	var unified *os.File
	if req.Unified {
		unified = files[fdUnified]
	}
	status, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	a := &forkedAgent{calls: &rawfork.Calls{}, status: status}
	err = a.fork(req, files, theirs, unified)
	_ = theirs.Close() // the child has its own
	if err != nil {
		_ = status.Close() // nothing will come
		return nil, err
	}
	return a, nil
}

func (a *forkedAgent) fork(req spawnRequest, files []*os.File, status, unified *os.File) error {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer null.Close() //nolint:errcheck // nothing is written to it
	// Out of the way of those that the child makes of them.
	var moved []int
	defer func() {
		for _, fd := range moved {
			_ = unix.Close(fd) // the child has its own
		}
	}()
	for _, f := range []*os.File{null, files[fdCrash], files[fdBoot], files[fdProgram], status} {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, firstMoved)
		if err != nil {
			return fmt.Errorf("cannot move a descriptor: %w", err)
		}
		moved = append(moved, fd)
	}
	flags, unshared := uint64(namespaces), uintptr(unix.CLONE_NEWCGROUP)
	weakenNamespaces(&flags, &unshared)
	if err := planAgent(a.calls, agentDescriptors{null: moved[0], crash: moved[1], boot: moved[2], program: moved[3], status: moved[4]}, req.Doors, unshared); err != nil {
		return err
	}
	if a.child, err = a.calls.Spawn(flags, unified, uintptr(moved[4])); err != nil {
		return err
	}
	if flags&unix.CLONE_NEWUSER != 0 {
		err = giveIDs(a.child.PID, req.Base)
	}
	if err != nil { // it waits for a word that will not come
		_ = unix.Kill(a.child.PID, unix.SIGKILL) // our child, not reaped: the number is its own
		_, _ = unix.Wait4(a.child.PID, nil, 0, nil)
		_ = a.child.PIDFD.Close()
	}
	return err
}

// started waits until the child has executed the agent, and says what kept it from that.
func (a *forkedAgent) started() error {
	defer a.status.Close() //nolint:errcheck // only read
	report, err := io.ReadAll(io.LimitReader(a.status, rawfork.ReportBytes))
	a.child.Hold()
	if err != nil || len(report) == 0 {
		return err // if it ended without a word, nobody knows why
	}
	call, errno, err := a.calls.Failed(report)
	if err != nil {
		return err
	}
	if call.Compares() {
		return errors.New(call.What)
	}
	return fmt.Errorf("%s: %w", call.What, errno)
}

// agentTimerSlack is by how much, in nanoseconds, the kernel may let an agent's timers run late, and the spawner's: see
// osthread.SetTimerSlack. It costs a quarter of an agent's start where processors are scarce, and nothing of an agent's needs to be
// more exact. Its workload has the default again: (*confined).signals in pkg/agent/guest.
const agentTimerSlack = 1_000_000

// agentProcessors has an agent run Go code on one thread at a time. For a second it would set up memory at its start, and wake a
// thread whenever there are two things to do, of which none is long: it carried output faster without.
const agentProcessors = "GOMAXPROCS=1"

// agentDescriptors are numbers in the spawner.
type agentDescriptors struct{ null, crash, boot, program, status int }

// planAgent is all that happens between the clone and the agent's first instruction. Every call is fatal.
func planAgent(c *rawfork.Calls, fds agentDescriptors, doors int, unshared uintptr) error {
	// Descriptors: what the spawner has open besides, other sandboxes' sockets among it, is closed before anything is waited for.
	for to, from := range []int{fds.null, fds.null, agentCrashFD: fds.crash, agentBootFD: fds.boot, programFD: fds.program} {
		flags := 0
		if to == programFD {
			flags = unix.O_CLOEXEC
		}
		c.Must(fmt.Sprintf("cannot take descriptor %d", to), unix.SYS_DUP3, uintptr(from), uintptr(to), uintptr(flags))
	}
	c.Must("cannot close descriptors", unix.SYS_CLOSE_RANGE, programFD+1, uintptr(fds.status-1), 0)
	c.Must("cannot close descriptors", unix.SYS_CLOSE_RANGE, uintptr(fds.status+1), uintptr(^uint32(0)), 0)
	c.Must("cannot start a session", unix.SYS_SETSID) // signals from the daemon's terminal are not the sandbox's

	// The word to go, with the cgroups: they come as the lowest free descriptors, in their order.
	word := new(uint64)
	message := &unix.Msghdr{Iov: &unix.Iovec{Base: (*byte)(unsafe.Pointer(word)), Len: 1}, Iovlen: 1}
	if doors > 0 {
		control := make([]byte, unix.CmsgSpace(4*doors))
		message.Control, message.Controllen = &control[0], uint64(len(control))
	}
	c.Must("cannot read the word to go", unix.SYS_RECVMSG, agentBootFD, rawfork.Address(c, message), unix.MSG_CMSG_CLOEXEC)
	c.Equal("the daemon has ended", word, ^uint64(0), wordToGo)
	zero := []byte("0") // the process that writes it
	for i := range doors {
		c.Must("cannot enter a cgroup", unix.SYS_WRITE, uintptr(programFD+1+i), rawfork.Address(c, &zero[0]), 1)
	}
	// Only now: the cgroups it is in are the namespace's root.
	if unshared != 0 {
		c.Must("cannot make a cgroup namespace", unix.SYS_UNSHARE, unshared)
	}
	// Root inside, in no group of the spawner's. Without this it stays the host's root, unmapped, and loses its capabilities at
	// execve.
	c.Must("cannot leave the groups", unix.SYS_SETGROUPS, 0, 0)
	c.Must("cannot become root's group", unix.SYS_SETRESGID, 0, 0, 0)
	c.Must("cannot become root", unix.SYS_SETRESUID, 0, 0, 0)
	slash, err := c.Text("/")
	if err != nil {
		return err
	}
	c.Must("cannot enter /", unix.SYS_CHDIR, slash)
	c.ResetSignals()
	c.Must("cannot set the timer slack", unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, agentTimerSlack, 0, 0, 0)

	var argv []*byte
	for _, arg := range []string{"sandbox-agent", name} {
		p, err := unix.BytePtrFromString(arg)
		if err != nil {
			return err
		}
		argv = append(argv, p)
	}
	argv = append(argv, nil)
	processors, err := unix.BytePtrFromString(agentProcessors)
	if err != nil {
		return err
	}
	env := []*byte{processors, nil}
	empty, err := c.Text("")
	if err != nil {
		return err
	}
	c.Must("cannot execute the agent", unix.SYS_EXECVEAT, programFD, empty, rawfork.Address(c, &argv[0]), rawfork.Address(c, &env[0]), unix.AT_EMPTY_PATH)
	return nil
}

// giveIDs maps a child's ids 0 to 65535 to those of its range. Its groups it may then set: else it would keep the spawner's.
func giveIDs(pid int, base uint32) error {
	proc := "/proc/" + strconv.Itoa(pid) // our child, not reaped: the number is its own
	for _, file := range []string{"/uid_map", "/gid_map"} {
		f, err := os.OpenFile(proc+file, os.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot give a sandbox its ids: %w", err)
		}
		_, err = fmt.Fprintf(f, "0 %d %d\n", base, idrange.Size)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("cannot give a sandbox its ids: %w", err)
		}
	}
	return nil
}

// weakenNamespaces is for test builds: see package weaken.
func weakenNamespaces(cloned *uint64, unshared *uintptr) {
	for what, flag := range map[string]uint64{
		"user namespace": unix.CLONE_NEWUSER, "pid namespace": unix.CLONE_NEWPID, "mount namespace": unix.CLONE_NEWNS, "network namespace": unix.CLONE_NEWNET,
		"ipc namespace": unix.CLONE_NEWIPC, "uts namespace": unix.CLONE_NEWUTS, "cgroup namespace": unix.CLONE_NEWCGROUP,
	} {
		if weaken.Without(what) {
			*cloned &^= flag
			*unshared &^= uintptr(flag)
		}
	}
}
