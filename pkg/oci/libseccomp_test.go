package oci

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// regenerateEnv, when set, has libseccomp compile the profiles anew (Debian: apt-get install python3-seccomp).
const regenerateEnv = "SANDBOXD_REGENERATE_LIBSECCOMP"

type libseccompProfile struct {
	Default uint             `json:"default"`
	Rules   []libseccompRule `json:"rules"`
}

type libseccompRule struct {
	Nr    uint32  `json:"nr"`
	Name  string  `json:"name"`
	Errno *uint   `json:"errno"`
	Args  [][]any `json:"args"`
}

// forLibseccomp is a profile in the form testdata/libseccomp.py reads.
func forLibseccomp(t *testing.T, p *specs.LinuxSeccomp) []byte {
	t.Helper()
	out := libseccompProfile{Default: *p.DefaultErrnoRet}
	for _, r := range p.Syscalls {
		for _, name := range r.Names {
			nr, known := syscallNumbers[name]
			if !known {
				continue
			}
			args := [][]any{}
			for _, a := range r.Args {
				args = append(args, []any{a.Index, a.Op, a.Value, a.ValueTwo})
			}
			out.Rules = append(out.Rules, libseccompRule{Nr: nr, Name: name, Errno: r.ErrnoRet, Args: args})
		}
	}
	b, err := json.Marshal(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What libseccomp 2.5.4 made of the same profiles is kept in testdata/libseccomp, with the profile it was made of. Ours
// must answer every call as it does, but for the two differences that CompileSeccomp announces.
func TestAgainstLibseccomp(t *testing.T) {
	everyOperator := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, DefaultErrnoRet: new(uint)}
	*everyOperator.DefaultErrnoRet = uint(unix.EACCES)
	for i, op := range []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual,
		specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual} {
		for j, v := range []uint64{1, 1<<32 - 1, 1 << 32, 0x7_0000_0008} {
			name := []string{"read", "write", "open", "close", "stat", "fstat", "lstat", "poll", "lseek", "mmap", "mprotect", "munmap", "brk",
				"rt_sigaction", "ioctl", "pread64", "pwrite64", "readv", "writev", "access", "pipe", "select", "mremap", "msync",
				"mincore", "madvise", "shmget", "shmat"}[i*4+j]
			arg := specs.LinuxSeccompArg{Index: uint(j), Op: op, Value: v}
			if op == specs.OpMaskedEqual {
				arg.ValueTwo = v & 0x4_ffff_fff9
			}
			everyOperator.Syscalls = append(everyOperator.Syscalls, specs.LinuxSyscall{Names: []string{name}, Action: specs.ActAllow,
				Args: []specs.LinuxSeccompArg{arg, {Index: 5, Op: specs.OpLessEqual, Value: 7}}})
		}
	}
	for name, p := range map[string]*specs.LinuxSeccomp{
		"default":       profileWith(t, nil, nil),
		"all":           profileWith(t, []string{"ALL"}, nil),
		"none":          profileWith(t, nil, []string{"ALL"}),
		"everyoperator": everyOperator,
	} {
		t.Run(name, func(t *testing.T) {
			theirs := newSimulator(t, libseccompFilter(t, name, forLibseccomp(t, p)))
			filter, err := CompileSeccomp(p)
			if err != nil {
				t.Fatal(err)
			}
			ours := newSimulator(t, filter)
			names, highest := byNumber(p)
			points := 0
			for nr := range uint32(600) {
				for _, args := range boundaries(p, names[nr]) {
					points++
					d := syscallData{nr: nr, arch: unix.AUDIT_ARCH_X86_64, args: args}
					got, want := ours.run(t, d), theirs.run(t, d)
					if nr > highest && want == retErrno|uint32(*p.DefaultErrnoRet) {
						want = retNoSys // the first difference: new calls fail so that programs fall back
					}
					if got != want {
						t.Fatalf("%s (%d) args %#x: %#x, libseccomp %#x", names[nr], nr, args, got, want)
					}
				}
			}
			// The second: libseccomp, told of amd64 alone, kills what uses x32; both kill i386.
			x32 := syscallData{nr: x32Bit, arch: unix.AUDIT_ARCH_X86_64}
			if got, want := ours.run(t, x32), theirs.run(t, x32); got != retNoSys || want != unix.SECCOMP_RET_KILL_THREAD {
				t.Errorf("x32: %#x, libseccomp %#x", got, want)
			}
			i386 := syscallData{arch: unix.AUDIT_ARCH_I386}
			if got, want := ours.run(t, i386), theirs.run(t, i386); got != unix.SECCOMP_RET_KILL_PROCESS || want != unix.SECCOMP_RET_KILL_THREAD {
				t.Errorf("i386: %#x, libseccomp %#x", got, want)
			}
			t.Logf("alike at %d points; %d bytes, libseccomp's %d", points, len(filter), len(libseccompFilter(t, name, forLibseccomp(t, p))))
		})
	}
}

func libseccompFilter(t *testing.T, name string, profile []byte) []byte {
	t.Helper()
	profileFile := filepath.Join("testdata", "libseccomp", name+".json")
	filterFile := filepath.Join("testdata", "libseccomp", name+".bpf")
	if os.Getenv(regenerateEnv) != "" {
		cmd := exec.CommandContext(t.Context(), "/usr/bin/python3", filepath.Join("testdata", "libseccomp.py"))
		cmd.Stdin, cmd.Stderr = bytes.NewReader(profile), os.Stderr
		filter, err := cmd.Output()
		if err != nil {
			t.Fatalf("libseccomp: %v", err)
		}
		if err := os.WriteFile(profileFile, profile, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filterFile, filter, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	kept, err := os.ReadFile(profileFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(kept, profile) {
		t.Fatalf("%s is of another profile: set %s=1 to have libseccomp compile this one", profileFile, regenerateEnv)
	}
	filter, err := os.ReadFile(filterFile)
	if err != nil {
		t.Fatal(err)
	}
	return filter
}
