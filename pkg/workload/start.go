package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// startLimit bounds one start, from the first step to the running process: a VM under software emulation on a busy
	// host takes seconds, tens of them at once take a minute.
	startLimit = 3 * time.Minute
	// releaseLimit bounds taking walls down.
	releaseLimit = time.Minute
)

// Start answers when the process runs. An error with reason PROCESS_NOT_FOUND or PROCESS_NOT_EXECUTABLE leaves the
// workload EXITED with 127 or 126. A caller that goes away does not call the start off.
func (m *Manager) Start(ctx context.Context, ref string) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	if err := e.lock(ctx); err != nil {
		return Workload{}, err
	}
	result := make(chan error, 1)
	m.owned.Go(func() { result <- e.startHeld() })
	select {
	case err := <-result:
		return e.workload(), err
	case <-ctx.Done():
		return Workload{}, ctx.Err()
	}
}

// startHeld starts with e.op held, and gives it back.
func (e *entry) startHeld() error {
	defer e.unlock()
	ctx, cancelLimit := context.WithTimeoutCause(e.m.ctx, startLimit, spec.Errorf(spec.KindUnavailable,
		"workload %q did not start within %v: the host may be overloaded; start it again", e.name, startLimit))
	defer cancelLimit()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	e.mu.Lock()
	e.cancelStart = cancel
	e.mu.Unlock()
	return e.start(ctx)
}

// start runs with e.op held.
func (e *entry) start(ctx context.Context) error {
	rec, _, _ := e.peek()
	if rec.Restoring {
		return spec.Errorf(spec.KindWrongState, "workload %q is just being made of a snapshot", e.name)
	}
	if rec.Condemned {
		return spec.Errorf(spec.KindWrongState, "workload %q is being removed", e.name)
	}
	switch rec.Status.State {
	case StateCreated, StateExited, StateFailed:
	default:
		return spec.Errorf(spec.KindWrongState, "workload %q is %s: only a created, exited or failed one can be started", e.name, rec.Status.State)
	}
	end := phase.Begin(e.id, "configuration")
	img, err := e.m.cfg.Images.Get(e.digest)
	if err != nil {
		return err
	}
	config, err := oci.Config(e.id, rec.Spec, img.Config, rec.Status.Isolation)
	if err != nil {
		return err
	}
	filter, err := oci.CompileSeccomp(config.Linux.Seccomp)
	if err != nil {
		return err
	}
	own, err := oci.CompileAgentSeccomp(config.Linux.Seccomp, rec.Status.Isolation)
	if err != nil {
		return err
	}
	logBase, opened, err := e.openOutput(rec.Run == 0)
	if err != nil {
		return err
	}
	defer opened() //nolint:errcheck // recorded has its error
	end()
	boot, err := bootid.Host()
	if err != nil {
		return err
	}
	if err := e.m.commit(e, rec.Spec.Resources, func() error {
		return e.setState(StateStarting, func(r *record) {
			r.Run++
			r.Boot = boot
			r.LogBase, r.OutputBefore = logBase, 0
			r.Status.Exit, r.Status.Message, r.Status.OOM = nil, "", nil
		})
	}); err != nil {
		return err
	}
	// The walls go up meanwhile: they do not outlive the host. The process may leave its mark on the world, and must not have
	// run unbeknownst.
	synced := e.syncBeside()
	recorded := func() error { return errors.Join(synced(), opened()) }
	r, err := e.build(ctx, img, agent.Container{ID: containerID, Config: config, Filter: filter, AgentFilter: own}, recorded)
	if err == nil {
		m := e.m
		m.owned.Go(func() { e.supervise(r) })
		return nil
	}
	return e.startFailed(ctx, err)
}

// openOutput opens the output's log, and says from where on in it this run's output lies. The first run's is made while the walls go
// up, unless a console is to lie beside it: next to a sync a file system takes its time. opened waits for it, and may be called
// again.
func (e *entry) openOutput(first bool) (from uint64, opened func() error, err error) {
	if _, keeps := e.runtime().(runtime.ConsoleKeeper); keeps || !first {
		log, err := e.output()
		if err != nil {
			return 0, nil, err
		}
		end, _ := log.end()
		return end.offset, func() error { return nil }, nil
	}
	result := make(chan error, 1)
	go func() {
		_, err := e.output()
		result <- err
	}()
	return 0, sync.OnceValue(func() error { return <-result }), nil
}

