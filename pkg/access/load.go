package access

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/user"
	"path"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// maxSourceBytes bounds the file: a person writes it.
const maxSourceBytes = 1 << 20

// version is the only version of the file format.
const version = 1

// Table is an access file as loaded.
type Table struct {
	roles  []*Role
	grants []grant
}

// Everybody is the table when there is no file.
func Everybody() *Table {
	return &Table{roles: []*Role{Everyone}, grants: []grant{{anybody: true, roles: []*Role{Everyone}}}}
}

// RolesOf are the roles of a caller, in the order of the file; none if no grant names it.
func (t *Table) RolesOf(c spec.Caller) []*Role {
	var out []*Role
	for _, g := range t.grants {
		if !g.holds(c) {
			continue
		}
		for _, r := range g.roles {
			if !slices.Contains(out, r) {
				out = append(out, r)
			}
		}
	}
	return out
}

type grant struct {
	anybody bool
	uids    []uint32
	gids    []uint32
	names   []string
	roles   []*Role
}

// holds: a caller is known by its user, any of its groups, or any name of its certificate.
func (g grant) holds(c spec.Caller) bool {
	if g.anybody {
		return true
	}
	if len(c.Names) > 0 {
		return slices.ContainsFunc(c.Names, func(n string) bool { return slices.Contains(g.names, n) })
	}
	return slices.Contains(g.uids, c.UID) || slices.Contains(g.gids, c.GID) ||
		slices.ContainsFunc(c.GIDs, func(gid uint32) bool { return slices.Contains(g.gids, gid) })
}

// file is what is read. Pointers and lists tell what is absent from what is empty.
type file struct {
	Version int      `yaml:"version"`
	Roles   []*Role  `yaml:"roles"`
	Grants  []grants `yaml:"grants"`
}

type grants struct {
	// Names or numbers.
	Users  []string `yaml:"users"`
	Groups []string `yaml:"groups"`
	// "cn:…", "dns:…", "email:…" or "uri:…".
	Certificates []string `yaml:"certificates"`
	Roles        []string `yaml:"roles"`
}

// Load reads an access file. filename only appears in errors. Whatever is not understood is an error: a limit that was
// mistyped must never be a limit that is not there.
func Load(source []byte, filename string) (*Table, error) {
	t, err := load(source)
	if err != nil {
		return nil, fmt.Errorf("cannot use access file %s: %w", filename, err)
	}
	return t, nil
}

func load(source []byte) (*Table, error) {
	if len(source) > maxSourceBytes {
		return nil, fmt.Errorf("it has %d bytes; it may have %d", len(source), maxSourceBytes)
	}
	decoder := yaml.NewDecoder(bytes.NewReader(source))
	decoder.KnownFields(true)
	var f, second file
	if err := decoder.Decode(&f); errors.Is(err, io.EOF) {
		return nil, errors.New("it is empty; it starts with \"version: 1\"")
	} else if err != nil {
		return nil, err
	}
	if err := decoder.Decode(&second); !errors.Is(err, io.EOF) {
		return nil, errors.New("it has a second document; it may have one")
	}
	if f.Version != version {
		return nil, fmt.Errorf("version is %d; this sandboxd understands \"version: %d\"", f.Version, version)
	}
	t := &Table{roles: f.Roles}
	byName := map[string]*Role{}
	for i, r := range f.Roles {
		if r == nil || r.Name == "" {
			return nil, fmt.Errorf("role %d has no name", i+1)
		}
		if byName[r.Name] != nil {
			return nil, fmt.Errorf("there are two roles %q", r.Name)
		}
		if err := r.check(); err != nil {
			return nil, fmt.Errorf("role %q: %w", r.Name, err)
		}
		byName[r.Name] = r
	}
	for i, g := range f.Grants {
		made, err := g.resolve(byName)
		if err != nil {
			return nil, fmt.Errorf("grant %d: %w", i+1, err)
		}
		t.grants = append(t.grants, made)
	}
	return t, nil
}

