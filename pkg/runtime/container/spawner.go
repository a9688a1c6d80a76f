package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/osthread"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// Forking from the daemon itself would need the daemon's threads to stand still in the wrong moments, and its memory to be shared
// with, or copied for, what becomes a sandbox. So the daemon has a spawner: this same program, started under another name, that
// does nothing but fork agents. It lives as long as its end of a socket: when the daemon dies, so does it, and the agents go on
// as children of init.
//
//	daemon ── request: ids, how many cgroups; program, standard error, boot and reply sockets, cgroup2 directory ──▶ spawner
//	       ◀── on the reply socket: pid; pidfd ── forks a child into new namespaces, gives it its ids
//	       ── on the boot socket: go; cgroups ──▶ the child enters them, becomes root inside, executes the agent
//	                                              ◀── reaps it later ──
//
// So the daemon makes the cgroup while the kernel makes the namespaces, and a root while the agent's program starts. What the
// child does until then is agentCalls: none of it is Go's.

const (
	// spawnerName is the name (argv[0]) under which this program is a spawner.
	spawnerName = "sandboxd-spawner"
	// spawnerFD is its socket.
	spawnerFD = 3
	// spawnTimeout bounds one fork, on a host that is out of memory too.
	spawnTimeout = 20 * time.Second
	// maxSpawnMessage bounds requests and answers.
	maxSpawnMessage = 4096
	// firstMoved is above every descriptor that an agent is to have.
	firstMoved = 64
)

// init makes this program a spawner when it was started as one. It is in init, and not in a function for main to call,
// so that every program with this package in it (the daemon, tests, benchmarks) is one when asked, and never a second daemon.
func init() {
	if len(os.Args) > 0 && os.Args[0] == spawnerName {
		spawnerMain()
	}
}

type spawnRequest struct {
	Base uint32 `json:"base"`
	// How many cgroups come with the word to go.
	Doors int `json:"doors"`
	// Whether the cgroup2 directory is among the descriptors.
	Unified bool `json:"unified"`
}

type spawnReply struct {
	PID   int    `json:"pid"`
	Error string `json:"error,omitempty"`
}

// Descriptors that come with a request, in this order.
const (
	fdProgram = iota
	fdCrash
	fdBoot
	fdReply
	fdUnified // only if there is one
	spawnFDs
)

// spawner is the daemon's end.
type spawner struct {
	mu   sync.Mutex // guards starting and ending the process
	conn *net.UnixConn
	cmd  *exec.Cmd
}

// send hands a request to the spawner, which is started first if there is none, or if it has died.
func (s *spawner) send(msg []byte, rights []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for range 2 { // the second try is for one that died since the last request
		if s.conn == nil {
			if err := s.startLocked(); err != nil {
				return fmt.Errorf("cannot start the spawner: %w", err)
			}
		}
		if err = s.conn.SetWriteDeadline(time.Now().Add(spawnTimeout)); err == nil {
			_, _, err = s.conn.WriteMsgUnix(msg, rights, nil)
		}
		if err == nil {
			return nil
		}
		s.endLocked()
	}
	return fmt.Errorf("cannot reach the spawner: %w", err)
}

func (s *spawner) startLocked() error {
	ours, theirs, err := messageSockets()
	if err != nil {
		return err
	}
	defer theirs.Close() //nolint:errcheck // the child's
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{spawnerName}
	cmd.Env = append([]string{}, weaken.Environment()...) // not nil, which would be the daemon's
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr // where the daemon's own crash would go
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // signals from the daemon's terminal are not for it
	if err := cmd.Start(); err != nil {
		_ = ours.Close() // nothing was sent
		return err
	}
	s.conn, s.cmd = ours, cmd
	return nil
}

// endLocked closes the socket, which ends the process, and reaps it.
func (s *spawner) endLocked() {
	_ = s.conn.Close() // that is the message
	_ = s.cmd.Wait()   // however it ended
	s.conn, s.cmd = nil, nil
}

func (s *spawner) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.endLocked()
	}
}

// spawning is an agent being forked: answer says how it went, once.
type spawning struct{ reply *net.UnixConn }

// request asks for an agent and does not wait for it. A nil unified is none.
func (s *spawner) request(req spawnRequest, program, crash, boot, unified *os.File) (*spawning, error) {
	ours, theirs, err := messageSockets()
	if err != nil {
		return nil, err
	}
	fds := []int{int(program.Fd()), int(crash.Fd()), int(boot.Fd()), int(theirs.Fd())}
	if req.Unified = unified != nil; req.Unified {
		fds = append(fds, int(unified.Fd()))
	}
	msg, err := json.Marshal(req)
	if err == nil {
		err = s.send(msg, unix.UnixRights(fds...))
	}
	_ = theirs.Close() // the spawner has its own: when it dies, reading the answer ends
	if err != nil {
		_ = ours.Close() // nothing will come
		return nil, err
	}
	return &spawning{ours}, nil
}

