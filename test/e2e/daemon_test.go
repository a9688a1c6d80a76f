package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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

// daemon is a sandboxd of the test's own, in directories of its own.
type daemon struct {
	name, runDir, stateDir, logPath, address string
	// Further arguments.
	args []string

	cmd *exec.Cmd
	// Closed when the process has been waited for; waitErr is set before.
	done    chan struct{}
	waitErr error

	conn *grpc.ClientConn
}

// newDaemon makes directories for a daemon; nothing runs yet. The run directory's path is short, since the path of a
// socket has at most 107 bytes; the state lies on the file system of the tree, since a tmpfs can't hold an image.
func newDaemon(name string, args ...string) (*daemon, error) {
	runDir, err := os.MkdirTemp("/run", "sandboxd-e2e-")
	if err != nil {
		return nil, err
	}
	parent, err := filepath.Abs(cache)
	if err != nil {
		return nil, err
	}
	stateDir, err := os.MkdirTemp(parent, "e2e-")
	if err != nil {
		return nil, errors.Join(err, os.Remove(runDir))
	}
	logs := filepath.Join(parent, "log")
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return nil, err
	}
	d := &daemon{
		name:     name,
		runDir:   runDir,
		stateDir: stateDir,
		logPath:  filepath.Join(logs, "e2e-"+name+".log"),
		address:  "unix://" + runDir + "/sandboxd.sock",
		args:     args,
	}
	if err := os.RemoveAll(d.logPath); err != nil {
		return nil, err
	}
	made.add(d)
	d.conn, err = grpc.NewClient(d.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	return d, err
}

// start runs the daemon and waits until it says that it serves.
func (d *daemon) start() error {
	log, err := os.OpenFile(d.logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	args := append([]string{
		"--listen", d.address, "--state-dir", d.stateDir, "--run-dir", d.runDir,
		"--vm-accel", "auto", "--vm-kernel", guestKernel, "--cgroup-parent", d.cgroupParent(), "--id-dir", idDir,
	}, d.args...)
	d.cmd = exec.Command(sandboxd, args...)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	if err := startChild(d.cmd); err != nil {
		return fmt.Errorf("cannot start sandboxd: %w", err)
	}
	d.done = make(chan struct{})
	go func() {
		d.waitErr = waitChild(d.cmd)
		close(d.done)
	}()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := d.waitServing(ctx); err != nil {
		return errors.Join(fmt.Errorf("sandboxd does not serve: %w\n%s", err, d.logTail()), d.kill())
	}
	return nil
}

func (d *daemon) waitServing(ctx context.Context) error {
	health := grpc_health_v1.NewHealthClient(d.conn)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		// A connection that failed backs off for seconds unless told to try again.
		d.conn.ResetConnectBackoff()
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

// cgroupParent is the group, in every hierarchy, below which each workload has one.
func (d *daemon) cgroupParent() string { return filepath.Base(d.runDir) }

func (d *daemon) running() bool {
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

// terminate ends the daemon politely; its workloads go on.
func (d *daemon) terminate() error {
	if !d.running() {
		return nil
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-d.done:
		if d.waitErr != nil {
			return fmt.Errorf("sandboxd after SIGTERM: %w\n%s", d.waitErr, d.logTail())
		}
		return nil
	case <-time.After(stopTimeout):
		return errors.Join(fmt.Errorf("sandboxd did not end within %s of SIGTERM\n%s", stopTimeout, d.logTail()), d.kill())
	}
}

// kill ends the daemon as a crash would.
func (d *daemon) kill() error {
	if !d.running() {
		return nil
	}
	if err := d.cmd.Process.Kill(); err != nil {
		return err
	}
	<-d.done
	return nil
}

// remove ends the daemon and everything it left, and says if that was more than it may leave.
func (d *daemon) remove() error { return d.removeWithin(settleTimeout) }

func (d *daemon) removeWithin(settle time.Duration) error {
	var errs []error
	if d.running() {
		for _, id := range strings.Fields(d.command("ps", "-a", "-q").run().stdout) {
			d.command("rm", "-f", id).run()
		}
		errs = append(errs, d.terminate())
	}
	if left, err := leftAfterDaemon(d, settle); err != nil || len(left) > 0 {
		errs = append(errs, err, fmt.Errorf("after daemon %s ended, there is left:\n\t%s", d.name, strings.Join(left, "\n\t")))
	}
	return errors.Join(append(errs, d.discard())...)
}

// discard removes a daemon's directories and its group, which must be empty in every hierarchy; it must not run.
func (d *daemon) discard() error {
	groups, err := cgroupParents(d)
	errs := []error{err, d.conn.Close(), os.RemoveAll(d.runDir), os.RemoveAll(d.stateDir)}
	for _, g := range groups {
		errs = append(errs, os.Remove(g))
	}
	return errors.Join(errs...)
}

func (d *daemon) importImage(name, file string) error {
	path := filepath.Join(cache, "images", file)
	if _, err := os.Stat(path); err != nil {
		return fmt.Errorf("%w: run make test-assets", err)
	}
	if r := d.command("image", "import", "--name", name, path).run(); r.code != 0 {
		return fmt.Errorf("cannot import %s: exit code %d\n%s%s", path, r.code, r.stderr, d.logTail())
	}
	return nil
}

// A failing test shows so much of the daemon's log.
const logTailBytes = 4 << 10

func (d *daemon) logTail() string {
	b, err := os.ReadFile(d.logPath)
	if err != nil {
		return err.Error()
	}
	if cut := len(b) - logTailBytes; cut > 0 {
		b = b[cut:]
	}
	return "log of daemon " + d.name + " (" + d.logPath + "):\n" + string(b)
}

// ownDaemon starts a daemon for one test, with the busybox image, and ends it afterwards.
func ownDaemon(t *testing.T, args ...string) *daemon {
	t.Helper()
	d, err := newDaemon(strings.NewReplacer("/", "-", " ", "-").Replace(t.Name()), args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.remove(); err != nil {
			t.Error(err)
		}
	})
	d.mustStart(t)
	if err := d.importImage(busybox, "busybox.tar"); err != nil {
		t.Fatal(err)
	}
	return d
}

func (d *daemon) mustStart(t *testing.T) {
	t.Helper()
	if err := d.start(); err != nil {
		t.Fatal(err)
	}
}

func (d *daemon) workloads() sandboxdv1.WorkloadServiceClient {
	return sandboxdv1.NewWorkloadServiceClient(d.conn)
}

// children are the processes that the test itself started and waits for. Others that turn up as its children are
// orphans of a daemon, adopted; see adoptOrphans.
var children = struct {
	sync.Mutex
	pids map[int]bool
}{pids: map[int]bool{}}

func startChild(cmd *exec.Cmd) error {
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

func waitChild(cmd *exec.Cmd) error {
	err := cmd.Wait()
	children.Lock()
	defer children.Unlock()
	delete(children.pids, cmd.Process.Pid)
	return err
}
