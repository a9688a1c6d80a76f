package server

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// services are those of this API.
var services = []string{"WorkloadService", "ImageService", "TemplateService", "SnapshotService", "PolicyService", "SystemService"}

// eachMethod calls fn with every method of this API.
func eachMethod(t *testing.T, fn func(full string, m protoreflect.MethodDescriptor)) {
	t.Helper()
	for _, service := range services {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName("sandboxd.v1." + service))
		if err != nil {
			t.Fatal(err)
		}
		all := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range all.Len() {
			fn(fmt.Sprintf("/sandboxd.v1.%s/%s", service, all.Get(i).Name()), all.Get(i))
		}
	}
}

// A method that is registered and has no row could be called by nobody; a row without method is a typing mistake.
func TestEveryMethodHasAnAccessRow(t *testing.T) {
	h := serve(t, Config{Workloads: &fakeWorkloads{}})
	registered := make(map[string]bool)
	for name, service := range h.server.grpc.GetServiceInfo() {
		for _, m := range service.Methods {
			full := "/" + name + "/" + m.Name
			registered[full] = true
			row, ok := methods[full]
			if !ok {
				t.Errorf("%s has no row in the table of pkg/server/access.go: say which verb of a role it needs, and what it is about", full)
			}
			if (row.verb == "") != row.open || row.verb != "" && !slices.Contains(access.Verbs, row.verb) {
				t.Errorf("%s: its row lets in nobody, or says two things: %+v", full, row)
			}
		}
	}
	for full := range methods {
		if !registered[full] {
			t.Errorf("the access table has a row for %s, which is not registered", full)
		}
	}
}

// Whether a call that changes something is audited is not left to whoever adds it: what only looks says so in its name.
func TestWhatChangesIsAudited(t *testing.T) {
	looks := []string{"Get", "List", "Wait", "Stream", "Watch", "Explain", "Info", "Doctor"}
	eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
		only := slices.ContainsFunc(looks, func(prefix string) bool { return strings.HasPrefix(string(m.Name()), prefix) })
		if methods[full].audited == only {
			t.Errorf("%s: audited %t; a call that changes something is, and its name does not begin with one of %v", full, methods[full].audited, looks)
		}
	})
}

func TestAuthorizeRefuses(t *testing.T) {
	h := serve(t, Config{Workloads: &fakeWorkloads{}})
	known := sandboxdv1.WorkloadService_GetWorkload_FullMethodName
	identified := peer.NewContext(t.Context(), &peer.Peer{AuthInfo: peerInfo{}})
	if _, err := h.server.authorize(identified, known); err != nil {
		t.Errorf("a known caller of a known method: %v", err)
	}
	if _, err := h.server.authorize(identified, "/sandboxd.v1.WorkloadService/Forgotten"); spec.KindOf(err) != spec.KindDenied {
		t.Errorf("a method without a row: %v, want denied", err)
	}
	if _, err := h.server.authorize(t.Context(), known); spec.KindOf(err) != spec.KindDenied {
		t.Errorf("a caller the transport did not identify: %v, want denied", err)
	}
	h.server.SetAccess(roles(t, "- {name: r, everything: true}", 77))
	if _, err := h.server.authorize(identified, known); spec.KindOf(err) != spec.KindDenied {
		t.Errorf("a caller without a role: %v, want denied", err)
	}
	// Without a permit nothing is seen and nothing may be asked for.
	if p := permitOf(t.Context()); p.sees(nil, spec.Caller{}) || p.everything() != nil {
		t.Error("a call that was not authorized sees workloads")
	}
}

