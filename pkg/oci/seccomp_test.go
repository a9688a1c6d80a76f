package oci

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// syscallData is the kernel's struct seccomp_data as a filter sees it.
type syscallData struct {
	nr, arch uint32
	args     [maxArgs]uint64
}

// simulate runs a compiled filter in the interpreter of golang.org/x/net/bpf, which also checks its jumps.
type simulator struct{ vm *bpf.VM }

func newSimulator(t testing.TB, filter []byte) simulator {
	t.Helper()
	if len(filter) == 0 || len(filter)%instructionSize != 0 {
		t.Fatalf("filter has %d bytes", len(filter))
	}
	var raw []bpf.RawInstruction
	for f := filter; len(f) > 0; f = f[instructionSize:] {
		raw = append(raw, bpf.RawInstruction{Op: binary.LittleEndian.Uint16(f), Jt: f[2], Jf: f[3], K: binary.LittleEndian.Uint32(f[4:])})
	}
	if len(raw) > maxInstructions {
		t.Fatalf("filter has %d instructions", len(raw))
	}
	instructions, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("filter has instructions that cannot be disassembled")
	}
	vm, err := bpf.NewVM(instructions)
	if err != nil {
		t.Fatal(err)
	}
	return simulator{vm}
}

func (s simulator) run(t testing.TB, d syscallData) uint32 {
	t.Helper()
	// The interpreter loads words of network packets, big-endian; a filter loads the machine's words at the same offsets.
	data := make([]byte, 0, dataArgs+maxArgs*argSize)
	for _, word := range []uint32{d.nr, d.arch, 0, 0} {
		data = binary.BigEndian.AppendUint32(data, word)
	}
	for _, a := range d.args {
		data = binary.BigEndian.AppendUint32(data, uint32(a))
		data = binary.BigEndian.AppendUint32(data, uint32(a>>32))
	}
	ret, err := s.vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(ret)
}

// oracle is what a profile means, read from CompileSeccomp's comment and written without its parts: by name, not by
// number, rule by rule.
func oracle(profile *specs.LinuxSeccomp, names map[uint32]string, highest uint32, d syscallData) uint32 {
	if d.arch != unix.AUDIT_ARCH_X86_64 {
		return unix.SECCOMP_RET_KILL_PROCESS
	}
	if d.nr >= 1<<30 {
		return 0x00050000 + 38
	}
	value := func(action specs.LinuxSeccompAction, errno *uint) uint32 {
		table := map[specs.LinuxSeccompAction]uint32{
			specs.ActAllow: 0x7fff0000, specs.ActLog: 0x7ffc0000, specs.ActTrap: 0x00030000,
			specs.ActKill: 0, specs.ActKillThread: 0, specs.ActKillProcess: 0x80000000,
		}
		if action != specs.ActErrno {
			return table[action]
		}
		if errno == nil {
			return 0x00050000 + 1
		}
		return 0x00050000 + uint32(*errno)
	}
	for _, r := range profile.Syscalls {
		if !slices.Contains(r.Names, names[d.nr]) {
			continue
		}
		holds := true
		for _, c := range r.Args {
			a := d.args[c.Index]
			switch c.Op {
			case specs.OpEqualTo:
				holds = holds && a == c.Value
			case specs.OpNotEqual:
				holds = holds && a != c.Value
			case specs.OpLessThan:
				holds = holds && a < c.Value
			case specs.OpLessEqual:
				holds = holds && a <= c.Value
			case specs.OpGreaterThan:
				holds = holds && a > c.Value
			case specs.OpGreaterEqual:
				holds = holds && a >= c.Value
			case specs.OpMaskedEqual:
				holds = holds && a&c.Value == c.ValueTwo
			}
		}
		if holds {
			return value(r.Action, r.ErrnoRet)
		}
	}
	if profile.DefaultAction == specs.ActErrno && d.nr > highest {
		return 0x00050000 + 38
	}
	return value(profile.DefaultAction, profile.DefaultErrnoRet)
}

// byNumber turns the table round, and gives the highest number the profile names.
func byNumber(profile *specs.LinuxSeccomp) (names map[uint32]string, highest uint32) {
	names = map[uint32]string{}
	for name, nr := range syscallNumbers {
		names[nr] = name
	}
	for _, r := range profile.Syscalls {
		for _, name := range r.Names {
			if nr, known := syscallNumbers[name]; known {
				highest = max(highest, nr)
			}
		}
	}
	return names, highest
}

