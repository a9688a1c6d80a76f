package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"math"
	"path"
	"slices"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// What conditions see. Every number is an int, so that conditions compare it with plain numbers. Whatever a condition
// may rely on is brought into one form here: a request must not escape a rule by saying the same thing differently.

type requestFacts struct {
	// As asked for: image.names and image.digest say what it means.
	Image  string            `cel:"image"`
	Name   string            `cel:"name"`
	Labels map[string]string `cel:"labels"`
	// "auto", "container" or "vm".
	Isolation  string   `cel:"isolation"`
	Entrypoint []string `cel:"entrypoint"`
	Command    []string `cel:"command"`
	// Names of environment variables the request sets; values are often secrets.
	EnvNames   []string `cel:"envNames"`
	User       string   `cel:"user"`
	WorkingDir string   `cel:"workingDir"`
	Hostname   string   `cel:"hostname"`
	// Full names: "CAP_NET_ADMIN". A request for ALL lists every capability, and "ALL".
	CapAdd  []string     `cel:"capAdd"`
	CapDrop []string     `cel:"capDrop"`
	Mounts  []mountFacts `cel:"mounts"`
	// "none" when the request names no network.
	Network      string        `cel:"network"`
	ReadOnlyRoot bool          `cel:"readOnlyRoot"`
	Snapshots    bool          `cel:"snapshots"`
	Terminal     bool          `cel:"terminal"`
	Resources    resourceFacts `cel:"resources"`
	// "default", "custom" or "unconfined".
	Seccomp string `cel:"seccomp"`
	// "sha256:…" of a custom profile as it was sent, else empty.
	SeccompDigest string `cel:"seccompDigest"`
}

type mountFacts struct {
	// "bind" or "tmpfs".
	Type string `cel:"type"`
	// Clean paths: no "..", no doubled slash.
	Source   string `cel:"source"`
	Target   string `cel:"target"`
	ReadOnly bool   `cel:"readOnly"`
}

// resourceFacts are as asked for: 0 means the daemon's default.
type resourceFacts struct {
	CPUMillis   int64 `cel:"cpuMillis"`
	MemoryBytes int64 `cel:"memoryBytes"`
	Pids        int64 `cel:"pids"`
	DiskBytes   int64 `cel:"diskBytes"`
	CPUWeight   int64 `cel:"cpuWeight"`
	// As asked for: "0-3,8".
	CPUSet          string `cel:"cpuset"`
	MemoryHighBytes int64  `cel:"memoryHighBytes"`
	SwapBytes       int64  `cel:"swapBytes"`
	OOMGroup        bool   `cel:"oomGroup"`
	IOReadBPS       int64  `cel:"ioReadBps"`
	IOWriteBPS      int64  `cel:"ioWriteBps"`
	IOReadIOPS      int64  `cel:"ioReadIops"`
	IOWriteIOPS     int64  `cel:"ioWriteIops"`
	LogBytes        int64  `cel:"logBytes"`
}

type imageFacts struct {
	// "sha256:…"
	Digest string           `cel:"digest"`
	Names  []string         `cel:"names"`
	Config imageConfigFacts `cel:"config"`
}

type imageConfigFacts struct {
	User       string            `cel:"user"`
	Entrypoint []string          `cel:"entrypoint"`
	Command    []string          `cel:"command"`
	Env        []string          `cel:"env"`
	WorkingDir string            `cel:"workingDir"`
	Labels     map[string]string `cel:"labels"`
}

type callerFacts struct {
	// -1 for a caller with a certificate.
	UID  int64   `cel:"uid"`
	GID  int64   `cel:"gid"`
	GIDs []int64 `cel:"gids"`
	PID  int64   `cel:"pid"`
	// Of its certificate: "cn:…", "dns:…", "email:…", "uri:…"; empty over the Unix socket.
	Names []string `cel:"names"`
}

type hostFacts struct {
	Hostname           string `cel:"hostname"`
	ContainerAvailable bool   `cel:"containerAvailable"`
	VMAvailable        bool   `cel:"vmAvailable"`
	// "kvm", "tcg" or empty.
	VMAccelerator string `cel:"vmAccelerator"`
}

