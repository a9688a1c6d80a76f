package oci

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Set in a child of this test that installs the default filter and then makes the calls of installedCalls, or runs the
// program named.
const (
	childEnv        = "SANDBOXD_TEST_SECCOMP_CHILD"
	childProgramEnv = "SANDBOXD_TEST_SECCOMP_PROGRAM"
)

// childTimeout bounds a child that only makes a few system calls.
const childTimeout = 30 * time.Second

// installedCalls are calls whose answer with the filter differs from the one without, and the reverse.
var installedCalls = []struct {
	name string
	nr   uintptr
	args [3]uintptr
	want syscall.Errno
}{
	{"getpid", unix.SYS_GETPID, [3]uintptr{}, 0},
	{"socket(AF_UNIX)", unix.SYS_SOCKET, [3]uintptr{unix.AF_UNIX, unix.SOCK_STREAM}, 0},
	{"socket(AF_VSOCK)", unix.SYS_SOCKET, [3]uintptr{unix.AF_VSOCK, unix.SOCK_STREAM}, unix.EPERM},
	{"socket(AF_ALG)", unix.SYS_SOCKET, [3]uintptr{unix.AF_ALG, unix.SOCK_SEQPACKET}, unix.EPERM},
	{"socket(AF_UNIX with a high bit)", unix.SYS_SOCKET, [3]uintptr{unix.AF_UNIX | 1<<32, unix.SOCK_STREAM}, unix.EPERM},
	{"personality(query)", unix.SYS_PERSONALITY, [3]uintptr{0xffffffff}, 0},
	{"personality(ADDR_NO_RANDOMIZE)", unix.SYS_PERSONALITY, [3]uintptr{0x40000}, unix.EPERM},
	{"unshare(user)", unix.SYS_UNSHARE, [3]uintptr{unix.CLONE_NEWUSER}, unix.EPERM},
	{"unshare(0)", unix.SYS_UNSHARE, [3]uintptr{}, unix.EPERM},
	{"clone3", unix.SYS_CLONE3, [3]uintptr{}, unix.ENOSYS},
	{"keyctl", unix.SYS_KEYCTL, [3]uintptr{}, unix.EPERM},
	{"bpf", unix.SYS_BPF, [3]uintptr{}, unix.EPERM},
	{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, [3]uintptr{}, unix.EPERM},
	{"kexec_load", unix.SYS_KEXEC_LOAD, [3]uintptr{}, unix.EPERM},
	{"a call of the future", 5000, [3]uintptr{}, unix.ENOSYS},
	{"getpid of x32", x32Bit | unix.SYS_GETPID, [3]uintptr{}, unix.ENOSYS},
}

func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		os.Exit(childMain())
	}
	os.Exit(m.Run())
}

// childMain runs with its filter on one thread only; it must not return to the scheduler before it exits.
func childMain() int {
	runtime.LockOSThread()
	filter, err := os.ReadFile(os.Getenv(childEnv))
	if err != nil {
		return 100
	}
	program := os.Getenv(childProgramEnv)
	if len(filter) > 0 {
		if err := install(filter); err != nil {
			os.Stderr.WriteString(err.Error())
			return 101
		}
	}
	if program != "" {
		_ = syscall.Exec(program, []string{program}, nil)
		return 102
	}
	answers := make([]syscall.Errno, len(installedCalls))
	for i, c := range installedCalls {
		_, _, answers[i] = unix.RawSyscall(c.nr, c.args[0], c.args[1], c.args[2])
	}
	if err := json.NewEncoder(os.Stdout).Encode(answers); err != nil {
		return 103
	}
	return 0
}

// install puts a filter on the calling thread, as the agent does.
func install(filter []byte) error {
	code := make([]unix.SockFilter, len(filter)/instructionSize)
	for i := range code {
		b := filter[i*instructionSize:]
		code[i] = unix.SockFilter{Code: binary.LittleEndian.Uint16(b), Jt: b[2], Jf: b[3], K: binary.LittleEndian.Uint32(b[4:])}
	}
	prog := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return errno
	}
	return nil
}

func runChild(t *testing.T, filter []byte, program string) (out []byte, state *os.ProcessState) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "filter")
	if err := os.WriteFile(file, filter, 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self)
	cmd.WaitDelay = childTimeout
	cmd.Env = append(os.Environ(), childEnv+"="+file, childProgramEnv+"="+program)
	cmd.Stderr = os.Stderr
	out, err = cmd.Output()
	var failed *exec.ExitError
	if err != nil && !errors.As(err, &failed) {
		t.Fatal(err)
	}
	return out, cmd.ProcessState
}

// The kernel takes the filter, and answers as the profile says.
func TestKernelEnforcesFilter(t *testing.T) {
	filter, err := CompileSeccomp(profileWith(t, nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	out, state := runChild(t, filter, "")
	if !state.Success() {
		t.Fatalf("child: %v", state)
	}
	var answers []syscall.Errno
	if err := json.Unmarshal(out, &answers); err != nil {
		t.Fatal(err)
	}
	for i, c := range installedCalls {
		if answers[i] != c.want {
			t.Errorf("%s: %v, want %v", c.name, answers[i], c.want)
		}
	}

	// Without the filter the same calls answer differently, or this test shows nothing.
	out, state = runChild(t, nil, "")
	if !state.Success() {
		t.Fatalf("child without a filter: %v", state)
	}
	if err := json.Unmarshal(out, &answers); err != nil {
		t.Fatal(err)
	}
	differ := 0
	for i, c := range installedCalls {
		if answers[i] != c.want {
			differ++
		}
	}
	if differ < 5 {
		t.Errorf("only %d calls answer differently without the filter: %v", differ, answers)
	}
}

// A program that uses the 32-bit entry is killed.
func TestKernelKillsI386(t *testing.T) {
	filter, err := CompileSeccomp(profileWith(t, []string{"ALL"}, nil))
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(t.TempDir(), "int80")
	if err := os.WriteFile(program, int80Program(), 0o700); err != nil {
		t.Fatal(err)
	}
	_, state := runChild(t, filter, program)
	status := state.Sys().(syscall.WaitStatus)
	if !status.Signaled() {
		t.Fatalf("the program was not killed: %v", state)
	}
	_, control := runChild(t, nil, program)
	if control.Success() {
		if status.Signal() != unix.SIGSYS {
			t.Errorf("killed by %v, want SIGSYS", status.Signal())
		}
		return
	}
	// A kernel without 32-bit emulation has no such entry at all: there is nothing for the filter to stop.
	t.Logf("this kernel has no i386 entry (without the filter: %v)", control)
}

// int80Program is a static 64-bit ELF file that calls getpid through the 32-bit entry, then exits with 0 through the
// 64-bit one.
func int80Program() []byte {
	const base, headers = 0x400000, 64 + 56
	code := []byte{
		0xb8, 20, 0, 0, 0, // mov $20, %eax: getpid of i386
		0xcd, 0x80, // int $0x80
		0xb8, 60, 0, 0, 0, // mov $60, %eax: exit of amd64
		0x31, 0xff, // xor %edi, %edi
		0x0f, 0x05, // syscall
	}
	le := binary.LittleEndian
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	b = le.AppendUint16(b, 2)  // ET_EXEC
	b = le.AppendUint16(b, 62) // EM_X86_64
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+headers) // entry
	b = le.AppendUint64(b, 64)           // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 1, 0, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 5) // read, execute
	size := uint64(headers + len(code))
	for _, v := range []uint64{0, base, base, size, size, 0x1000} {
		b = le.AppendUint64(b, v)
	}
	return append(b, code...)
}
