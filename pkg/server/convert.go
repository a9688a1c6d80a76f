package server

import (
	"fmt"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// What a caller asks for, both ways: the specs of workloads. Tests compare every field by reflection, so a field added
// to the proto and forgotten here fails them.

// isolations pairs the isolations; what is in neither column is unspecified.
var isolations = pairs[spec.Isolation, sandboxdv1.Isolation]{
	{spec.IsolationAuto, sandboxdv1.Isolation_ISOLATION_AUTO},
	{spec.IsolationContainer, sandboxdv1.Isolation_ISOLATION_CONTAINER},
	{spec.IsolationVM, sandboxdv1.Isolation_ISOLATION_VM},
}

var mountTypes = pairs[spec.MountType, sandboxdv1.Mount_Type]{
	{spec.MountBind, sandboxdv1.Mount_TYPE_BIND},
	{spec.MountTmpfs, sandboxdv1.Mount_TYPE_TMPFS},
}

// pairs is a table of values of the daemon and of the API that mean the same. Unknown values become zero, which is
// "unspecified" on the one side and invalid or empty on the other.
type pairs[A, B comparable] []struct {
	ours A
	api  B
}

func (p pairs[A, B]) toAPI(a A) (b B) {
	for _, row := range p {
		if row.ours == a {
			return row.api
		}
	}
	return b
}

func (p pairs[A, B]) fromAPI(b B) (a A) {
	for _, row := range p {
		if row.api == b {
			return row.ours
		}
	}
	return a
}

func specFromAPI(w *sandboxdv1.WorkloadSpec) spec.Workload {
	s := spec.Workload{
		Image:        w.GetImage(),
		Isolation:    isolations.fromAPI(w.GetIsolation()),
		Process:      processFromAPI(w.GetProcess()),
		Resources:    resourcesFromAPI(w.GetResources()),
		Hostname:     w.GetHostname(),
		Network:      w.GetNetwork(),
		ReadOnlyRoot: w.GetReadOnlyRoot(),
		Snapshots:    w.GetSnapshots(),
		CapAdd:       w.GetCapAdd(),
		CapDrop:      w.GetCapDrop(),
		StopSignal:   w.GetStopSignal(),
		Seccomp:      spec.Seccomp{Unconfined: w.GetSeccomp().GetUnconfined(), Profile: w.GetSeccomp().GetProfile()},
	}
	for _, m := range w.GetMounts() {
		s.Mounts = append(s.Mounts, spec.Mount{
			Type:      mountTypes.fromAPI(m.GetType()),
			Source:    m.GetSource(),
			Target:    m.GetTarget(),
			ReadOnly:  m.GetReadOnly(),
			SizeBytes: m.GetSizeBytes(),
			Mode:      m.GetMode(),
		})
	}
	return s
}

func specToAPI(s spec.Workload) *sandboxdv1.WorkloadSpec {
	w := &sandboxdv1.WorkloadSpec{
		Image:        s.Image,
		Isolation:    isolations.toAPI(s.Isolation),
		Process:      processToAPI(s.Process),
		Resources:    resourcesToAPI(s.Resources),
		Hostname:     s.Hostname,
		Network:      s.Network,
		ReadOnlyRoot: s.ReadOnlyRoot,
		Snapshots:    s.Snapshots,
		CapAdd:       s.CapAdd,
		CapDrop:      s.CapDrop,
		StopSignal:   s.StopSignal,
	}
	if !s.Seccomp.IsDefault() {
		w.Seccomp = &sandboxdv1.Seccomp{Unconfined: s.Seccomp.Unconfined, Profile: s.Seccomp.Profile}
	}
	for _, m := range s.Mounts {
		w.Mounts = append(w.Mounts, &sandboxdv1.Mount{
			Type:      mountTypes.toAPI(m.Type),
			Source:    m.Source,
			Target:    m.Target,
			ReadOnly:  m.ReadOnly,
			SizeBytes: m.SizeBytes,
			Mode:      m.Mode,
		})
	}
	return w
}

func processFromAPI(p *sandboxdv1.ProcessSpec) spec.Process {
	s := spec.Process{
		Entrypoint:   p.GetEntrypoint(),
		Command:      p.GetCommand(),
		Env:          p.GetEnv(),
		User:         p.GetUser(),
		WorkingDir:   p.GetWorkingDir(),
		Terminal:     p.GetTerminal(),
		TerminalSize: sizeFromAPI(p.GetTerminalSize()),
		Stdin:        p.GetStdin(),
	}
	for _, l := range p.GetRlimits() {
		s.Rlimits = append(s.Rlimits, spec.Rlimit{Type: l.GetType(), Soft: l.GetSoft(), Hard: l.GetHard()})
	}
	return s
}

func processToAPI(s spec.Process) *sandboxdv1.ProcessSpec {
	p := &sandboxdv1.ProcessSpec{
		Entrypoint:   s.Entrypoint,
		Command:      s.Command,
		Env:          s.Env,
		User:         s.User,
		WorkingDir:   s.WorkingDir,
		Terminal:     s.Terminal,
		TerminalSize: sizeToAPI(s.TerminalSize),
		Stdin:        s.Stdin,
	}
	for _, l := range s.Rlimits {
		p.Rlimits = append(p.Rlimits, &sandboxdv1.Rlimit{Type: l.Type, Soft: l.Soft, Hard: l.Hard})
	}
	return p
}

func execFromAPI(e *sandboxdv1.ExecStart) spec.Process {
	return spec.Process{
		Command:      e.GetCommand(),
		Env:          e.GetEnv(),
		User:         e.GetUser(),
		WorkingDir:   e.GetWorkingDir(),
		Terminal:     e.GetTerminal(),
		TerminalSize: sizeFromAPI(e.GetTerminalSize()),
		Stdin:        e.GetStdin(),
	}
}

// sizeFromAPI relies on validation: rows and columns fit in 16 bits.
func sizeFromAPI(t *sandboxdv1.TerminalSize) spec.TerminalSize {
	return spec.TerminalSize{Rows: uint16(t.GetRows()), Columns: uint16(t.GetColumns())}
}

func sizeToAPI(t spec.TerminalSize) *sandboxdv1.TerminalSize {
	if t == (spec.TerminalSize{}) {
		return nil
	}
	return &sandboxdv1.TerminalSize{Rows: uint32(t.Rows), Columns: uint32(t.Columns)}
}

func resourcesFromAPI(r *sandboxdv1.Resources) spec.Resources {
	return spec.Resources{
		CPUMillis:   r.GetCpuMillis(),
		MemoryBytes: r.GetMemoryBytes(),
		Pids:        r.GetPids(),
		DiskBytes:   r.GetDiskBytes(),

		CPUWeight: r.GetCpuWeight(), CPUSet: r.GetCpusetCpus(),
		MemoryHighBytes: r.GetMemoryHighBytes(), SwapBytes: r.GetSwapBytes(), OOMGroup: r.GetOomGroup(),
		IOReadBPS: r.GetIoReadBps(), IOWriteBPS: r.GetIoWriteBps(), IOReadIOPS: r.GetIoReadIops(), IOWriteIOPS: r.GetIoWriteIops(),
		LogBytes: r.GetLogBytes(),
	}
}

func resourcesToAPI(s spec.Resources) *sandboxdv1.Resources {
	return &sandboxdv1.Resources{
		CpuMillis:   s.CPUMillis,
		MemoryBytes: s.MemoryBytes,
		Pids:        s.Pids,
		DiskBytes:   s.DiskBytes,

		CpuWeight: s.CPUWeight, CpusetCpus: s.CPUSet,
		MemoryHighBytes: s.MemoryHighBytes, SwapBytes: s.SwapBytes, OomGroup: s.OOMGroup,
		IoReadBps: s.IOReadBPS, IoWriteBps: s.IOWriteBPS, IoReadIops: s.IOReadIOPS, IoWriteIops: s.IOWriteIOPS,
		LogBytes: s.LogBytes,
	}
}

// checkArgs refuses arguments that would be cut short further down: protovalidate has no rule for the bytes
// of an argument, and the kernel ends an argument at its first NUL.
func checkArgs(field string, args []string) error {
	for i, a := range args {
		for j := range len(a) {
			if a[j] == 0 {
				return spec.Invalidf(fmt.Sprintf("%s[%d]", field, i), "%s[%d] contains a NUL byte at offset %d", field, i, j)
			}
		}
	}
	return nil
}
