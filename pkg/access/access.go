// Package access says who may do what: identities, as the transport proved them, are given roles by a file, and a role
// says what may be done with which workloads, and what may be asked for. What a role does not say is not allowed.
//
// The package knows neither the API nor the daemon: pkg/server holds the table that says what each method and each field
// of a request needs.
package access

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Verb is something a role may do. The zero value is nothing, so that a method that forgets to say needs what no role has.
type Verb string

const (
	// Of workloads; on those that the role selects.
	View    Verb = "view"    // that they are there, their specs (environment included), state, usage, events
	Logs    Verb = "logs"    // their output
	Create  Verb = "create"  // make one, and ask what would be decided
	Control Verb = "control" // start, stop, signal, pause, resume
	Update  Verb = "update"  // change their limits
	Delete  Verb = "delete"
	Exec    Verb = "exec" // run processes in them, attach to theirs
	Copy    Verb = "copy" // files, in and out
	// Take snapshots of them and fork them; list, restore and remove those. Their memory with all its secrets goes on from there.
	Snapshot Verb = "snapshot"
	// Of images; on those whose names the role lists.
	ImagesView   Verb = "images-view"
	ImagesAdd    Verb = "images-add"
	ImagesRemove Verb = "images-remove"
	// Of the templates that VMs are cloned from.
	TemplatesView   Verb = "templates-view"
	TemplatesBuild  Verb = "templates-build" // of images whose names the role lists, within its limits
	TemplatesRemove Verb = "templates-remove"
	// Of the daemon.
	PolicyView Verb = "policy-view"
	SystemView Verb = "system-view" // version, paths, what the host can do
)

// Verbs are all there are.
var Verbs = []Verb{View, Logs, Create, Control, Update, Delete, Exec, Copy, Snapshot, ImagesView, ImagesAdd, ImagesRemove, TemplatesView, TemplatesBuild, TemplatesRemove, PolicyView, SystemView}

// Privilege is something a request may ask for that the default sandbox does not have and that no other key of a role
// is about.
type Privilege string

const (
	Seccomp      Privilege = "seccomp"       // another filter of system calls than the default, or none
	Placement    Privilege = "placement"     // on which processors, with what weight against others
	Swap         Privilege = "swap"          // swap beyond its memory
	InsecurePull Privilege = "insecure-pull" // images from a registry without TLS
)

// Privileges are all there are.
var Privileges = []Privilege{Seccomp, Placement, Swap, InsecurePull}

// Role is what a caller may do. The zero value may do nothing.
type Role struct {
	Name string `yaml:"name"`
	// May do and ask for everything there is or will be, with every workload; the other fields are empty.
	Everything bool     `yaml:"everything"`
	May        []Verb   `yaml:"may"`
	Workloads  Selector `yaml:"workloads"`
	// May be asked for. Image patterns are path.Match's over full names, with "**" for any rest at the end.
	Isolation    []spec.Isolation `yaml:"isolation"`
	Images       []string         `yaml:"images"`
	Binds        []Bind           `yaml:"binds"`
	Capabilities []string         `yaml:"capabilities"`
	Networks     []string         `yaml:"networks"`
	Privileges   []Privilege      `yaml:"privileges"`
	// The most one workload may ask for; what is left out is the daemon's default.
	Max Limits `yaml:"max"`
}

// Selector says which workloads. The zero value selects all.
type Selector struct {
	// The label "tenant".
	Tenant string `yaml:"tenant"`
	// Every pair must match; an empty value matches any.
	Labels map[string]string `yaml:"labels"`
	// Only those that the caller itself created.
	Own bool `yaml:"own"`
}

// Bind is a directory of the host that may be mounted, with what is below it.
type Bind struct {
	Path     string `yaml:"path"`
	Writable bool   `yaml:"writable"`
}

// Limits of one workload.
type Limits struct {
	CPUMillis uint32 `yaml:"cpu_millis"`
	Memory    Bytes  `yaml:"memory"`
	Disk      Bytes  `yaml:"disk"`
	Pids      uint32 `yaml:"pids"`
	// Of its output that the daemon keeps.
	Log Bytes `yaml:"log"`
	// What it reads from and writes to disks, a second. The daemon's default is no limit; a role with one here may neither
	// ask for more nor leave it out.
	IOReadBPS   Bytes  `yaml:"io_read_bps"`
	IOWriteBPS  Bytes  `yaml:"io_write_bps"`
	IOReadIOPS  uint32 `yaml:"io_read_iops"`
	IOWriteIOPS uint32 `yaml:"io_write_iops"`
}