// boundaries are the argument vectors at which any condition on the named call could change its mind: each argument at
// and beside each value it is compared with, in both halves, bit by bit of each mask, the others being zero, all ones
// or what satisfies their own conditions.
func boundaries(profile *specs.LinuxSeccomp, name string) [][maxArgs]uint64 {
	var conditions []specs.LinuxSeccompArg
	backgrounds := [][maxArgs]uint64{{}, {^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0), ^uint64(0)}}
	for _, r := range profile.Syscalls {
		if !slices.Contains(r.Names, name) {
			continue
		}
		conditions = append(conditions, r.Args...)
		var satisfied [maxArgs]uint64
		for _, c := range r.Args {
			satisfied[c.Index] = c.Value
			switch c.Op {
			case specs.OpMaskedEqual:
				satisfied[c.Index] = c.ValueTwo
			case specs.OpLessThan:
				satisfied[c.Index]--
			case specs.OpGreaterThan, specs.OpNotEqual:
				satisfied[c.Index]++
			}
		}
		backgrounds = append(backgrounds, satisfied)
	}
	out := slices.Clone(backgrounds)
	if !slices.ContainsFunc(profile.Syscalls, func(r specs.LinuxSyscall) bool { return len(r.Args) > 1 && slices.Contains(r.Names, name) }) {
		backgrounds = backgrounds[:2] // no rule looks at two arguments, so the others need not be satisfied too
	}
	for _, c := range conditions {
		values := []uint64{0, 1, ^uint64(0), 1 << 31, 1 << 32, 1<<32 - 1}
		for _, v := range []uint64{c.Value, c.ValueTwo} {
			values = append(values, v-1, v, v+1, v^1<<32, v|1<<63, ^v, v<<32, v>>32, v&0xffffffff, v&^0xffffffff)
		}
		if c.Op == specs.OpMaskedEqual {
			for bit := range 64 {
				values = append(values, c.ValueTwo^1<<bit, ^c.Value^1<<bit, c.ValueTwo|^c.Value)
			}
		}
		for _, b := range backgrounds {
			for _, v := range values {
				b[c.Index] = v
				out = append(out, b)
			}
		}
	}
	return out
}

// compare runs a filter and the oracle over every system call number and boundary, and returns how many points it looked at.
func compare(t *testing.T, profile *specs.LinuxSeccomp) int {
	t.Helper()
	filter, err := CompileSeccomp(profile)
	if err != nil {
		t.Fatal(err)
	}
	sim := newSimulator(t, filter)
	names, highest := byNumber(profile)
	points := 0
	check := func(d syscallData) {
		points++
		if got, want := sim.run(t, d), oracle(profile, names, highest, d); got != want {
			t.Fatalf("%s (%d) arch %#x args %#x: filter says %#x, profile means %#x", names[d.nr], d.nr, d.arch, d.args, got, want)
		}
	}
	var numbers []uint32
	for nr := range uint32(600) {
		numbers = append(numbers, nr)
	}
	numbers = append(numbers, 1023, 1<<30-1, 1<<30, 1<<30+1, 1<<30+512, 1<<31-1, 1<<31, ^uint32(0)-1, ^uint32(0))
	for _, nr := range numbers {
		for _, args := range boundaries(profile, names[nr]) {
			check(syscallData{nr: nr, arch: unix.AUDIT_ARCH_X86_64, args: args})
		}
		check(syscallData{nr: nr, arch: unix.AUDIT_ARCH_I386})
		check(syscallData{nr: nr, arch: unix.AUDIT_ARCH_AARCH64})
		check(syscallData{nr: nr, arch: 0})
	}
	return points
}

// profileWith is the default profile of a workload with the given capabilities added and dropped.
func profileWith(t testing.TB, add, drop []string) *specs.LinuxSeccomp {
	t.Helper()
	c, err := Config(testID, spec.Workload{Process: spec.Process{Command: []string{"true"}}, CapAdd: add, CapDrop: drop}, spec.ImageConfig{}, spec.IsolationContainer)
	if err != nil {
		t.Fatal(err)
	}
	return c.Linux.Seccomp
}

