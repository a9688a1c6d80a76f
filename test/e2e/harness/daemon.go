package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

const (
	// A daemon is up when it has looked at its host, a VM's start included, and recovered its workloads.
	startTimeout = time.Minute
	// On SIGTERM it only closes connections: it waits for no workload.
	stopTimeout = 30 * time.Second
)

// idDir is where the daemons of the test share out user ids. It is not the host's, so that what is in it is the test's.
var idDir string

// Daemon is a sandboxd of the test's own, in directories of its own.
type Daemon struct {
	Name, RunDir, StateDir, logPath, Address string
	// The program, bin/sandboxd unless a test sets another before Start, and what its environment has besides this process's.
	Program string
	Env     []string
	// Further arguments.
	Args []string
	// Its own network namespace; nil for the machine's.
	network *networkOf

	Cmd *exec.Cmd
	// Closed when the process has been waited for; waitErr is set before.
	done    chan struct{}
	waitErr error

	Conn *grpc.ClientConn
}

// argsVariable names an environment variable with more arguments for every daemon: how the suite is run with what is off by
// default.
const argsVariable = "SANDBOXD_E2E_ARGS"

// NewDaemon makes directories for a daemon; nothing runs yet. The run directory's path is short, since the path of a
// socket has at most 107 bytes; the state lies on the file system of the tree, since a tmpfs can't hold an image.
func NewDaemon(name string, args ...string) (*Daemon, error) {
	runDir, err := os.MkdirTemp("/run", "sandboxd-e2e-")
	if err != nil {
		return nil, err
	}
	stateDir, err := os.MkdirTemp(Cache, "e2e-")
	if err != nil {
		return nil, errors.Join(err, os.Remove(runDir))
	}
	logs := filepath.Join(Cache, "log")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	d := &Daemon{
		Program:  sandboxd,
		Name:     name,
		RunDir:   runDir,
		StateDir: stateDir,
		logPath:  filepath.Join(logs, "e2e-"+name+".log"),
		Address:  "unix://" + runDir + "/sandboxd.sock",
		Args:     slices.Concat(args, strings.Fields(os.Getenv(argsVariable))),
	}
	if err := os.RemoveAll(d.logPath); err != nil {
		return nil, err
	}
	made.add(d)
	d.Conn, err = grpc.NewClient(d.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	return d, err
}

// Start runs the daemon and waits until it says that it serves.
func (d *Daemon) Start() error {
	log, err := os.OpenFile(d.logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := append([]string{
		"--listen", d.Address, "--state-dir", d.StateDir, "--run-dir", d.RunDir,
		"--vm-accel", "auto", "--vm-kernel", guestKernel, "--cgroup-parent", d.CgroupParent(), "--id-dir", idDir,
	}, d.Args...)
	d.Cmd = d.Within(append([]string{d.Program}, args...)...)
	d.Cmd.Env = append(os.Environ(), d.Env...)
	d.Cmd.Stdout, d.Cmd.Stderr = log, log
	if err := StartChild(d.Cmd); err != nil {
		return fmt.Errorf("cannot start sandboxd: %w", err)
	}
	d.done = make(chan struct{})
	go func() {
		d.waitErr = WaitChild(d.Cmd)
		close(d.done)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := d.waitServing(ctx); err != nil {
		return errors.Join(fmt.Errorf("sandboxd does not serve: %w\n%s", err, d.LogTail()), d.Kill())
	}
	return nil
}

func (d *Daemon) waitServing(ctx context.Context) error {
	health := grpc_health_v1.NewHealthClient(d.Conn)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		// A connection that failed backs off for seconds unless told to try again.
		d.Conn.ResetConnectBackoff()
		r, err := health.Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(false))
		if err == nil && r.Status == grpc_health_v1.HealthCheckResponse_SERVING {
			return nil
		}
		select {
		case <-tick.C:
		case <-d.done:
			return fmt.Errorf("it ended: %v", d.waitErr)
		case <-ctx.Done():
			return fmt.Errorf("no answer in time; last: %v, %w", r, err)
		}
	}
}

// CgroupParent is the group, in every hierarchy, below which each workload has one.
func (d *Daemon) CgroupParent() string { return filepath.Base(d.RunDir) }

// Running reports whether the daemon's process is there.
func (d *Daemon) Running() bool {
	if d.done == nil {
		return false
	}
	select {
	case <-d.done:
		return false
	default:
		return true
	}
}

// Terminate ends the daemon politely; its workloads go on.
func (d *Daemon) Terminate() error {
	if !d.Running() {
		return nil
	}
	if err := d.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-d.done:
		if d.waitErr != nil {
			return fmt.Errorf("sandboxd after SIGTERM: %w\n%s", d.waitErr, d.LogTail())
		}
		return nil
	case <-time.After(stopTimeout):
		return errors.Join(fmt.Errorf("sandboxd did not end within %s of SIGTERM\n%s", stopTimeout, d.LogTail()), d.Kill())
	}
}

