package oci

import (
	"bytes"
	"reflect"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestFingerprintSeesEveryField: a field that it did not see would give a workload another's filter.
func TestFingerprintSeesEveryField(t *testing.T) {
	errno := uint(1)
	base := func() *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{
			DefaultAction: specs.ActErrno, DefaultErrnoRet: &errno, Architectures: []specs.Arch{specs.ArchX86_64},
			Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog}, ListenerPath: "p", ListenerMetadata: "m",
			Syscalls: []specs.LinuxSyscall{{
				Names: []string{"read"}, Action: specs.ActAllow, ErrnoRet: &errno,
				Args: []specs.LinuxSeccompArg{{Index: 1, Value: 2, ValueTwo: 3, Op: specs.OpEqualTo}},
			}},
		}
	}
	want := fingerprint(base())
	if want != fingerprint(base()) {
		t.Fatal("two equal profiles differ")
	}
	seen := 0
	// Every leaf that the types have, those of a later version of the specification too.
	var change func(at func(*specs.LinuxSeccomp) reflect.Value)
	change = func(at func(*specs.LinuxSeccomp) reflect.Value) {
		v := at(base())
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				change(func(p *specs.LinuxSeccomp) reflect.Value { return at(p).Field(i) })
			}
			return
		case reflect.Slice:
			change(func(p *specs.LinuxSeccomp) reflect.Value { return at(p).Index(0) })
		}
		p := base()
		switch v := at(p); v.Kind() {
		case reflect.String:
			v.SetString(v.String() + "x")
		case reflect.Uint, reflect.Uint32, reflect.Uint64:
			v.SetUint(v.Uint() + 1)
		case reflect.Pointer:
			other := errno + 1
			v.Set(reflect.ValueOf(&other))
		case reflect.Slice:
			v.Set(reflect.Append(v, v.Index(0)))
		default:
			t.Fatalf("a field of kind %v", v.Kind())
		}
		seen++
		if fingerprint(p) == want {
			t.Errorf("%+v is taken for %+v", p, base())
		}
	}
	change(func(p *specs.LinuxSeccomp) reflect.Value { return reflect.ValueOf(p).Elem() })
	if seen < 15 {
		t.Errorf("only %d fields", seen)
	}
	// Where one field ends and the next begins.
	a, b := base(), base()
	a.Syscalls[0].Names, b.Syscalls[0].Names = []string{"ab", "c"}, []string{"a", "bc"}
	if fingerprint(a) == fingerprint(b) {
		t.Error("names run together")
	}
}

func TestCompiledIsKept(t *testing.T) {
	c := &compiled{}
	compiles := 0
	compile := func(p *specs.LinuxSeccomp) ([]byte, error) { compiles++; return []byte(p.DefaultAction), nil }
	for range 2 {
		for _, action := range []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno} {
			if got, err := c.get(&specs.LinuxSeccomp{DefaultAction: action}, compile); err != nil || !bytes.Equal(got, []byte(action)) {
				t.Errorf("%s: %s, %v", action, got, err)
			}
		}
	}
	if compiles != 2 {
		t.Errorf("compiled %d times", compiles)
	}
	for i := range 3 * maxCompiled {
		if _, err := c.get(&specs.LinuxSeccomp{ListenerMetadata: string(rune(i))}, compile); err != nil || len(c.filters) > maxCompiled {
			t.Fatalf("%d are kept, %v", len(c.filters), err)
		}
	}
}