// capabilitySets give every variant of the profile that the moby rows tell apart: each capability alone, and the usual sets.
func capabilitySets() map[string][2][]string {
	sets := map[string][2][]string{"default": {}, "all": {{"ALL"}, nil}, "none": {nil, {"ALL"}}}
	for _, c := range spec.Capabilities {
		sets[c] = [2][]string{{c}, {"ALL"}}
	}
	return sets
}

func TestFilterMeansWhatTheProfileSays(t *testing.T) {
	for name, set := range capabilitySets() {
		t.Run(name, func(t *testing.T) {
			points := compare(t, profileWith(t, set[0], set[1]))
			if points < 2000 {
				t.Errorf("looked at %d points only", points)
			}
		})
	}
}

func TestFilterOfRandomProfiles(t *testing.T) {
	var names []string
	for name := range syscallNumbers {
		names = append(names, name)
	}
	slices.Sort(names)
	for seed := range uint64(60) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 7))
			compare(t, randomProfile(r, names))
		})
	}
}

func randomProfile(r *rand.Rand, names []string) *specs.LinuxSeccomp {
	actions := []specs.LinuxSeccompAction{specs.ActAllow, specs.ActErrno, specs.ActLog, specs.ActTrap, specs.ActKill, specs.ActKillThread, specs.ActKillProcess}
	operators := []specs.LinuxSeccompOperator{specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual}
	interesting := []uint64{0, 1, 8, 40, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32, 1<<32 + 1, 0x7e020000, 1<<63 - 1, 1 << 63, ^uint64(0)}
	value := func() uint64 {
		if r.IntN(3) == 0 {
			return r.Uint64()
		}
		return interesting[r.IntN(len(interesting))]
	}
	action := func() (specs.LinuxSeccompAction, *uint) {
		a := actions[r.IntN(len(actions))]
		if a == specs.ActErrno && r.IntN(2) == 0 {
			e := uint(r.IntN(maxErrno + 1))
			return a, &e
		}
		return a, nil
	}
	p := &specs.LinuxSeccomp{}
	p.DefaultAction, p.DefaultErrnoRet = action()
	for range r.IntN(60) {
		s := specs.LinuxSyscall{}
		s.Action, s.ErrnoRet = action()
		for range 1 + r.IntN(6) {
			s.Names = append(s.Names, names[r.IntN(len(names))])
		}
		for _, i := range r.Perm(maxArgs)[:r.IntN(4)] {
			c := specs.LinuxSeccompArg{Index: uint(i), Op: operators[r.IntN(len(operators))], Value: value()}
			if c.Op == specs.OpMaskedEqual {
				c.ValueTwo = value() & c.Value
			}
			s.Args = append(s.Args, c)
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	return p
}

// Jumps beyond 255 instructions, and programs beyond what the kernel takes.
func TestFilterSize(t *testing.T) {
	profile := func(rules int) *specs.LinuxSeccomp {
		p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}
		for _, name := range []string{"read", "write", "openat"} {
			for i := range rules {
				p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{name}, Action: specs.ActAllow,
					Args: []specs.LinuxSeccompArg{{Index: 2, Op: specs.OpEqualTo, Value: uint64(i * 3)}}})
			}
		}
		return p
	}
	compare(t, profile(60)) // 180 and more instructions a call, three calls in a row
	if _, err := CompileSeccomp(profile(300)); err == nil || !strings.Contains(err.Error(), "4096") {
		t.Errorf("a program too long: %v", err)
	}
	filter, err := CompileSeccomp(profileWith(t, nil, nil))
	if err != nil {
		t.Fatal(err)
	}
	// Of use to whoever asks what a system call costs: the depth is about the logarithm of this.
	t.Logf("the default profile takes %d instructions", len(filter)/instructionSize)
	if n := len(filter) / instructionSize; n > 600 {
		t.Errorf("the default profile takes %d instructions", n)
	}
}