// roles is a table of roles, each given to a user.
func roles(t *testing.T, source string, uid int) *access.Table {
	t.Helper()
	var names []string
	for line := range strings.Lines(source) {
		_, rest, ok := strings.Cut(line, "name: ")
		if ok {
			names = append(names, strings.FieldsFunc(rest, func(r rune) bool { return strings.ContainsRune(",} \n", r) })[0])
		}
	}
	table, err := access.Load(fmt.Appendf(nil, "version: 1\nroles:\n%s\ngrants:\n  - {users: [\"%d\"], roles: [%s]}\n", source, uid, strings.Join(names, ", ")), "test")
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// minimal is the smallest request that is well-formed.
func minimal(t *testing.T, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	m := kind.New()
	fill(m)
	return m.Interface()
}

func fill(m protoreflect.Message) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		switch f.Name() {
		case "id", "reference", "image":
			m.Set(f, protoreflect.ValueOfString("busybox"))
			if f.Parent().Name() == "RemoveTemplateRequest" {
				m.Set(f, protoreflect.ValueOfString("abcd"))
			}
		case "snapshot":
			m.Set(f, protoreflect.ValueOfString("abcd"))
		case "path":
			m.Set(f, protoreflect.ValueOfString("/tmp"))
		case "isolation":
			m.Set(f, protoreflect.ValueOfEnum(sandboxdv1.Isolation_ISOLATION_VM.Number()))
		case "command":
			if f.Parent().Name() == "ExecStart" {
				m.Mutable(f).List().Append(protoreflect.ValueOfString("true"))
			}
		case "name":
			if f.Parent().Name() == "ImportImageStart" {
				m.Set(f, protoreflect.ValueOfString("busybox"))
			}
		case "spec", "start", "resources":
			fill(m.Mutable(f).Message())
		}
	}
}

// invoke makes a call of any method with one message and answers with how it ended. A call that was let through ends in
// the fakes, which expect nothing.
func invoke(ctx context.Context, conn *grpc.ClientConn, full string, m protoreflect.MethodDescriptor, request proto.Message) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: m.IsStreamingServer(), ClientStreams: true}, full)
	if err != nil {
		return err
	}
	if err := stream.SendMsg(request); err != nil && err != io.EOF {
		return err
	}
	if !m.IsStreamingClient() {
		if err := stream.CloseSend(); err != nil {
			return err
		}
	}
	kind, err := protoregistry.GlobalTypes.FindMessageByName(m.Output().FullName())
	if err != nil {
		return err
	}
	return stream.RecvMsg(kind.New().Interface())
}

// accessHarness has one workload of tenant a, and one image.
func accessHarness(t *testing.T) *harness {
	w := workload.Workload{ID: strings.Repeat("ab", 16), Name: "w", Labels: map[string]string{"tenant": "a"}, Spec: spec.Workload{Image: "busybox", Isolation: spec.IsolationVM}}
	of := workload.Snapshot{ID: strings.Repeat("cd", 16), Labels: w.Labels, Spec: w.Spec}
	h := serve(t, Config{
		// Calls that get through end in a panic of the fakes: no news.
		Log: zap.NewNop(),
		Workloads: &fakeWorkloads{
			get:      func(string) (workload.Workload, error) { return w, nil },
			snapshot: func(string) (workload.Snapshot, error) { return of, nil },
			list:     func(workload.Filter, int, string) ([]workload.Workload, string, error) { return nil, "", nil },
		},
		Images: &fakeImages{get: func(string) (image.Image, error) {
			return image.Image{Digest: "sha256:" + strings.Repeat("0", 64), Names: []string{"docker.io/library/busybox:latest"}}, nil
		}, list: func() ([]image.Image, error) { return nil, nil }},
	})
	return h
}

// fullRole may ask for everything the table has checks for, but says each of them.
const fullRole = `  - name: full
    may: [%s]
    workloads: {tenant: a}
    isolation: [auto, container, vm]
    images: ["**"]
    binds: [{path: /, writable: true}]
    capabilities: [ALL]
    networks: [front]
    privileges: [seccomp, placement, swap, insecure-pull]
    max: {cpu_millis: 100000, memory: 64g, disk: 64g, pids: 100000, log: 64g}
`