// Kill ends the daemon as a crash would.
func (d *Daemon) Kill() error {
	if !d.Running() {
		return nil
	}
	if err := d.Cmd.Process.Kill(); err != nil {
		return err
	}
	<-d.done
	return nil
}

// Remove ends the daemon and everything it left, and says if that was more than it may leave.
func (d *Daemon) Remove() error { return d.RemoveWithin(SettleTimeout) }

func (d *Daemon) RemoveWithin(settle time.Duration) error {
	var errs []error
	if d.Running() {
		for _, id := range strings.Fields(d.Command("ps", "-a", "-q").Run().Stdout) {
			d.Command("rm", "-f", id).Run()
		}
		errs = append(errs, d.Terminate())
	}
	if left, err := leftAfterDaemon(d, settle); err != nil || len(left) > 0 {
		errs = append(errs, err, fmt.Errorf("after daemon %s ended, there is left:\n\t%s", d.Name, strings.Join(left, "\n\t")))
	}
	return errors.Join(append(errs, d.Discard())...)
}

// Discard removes a daemon's directories and its group, which must be empty in every hierarchy; it must not run.
func (d *Daemon) Discard() error {
	groups, err := cgroupParents(d)
	errs := []error{err, d.Conn.Close(), os.RemoveAll(d.RunDir), os.RemoveAll(d.StateDir)}
	for _, g := range groups {
		errs = append(errs, os.Remove(g))
	}
	return errors.Join(errs...)
}

// Import gives the daemon one of the images that make fetches.
func (d *Daemon) Import(name string) error {
	path := filepath.Join(Cache, "images", archives[name])
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("%w: run make test-assets", err)
	}
	if r := d.Command("image", "import", "--name", name, path).Run(); r.Code != 0 {
		return fmt.Errorf("cannot import %s: exit code %d\n%s%s", path, r.Code, r.Stderr, d.LogTail())
	}
	return nil
}

// A failing test shows so much of the daemon's log.
const logTailBytes = 4 << 10

func (d *Daemon) LogTail() string {
	b, err := os.ReadFile(d.logPath)
	if err != nil {
		return err.Error()
	}
	if cut := len(b) - logTailBytes; cut > 0 {
		b = b[cut:]
	}
	return "log of daemon " + d.Name + " (" + d.logPath + "):\n" + string(b)
}

// OwnDaemon starts a daemon for one test, with the busybox image, and ends it afterwards.
func OwnDaemon(t *testing.T, args ...string) *Daemon {
	t.Helper()
	d := MakeDaemon(t, args...)
	d.MustStart(t)
	if err := d.Import(Busybox); err != nil {
		t.Fatal(err)
	}
	return d
}

// MakeDaemon makes a daemon for one test, to be started, and ends it afterwards.
func MakeDaemon(t *testing.T, args ...string) *Daemon {
	t.Helper()
	d, err := NewDaemon(strings.NewReplacer("/", "-", " ", "-").Replace(t.Name()), args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *Daemon) MustStart(t *testing.T) {
	t.Helper()
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
}

func (d *Daemon) Workloads() sandboxdv1.WorkloadServiceClient {
	return sandboxdv1.NewWorkloadServiceClient(d.Conn)
}

// children are the processes that the test itself started and waits for. Others that turn up as its children are
// orphans of a daemon, adopted; see adoptOrphans.
var children = struct {
	sync.Mutex
	pids map[int]bool
}{pids: map[int]bool{}}

// StartChild starts a process that the test itself waits for, with WaitChild.
func StartChild(cmd *exec.Cmd) error {
	// Held over Start, so that the reaper of orphans never sees a child it does not know.
	children.Lock()
	defer children.Unlock()
	if err := cmd.Start(); err != nil {
		return err
	}
	children.pids[cmd.Process.Pid] = true
	return nil
}

// isChild reports whether a living process was started by the test itself.
func isChild(pid int) bool {
	children.Lock()
	defer children.Unlock()
	return children.pids[pid]
}

// Output is cmd.Output for a child of the test's: without it the reaper of orphans may be quicker.
func Output(cmd *exec.Cmd) ([]byte, error) {
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := StartChild(cmd); err != nil {
		return nil, err
	}
	err := WaitChild(cmd)
	return out.Bytes(), err
}

// WaitChild waits for a process of StartChild.
func WaitChild(cmd *exec.Cmd) error {
	err := cmd.Wait()
	children.Lock()
	defer children.Unlock()
	delete(children.pids, cmd.Process.Pid)
	return err
}