// answer waits for the agent's pid and pidfd.
func (s *spawning) answer() (int, *os.File, error) {
	defer s.reply.Close() //nolint:errcheck // read to its one message
	if err := s.reply.SetReadDeadline(time.Now().Add(spawnTimeout)); err != nil {
		return 0, nil, err
	}
	answer, files, err := receive(s.reply)
	if err != nil {
		return 0, nil, fmt.Errorf("cannot hear from the spawner: %w", err)
	}
	var reply spawnReply
	if err := json.Unmarshal(answer, &reply); err != nil {
		err = fmt.Errorf("cannot decode the spawner's answer: %w", err)
		return 0, nil, errors.Join(err, closeAll(files))
	}
	if reply.Error != "" || len(files) != 1 {
		return 0, nil, errors.Join(errors.New(reply.Error), closeAll(files))
	}
	return reply.PID, files[0], nil
}

// messageSockets is a pair of message sockets: the daemon's end, and another process's.
func messageSockets() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a pair of sockets: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "socket"), os.NewFile(uintptr(fds[1]), "socket")
	conn, err := unixConn(ours)
	if err != nil {
		_ = theirs.Close() // nothing was sent
		return nil, nil, err
	}
	return conn, theirs, nil
}

// unixConn makes a connection of a socket, which it takes over.
func unixConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close() //nolint:errcheck // FileConn has its own copy
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("cannot use a socket: %w", err)
	}
	c, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close() // it is of no use
		return nil, errors.New("cannot use a socket: it is no Unix socket")
	}
	return c, nil
}

// receive reads one message with its descriptors. An empty one is the end.
func receive(c *net.UnixConn) ([]byte, []*os.File, error) {
	buf, oob := make([]byte, maxSpawnMessage), make([]byte, unix.CmsgSpace(spawnFDs*4))
	n, oobn, _, _, err := c.ReadMsgUnix(buf, oob) // sets CLOEXEC on what comes
	if err != nil {
		return nil, nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, nil, err
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, nil, errors.Join(err, closeAll(files))
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	if n == 0 {
		return nil, nil, errors.Join(errors.New("the other end is closed"), closeAll(files))
	}
	return buf[:n], files, nil
}

func closeAll(files []*os.File) (err error) {
	for _, f := range files {
		err = errors.Join(err, f.Close())
	}
	return err
}

// spawnerMain is the spawner's life. Runs in the spawner.
func spawnerMain() {
	conn, err := unixConn(os.NewFile(spawnerFD, "requests"))
	if err == nil {
		err = cgroup.DropOOMProtection(os.Getpid()) // and so of every agent, from its clone on
	}
	if err == nil {
		err = osthread.SetTimerSlack(agentTimerSlack)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, spawnerName+":", err)
		os.Exit(1)
	}
	for {
		msg, files, err := receive(conn)
		if err != nil {
			os.Exit(0) // the daemon is gone, and forks in flight are of no use to anyone
		}
		go serveSpawn(msg, files) // ends with its agent, or with this process
	}
}

// serveSpawn answers one request, and reaps the agent when it ends. Runs in the spawner.
func serveSpawn(msg []byte, files []*os.File) {
	a, err := forkAgent(msg, files)
	if len(files) >= fdReply+1 {
		answer(files[fdReply], a, err)
		_ = files[fdReply].Close() // it has its one message
	}
	if err == nil {
		// Who reads the crash log when the boot socket is closed at the agent's end finds there what kept the agent from being one:
		// until it is written this process has that end too.
		if failure := a.started(); failure != nil {
			_, _ = fmt.Fprintln(files[fdCrash], failure) // a file that is full has enough of it
		}
	}
	_ = closeAll(files) // the agent has its own
	if err != nil {
		return
	}
	waitProcess(a.child.PIDFD)
	_ = a.child.PIDFD.Close()
}

func answer(to *os.File, a *forkedAgent, err error) {
	reply, rights := spawnReply{}, []byte(nil)
	if err != nil {
		reply.Error = err.Error()
	} else {
		reply.PID, rights = a.child.PID, unix.UnixRights(int(a.child.PIDFD.Fd()))
	}
	msg, err := json.Marshal(reply)
	if err != nil {
		return // the daemon sees its socket closed
	}
	// A daemon that is gone does not listen; the agent sees its boot socket closed and ends.
	_ = unix.Sendmsg(int(to.Fd()), msg, rights, nil, unix.MSG_NOSIGNAL)
}