// factsOf are the variables of a condition. It refuses a request that was not brought into its canonical form.
func factsOf(in Input) (map[string]any, error) {
	w := in.Request.Workload
	capAdd, err := capabilities("spec.cap_add", w.CapAdd)
	if err != nil {
		return nil, err
	}
	capDrop, err := capabilities("spec.cap_drop", w.CapDrop)
	if err != nil {
		return nil, err
	}
	request := requestFacts{
		Image: in.Request.Image, Name: in.Request.Name, Labels: in.Request.Labels, Isolation: string(w.Isolation),
		Entrypoint: w.Process.Entrypoint, Command: w.Process.Command, EnvNames: names(w.Process.Env), User: w.Process.User,
		WorkingDir: w.Process.WorkingDir, Hostname: w.Hostname, CapAdd: capAdd, CapDrop: capDrop,
		Network: w.Network, ReadOnlyRoot: w.ReadOnlyRoot, Snapshots: w.Snapshots, Terminal: w.Process.Terminal,
		Resources: resourceFacts{
			CPUMillis: int64(w.Resources.CPUMillis), MemoryBytes: integer(w.Resources.MemoryBytes),
			Pids: int64(w.Resources.Pids), DiskBytes: integer(w.Resources.DiskBytes),
			CPUWeight: int64(w.Resources.CPUWeight), CPUSet: w.Resources.CPUSet,
			MemoryHighBytes: integer(w.Resources.MemoryHighBytes), SwapBytes: integer(w.Resources.SwapBytes), OOMGroup: w.Resources.OOMGroup,
			IOReadBPS: integer(w.Resources.IOReadBPS), IOWriteBPS: integer(w.Resources.IOWriteBPS),
			IOReadIOPS: int64(w.Resources.IOReadIOPS), IOWriteIOPS: int64(w.Resources.IOWriteIOPS),
			LogBytes: integer(w.Resources.LogBytes),
		},
	}
	request.Seccomp, request.SeccompDigest = seccompFacts(w.Seccomp)
	if request.Network == "" {
		request.Network = "none"
	}
	for _, m := range w.Mounts {
		source := m.Source
		if source != "" {
			source = path.Clean(source)
		}
		request.Mounts = append(request.Mounts, mountFacts{string(m.Type), source, path.Clean(m.Target), m.ReadOnly})
	}
	caller := callerFacts{UID: int64(in.Caller.UID), GID: int64(in.Caller.GID), PID: int64(in.Caller.PID), Names: in.Caller.Names}
	if len(caller.Names) > 0 {
		// Whatever stands there: it must not be taken for a user of this host.
		caller.UID, caller.GID = -1, -1
	}
	for _, gid := range in.Caller.GIDs {
		caller.GIDs = append(caller.GIDs, int64(gid))
	}
	return map[string]any{
		"request": request,
		"image": imageFacts{in.Image.Digest, in.Image.Names, imageConfigFacts{
			User: in.Image.Config.User, Entrypoint: in.Image.Config.Entrypoint, Command: in.Image.Config.Command,
			Env: in.Image.Config.Env, WorkingDir: in.Image.Config.WorkingDir, Labels: in.Image.Config.Labels,
		}},
		"caller": caller,
		"host":   hostFacts{in.Host.Hostname, in.Host.ContainerAvailable, in.Host.VMAvailable, in.Host.VMAccelerator},
	}, nil
}

const (
	seccompDefault    = "default"
	seccompCustom     = "custom"
	seccompUnconfined = "unconfined"
)

// seccompFacts names the filter asked for; a request that asks for both a profile and none is taken for the latter.
func seccompFacts(s spec.Seccomp) (kind, digest string) {
	if s.Profile != "" {
		sum := sha256.Sum256([]byte(s.Profile))
		kind, digest = seccompCustom, "sha256:"+hex.EncodeToString(sum[:])
	}
	switch {
	case s.Unconfined:
		return seccompUnconfined, digest
	case kind == "":
		return seccompDefault, ""
	default:
		return kind, digest
	}
}

// capabilities writes ALL out, so that a rule about one capability also sees a request for all of them.
func capabilities(field string, asked []string) ([]string, error) {
	var out []string
	for _, c := range asked {
		canonical, err := spec.CanonicalCap(c)
		if err != nil {
			return nil, spec.Invalidf(field, "%w", err)
		}
		if canonical == spec.CapAll {
			out = append(out, spec.Capabilities...)
		}
		out = append(out, canonical)
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// names are those of NAME=value entries.
func names(env []string) []string {
	var out []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		out = append(out, name)
	}
	return out
}

// integer is v, or the largest number there is: a rule about "more than" must hold for it.
func integer(v uint64) int64 { return int64(min(v, math.MaxInt64)) }
