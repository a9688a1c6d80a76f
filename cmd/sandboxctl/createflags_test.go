package main

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// parseCreate reads a command line of create.
func parseCreate(args ...string) (*sandboxdv1.CreateWorkloadRequest, error) {
	var c createFlags
	f := pflag.NewFlagSet("create", pflag.ContinueOnError)
	c.register(f)
	f.SetInterspersed(false)
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	return c.request(f.Arg(0), f.Args()[1:])
}

func TestCreateFlags(t *testing.T) {
	dir := t.TempDir()
	envFile := filepath.Join(dir, "env")
	if err := os.WriteFile(envFile, []byte("# comment\n\nFROM_FILE=a b\nINHERITED\nNOT_SET_ANYWHERE\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("INHERITED", "yes")
	got, err := parseCreate("--name", "web", "--isolation", "vm", "--cpus", "1.5", "--memory", "256m", "--pids", "99", "--disk", "1g",
		"-e", "A=1=2", "-e", "INHERITED", "--env-file", envFile, "-u", "1:2", "-w", "/srv", "--hostname", "h", "-l", "k=v=w", "--label", "bare",
		"--mount", "type=tmpfs,target=/x,size=64m,mode=1777,readonly", "--mount", "type=bind,src=/a,dst=/b,ro=false", "--tmpfs", "/y:size=1k,ro", "--tmpfs", "/z",
		"--read-only", "--network", "lan", "--cap-add", "net_admin,SYS_TIME", "--cap-drop", "ALL", "--ulimit", "nofile=1024:2048", "--ulimit", "core=-1",
		"--entrypoint", "", "--stop-signal", "USR1", "-it", "debian", "sh", "-c", "--name x")
	if err != nil {
		t.Fatal(err)
	}
	want := &sandboxdv1.CreateWorkloadRequest{
		Name: "web", Labels: map[string]string{"k": "v=w", "bare": ""},
		Spec: &sandboxdv1.WorkloadSpec{
			Image: "debian", Isolation: sandboxdv1.Isolation_ISOLATION_VM,
			Process: &sandboxdv1.ProcessSpec{
				// What follows the image is the command's, also when it looks like a flag.
				Entrypoint: []string{""}, Command: []string{"sh", "-c", "--name x"},
				// Files first: flags win in the sandbox.
				Env:  []string{"FROM_FILE=a b", "INHERITED=yes", "A=1=2", "INHERITED=yes"},
				User: "1:2", WorkingDir: "/srv", Terminal: true, Stdin: true,
				Rlimits: []*sandboxdv1.Rlimit{{Type: "nofile", Soft: 1024, Hard: 2048}, {Type: "core", Soft: math.MaxUint64, Hard: math.MaxUint64}},
			},
			Resources: &sandboxdv1.Resources{CpuMillis: 1500, MemoryBytes: 256 << 20, Pids: 99, DiskBytes: 1 << 30},
			Hostname:  "h", Network: "lan", ReadOnlyRoot: true, StopSignal: "USR1",
			CapAdd: []string{"NET_ADMIN", "SYS_TIME"}, CapDrop: []string{"ALL"},
			Mounts: []*sandboxdv1.Mount{
				{Type: sandboxdv1.Mount_TYPE_TMPFS, Target: "/x", SizeBytes: 64 << 20, Mode: 0o1777, ReadOnly: true},
				{Type: sandboxdv1.Mount_TYPE_BIND, Source: "/a", Target: "/b"},
				{Type: sandboxdv1.Mount_TYPE_TMPFS, Target: "/y", SizeBytes: 1024, ReadOnly: true},
				{Type: sandboxdv1.Mount_TYPE_TMPFS, Target: "/z"},
			},
		},
	}
	if !proto.Equal(want, got) {
		t.Errorf("want %s\ngot  %s", prototext.Format(want), prototext.Format(got))
	}
}

func TestDefaultsLeaveTheChoiceToTheDaemon(t *testing.T) {
	got, err := parseCreate("debian")
	if err != nil {
		t.Fatal(err)
	}
	want := &sandboxdv1.CreateWorkloadRequest{Spec: &sandboxdv1.WorkloadSpec{
		Image: "debian", Isolation: sandboxdv1.Isolation_ISOLATION_AUTO, Network: "none",
		Process: &sandboxdv1.ProcessSpec{}, Resources: &sandboxdv1.Resources{},
	}}
	if !proto.Equal(want, got) {
		t.Errorf("want %s\ngot  %s", prototext.Format(want), prototext.Format(got))
	}
}

func TestCreateFlagsRefused(t *testing.T) {
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--isolation", "jail"}, "auto, container or vm"},
		{[]string{"--cpus", "many"}, "--cpus"},
		{[]string{"--cpus", "0"}, "--cpus"},
		{[]string{"--cpus", "-1"}, "--cpus"},
		{[]string{"--cpus", "NaN"}, "--cpus"},
		{[]string{"--memory", "lots"}, "--memory"},
		{[]string{"--memory", "12q"}, "--memory"},
		{[]string{"--memory", "-1m"}, "--memory"},
		{[]string{"--memory", "99999999t"}, "--memory"},
		{[]string{"-l", "=v"}, "key=value"},
		{[]string{"-e", "=v"}, "NAME=value"},
		{[]string{"--env-file", "/nonexistent"}, "--env-file"},
		{[]string{"--mount", "target=/x"}, "type is missing"},
		{[]string{"--mount", "type=tmpfs"}, "target is missing"},
		{[]string{"--mount", "type=volume,target=/x"}, "unknown type"},
		{[]string{"--mount", "type=tmpfs,target=/x,color=red"}, "unknown option"},
		{[]string{"--mount", "type=tmpfs,target=/x,mode=99"}, "octal"},
		{[]string{"--tmpfs", "/x:noexec"}, "unknown option"},
		{[]string{"--tmpfs", "/x:source=/etc"}, "unknown option"},
		{[]string{"--ulimit", "nofile"}, "--ulimit"},
		{[]string{"--ulimit", "nofile=a:b"}, "--ulimit"},
		{[]string{"--publish", "80:80"}, "unknown flag"},
	} {
		if _, err := parseCreate(append(c.args, "debian")...); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v, want an error that says %q", c.args, err, c.says)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for s, want := range map[string]uint64{
		"0": 0, "512": 512, "512b": 512, "64k": 64 << 10, "64K": 64 << 10, "256m": 256 << 20, "256MB": 256 << 20, "256MiB": 256 << 20,
		"1.5g": 3 << 29, "2t": 2 << 40,
	} {
		if got, err := parseBytes(s); err != nil || got != want {
			t.Errorf("parseBytes(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "m", "-1", "1x", "1mm", "1 m", "1e", "0x10", "_", "1_", "inf", "9223372036854775807"} {
		if got, err := parseBytes(s); err == nil {
			t.Errorf("parseBytes(%q) = %d, want an error", s, got)
		}
	}
}

func TestFilters(t *testing.T) {
	f, err := parseFilters([]string{"label=a=b=c", "label=d", "state=exited", "state=failed", "isolation=vm", "name=we"})
	if err != nil {
		t.Fatal(err)
	}
	want := &sandboxdv1.ListWorkloadsRequest{
		Labels: map[string]string{"a": "b=c", "d": ""}, Isolation: sandboxdv1.Isolation_ISOLATION_VM,
		States: []sandboxdv1.WorkloadState{sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED, sandboxdv1.WorkloadState_WORKLOAD_STATE_FAILED},
	}
	if !proto.Equal(want, f.request) || !slices.Equal(f.names, []string{"we"}) {
		t.Errorf("got %v and names %v", f.request, f.names)
	}
	if !f.named("web") || f.named("db") || !(&filter{}).named("any") {
		t.Error("names are not matched by their parts")
	}
	for _, bad := range []string{"label", "label=", "state=dead", "state=unspecified", "isolation=auto", "isolation=", "color=red"} {
		if _, err := parseFilters([]string{bad}); err == nil {
			t.Errorf("filter %q was accepted", bad)
		}
	}
}

func TestSecurityOpt(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	profile := write("profile.json", `{"defaultAction":"SCMP_ACT_ALLOW"}`)
	for opt, want := range map[string]*sandboxdv1.Seccomp{
		"seccomp=unconfined": {Unconfined: true},
		"seccomp=" + profile: {Profile: `{"defaultAction":"SCMP_ACT_ALLOW"}`},
	} {
		got, err := parseCreate("--security-opt", opt, "debian")
		if err != nil || !proto.Equal(got.GetSpec().GetSeccomp(), want) {
			t.Errorf("%s: %v, %v", opt, got.GetSpec().GetSeccomp(), err)
		}
	}
	for _, opts := range [][]string{
		{"seccomp"}, {"seccomp="}, {"apparmor=x"}, {"no-new-privileges"}, {"seccomp=" + filepath.Join(dir, "missing")}, {"seccomp=" + write("empty", " \n")},
		{"seccomp=" + write("large", strings.Repeat("x", maxSeccompProfile+1))}, {"seccomp=unconfined", "seccomp=" + profile},
	} {
		var args []string
		for _, o := range opts {
			args = append(args, "--security-opt", o)
		}
		if _, err := parseCreate(append(args, "debian")...); err == nil || !strings.Contains(err.Error(), "--security-opt") {
			t.Errorf("%q: %v", opts, err)
		}
	}
}