// Everyone is the role of each caller when there is no file: whoever the socket's mode lets in may do everything.
var Everyone = &Role{Name: "everyone", Everything: true}

// Allows reports whether the role has a verb.
func (r *Role) Allows(v Verb) bool { return r.Everything || v != "" && slices.Contains(r.May, v) }

// Selects reports whether the role's verbs concern a workload with these labels that owner created.
func (r *Role) Selects(labels map[string]string, owner, caller spec.Caller) bool {
	if r.Everything {
		return true
	}
	return r.Fits(labels) == "" && (!r.Workloads.Own || owner.Key() == caller.Key())
}

// Fits says what labels lack to be those of a workload of this role; empty if nothing.
func (r *Role) Fits(labels map[string]string) string {
	if r.Everything {
		return ""
	}
	want := map[string]string{}
	for k, v := range r.Workloads.Labels {
		want[k] = v
	}
	if r.Workloads.Tenant != "" {
		want[spec.TenantLabel] = r.Workloads.Tenant
	}
	for _, k := range sortedKeys(want) {
		if got, ok := labels[k]; !ok || want[k] != "" && got != want[k] {
			return fmt.Sprintf("workloads: they must have the label %s=%s", k, want[k])
		}
	}
	return ""
}

// The rest answers why something may not be asked for; empty if it may.

func (r *Role) Isolates(i spec.Isolation) string {
	return r.among("isolation", string(i), stringsOf(r.Isolation))
}

// Connects: no network needs no leave.
func (r *Role) Connects(network string) string {
	if network == "" || network == "none" {
		return ""
	}
	return r.among("networks", network, r.Networks)
}

func (r *Role) Has(p Privilege) string {
	return r.among("privileges", string(p), stringsOf(r.Privileges))
}

// Capable wants a capability's canonical name; ALL is only among a list that says ALL.
func (r *Role) Capable(name string) string {
	canonical, err := spec.CanonicalCap(name)
	if err != nil {
		return err.Error()
	}
	if slices.Contains(r.Capabilities, spec.CapAll) {
		return ""
	}
	return r.among("capabilities", canonical, r.Capabilities)
}

// Uses reports whether one of an image's full names, or its digest, is among the role's.
func (r *Role) Uses(names ...string) string {
	if r.Everything {
		return ""
	}
	for _, pattern := range r.Images {
		for _, name := range names {
			if matchName(pattern, name) {
				return ""
			}
		}
	}
	return fmt.Sprintf("images: %s is not among %s", strings.Join(names, ", "), list(r.Images))
}

// Mounts is about a directory or file of the host, by its path as asked for.
func (r *Role) Mounts(source string, readOnly bool) string {
	if r.Everything {
		return ""
	}
	clean := path.Clean(source)
	for _, b := range r.Binds {
		if (clean == b.Path || strings.HasPrefix(clean, strings.TrimSuffix(b.Path, "/")+"/")) && (readOnly || b.Writable) {
			return ""
		}
	}
	mode := "to write to"
	if readOnly {
		mode = "to read"
	}
	return fmt.Sprintf("binds: %s is not below a path it may mount %s", clean, mode)
}

// Within compares a limit of one workload with the role's. Zero in the role stands for the daemon's default.
func (r *Role) Within(what string, asked, most, byDefault uint64) string {
	if most == 0 {
		most = byDefault
	}
	if asked == 0 {
		asked = byDefault
	}
	if r.Everything || asked <= most {
		return ""
	}
	return fmt.Sprintf("max.%s: %d is more than %d", what, asked, most)
}

// WithinRate is Within for what has no limit by default: zero is without limit, and so more than any.
func (r *Role) WithinRate(what string, asked, most uint64) string {
	switch {
	case r.Everything || most == 0:
		return ""
	case asked == 0:
		return fmt.Sprintf("max.%s: no limit is more than %d", what, most)
	default:
		return r.Within(what, asked, most, most)
	}
}

func (r *Role) among(key, asked string, allowed []string) string {
	if r.Everything || slices.Contains(allowed, asked) {
		return ""
	}
	return fmt.Sprintf("%s: %s is not among %s", key, asked, list(allowed))
}

func list(s []string) string {
	if len(s) == 0 {
		return "those the role lists, which are none"
	}
	return strings.Join(s, ", ")
}

func stringsOf[T ~string](s []T) []string {
	out := make([]string, len(s))
	for i, v := range s {
		out[i] = string(v)
	}
	return out
}

// matchName: "**" at the end of a pattern matches any rest, slashes included; path.Match says the rest.
func matchName(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "**"); ok {
		return strings.HasPrefix(name, prefix)
	}
	ok, err := path.Match(pattern, name)
	return err == nil && ok
}
