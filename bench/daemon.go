package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// daemon is a sandboxd of the benchmark's own, with directories and cgroups of its own.
type daemon struct {
	cmd       *exec.Cmd
	log       *os.File
	conn      *grpc.ClientConn
	workloads sandboxdv1.WorkloadServiceClient
	images    sandboxdv1.ImageServiceClient
	system    sandboxdv1.SystemServiceClient
	stateDir  string
	// How sandboxctl is called for it.
	ctl []string
}

const (
	benchImage = "bench/busybox"
	// traceFile is where the daemon writes the phases, in the run's directory.
	traceFile = "trace"
	// daemonWait bounds the daemon's start, accelerator probe included, and its end.
	daemonWait = time.Minute
)

func startDaemon(ctx context.Context, o options, dir string) (*daemon, error) {
	ids := filepath.Join(dir, "ids") // all daemons of a host share them
	dir, kind := o.place(dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "sandboxd.sock")
	d := &daemon{
		stateDir: filepath.Join(dir, "state"),
		ctl:      []string{filepath.Join(o.bin, "sandboxctl"), "--address", "unix://" + socket},
	}
	var err error
	if d.log, err = os.Create(filepath.Join(dir, "sandboxd.log")); err != nil {
		return nil, err
	}
	kernels, err := filepath.Glob(filepath.Join(o.cache, "kernel/boot/vmlinuz-*"))
	if err != nil || len(kernels) == 0 {
		return nil, errors.New("no guest kernel in the cache: run `make test-assets`")
	}
	d.cmd = exec.Command(filepath.Join(o.bin, "sandboxd"),
		"--listen", "unix://"+socket, "--state-dir", d.stateDir, "--run-dir", filepath.Join(o.runDir, kind),
		"--cgroup-parent", fmt.Sprintf("sandboxd-bench-%d-%s", os.Getpid(), kind), "--id-dir", ids,
		"--vm-accel", "auto", "--vm-kernel", kernels[len(kernels)-1])
	if o.pool > 0 {
		d.cmd.Args = append(d.cmd.Args, "--agent-pool", strconv.Itoa(o.pool))
	}
	if o.templates {
		d.cmd.Args = append(d.cmd.Args, "--vm-templates", "on")
	}
	if o.trace {
		d.cmd.Args = append(d.cmd.Args, "--trace", filepath.Join(dir, traceFile))
	}
	d.cmd.Stdout, d.cmd.Stderr = d.log, d.log
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot start sandboxd (run `make build`): %w", err)
	}
	if d.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		d.stop()
		return nil, err
	}
	d.workloads = sandboxdv1.NewWorkloadServiceClient(d.conn)
	d.images = sandboxdv1.NewImageServiceClient(d.conn)
	d.system = sandboxdv1.NewSystemServiceClient(d.conn)
	wait, cancel := context.WithTimeout(ctx, daemonWait)
	defer cancel()
	if _, err := d.system.Info(wait, &sandboxdv1.InfoRequest{}, grpc.WaitForReady(true)); err != nil {
		d.stop()
		return nil, fmt.Errorf("sandboxd does not answer: %w", err)
	}
	if err := d.importImage(ctx, filepath.Join(o.cache, "images/busybox.tar")); err != nil {
		d.stop()
		return nil, err
	}
	return d, nil
}

func (d *daemon) stop() {
	if d.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), daemonWait)
		defer cancel()
		if l, err := d.workloads.ListWorkloads(ctx, &sandboxdv1.ListWorkloadsRequest{PageSize: 1000}); err == nil {
			for _, w := range l.GetWorkloads() {
				_ = d.delete(ctx, w.GetId())
			}
		}
		d.conn.Close()
	}
	_ = d.cmd.Process.Signal(os.Interrupt)
	done := make(chan struct{})
	go func() { defer close(done); _ = d.cmd.Wait() }()
	select {
	case <-done:
	case <-time.After(daemonWait):
		_ = d.cmd.Process.Kill()
		<-done
	}
	d.log.Close()
}

