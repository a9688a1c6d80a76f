package server

import (
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// filled sets every field of a message, however deep, to something that is not zero.
func filled[M proto.Message](m M) M {
	fillMessage(m.ProtoReflect(), new(uint64))
	return m
}

func fillMessage(m protoreflect.Message, n *uint64) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		switch {
		case fd.IsMap():
			entry := m.Mutable(fd).Map()
			entry.Set(protoreflect.MapKey(fillScalar(fd.MapKey(), n)), fillScalar(fd.MapValue(), n))
		case fd.IsList():
			list := m.Mutable(fd).List()
			for range 2 {
				if fd.Kind() == protoreflect.MessageKind {
					fillMessage(list.AppendMutable().Message(), n)
				} else {
					list.Append(fillScalar(fd, n))
				}
			}
		case fd.Kind() == protoreflect.MessageKind:
			fillMessage(m.Mutable(fd).Message(), n)
		default:
			m.Set(fd, fillScalar(fd, n))
		}
	}
}

func fillScalar(fd protoreflect.FieldDescriptor, n *uint64) protoreflect.Value {
	*n++
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(fmt.Sprintf("%s-%d", fd.Name(), *n))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(*n))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(*n)
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(*n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(*n))
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(fmt.Appendf(nil, "%s-%d", fd.Name(), *n))
	case protoreflect.EnumKind:
		// The last one: zero is unspecified.
		values := fd.Enum().Values()
		return protoreflect.ValueOfEnum(values.Get(values.Len() - 1).Number())
	}
	panic("no value for kind " + fd.Kind().String())
}

// A field that is added to WorkloadSpec and forgotten in either direction is lost on the way and fails this.
func TestSpecRoundTrip(t *testing.T) {
	want := filled(&sandboxdv1.WorkloadSpec{})
	got := specToAPI(specFromAPI(want))
	if d := diff(want, got); d != "" {
		t.Errorf("a spec changed on the way in and out:\n%s", d)
	}
}

// The same for the fields of pkg/spec, the other way round.
func TestSpecRoundTripFromOurSide(t *testing.T) {
	var want spec.Workload
	fillGo(reflect.ValueOf(&want).Elem(), new(int))
	want.Isolation = spec.IsolationVM
	for i := range want.Mounts {
		want.Mounts[i].Type = spec.MountTmpfs
	}
	if got := specFromAPI(specToAPI(want)); !reflect.DeepEqual(want, got) {
		t.Errorf("a spec changed on the way out and in:\nwant %+v\ngot  %+v", want, got)
	}
}

func TestExecCarriesEveryField(t *testing.T) {
	start := filled(&sandboxdv1.ExecStart{})
	p := execFromAPI(start)
	back := processToAPI(p)
	got := &sandboxdv1.ExecStart{
		Id:      start.GetId(), // names the workload, no part of the process
		Command: back.GetCommand(), Env: back.GetEnv(), User: back.GetUser(), WorkingDir: back.GetWorkingDir(),
		Terminal: back.GetTerminal(), Stdin: back.GetStdin(), TerminalSize: back.GetTerminalSize(),
		OutputPipes: start.GetOutputPipes(), // where its output goes, no part of it either
	}
	if d := diff(start, got); d != "" {
		t.Errorf("an exec changed on the way:\n%s", d)
	}
}

func diff(want, got proto.Message) string {
	if proto.Equal(want, got) {
		return ""
	}
	return fmt.Sprintf("want %v\ngot  %v", want, got)
}