// Every method with every verb a role can have, and with none.
func TestMethodsTimesVerbs(t *testing.T) {
	h := accessHarness(t)
	calls := 0
	for _, verb := range append([]access.Verb{""}, access.Verbs...) {
		h.server.SetAccess(roles(t, fmt.Sprintf(fullRole, verb), 0))
		eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
			request := minimal(t, m.Input())
			label(request, "a")
			if err := h.server.validate(request); err != nil {
				t.Fatalf("%s: fill must learn to make this request: %v", full, err)
			}
			calls++
			err := invoke(t.Context(), h.conn, full, m, request)
			denied := status.Code(err) == codes.PermissionDenied
			if want := methods[full].verb != verb || len(methods[full].also) > 0; denied != want {
				t.Errorf("%s by a role that may %q: denied %t, want %t: %v", full, verb, denied, want, err)
			}
			if info, _ := detailsOf(err); denied && (info.GetReason() != reasonForbidden || info.GetMetadata()["rule"] != "full.may") {
				t.Errorf("%s by a role that may %q: the denial names no rule: %v", full, verb, info)
			}
		})
	}
	t.Logf("%d calls", calls)
}

// A method that does several things at once needs the verbs of all of them, in one role.
func TestMethodsOfSeveralVerbs(t *testing.T) {
	h := accessHarness(t)
	several := 0
	eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
		needed := methods[full].verbs()
		if len(needed) == 1 {
			return
		}
		several++
		request := minimal(t, m.Input())
		label(request, "a")
		join := func(verbs []access.Verb) string {
			var s []string
			for _, v := range verbs {
				s = append(s, string(v))
			}
			return strings.Join(s, ", ")
		}
		h.server.SetAccess(roles(t, fmt.Sprintf(fullRole, join(needed)), 0))
		if err := invoke(t.Context(), h.conn, full, m, request); status.Code(err) == codes.PermissionDenied {
			t.Errorf("%s with all it needs: %v", full, err)
		}
		for i, left := range needed {
			others := slices.Delete(slices.Clone(needed), i, i+1)
			h.server.SetAccess(roles(t, fmt.Sprintf(fullRole, join(others)), 0))
			err := invoke(t.Context(), h.conn, full, m, request)
			if info, _ := detailsOf(err); status.Code(err) != codes.PermissionDenied || info.GetMetadata()["rule"] != "full.may" {
				t.Errorf("%s without %q: %v", full, left, err)
			}
			second := strings.Replace(fmt.Sprintf(fullRole, left), "name: full", "name: second", 1)
			h.server.SetAccess(roles(t, fmt.Sprintf(fullRole, join(others))+second, 0))
			if err := invoke(t.Context(), h.conn, full, m, request); status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s with %q from another role: %v", full, left, err)
			}
		}
	})
	if several == 0 {
		t.Error("there is none: this test tests nothing")
	}
}

// label gives a request that makes something the tenant's label.
func label(m proto.Message, tenant string) {
	if f := m.ProtoReflect().Descriptor().Fields().ByName("labels"); f != nil && f.IsMap() {
		m.ProtoReflect().Mutable(f).Map().Set(protoreflect.ValueOfString("tenant").MapKey(), protoreflect.ValueOfString(tenant))
	}
}