func (d *daemon) importImage(ctx context.Context, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("no test image (run `make test-assets`): %w", err)
	}
	defer f.Close()
	s, err := d.images.ImportImage(ctx)
	if err != nil {
		return err
	}
	start := &sandboxdv1.ImportImageRequest{Request: &sandboxdv1.ImportImageRequest_Start{Start: &sandboxdv1.ImportImageStart{Name: benchImage}}}
	if err := s.Send(start); err != nil {
		return err
	}
	for b := make([]byte, 256<<10); ; {
		n, err := f.Read(b)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := s.Send(&sandboxdv1.ImportImageRequest{Request: &sandboxdv1.ImportImageRequest_Data{Data: b[:n]}}); err != nil {
			return err
		}
	}
	_, err = s.CloseAndRecv()
	return err
}

// commands are what every subject is asked to run.
var commands = map[string][]string{
	"true":  {"/bin/true"},
	"exit7": {"/bin/sh", "-c", "exit 7"},
	"sleep": {"/bin/sleep", "3600"},
}

func (d *daemon) create(ctx context.Context, isolation sandboxdv1.Isolation, command string) (string, error) {
	w, err := d.workloads.CreateWorkload(ctx, &sandboxdv1.CreateWorkloadRequest{Spec: request(isolation, command)})
	return w.GetWorkload().GetId(), err
}

func (d *daemon) start(ctx context.Context, isolation sandboxdv1.Isolation, command string) (string, error) {
	id, err := d.create(ctx, isolation, command)
	if err != nil {
		return "", err
	}
	_, err = d.workloads.StartWorkload(ctx, &sandboxdv1.StartWorkloadRequest{Id: id})
	return id, err
}

func (d *daemon) delete(ctx context.Context, id string) error {
	_, err := d.workloads.DeleteWorkload(ctx, &sandboxdv1.DeleteWorkloadRequest{Id: id, Force: true})
	return err
}

// request asks for what each subject runs.
func request(isolation sandboxdv1.Isolation, command string) *sandboxdv1.WorkloadSpec {
	return &sandboxdv1.WorkloadSpec{
		Image: benchImage, Isolation: isolation,
		Process:   &sandboxdv1.ProcessSpec{Command: commands[command]},
		Resources: &sandboxdv1.Resources{MemoryBytes: 256 << 20},
	}
}

// run is a whole life through the API in one call, which answers when the workload is gone.
func (d *daemon) run(ctx context.Context, isolation sandboxdv1.Isolation, command string) (int, error) {
	w, err := d.runWorkload(ctx, isolation, command)
	if err != nil {
		return 0, err
	}
	return exitOf(w)
}

func (d *daemon) runWorkload(ctx context.Context, isolation sandboxdv1.Isolation, command string) (*sandboxdv1.Workload, error) {
	s, err := d.workloads.RunWorkload(ctx, &sandboxdv1.RunWorkloadRequest{Spec: request(isolation, command), RemoveWhenEnded: true})
	if err != nil {
		return nil, err
	}
	r, err := s.Recv()
	if err != nil {
		return nil, err
	}
	if r.GetEvent() != sandboxdv1.RunEvent_RUN_EVENT_REMOVED {
		return nil, fmt.Errorf("the workload is not gone: %v", r.GetEvent())
	}
	return r.GetWorkload(), nil
}

func exitOf(w *sandboxdv1.Workload) (int, error) {
	if w.GetStatus().ExitCode == nil {
		return 0, fmt.Errorf("no exit code: %s", w.GetStatus().GetMessage())
	}
	return int(w.GetStatus().GetExitCode()), nil
}

// runInFour is a whole life through the API: create, start, wait, delete.
func (d *daemon) runInFour(ctx context.Context, isolation sandboxdv1.Isolation, command string) (int, error) {
	id, err := d.start(ctx, isolation, command)
	if err != nil {
		return 0, err
	}
	w, err := d.workloads.WaitWorkload(ctx, &sandboxdv1.WaitWorkloadRequest{Id: id})
	if err != nil {
		return 0, err
	}
	code, err := exitOf(w.GetWorkload())
	if err != nil {
		return 0, err
	}
	return code, d.delete(ctx, id)
}

func (d *daemon) exec(ctx context.Context, id, command string) (int, error) {
	s, err := d.workloads.Exec(ctx)
	if err != nil {
		return 0, err
	}
	start := &sandboxdv1.ExecStart{Id: id, Command: commands[command]}
	if err := s.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: start}}); err != nil {
		return 0, err
	}
	for {
		r, err := s.Recv()
		if err != nil {
			return 0, err
		}
		if x := r.GetExit(); x != nil {
			return int(x.GetCode()), nil
		}
	}
}