// build raises the walls and starts the process. After an error the caller takes down what stands.
func (e *entry) build(ctx context.Context, img image.Image, container agent.Container, recorded func() error) (_ *run, err error) {
	rec, _, _ := e.peek()
	if rec.Run > 1 {
		// What an earlier life left, if its end could not take everything down.
		if err := e.takeDown(ctx); err != nil {
			return nil, fmt.Errorf("cannot clear away the sandbox of the run before: %w", err)
		}
		fault.At("start", "earlier sandbox taken down")
	}
	launch := agent.Launch{Container: container, ProcessID: runProcess(rec.Run), Stdin: rec.Spec.Process.Stdin}
	var preparation []byte
	if preparer, ok := e.runtime().(runtime.Preparer); ok && preparer.Prepares() && !spec.Joins(rec.Spec.Network) {
		if preparation, err = spec.Preparation(container.Config); err != nil {
			return nil, err
		}
	}
	effective := encodeLater(container.Config)
	inst, launched, client, err := e.raise(ctx, spec.Sandbox{
		ID: e.id, ImagePath: img.Path, Resources: rec.Spec.Resources, Network: rec.Spec.Network, ConsolePath: e.consolePath(),
		TemplateScope: e.m.cfg.Templates.scope(rec.Caller, rec.Labels), Snapshots: rec.Spec.Snapshots, Prepare: preparation,
	}, launch, func() error {
		effective.begin() // nothing of it changes any more
		return recorded()
	})
	if err != nil {
		return nil, err
	}
	fault.At("start", "sandbox stands")
	r := &run{inst: inst, client: client}
	defer func() {
		if err != nil {
			e.setRun(nil)
			r.client.Close()
		}
	}()
	e.setRun(r)
	r.stdin.synced = true
	var claims spec.Claims
	var joined *spec.Network
	if launched != nil {
		claims, r.proc, err = r.client.Launched(launch, launched)
	} else {
		claims, joined, err = e.begin(ctx, r, launch, recorded)
	}
	if err != nil {
		return nil, err
	}
	fault.At("start", "process started")
	config, err := effective.result()
	if err != nil {
		return nil, fmt.Errorf("cannot encode the OCI config: %w", err)
	}
	return r, e.setState(StateRunning, func(r *record) {
		r.config = config
		setFacts(r, inst.Facts())
		r.Status.Claims = claims
		if joined != nil {
			r.Status.Networks = []spec.Network{*joined}
		}
		r.Status.StartedAt = time.Now().UTC()
	})
}

// encoding is a configuration that is encoded while others work: with its system call filter it is large.
type encoding struct {
	begin func()
	// result begins if nobody did, and waits.
	result func() ([]byte, error)
}

func encodeLater(c *specs.Spec) encoding {
	encode := sync.OnceValues(func() ([]byte, error) { return json.Marshal(c) })
	return encoding{begin: func() { go encode() }, result: encode} //nolint:errcheck // result has it
}

// raise raises the walls, and answers with a client of the agent behind them. Where it can it has the process launched as they
// come to stand: then it answers with what the agent said of that, too.
func (e *entry) raise(ctx context.Context, s spec.Sandbox, l agent.Launch, recorded func() error) (_ runtime.Instance, launched []byte, _ *agent.Client, err error) {
	launcher, can := e.runtime().(runtime.Launcher)
	if !can || spec.Joins(s.Network) { // networks are joined once the walls stand
		inst, err := e.runtime().Start(ctx, s)
		if err != nil {
			return nil, nil, nil, err
		}
		return inst, nil, agent.New(inst.Dial, inst.Done()), nil
	}
	var client *agent.Client
	inst, launched, err := launcher.Launch(ctx, s, func(sandbox runtime.Launching) ([]byte, error) {
		fromFacts(l.Container.Config, sandbox.Facts)
		message, err := l.Encode()
		if errors.Is(err, agent.ErrTooLarge) {
			return nil, nil // it is told call by call
		}
		if err == nil {
			err = recorded()
		}
		if err == nil {
			client = agent.New(sandbox.Dial, sandbox.Done)
			client.Expect(l.ProcessID)
		}
		return message, err
	})
	if err != nil {
		if client != nil {
			client.Close()
		}
		return nil, nil, nil, err
	}
	if client == nil {
		client = agent.New(inst.Dial, inst.Done())
	}
	return inst, launched, client, nil
}