// fillGo sets every field of a Go value to something that is not zero.
func fillGo(v reflect.Value, n *int) {
	*n++
	switch {
	case v.Type() == reflect.TypeFor[time.Time]():
		v.Set(reflect.ValueOf(time.Unix(int64(*n), 5).UTC()))
		return
	case v.Type() == reflect.TypeFor[netip.Addr]():
		v.Set(reflect.ValueOf(netip.AddrFrom4([4]byte{10, 0, byte(*n >> 8), byte(*n)})))
		return
	case v.Type() == reflect.TypeFor[netip.Prefix](): // a default route's, whose gateway is shown
		v.Set(reflect.ValueOf(netip.PrefixFrom(netip.IPv4Unspecified(), 0)))
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		for i := range v.NumField() {
			fillGo(v.Field(i), n)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fillGo(v.Elem(), n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fillGo(v.Index(i), n)
		}
	case reflect.Map:
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fillGo(key, n)
		fillGo(value, n)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(key, value)
	case reflect.String:
		v.SetString(fmt.Sprintf("s%d", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(*n))
	case reflect.Float64:
		v.SetFloat(float64(*n))
	default:
		panic("no value for " + v.Type().String())
	}
}

// unset names the fields of a message, however deep, that are zero.
func unset(m protoreflect.Message, prefix string) (missing []string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		name := prefix + string(fd.Name())
		if !m.Has(fd) {
			missing = append(missing, name)
			continue
		}
		if fd.Kind() != protoreflect.MessageKind || fd.IsMap() || strings.HasPrefix(string(fd.Message().FullName()), "google.protobuf.") {
			continue
		}
		if fd.IsList() {
			missing = append(missing, unset(m.Get(fd).List().Get(0).Message(), name+"[0].")...)
		} else {
			missing = append(missing, unset(m.Get(fd).Message(), name+".")...)
		}
	}
	return missing
}

// What callers see comes from values of ours that are full: then every field of the message must be set.
func TestViewsLeaveNothingOut(t *testing.T) {
	var (
		n        int
		w        workload.Workload
		decision policy.Decision
		usage    workload.Usage
		event    workload.Event
		img      image.Image
		progress image.Progress
		check    runtime.Check
		avail    runtime.Availability
		rule     policy.Rule
		trace    []policy.Trace
		exit     spec.Exit
	)
	for _, p := range []any{&w, &decision, &usage, &event, &img, &progress, &check, &avail, &rule, &trace, &exit} {
		fillGo(reflect.ValueOf(p).Elem(), &n)
	}
	decision.Isolation, decision.Granted = spec.IsolationContainer, spec.IsolationVM
	w.Spec.Isolation, w.Status.Isolation, w.Status.State, w.Status.Decision = spec.IsolationAuto, spec.IsolationVM, workload.StateExited, decision
	for i := range w.Spec.Mounts {
		w.Spec.Mounts[i].Type = spec.MountBind
	}
	usage.Workload = w
	w.Status.OOM.Where = workload.OOMVMM
	event.Isolation, event.Type = spec.IsolationVM, workload.EventExited
	check.Result = "warning"
	for _, m := range []proto.Message{
		workloadToAPI(w), decisionToAPI(decision), usageToAPI(usage), eventToAPI(event), imageToAPI(img),
		progressToAPI(progress), checkToAPI(check), isolationInfoToAPI(spec.IsolationVM, avail), ruleToAPI(rule),
		traceToAPI(trace)[0], exitToAPI(exit),
	} {
		if missing := unset(m.ProtoReflect(), ""); len(missing) > 0 {
			t.Errorf("%s: nothing sets %v", m.ProtoReflect().Descriptor().Name(), missing)
		}
	}
}

// The zero value must stay unspecified, in both directions, and no row may be missing.
func TestTablesAreComplete(t *testing.T) {
	checkTable(t, "isolations", isolations)
	checkTable(t, "mountTypes", mountTypes)
	checkTable(t, "states", states)
	checkTable(t, "eventTypes", eventTypes)
	checkTable(t, "streams", streams)
	checkTable(t, "checkResults", checkResults)
}

func checkTable[A comparable, B interface {
	comparable
	protoreflect.Enum
}](t *testing.T, name string, table pairs[A, B]) {
	t.Helper()
	var zeroA A
	var zeroB B
	if table.fromAPI(zeroB) != zeroA || table.toAPI(zeroA) != zeroB {
		t.Errorf("%s: unspecified means something", name)
	}
	values := zeroB.Descriptor().Values()
	seen := make(map[protoreflect.EnumNumber]bool)
	for _, row := range table {
		if table.fromAPI(row.api) != row.ours || table.toAPI(row.ours) != row.api {
			t.Errorf("%s: %v and %v do not mean each other", name, row.ours, row.api)
		}
		seen[row.api.Number()] = true
	}
	for i := range values.Len() {
		if v := values.Get(i); v.Number() != 0 && !seen[v.Number()] {
			t.Errorf("%s: no row for %s", name, v.Name())
		}
	}
}

// Strings that no proto message may carry would make every answer that has them fail: a sandbox could hide behind that.
func TestHostileStringsCanBeSent(t *testing.T) {
	var w workload.Workload
	bad := "\xff\xfe not UTF-8"
	w.Status.Message, w.Status.Claims.BootID, w.Status.Claims.KernelRelease = bad, bad, bad
	e := workload.Event{Message: bad, Attributes: map[string]string{bad: bad}}
	for _, m := range []proto.Message{workloadToAPI(w), eventToAPI(e)} {
		if _, err := proto.Marshal(m); err != nil {
			t.Errorf("%s: %v", m.ProtoReflect().Descriptor().Name(), err)
		}
	}
}
