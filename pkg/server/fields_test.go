package server

import (
	"fmt"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// fieldsOf calls fn with every field of a message and of the messages in it.
func fieldsOf(m protoreflect.MessageDescriptor, fn func(protoreflect.FieldDescriptor)) {
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		fn(f)
		if f.Kind() == protoreflect.MessageKind && !f.IsMap() && ours(f.Message()) {
			fieldsOf(f.Message(), fn)
		}
	}
}

func TestEveryFieldHasAnAccessRow(t *testing.T) {
	there := make(map[protoreflect.FullName]bool)
	eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
		fieldsOf(m.Input(), func(f protoreflect.FieldDescriptor) { there[f.FullName()] = true })
	})
	for name := range there {
		row, ok := fields[name]
		if !ok {
			t.Errorf("%s has no row in the table of pkg/server/fields.go: give the check that a role must pass to set it, or the reason why it needs none", name)
			continue
		}
		if (row.check == nil) == (row.free == "") {
			t.Errorf("%s: its row has both a check and a reason for none, or neither", name)
		}
	}
	for name := range fields {
		if !there[name] {
			t.Errorf("the access table has a row for %s, which is in no request", name)
		}
	}
	if len(there) < 80 {
		t.Errorf("only %d fields were looked at", len(there))
	}
}

// excess is, for each field of the table that is checked, what a role that may little must not have: the role's rule
// that says no, and a way to set it.
var excess = map[protoreflect.FullName]struct {
	rule string
	set  func(protoreflect.Message, protoreflect.FieldDescriptor)
}{
	"sandboxd.v1.WorkloadSpec.image":     {"images", toString("registry.example/other")},
	"sandboxd.v1.WorkloadSpec.isolation": {"isolation", toEnum(sandboxdv1.Isolation_ISOLATION_CONTAINER.Number())},
	"sandboxd.v1.WorkloadSpec.network":   {"networks", toString("front")},
	"sandboxd.v1.WorkloadSpec.cap_add":   {"capabilities", toList("NET_ADMIN")},
	"sandboxd.v1.WorkloadSpec.mounts":    {"binds", toBind},
	"sandboxd.v1.WorkloadSpec.seccomp": {"privileges", func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
		m.Set(f, protoreflect.ValueOfMessage((&sandboxdv1.Seccomp{Unconfined: true}).ProtoReflect()))
	}},
	"sandboxd.v1.Resources.cpu_millis":         {"max", toUint32(1001)},
	"sandboxd.v1.Resources.memory_bytes":       {"max", toUint64(64<<20 + 1)},
	"sandboxd.v1.Resources.disk_bytes":         {"max", toUint64(2<<30 + 1)},
	"sandboxd.v1.Resources.pids":               {"max", toUint32(513)},
	"sandboxd.v1.Resources.log_bytes":          {"max", toUint64(128<<20 + 1)},
	"sandboxd.v1.Resources.io_read_bps":        {"max", toUint64(1<<20 + 1)},
	"sandboxd.v1.Resources.io_write_bps":       {"max", toUint64(2<<20 + 1)},
	"sandboxd.v1.Resources.io_read_iops":       {"max", toUint32(101)},
	"sandboxd.v1.Resources.io_write_iops":      {"max", toUint32(201)},
	"sandboxd.v1.Resources.cpu_weight":         {"privileges", toUint32(1)},
	"sandboxd.v1.Resources.cpuset_cpus":        {"privileges", toString("0")},
	"sandboxd.v1.Resources.swap_bytes":         {"privileges", toUint64(1)},
	"sandboxd.v1.CreateWorkloadRequest.labels": {"workloads", toTenant("b")},
	"sandboxd.v1.RunWorkloadRequest.labels":    {"workloads", toTenant("b")},
	// Which removes only what this very caller has made, and still is a removal.
	"sandboxd.v1.RunWorkloadRequest.remove_when_ended": {"may", toTrue},
	"sandboxd.v1.ExplainRequest.labels":                {"workloads", toTenant("b")},
	"sandboxd.v1.ImportImageStart.name":                {"images", toString("registry.example/other")},
	"sandboxd.v1.PullImageRequest.reference":           {"images", toString("registry.example/other")},
	"sandboxd.v1.PullImageRequest.insecure":            {"privileges", toTrue},
	"sandboxd.v1.GetImageRequest.reference":            {"images", toString("registry.example/other")},
	"sandboxd.v1.RemoveImageRequest.reference":         {"images", toString("registry.example/other")},
	"sandboxd.v1.BuildTemplateRequest.image":           {"images", toString("registry.example/other")},
	"sandboxd.v1.BuildTemplateRequest.labels":          {"workloads", toTenant("b")},
}

