package guest

import (
	"fmt"
	"runtime"
	"syscall"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// needed are the capabilities that a container's agent keeps once the container stands, beside the workload's own. Each is what
// it, or a child of its, does for the workload; all others it gives up on every thread, and under no_new_privs (filterSelf) none
// has them again.
var needed = []struct {
	number uintptr
	reason string
}{
	{unix.CAP_SETUID, "a child becomes the user"},
	{unix.CAP_SETGID, "a child becomes the user"},
	{unix.CAP_SETPCAP, "a child limits the bounding set"},
	{unix.CAP_KILL, "signals reach every user's processes"},
	{unix.CAP_CHOWN, "streams are given to the user; copies keep owners"},
	{unix.CAP_FOWNER, "copies keep modes and times"},
	{unix.CAP_FSETID, "copies keep set-id bits"},
	{unix.CAP_DAC_OVERRIDE, "copies reach every file"},
	{unix.CAP_DAC_READ_SEARCH, "copies reach every file"},
	{unix.CAP_MKNOD, "copies make fifos"},
	{unix.CAP_SETFCAP, "copies keep file capabilities"},
}

// unbounded are given up in the bounding set too, unless the workload has them, where no no_new_privs follows (filterSelf): those
// that open most of the host's kernel to whoever takes the agent over, so that no program executed as root has them again. Under
// no_new_privs none has: execve then gives a program nothing that the process did not have permitted. Each costs a stop of all of
// the agent's threads, so the rest stays there.
var unbounded = []struct {
	number uintptr
	reason string
}{
	{unix.CAP_SYS_ADMIN, "mounts are made: nobody may now mount a fresh, unmasked /proc"},
	{unix.CAP_NET_ADMIN, "loopback is up: packet filters and the like are a large part of the kernel"},
	{unix.CAP_SYS_PTRACE, "nobody is to be traced"},
}

// undumpable makes the agent a poor target: nobody may trace it, read its memory or follow its /proc links. In a container
// the runtime also gives it a program file that nobody may read, without which root's /proc/1/fd stays open whatever is
// set here.
func undumpable() error {
	if weaken.Without("be undumpable") {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot make the agent undumpable: %w", err)
	}
	return nil
}

// surrender gives up capabilities on every thread of the agent; filtered says that filterSelf comes next and has a filter. A
// guest's agent does not: it shuts the machine down, and the kernel it could attack is its own.
func surrender(config *specs.Spec, filtered bool) error {
	if weaken.Without("surrender capabilities") {
		return nil
	}
	var kept capSets
	if config.Process != nil {
		var err error
		if kept, err = newCapSets(config.Process.Capabilities); err != nil {
			return err
		}
	}
	keep := kept.Bounding
	for _, c := range needed {
		keep |= 1 << c.number
	}
	for _, c := range unbounded {
		if filtered || kept.Bounding&(1<<c.number) != 0 {
			continue
		}
		if _, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c.number, 0, 0, 0, 0); errno != 0 {
			return fmt.Errorf("cannot drop capability %d: %w", c.number, errno)
		}
	}
	return keepCapabilities(keep)
}

// keepCapabilities gives up all others, on every thread.
func keepCapabilities(keep uint64) error {
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := &[2]unix.CapUserData{}
	if err := unix.Capget(header, &data[0]); err != nil {
		return fmt.Errorf("cannot read capabilities: %w", err)
	}
	for i := range data {
		mask := uint32(keep >> (32 * i))
		data[i].Permitted &= mask
		data[i].Effective &= mask
		data[i].Inheritable &= mask
	}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(data)), 0)
	runtime.KeepAlive(header)
	runtime.KeepAlive(data)
	if errno != 0 {
		return fmt.Errorf("cannot give up capabilities: %w", errno)
	}
	return nil
}

// filters reports whether filterSelf does anything.
func filters(filter []byte) bool { return len(filter) > 0 && !weaken.Without("filter the agent") }

// filterSelf puts a filter over every thread of the agent, those to come and all stages included. With it come no_new_privs,
// which the kernel asks of whoever has no CAP_SYS_ADMIN, and which every workload with a filter has anyway.
func filterSelf(filter []byte) error {
	if !filters(filter) {
		return nil
	}
	// Both on one thread: the second asks for the first, and gives it to all others.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot forbid the agent new privileges: %w", err)
	}
	if err := installFilter(filter, unix.SECCOMP_FILTER_FLAG_TSYNC); err != nil {
		return fmt.Errorf("cannot install the agent's system call filter: %w", err)
	}
	return nil
}
