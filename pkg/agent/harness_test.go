package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// These tests run the real agent as PID 1 of fresh namespaces, with busybox as its image. They need root and
// busybox-static; without either they fail, they don't skip.

const (
	// idBase and idCount are the host's ids that the test's sandboxes use.
	idBase  = 1_900_000_000
	idCount = 65536
	// patience bounds every wait of a test that nothing else bounds.
	patience = 60 * time.Second
	// theContainer is the only one.
	theContainer = "c"
)

var agentProgram string // built by TestMain

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "agent-test")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	agentProgram = filepath.Join(dir, "sandbox-agent")
	build := exec.Command("go", "build", "-o", agentProgram, "github.com/sandboxd/sandboxd/cmd/sandbox-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "cannot build the agent: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// sandbox is an agent in namespaces, and the daemon's end of it.
type sandbox struct {
	*agent.Client
	t      testing.TB
	socket string
	pid    int
	done   chan struct{}
	state  *os.ProcessState // set when done is closed
	base   *specs.Process
	proxy  *breaker
	rootfs string
}

type option func(*specs.Spec, string)

// newSandbox starts an agent and creates a container in it.
func newSandbox(t testing.TB, options ...option) *sandbox {
	t.Helper()
	s := bootSandbox(t)
	config := testConfig()
	for _, o := range options {
		o(config, s.rootfs)
	}
	chownTree(t, s.rootfs)
	if _, err := s.Configure(t.Context(), "testhost", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateContainer(t.Context(), agent.Container{ID: theContainer, Config: config, Filter: seccompDenyMkdir()}); err != nil {
		t.Fatal(err)
	}
	s.base = config.Process
	return s
}

// bootSandbox starts an agent that is told nothing but its boot message.
func bootSandbox(t testing.TB) *sandbox {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("run as root: the agent is PID 1 of namespaces with a range of users")
	}
	dir := t.TempDir()
	s := &sandbox{t: t, socket: filepath.Join(dir, "agent.sock"), done: make(chan struct{}), rootfs: filepath.Join(dir, "root")}
	makeRootfs(t, s.rootfs)
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listenerFile, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	listener.Close()
	defer listenerFile.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, s.rootfs, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tree)

	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "boot"), os.NewFile(uintptr(pair[1]), "boot")
	defer ours.Close()
	program := sealedProgram(t)
	defer program.Close()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", program.Fd()), "container")
	cmd.Args[0] = "sandbox-agent"
	cmd.Env = []string{"GOMAXPROCS=1"}
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{theirs}
	maps := []syscall.SysProcIDMap{{ContainerID: 0, HostID: idBase, Size: idCount}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC |
			unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP,
		UidMappings: maps, GidMappings: maps, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{Uid: 0, Gid: 0},
		Pdeathsig:  unix.SIGKILL,
	}
	// As the container runtime does: the agent's timer slack is not to become its workload's.
	runtime.LockOSThread()
	err = errors.Join(unix.Prctl(unix.PR_SET_TIMERSLACK, 1_000_000, 0, 0, 0), cmd.Start(), unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0))
	runtime.UnlockOSThread()
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	s.pid = cmd.Process.Pid
	go func() {
		_ = cmd.Wait()
		s.state = cmd.ProcessState
		close(s.done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-s.done
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("agent's log: %s", b)
		}
	})

	message, _ := json.Marshal(spec.ContainerBoot{Version: spec.ProtocolVersion})
	if err := unix.Sendmsg(pair[0], message, unix.UnixRights(tree, int(listenerFile.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 4096)
	n, err := unix.Read(pair[0], answer)
	if err != nil {
		t.Fatal(err)
	}
	var result spec.BootResult
	if err := json.Unmarshal(answer[:n], &result); err != nil || result.Error != "" {
		t.Fatalf("boot: %v %q", err, result.Error)
	}
	s.proxy = &breaker{}
	s.Client = agent.New(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", s.socket)
		if err != nil {
			return nil, err
		}
		return s.proxy.wrap(conn), nil
	}, s.done)
	t.Cleanup(s.Close)
	return s
}

func sealedProgram(t testing.TB) *os.File {
	t.Helper()
	content, err := os.ReadFile(agentProgram)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.MemfdCreate("sandbox-agent", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "sandbox-agent")
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := f.Chmod(0o111); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		t.Fatal(err)
	}
	return f
}