func toString(s string) func(protoreflect.Message, protoreflect.FieldDescriptor) {
	return func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Set(f, protoreflect.ValueOfString(s)) }
}

func toEnum(n protoreflect.EnumNumber) func(protoreflect.Message, protoreflect.FieldDescriptor) {
	return func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Set(f, protoreflect.ValueOfEnum(n)) }
}

func toUint32(n uint32) func(protoreflect.Message, protoreflect.FieldDescriptor) {
	return func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Set(f, protoreflect.ValueOfUint32(n)) }
}

func toUint64(n uint64) func(protoreflect.Message, protoreflect.FieldDescriptor) {
	return func(m protoreflect.Message, f protoreflect.FieldDescriptor) { m.Set(f, protoreflect.ValueOfUint64(n)) }
}

func toList(s string) func(protoreflect.Message, protoreflect.FieldDescriptor) {
	return func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
		m.Mutable(f).List().Append(protoreflect.ValueOfString(s))
	}
}

func toTrue(m protoreflect.Message, f protoreflect.FieldDescriptor) {
	m.Set(f, protoreflect.ValueOfBool(true))
}

func toTenant(tenant string) func(protoreflect.Message, protoreflect.FieldDescriptor) {
	return func(m protoreflect.Message, f protoreflect.FieldDescriptor) {
		m.Mutable(f).Map().Set(protoreflect.ValueOfString("tenant").MapKey(), protoreflect.ValueOfString(tenant))
	}
}

func toBind(m protoreflect.Message, f protoreflect.FieldDescriptor) {
	bind := &sandboxdv1.Mount{Type: sandboxdv1.Mount_TYPE_BIND, Source: "/etc", Target: "/mnt", ReadOnly: true}
	m.Mutable(f).List().Append(protoreflect.ValueOfMessage(bind.ProtoReflect()))
}

// littleRole may do everything but delete, and ask for nothing beyond the minimal request.
const littleRole = `  - name: little
    may: [view, logs, create, control, update, exec, copy, images-view, images-add, images-remove, templates-view, templates-build, templates-remove, policy-view, system-view]
    workloads: {tenant: a}
    isolation: [vm]
    images: ["docker.io/library/busybox:*"]
    max: {memory: 64m, io_read_bps: 1m, io_write_bps: 2m, io_read_iops: 100, io_write_iops: 200}
`

// place finds a field in a request, making the messages on the way.
func place(m protoreflect.Message, name protoreflect.FullName) (protoreflect.Message, protoreflect.FieldDescriptor) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		if f.FullName() == name {
			return m, f
		}
		if f.Kind() != protoreflect.MessageKind || f.IsMap() || f.IsList() || !ours(f.Message()) || !mayHold(f.Message(), name) {
			continue
		}
		return place(m.Mutable(f).Message(), name)
	}
	return nil, nil
}

func mayHold(d protoreflect.MessageDescriptor, name protoreflect.FullName) (holds bool) {
	fieldsOf(d, func(f protoreflect.FieldDescriptor) { holds = holds || f.FullName() == name })
	return holds
}

