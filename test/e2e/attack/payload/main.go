// Command payload is what a hostile workload does: each attack tries to get something it must not have, without ever using
// it, and says on a line of its own how that went. The test puts it into an image, and the table there says what each is.
//
//	payload ATTACK...     NAME \t blocked|succeeded \t TRY: ERROR; TRY: ERROR …
package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// try is one way of an attack; no error means that it succeeded.
type try struct {
	what string
	err  error
}

// errNothing is the error of a try that met no refusal, but found nothing to get either.
var errNothing = errors.New("nothing there")

var attacks = map[string]func() []try{
	"runtime-program":    runtimeProgram,
	"descriptors":        descriptors,
	"workdir":            workdir,
	"masked":             masked,
	"kernel-settings":    kernelSettings,
	"sysrq":              sysrq,
	"release-agent":      releaseAgent,
	"keyrings":           keyrings,
	"user-namespaces":    userNamespaces,
	"mounts":             mounts,
	"devices":            devices,
	"trace-init":         traceInit,
	"set-user-id":        setUserID,
	"file-capabilities":  fileCapabilities,
	"abstract-socket":    abstractSocket,
	"neighbour-socket":   neighbourSocket,
	"vsock":              vsock,
	"neighbour-agents":   neighbourAgents,
	"fake-proc":          fakeProc,
	"fake-dev":           fakeDev,
	"tmpfs-through-link": tmpfsThroughLink,

	"namespaces":         namespaces,
	"ids":                ids,
	"pids-limit":         pidsLimit,
	"propagation":        propagation,
	"fresh-filesystems":  freshFilesystems,
	"mount-attributes":   mountAttributes,
	"read-only-paths":    readOnlyPaths,
	"read-only-root":     readOnlyRoot,
	"host-file":          hostFile,
	"hidden":             hidden,
	"agent-capabilities": agentCapabilities,
	"agent-filter":       agentFilter,
	"agent-open":         agentOpen,
	"session":            session,
	"limits":             limits,
	"user":               user,
	"bounding":           bounding,
	"capabilities":       capabilities,
	"no-capabilities":    noCapabilities,
	"umask":              umask,
	"signals":            signals,
	"no-new-privileges":  noNewPrivileges,
	"own-filter":         ownFilter,
}

func main() {
	runtime.LockOSThread() // credentials and namespaces are a thread's
	if len(os.Args) == 2 {
		switch os.Args[1] {
		case "euid":
			fmt.Println(os.Geteuid())
			return
		case "capeff":
			fmt.Println(effective())
			return
		case "cgroup-mounts":
			for _, t := range cgroupMounts() {
				if t.err == nil {
					return
				}
			}
			os.Exit(1)
		case "true":
			return
		case "signal-init":
			signalInit()
			return
		case "swap":
			fmt.Fprintln(os.Stderr, swap())
			os.Exit(1)
		case "sleep":
			time.Sleep(10 * time.Minute) // longer than any test
			return
		}
	}
	names := os.Args[1:]
	if len(names) == 0 {
		fmt.Println("attacks:", slices.Sorted(maps.Keys(attacks)))
		os.Exit(2)
	}
	for _, name := range names {
		run, known := attacks[name]
		if !known {
			fmt.Fprintln(os.Stderr, "no such attack:", name)
			os.Exit(2)
		}
		report(name, run())
	}
}

func report(name string, tries []try) {
	verdict := "blocked"
	var said []string
	for _, t := range tries {
		text := "got it"
		if t.err != nil {
			text = t.err.Error()
			var errno unix.Errno
			if errors.As(t.err, &errno) {
				text = unix.ErrnoName(errno)
			}
		} else {
			verdict = "succeeded"
		}
		said = append(said, t.what+": "+text)
	}
	fmt.Printf("%s\t%s\t%s\n", name, verdict, strings.Join(said, "; "))
}

// opened tries to open a file and closes it again.
func opened(path string, flags int) try {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err == nil {
		unix.Close(fd)
	}
	how := map[int]string{unix.O_RDONLY: "read", unix.O_WRONLY: "write", unix.O_RDWR: "read and write", unix.O_PATH: "find"}[flags]
	return try{how + " " + path, err}
}

// read tries to get a byte out of a file, or a name out of a directory.
func read(path string) try {
	entries, err := os.ReadDir(path)
	switch {
	case err == nil && len(entries) > 0:
		return try{"list " + path, nil}
	case err == nil:
		return try{"list " + path, errNothing}
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return try{"read " + path, err}
	}
	defer unix.Close(fd)
	n, err := unix.Read(fd, make([]byte, 1))
	if err == nil && n == 0 {
		err = errNothing
	}
	return try{"read " + path, err}
}

// syscall tries a system call.
func syscall(what string, trap uintptr, args ...uintptr) try {
	_, err := call(trap, args...)
	return try{what, err}
}

func call(trap uintptr, args ...uintptr) (uintptr, error) {
	var a [6]uintptr
	copy(a[:], args)
	r, _, errno := unix.Syscall6(trap, a[0], a[1], a[2], a[3], a[4], a[5])
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}

func effective() string {
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return "no CapEff"
}