func (r *Role) check() error {
	if r.Everything {
		if !r.onlyEverything() {
			return errors.New("everything leaves nothing else to say: remove its other keys, or everything")
		}
		return nil
	}
	if err := errors.Join(
		known("may", r.May, Verbs),
		known("privileges", r.Privileges, Privileges),
		known("isolation", r.Isolation, []spec.Isolation{spec.IsolationAuto, spec.IsolationContainer, spec.IsolationVM}),
	); err != nil {
		return err
	}
	for i, c := range r.Capabilities {
		canonical, err := spec.CanonicalCap(c)
		if err != nil {
			return fmt.Errorf("capabilities: %w", err)
		}
		r.Capabilities[i] = canonical
	}
	for i, b := range r.Binds {
		if !path.IsAbs(b.Path) {
			return fmt.Errorf("binds: %q is no absolute path", b.Path)
		}
		r.Binds[i].Path = path.Clean(b.Path)
	}
	for _, p := range r.Images {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			return fmt.Errorf("images: %q is no pattern", p)
		}
	}
	return nil
}

func (r *Role) onlyEverything() bool {
	return len(r.May)+len(r.Isolation)+len(r.Images)+len(r.Binds)+len(r.Capabilities)+len(r.Networks)+len(r.Privileges)+len(r.Workloads.Labels) == 0 &&
		r.Workloads.Tenant == "" && !r.Workloads.Own && r.Max == Limits{}
}

func known[T ~string](key string, given, all []T) error {
	for _, v := range given {
		if !slices.Contains(all, v) {
			return fmt.Errorf("%s: %q is unknown; there are %s", key, v, strings.Join(stringsOf(all), ", "))
		}
	}
	return nil
}

func (g grants) resolve(roles map[string]*Role) (grant, error) {
	var out grant
	for _, name := range g.Roles {
		if roles[name] == nil {
			return out, fmt.Errorf("there is no role %q", name)
		}
		out.roles = append(out.roles, roles[name])
	}
	for _, name := range g.Users {
		id, err := lookUp(name, func() (string, error) {
			u, err := user.Lookup(name)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		})
		if err != nil {
			return out, fmt.Errorf("users: %w", err)
		}
		out.uids = append(out.uids, id)
	}
	for _, name := range g.Groups {
		id, err := lookUp(name, func() (string, error) {
			u, err := user.LookupGroup(name)
			if err != nil {
				return "", err
			}
			return u.Gid, nil
		})
		if err != nil {
			return out, fmt.Errorf("groups: %w", err)
		}
		out.gids = append(out.gids, id)
	}
	for _, name := range g.Certificates {
		kind, rest, _ := strings.Cut(name, ":")
		if !slices.Contains([]string{"cn", "dns", "email", "uri"}, kind) || rest == "" {
			return out, fmt.Errorf("certificates: %q must be cn:NAME, dns:NAME, email:ADDRESS or uri:URI", name)
		}
		out.names = append(out.names, name)
	}
	if len(out.uids)+len(out.gids)+len(out.names) == 0 || len(out.roles) == 0 {
		return out, errors.New("it must name at least one of users, groups and certificates, and a role")
	}
	return out, nil
}

func lookUp(name string, byName func() (string, error)) (uint32, error) {
	digits := name
	if _, err := strconv.ParseUint(name, 10, 32); err != nil {
		if digits, err = byName(); err != nil {
			return 0, fmt.Errorf("%w: use a number, or make it first", err)
		}
	}
	id, err := strconv.ParseUint(digits, 10, 32)
	if err != nil {
		return 0, fmt.Errorf("%q has no number: %w", name, err)
	}
	if uint32(id) == spec.NoID {
		return 0, fmt.Errorf("%d is the id of nobody", id)
	}
	return uint32(id), nil
}

// Bytes is a size in a file: a number, or one with a unit of 1024: 512m, 4g.
type Bytes uint64

// units of a size.
var units = []struct {
	suffix string
	bytes  uint64
}{{"k", 1 << 10}, {"m", 1 << 20}, {"g", 1 << 30}, {"t", 1 << 40}}

func (b *Bytes) UnmarshalYAML(n *yaml.Node) error {
	s, unit := strings.ToLower(n.Value), uint64(1)
	for _, u := range units {
		if digits, ok := strings.CutSuffix(s, u.suffix); ok {
			s, unit = digits, u.bytes
		}
	}
	v, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n.Kind != yaml.ScalarNode || v > ^uint64(0)/unit {
		return fmt.Errorf("line %d: %q is no size: use a number of bytes, or 512m, 4g", n.Line, n.Value)
	}
	*b = Bytes(v * unit)
	return nil
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