// Every method that carries a checked field, with a role that may not have it, one that may, and one that may do all.
func TestMethodsTimesFields(t *testing.T) {
	h := accessHarness(t)
	h.server.Images = &fakeImages{list: func() ([]image.Image, error) { return nil, nil }, get: func(ref string) (image.Image, error) {
		name, _ := image.CanonicalName(ref)
		return image.Image{Digest: "sha256:" + strings.Repeat("0", 64), Names: []string{name}}, nil
	}}
	tried := make(map[protoreflect.FullName]int)
	all := make([]string, len(access.Verbs))
	for i, v := range access.Verbs {
		all[i] = string(v)
	}
	for _, c := range []struct {
		role   string
		table  *access.Table
		denied bool
	}{
		{"little", roles(t, littleRole, 0), true},
		{"full", roles(t, strings.Replace(fmt.Sprintf(fullRole, strings.Join(all, ", ")), "{tenant: a}", "{}", 1), 0), false},
		{"everything", roles(t, "  - {name: everything, everything: true}", 0), false},
	} {
		h.server.SetAccess(c.table)
		eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
			for name, row := range fields {
				if row.check == nil || !mayHold(m.Input(), name) {
					continue
				}
				tried[name]++
				bad, ok := excess[name]
				if !ok {
					t.Errorf("%s is checked, and excess does not say what a role may not set it to", name)
					continue
				}
				request := minimal(t, m.Input())
				label(request, "a")
				small(request)
				if c.denied {
					if err := invoke(t.Context(), h.conn, full, m, request); status.Code(err) == codes.PermissionDenied {
						t.Fatalf("%s: the minimal request is denied already: %v", full, err)
					}
				}
				in, f := place(request.ProtoReflect(), name)
				bad.set(in, f)
				err := invoke(t.Context(), h.conn, full, m, request)
				if denied := status.Code(err) == codes.PermissionDenied; denied != c.denied {
					t.Errorf("%s with %s by role %s: denied %t, want %t: %v", full, name, c.role, denied, c.denied, err)
				}
				if info, _ := detailsOf(err); c.denied && !strings.HasPrefix(info.GetMetadata()["rule"], "little."+bad.rule) {
					t.Errorf("%s with %s: denied by rule %q, want little.%s", full, name, info.GetMetadata()["rule"], bad.rule)
				}
			}
		})
	}
	// Said twice, so that a check does not go unnoticed.
	for name := range excess {
		if fields[name].check == nil {
			t.Errorf("%s: excess says what a role may not set it to, and nothing checks it", name)
		}
	}
	for name, row := range fields {
		if row.check != nil && tried[name] == 0 {
			t.Errorf("%s is checked and was tried in no request", name)
		}
	}
}

// small asks for as much as the role little may have of what is more by default.
func small(m proto.Message) {
	for name, value := range map[protoreflect.FullName]protoreflect.Value{
		"sandboxd.v1.Resources.memory_bytes":  protoreflect.ValueOfUint64(64 << 20),
		"sandboxd.v1.Resources.io_read_bps":   protoreflect.ValueOfUint64(1 << 20),
		"sandboxd.v1.Resources.io_write_bps":  protoreflect.ValueOfUint64(2 << 20),
		"sandboxd.v1.Resources.io_read_iops":  protoreflect.ValueOfUint32(100),
		"sandboxd.v1.Resources.io_write_iops": protoreflect.ValueOfUint32(200),
	} {
		if in, f := place(m.ProtoReflect(), name); in != nil {
			in.Set(f, value)
		}
	}
}

