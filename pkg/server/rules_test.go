package server

import (
	"context"
	"errors"
	"strings"
	"testing"

	"buf.build/go/protovalidate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// unboundedStrings are the strings of requests that no rule bounds, each with the reason.
var unboundedStrings = map[string]string{
	"sandboxd.v1.ProcessSpec.command":    "the kernel says how long an argument may be, and a message has a limit",
	"sandboxd.v1.ProcessSpec.entrypoint": "likewise",
	"sandboxd.v1.ExecStart.command":      "likewise",
}

// Whatever a caller can send has a bound, so that nothing behind the edge needs one of its own.
func TestEveryStringIsBounded(t *testing.T) {
	h := serve(t, Config{Workloads: &fakeWorkloads{}})
	n := 0
	for _, service := range []string{"WorkloadService", "ImageService", "TemplateService", "SnapshotService", "PolicyService", "SystemService"} {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName("sandboxd.v1." + service))
		if err != nil {
			t.Fatal(err)
		}
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			input := methods.Get(i).Input()
			for _, path := range stringsOf(input) {
				leaf := path[len(path)-1]
				if unboundedStrings[string(leaf.FullName())] != "" {
					continue
				}
				n++
				if !refusesLong(t, h.server.validator, input, path) {
					t.Errorf("%s: %s takes any length", input.Name(), leaf.FullName())
				}
			}
		}
	}
	if n < 40 {
		t.Errorf("only %d strings were looked at", n)
	}
}

// stringsOf are the ways from a message to its strings and bytes.
func stringsOf(m protoreflect.MessageDescriptor) (paths [][]protoreflect.FieldDescriptor) {
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		switch {
		case f.Kind() == protoreflect.StringKind, f.Kind() == protoreflect.BytesKind, f.IsMap():
			paths = append(paths, []protoreflect.FieldDescriptor{f})
		case f.Kind() == protoreflect.MessageKind && f.Message().ParentFile().Package() == "sandboxd.v1":
			for _, rest := range stringsOf(f.Message()) {
				paths = append(paths, append([]protoreflect.FieldDescriptor{f}, rest...))
			}
		}
	}
	return paths
}

// refusesLong sets one string of an otherwise empty message, and looks whether the rules complain of that one.
func refusesLong(t *testing.T, v protovalidate.Validator, input protoreflect.MessageDescriptor, path []protoreflect.FieldDescriptor) bool {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(input.FullName())
	if err != nil {
		t.Fatal(err)
	}
	root := kind.New()
	m := root
	for _, f := range path[:len(path)-1] {
		if f.IsList() {
			m = m.Mutable(f).List().AppendMutable().Message()
		} else {
			m = m.Mutable(f).Message()
		}
	}
	leaf := path[len(path)-1]
	long := strings.Repeat("a", 2<<20)
	switch value := protoreflect.ValueOfString(long); {
	case leaf.IsMap():
		m.Mutable(leaf).Map().Set(protoreflect.ValueOfString("key").MapKey(), value)
	case leaf.IsList():
		if leaf.Message() == nil {
			m.Mutable(leaf).List().Append(value)
		}
	case leaf.Kind() == protoreflect.BytesKind:
		m.Set(leaf, protoreflect.ValueOfBytes([]byte(long)))
	default:
		m.Set(leaf, value)
	}
	var violated *protovalidate.ValidationError
	if !errors.As(v.Validate(root.Interface()), &violated) {
		return false
	}
	for _, violation := range violated.Violations {
		name, _, _ := strings.Cut(lastOf(protovalidate.FieldPathString(violation.Proto.GetField())), "[")
		if name == string(leaf.Name()) {
			return true
		}
	}
	return false
}

func lastOf(path string) string { return path[strings.LastIndex(path, ".")+1:] }

// What a policy is asked is held to the same rules as what is created.
func TestExplainTakesWhatCreateTakes(t *testing.T) {
	asked := make(chan workload.CreateOptions, 4)
	h := serve(t, Config{Workloads: &fakeWorkloads{explain: func(_ context.Context, o workload.CreateOptions) (policy.Decision, error) {
		asked <- o
		return policy.Decision{}, nil
	}}})
	spec := validCreate().GetSpec()
	if _, err := h.policy.Explain(t.Context(), &sandboxdv1.ExplainRequest{Name: "web", Labels: map[string]string{"a": "b"}, Spec: spec}); err != nil {
		t.Fatal(err)
	}
	if o := receive(t, asked, "the question"); o.Name != "web" || o.Labels["a"] != "b" {
		t.Errorf("asked about %+v", o)
	}
	for _, bad := range []*sandboxdv1.ExplainRequest{
		{Name: "-web", Spec: spec},
		{Labels: map[string]string{"": "b"}, Spec: spec},
		{Labels: map[string]string{"a": strings.Repeat("b", 1025)}, Spec: spec},
	} {
		if _, err := h.policy.Explain(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v", bad.String(), err)
		}
	}
}

func TestExecRules(t *testing.T) {
	h := serve(t, Config{Workloads: &fakeWorkloads{}})
	start := func(change func(*sandboxdv1.ExecStart)) proto.Message {
		s := &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}}
		change(s)
		return &sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: s}}
	}
	for name, m := range map[string]proto.Message{
		"NUL in user":      start(func(s *sandboxdv1.ExecStart) { s.User = "root\x00" }),
		"empty signal":     &sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Signal{}},
		"attach, likewise": &sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Signal{}},
		"state unknown":    &sandboxdv1.ListWorkloadsRequest{States: []sandboxdv1.WorkloadState{99}},
		"isolation":        &sandboxdv1.ListWorkloadsRequest{Isolation: 99},
	} {
		if err := h.server.validate(m); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if err := h.server.validate(start(func(s *sandboxdv1.ExecStart) { s.User = "root:wheel" })); err != nil {
		t.Error(err)
	}
}