// What a caller may not see is not there, whatever it is called by.
func TestOthersWorkloadsAreNotThere(t *testing.T) {
	mine := workload.Workload{ID: "aaaa" + strings.Repeat("0", 28), Name: "mine", Labels: map[string]string{"tenant": "a"}}
	other := workload.Workload{ID: "bbbb" + strings.Repeat("0", 28), Name: "other", Labels: map[string]string{"tenant": "b"}}
	var asked string
	h := serve(t, Config{
		Access: roles(t, fmt.Sprintf(fullRole, "view, logs, control"), 0),
		Workloads: &fakeWorkloads{
			get: func(ref string) (workload.Workload, error) {
				for _, w := range []workload.Workload{mine, other} {
					if ref == w.Name || strings.HasPrefix(w.ID, ref) {
						return w, nil
					}
				}
				return workload.Workload{}, spec.Invalidf("id", "%q is the beginning of more than one", ref)
			},
			list: func(f workload.Filter, _ int, _ string) (out []workload.Workload, _ string, _ error) {
				for _, w := range []workload.Workload{mine, other} {
					if f.Visible(w) {
						out = append(out, w)
					}
				}
				return out, "", nil
			},
			logs: func(_ context.Context, ref string, _ workload.LogOptions, _ func(workload.LogEntry) error) error {
				asked = ref
				return nil
			},
			watch: func(_ context.Context, _ string, _ time.Time, fn func(workload.Event) error) error {
				for _, e := range []workload.Event{
					{WorkloadID: mine.ID, Labels: mine.Labels}, {WorkloadID: other.ID, Labels: other.Labels},
					{Type: workload.EventImageAdded, Attributes: map[string]string{"image": "registry.example/b"}},
				} {
					if err := fn(e); err != nil {
						return err
					}
				}
				return nil
			},
		},
	})
	list, err := h.workloads.ListWorkloads(t.Context(), &sandboxdv1.ListWorkloadsRequest{})
	if err != nil || len(list.GetWorkloads()) != 1 || list.GetWorkloads()[0].GetName() != "mine" {
		t.Errorf("list: %v %v", list, err)
	}
	if _, err := h.workloads.GetWorkload(t.Context(), &sandboxdv1.GetWorkloadRequest{Id: "mine"}); err != nil {
		t.Errorf("my own: %v", err)
	}
	var missing error
	for _, ref := range []string{"none", "other", other.ID, "bbbb"} {
		_, err := h.workloads.GetWorkload(t.Context(), &sandboxdv1.GetWorkloadRequest{Id: ref})
		if status.Code(err) != codes.NotFound {
			t.Errorf("get %s: %v, want not found", ref, err)
		}
		if missing == nil {
			missing = err
		} else if strings.ReplaceAll(err.Error(), ref, "none") != missing.Error() {
			t.Errorf("%q tells of a workload that the caller may not see: %q is what is said of one that is not there", err, missing)
		}
	}
	logs, err := h.workloads.StreamLogs(t.Context(), &sandboxdv1.StreamLogsRequest{Id: "other"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := logs.Recv(); status.Code(err) != codes.NotFound {
		t.Errorf("logs: %v, want not found", err)
	}
	logs, err = h.workloads.StreamLogs(t.Context(), &sandboxdv1.StreamLogsRequest{Id: "mine"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := logs.Recv(); err != io.EOF || asked != mine.ID {
		t.Errorf("logs of mine: %v; asked for %q, want the id that was looked at", err, asked)
	}
	events, err := h.workloads.WatchEvents(t.Context(), &sandboxdv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for {
		e, err := events.Recv()
		if err != nil {
			break
		}
		got = append(got, e.GetEvent().GetWorkloadId())
	}
	if !slices.Equal(got, []string{mine.ID}) {
		t.Errorf("events of %q, want mine only", got)
	}
	// A verb the role lacks is denied even on what it sees.
	if _, err := h.workloads.DeleteWorkload(t.Context(), &sandboxdv1.DeleteWorkloadRequest{Id: "mine"}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("delete: %v, want denied", err)
	}
}

// A reference is what the store takes it for, not what it looks like.
func TestImagesByWhatTheyMean(t *testing.T) {
	evil := image.Image{Digest: "sha256:abcdef" + strings.Repeat("0", 58), Names: []string{"registry.example/evil:1"}}
	good := image.Image{Digest: "sha256:123456" + strings.Repeat("0", 58), Names: []string{"docker.io/library/busybox:latest", "registry.example/other:1"}}
	created := ""
	h := serve(t, Config{
		Access: roles(t, "  - {name: r, may: [create, images-view, images-remove], isolation: [auto], images: [\"docker.io/library/**\"]}", 0),
		Images: &fakeImages{
			get: func(ref string) (image.Image, error) {
				name, _ := image.CanonicalName(ref)
				for _, i := range []image.Image{evil, good} {
					if slices.Contains(i.Names, name) || strings.HasPrefix(i.Digest, ref) || strings.HasPrefix(i.Digest, "sha256:"+ref) {
						return i, nil
					}
				}
				return image.Image{}, spec.Errorf(spec.KindNotFound, "none")
			},
			list:   func() ([]image.Image, error) { return []image.Image{evil, good}, nil },
			remove: func(string, func(string) bool) error { return nil },
		},
		Workloads: &fakeWorkloads{create: func(_ context.Context, o workload.CreateOptions) (workload.Workload, error) {
			created = o.Spec.Image
			return workload.Workload{}, nil
		}, events: make(chan workload.Event, 10)},
	})
	for ref, want := range map[string]codes.Code{
		"busybox": codes.OK, good.Digest: codes.OK, "123456": codes.OK,
		"registry.example/evil:1": codes.PermissionDenied, evil.Digest: codes.PermissionDenied,
		// As a name it would be docker.io/library/abcdef, which fits; the store takes it for a digest.
		"abcdef": codes.PermissionDenied,
		// The same content by a name that is not the role's.
		"registry.example/other:1": codes.PermissionDenied,
	} {
		create := validCreate()
		create.Spec.Image = ref
		created = ""
		_, err := h.workloads.CreateWorkload(t.Context(), create)
		if status.Code(err) != want || (created != "") != (want == codes.OK) {
			t.Errorf("create from %s: %v, want %v", ref, err, want)
		}
	}
	list, err := h.images.ListImages(t.Context(), &sandboxdv1.ListImagesRequest{})
	if err != nil || len(list.GetImages()) != 1 || !slices.Equal(list.GetImages()[0].GetNames(), good.Names[:1]) {
		t.Errorf("list: %v %v, want the good one by its first name", list, err)
	}
	for ref, want := range map[string]codes.Code{
		"busybox": codes.OK,
		// Would take the other name as well.
		good.Digest: codes.PermissionDenied, "abcdef": codes.PermissionDenied,
	} {
		if _, err := h.images.RemoveImage(t.Context(), &sandboxdv1.RemoveImageRequest{Reference: ref}); status.Code(err) != want {
			t.Errorf("remove %s: %v, want %v", ref, err, want)
		}
	}
}

// What goes on from a snapshot, or is forked, is asked for as a creation is, and a snapshot is its workload's owner's and tenant's.
func TestWhoMakesWorkloadsOfSnapshots(t *testing.T) {
	const may = `  - {name: r, may: [snapshot, create, control, view], workloads: {tenant: %s}, isolation: [%s], images: ["%s"]}`
	for _, c := range []struct {
		name, tenant, isolation, image string
		labels                         map[string]string
		want                           codes.Code
	}{
		{"what it may create", "a", "vm", "**", nil, codes.Internal}, // let through: the fake panics
		{"another tenant's", "b", "vm", "**", nil, codes.NotFound},
		{"another isolation", "a", "container", "**", nil, codes.PermissionDenied},
		{"another image", "a", "vm", "debian", nil, codes.PermissionDenied},
		{"labels of another tenant", "a", "vm", "**", map[string]string{"tenant": "b"}, codes.PermissionDenied},
	} {
		h := accessHarness(t)
		h.server.SetAccess(roles(t, fmt.Sprintf(may, c.tenant, c.isolation, c.image), os.Geteuid()))
		client := sandboxdv1.NewSnapshotServiceClient(h.conn)
		_, err := client.RestoreSnapshot(t.Context(), &sandboxdv1.RestoreSnapshotRequest{Snapshot: "abcd", Labels: c.labels})
		if status.Code(err) != c.want {
			t.Errorf("restore of %s: %v, want %s", c.name, err, c.want)
		}
		if _, err := client.ForkWorkload(t.Context(), &sandboxdv1.ForkWorkloadRequest{Id: "w", Labels: c.labels}); status.Code(err) != c.want {
			t.Errorf("fork of %s: %v, want %s", c.name, err, c.want)
		}
		if _, err := client.DeleteSnapshot(t.Context(), &sandboxdv1.DeleteSnapshotRequest{Snapshot: "abcd"}); (c.tenant == "b") != (status.Code(err) == codes.NotFound) {
			t.Errorf("removal of %s: %v", c.name, err)
		}
	}
}