// Of an update only what it changes counts: a zero outside of its mask is no wish for the default, one in it is.
func TestUpdateIsAboutWhatItChanges(t *testing.T) {
	h := accessHarness(t)
	// Its most of memory is below the default of 512 MiB.
	h.server.SetAccess(roles(t, littleRole, 0))
	r := func(change *sandboxdv1.Resources, mask ...string) *sandboxdv1.UpdateWorkloadRequest {
		u := &sandboxdv1.UpdateWorkloadRequest{Id: "w", Resources: change}
		if mask != nil {
			u.UpdateMask = &fieldmaskpb.FieldMask{Paths: mask}
		}
		return u
	}
	for what, c := range map[string]struct {
		request *sandboxdv1.UpdateWorkloadRequest
		rule    string
	}{
		"no mask, memory left alone":       {r(&sandboxdv1.Resources{Pids: 10}), ""},
		"no mask, memory it may have":      {r(&sandboxdv1.Resources{MemoryBytes: 64 << 20}), ""},
		"no mask, too much memory":         {r(&sandboxdv1.Resources{MemoryBytes: 65 << 20, Pids: 10}), "little.max.memory"},
		"a mask without memory":            {r(&sandboxdv1.Resources{}, "pids"), ""},
		"a mask that has memory's default": {r(&sandboxdv1.Resources{}, "memory_bytes"), "little.max.memory"},
		"memory's default among others":    {r(&sandboxdv1.Resources{Pids: 10}, "pids", "memory_bytes"), "little.max.memory"},
		"too much, outside the mask":       {r(&sandboxdv1.Resources{MemoryBytes: 1 << 40, SwapBytes: 1}, "pids"), ""},
		"swap, in the mask":                {r(&sandboxdv1.Resources{SwapBytes: 1}, "swap_bytes"), "little.privileges"},
		"no swap, which takes something":   {r(&sandboxdv1.Resources{}, "swap_bytes", "cpuset_cpus"), ""},
		"disk I/O within its most":         {r(&sandboxdv1.Resources{IoReadBps: 1 << 20}), ""},
		"more disk I/O":                    {r(&sandboxdv1.Resources{IoReadBps: 2 << 20}), "little.max.io_read_bps"},
		"a limit of disk I/O lifted":       {r(&sandboxdv1.Resources{}, "io_write_iops"), "little.max.io_write_iops"},
		"a mask that names no field":       {r(&sandboxdv1.Resources{MemoryBytes: 1 << 40}, "resources.memory_bytes"), ""},
		"a field and one there is not":     {r(&sandboxdv1.Resources{MemoryBytes: 1 << 40}, "memory_bytes", "x"), ""},
		"an empty mask changes nothing":    {&sandboxdv1.UpdateWorkloadRequest{Id: "w", Resources: &sandboxdv1.Resources{MemoryBytes: 1 << 40}, UpdateMask: &fieldmaskpb.FieldMask{}}, ""},
	} {
		changed := false
		h.server.Workloads.(*fakeWorkloads).update = func(change func(*spec.Resources)) error {
			had := spec.Resources{MemoryBytes: 32 << 20, Pids: 5}
			change(&had)
			changed = true
			if had.MemoryBytes == 0 || had.MemoryBytes > 64<<20 || had.SwapBytes > 0 {
				t.Errorf("%s: let through, and it makes %+v", what, had)
			}
			return nil
		}
		_, err := h.workloads.UpdateWorkload(t.Context(), c.request)
		info, _ := detailsOf(err)
		if denied := status.Code(err) == codes.PermissionDenied; denied != (c.rule != "") || info.GetMetadata()["rule"] != c.rule || denied && changed {
			t.Errorf("%s: %v by rule %q, changed %t; want the rule %q", what, err, info.GetMetadata()["rule"], changed, c.rule)
		}
	}
}

// A field of a request that the table does not know may be set by nobody who may not do everything.
func TestUnknownFieldIsRefused(t *testing.T) {
	h := accessHarness(t)
	const name = "sandboxd.v1.WorkloadSpec.hostname"
	row := fields[name]
	delete(fields, name)
	defer func() { fields[name] = row }()
	h.server.SetAccess(roles(t, fmt.Sprintf(fullRole, "create"), 0))
	create := validCreate()
	create.Labels = map[string]string{"tenant": "a"}
	create.Spec.Hostname = "x"
	_, err := h.workloads.CreateWorkload(t.Context(), create)
	if info, _ := detailsOf(err); status.Code(err) != codes.PermissionDenied || info.GetMetadata()["rule"] != "full.fields" {
		t.Errorf("%v, want a denial by full.fields", err)
	}
}