func TestProfilesRefused(t *testing.T) {
	one := uint(1)
	big := uint(4096)
	arg := func(c ...specs.LinuxSeccompArg) []specs.LinuxSyscall {
		return []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow, Args: c}}
	}
	for want, p := range map[string]*specs.LinuxSeccomp{
		"architecture":     {DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86}},
		"flags":            {DefaultAction: specs.ActErrno, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog}},
		"listener":         {DefaultAction: specs.ActErrno, ListenerPath: "/x"},
		"default action":   {},
		"SCMP_ACT_NOTIFY":  {DefaultAction: specs.ActNotify},
		"SCMP_ACT_TRACE":   {DefaultAction: specs.ActTrace},
		"no error number":  {DefaultAction: specs.ActAllow, DefaultErrnoRet: &one},
		"above 4095":       {DefaultAction: specs.ActErrno, DefaultErrnoRet: &big},
		"a system call ha": {DefaultAction: specs.ActErrno, Syscalls: arg(specs.LinuxSeccompArg{Index: 6, Op: specs.OpEqualTo})},
		"two conditions":   {DefaultAction: specs.ActErrno, Syscalls: arg(specs.LinuxSeccompArg{Op: specs.OpEqualTo}, specs.LinuxSeccompArg{Op: specs.OpNotEqual})},
		"operator":         {DefaultAction: specs.ActErrno, Syscalls: arg(specs.LinuxSeccompArg{Op: "SCMP_CMP_ODD"})},
		`"reed" is unknown`: {DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"reed"}, Action: specs.ActErrno}}},
	} {
		if filter, err := CompileSeccomp(p); err == nil || !strings.Contains(err.Error(), want) || filter != nil {
			t.Errorf("want an error with %q, got %v", want, err)
		}
	}
	if filter, err := CompileSeccomp(nil); err != nil || filter != nil {
		t.Errorf("no profile: %v, %v", filter, err)
	}
}

// Every name of the profile that this table lacks must be one amd64 does not have.
func TestProfileNamesUnknown(t *testing.T) {
	var unknown []string
	for _, r := range seccomp.DefaultProfile().Syscalls {
		for _, name := range r.Names {
			if _, known := syscallNumbers[name]; !known && !slices.Contains(unknown, name) {
				unknown = append(unknown, name)
			}
		}
	}
	for _, name := range unknown {
		// Of 32-bit machines, of other architectures, or removed long ago.
		is32 := strings.HasSuffix(name, "32") || strings.HasSuffix(name, "64") || strings.HasSuffix(name, "_time64")
		if !is32 && !slices.Contains(otherArchitectures, name) {
			t.Errorf("system call %q of the profile is not in the table: regenerate it, or say here why amd64 has none", name)
		}
	}
}

var otherArchitectures = []string{
	"_llseek", "_newselect", "arm_fadvise64_64", "arm_sync_file_range", "breakpoint", "cacheflush", "ipc", "mmap2", "nice", "oldfstat", "oldlstat",
	"oldstat", "olduname", "recv", "riscv_flush_icache", "riscv_hwprobe", "s390_pci_mmio_read", "s390_pci_mmio_write", "s390_runtime_instr",
	"send", "set_tls", "sigaction", "signal", "sigpending", "sigprocmask", "sigreturn", "sigsuspend", "socketcall", "stime",
	"swapcontext", "sync_file_range2", "ugetrlimit", "umount", "waitpid",
}

func FuzzCompileSeccomp(f *testing.F) {
	f.Add(uint64(1), uint64(2), uint64(3), "SCMP_CMP_MASKED_EQ", uint(0))
	f.Add(uint64(1)<<32, uint64(0), uint64(1)<<32, "SCMP_CMP_LE", uint(5))
	f.Fuzz(func(t *testing.T, argument, value, second uint64, op string, index uint) {
		p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{
			Names: []string{"read"}, Action: specs.ActAllow,
			Args: []specs.LinuxSeccompArg{{Index: index, Op: specs.LinuxSeccompOperator(op), Value: value, ValueTwo: second}},
		}}}
		filter, err := CompileSeccomp(p)
		if err != nil {
			return
		}
		names, highest := byNumber(p)
		d := syscallData{arch: unix.AUDIT_ARCH_X86_64}
		d.args[index] = argument
		if got, want := newSimulator(t, filter).run(t, d), oracle(p, names, highest, d); got != want {
			t.Fatalf("%#x %s %#x %#x: filter says %#x, want %#x", argument, op, value, second, got, want)
		}
	})
}