// begin joins the network and has the agent start the process, call by call.
func (e *entry) begin(ctx context.Context, r *run, l agent.Launch, recorded func() error) (spec.Claims, *spec.Network, error) {
	rec, _, _ := e.peek()
	config := l.Container.Config
	fromFacts(config, r.inst.Facts())
	joined, err := e.join(ctx, r.inst, rec.Spec.Network)
	if err != nil {
		return spec.Claims{}, nil, err
	}
	fault.At("start", "joined")
	end := phase.Begin(e.id, "call: configure")
	claims, err := r.client.Configure(ctx, config.Hostname, joined)
	end()
	if err != nil {
		return spec.Claims{}, nil, err
	}
	fault.At("start", "configured")
	end = phase.Begin(e.id, "call: create container")
	err = r.client.CreateContainer(ctx, l.Container)
	end()
	if err != nil {
		return spec.Claims{}, nil, err
	}
	fault.At("start", "container created")
	if err := recorded(); err != nil {
		return spec.Claims{}, nil, err
	}
	end = phase.Begin(e.id, "call: start process")
	r.proc, err = r.client.Start(ctx, l.Container.ID, l.ProcessID, config.Process, l.Stdin)
	end()
	return claims, joined, err
}

// fromFacts puts into config what only the runtime knows: the AppArmor profile, and which ids of the host the sandbox has.
// Agent and workload learn of those anyway, from /proc/self/uid_map.
func fromFacts(config *specs.Spec, f runtime.Facts) {
	config.Process.ApparmorProfile = f.AppArmorProfile
	if f.IDBase == 0 {
		return
	}
	mapping := []specs.LinuxIDMapping{{ContainerID: 0, HostID: f.IDBase, Size: idrange.Size}}
	config.Linux.UIDMappings, config.Linux.GIDMappings = mapping, mapping
}

func setFacts(r *record, f runtime.Facts) {
	r.Status.Accelerator = f.Accelerator
	r.Status.AgentTransport = f.AgentTransport
	r.Status.StartedFrom, r.Status.StartNote = f.StartedFrom, f.StartNote
	r.Status.HostPID = f.HostPID
}

// callOff ends a start that is under way; its caller gets the reason.
func (e *entry) callOff(why string) {
	e.mu.Lock()
	cancel := e.cancelStart
	e.mu.Unlock()
	if cancel != nil {
		cancel(spec.Errorf(spec.KindWrongState, "workload %q was %s while it was starting", e.name, why))
	}
}

// startFailed takes down what stands of the walls and records why.
func (e *entry) startFailed(ctx context.Context, cause error) error {
	switch {
	case e.m.ctx.Err() != nil:
		cause = spec.Errorf(spec.KindUnavailable, "sandboxd was shut down while workload %q was starting: start it again", e.name)
	case ctx.Err() != nil:
		cause = context.Cause(ctx)
	}
	e.release()
	exit := map[string]int{spec.ReasonProcessNotFound: 127, spec.ReasonProcessNotExecutable: 126}[spec.ReasonOf(cause)]
	if exit != 0 {
		e.mustState(StateExited, func(r *record) {
			r.Status.Exit = &spec.Exit{Code: exit, Time: time.Now().UTC()}
			r.Status.Message = cause.Error()
			r.Status.HostPID = 0
		})
		e.logUnsynced(e.sync())
	} else {
		e.mustState(StateFailed, func(r *record) {
			r.Status.Message = cause.Error()
			r.Status.HostPID = 0
		})
	}
	return cause
}

// release takes the walls down and keeps the writable layer. What it cannot remove now is found again by Recover.
func (e *entry) release() {
	ctx, cancel := context.WithTimeout(context.Background(), releaseLimit)
	defer cancel()
	if err := e.takeDown(ctx); err != nil {
		e.m.cfg.Log.Error("cannot take down sandbox", zap.String("workload", e.id), zap.Error(err))
	}
	e.setRun(nil)
}