func makeRootfs(t testing.TB, root string) {
	t.Helper()
	for _, dir := range []string{"bin", "etc", "tmp", "home/user", "proc", "sys", "root"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o777|fs.ModeSticky); err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("install busybox-static: %v", err)
	}
	files := map[string]string{
		"bin/busybox": string(busybox),
		"bin/plain":   "not executable",
		"bin/garbage": "\x00\x01\x02 no program",
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
		"etc/group":   "root:x:0:\nuser:x:1000:\nvideo:x:44:user,other\naudio:x:29:user\nstaff:x:50:\n",
	}
	for name, content := range files {
		mode := fs.FileMode(0o755)
		if name == "bin/plain" || strings.HasPrefix(name, "etc/") {
			mode = 0o644
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	applets, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields(string(applets)) {
		_ = os.Symlink("busybox", filepath.Join(root, "bin", applet))
	}
}

// chownTree gives the tree to the sandbox's root.
func chownTree(t testing.TB, root string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, idBase, idBase)
	})
	if err != nil {
		t.Fatal(err)
	}
}

var defaultCaps = []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_SYS_CHROOT", "CAP_MKNOD"}

func testConfig() *specs.Spec {
	return &specs.Spec{
		Version: specs.Version,
		Process: &specs.Process{
			Args: []string{"sh"}, Env: []string{"PATH=/bin"}, Cwd: "/work", User: specs.User{Username: "0"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: defaultCaps, Permitted: defaultCaps, Effective: defaultCaps},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 512, Hard: 1024}},
		},
		Root:     &specs.Root{Path: "rootfs"},
		Hostname: "testhost",
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		},
		Linux: &specs.Linux{
			MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/interrupts", "/proc/acpi", "/sys/firmware", "/proc/scsi"},
			ReadonlyPaths: []string{"/proc/sys", "/proc/irq", "/proc/bus", "/proc/sysrq-trigger"},
		},
	}
}

// seccompDenyMkdir is the smallest filter that shows: mkdir and mkdirat answer ENOTTY, the rest is allowed.
func seccompDenyMkdir() []byte {
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 0}, // the system call's number
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_MKDIR, Jt: 1},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_MKDIRAT, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x00050000 | uint32(unix.ENOTTY)}, // SECCOMP_RET_ERRNO
		{Code: unix.BPF_RET | unix.BPF_K, K: 0x7fff0000},                       // SECCOMP_RET_ALLOW
	}
	var b []byte
	for _, i := range program {
		b = append(b, byte(i.Code), byte(i.Code>>8), i.Jt, i.Jf, byte(i.K), byte(i.K>>8), byte(i.K>>16), byte(i.K>>24))
	}
	return b
}

// process is what a test starts; the zero value of a field means the container's own.
type process struct {
	args  []string
	user  string
	cwd   string
	env   []string
	tty   *specs.Box
	stdin bool
	edit  func(*specs.Process)
}

var processIDs = make(chan string)

func init() {
	go func() {
		for n := 0; ; n++ {
			processIDs <- fmt.Sprintf("p%d", n)
		}
	}()
}

func (s *sandbox) start(p process) (*agent.Process, error) {
	config := *s.base
	config.Args = p.args
	config.Cwd = "/"
	if p.user != "" {
		config.User = specs.User{Username: p.user}
	}
	if p.cwd != "" {
		config.Cwd = p.cwd
	}
	config.Env = append(config.Env[:len(config.Env):len(config.Env)], p.env...)
	config.Terminal, config.ConsoleSize = p.tty != nil, p.tty
	if p.edit != nil {
		p.edit(&config)
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	return s.Client.Start(ctx, theContainer, <-processIDs, &config, p.stdin)
}

func (s *sandbox) mustStart(args ...string) *agent.Process {
	s.t.Helper()
	p, err := s.start(process{args: args})
	if err != nil {
		s.t.Fatal(err)
	}
	return p
}

// result is what came of a process that ran to its end.
type result struct {
	stdout, stderr string
	exit           spec.Exit
}

func (s *sandbox) finish(p *agent.Process) (result, error) {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	var r result
	var offset uint64
	for {
		chunks, eof, err := p.ReadOutput(ctx, offset)
		if err != nil {
			return r, err
		}
		for _, c := range chunks {
			offset += uint64(len(c.Data))
			if c.Stream == 1 {
				r.stdout += string(c.Data)
			} else {
				r.stderr += string(c.Data)
			}
		}
		if eof {
			break
		}
	}
	exit, err := p.Wait(ctx)
	r.exit = exit
	return r, errors.Join(err, p.Release(ctx))
}

func (s *sandbox) run(p process) result {
	s.t.Helper()
	started, err := s.start(p)
	if err != nil {
		s.t.Fatalf("%v: %v", p.args, err)
	}
	r, err := s.finish(started)
	if err != nil {
		s.t.Fatalf("%v: %v", p.args, err)
	}
	return r
}

// sh runs a shell script and answers with what it wrote to standard output; it must end with 0.
func (s *sandbox) sh(script string) string {
	s.t.Helper()
	r := s.run(process{args: []string{"sh", "-c", script}})
	if r.exit.Code != 0 || r.stderr != "" {
		s.t.Fatalf("%s: exit %+v, stderr %q", script, r.exit, r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}
