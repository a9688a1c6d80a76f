package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What follows looks from inside at one step each of a sandbox's confinement. As with attacks, no error means that the step is
// missing. What cannot be known inside, the test says in the environment.

var errConfined = errors.New("as it should be")

// wants is a check that something has one value only.
func wants(what, got, want string) []try {
	if got == want {
		return []try{{what + " is " + got, errConfined}}
	}
	return []try{{what + " is " + got + ", not " + want, nil}}
}

// status is a field of a process's status.
func status(process, field string) string {
	b, err := os.ReadFile("/proc/" + process + "/status")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.TrimSpace(rest)
		}
	}
	return "missing"
}

const self = "thread-self"

// namespaces: ATTACK_NAMESPACES are the daemon's.
func namespaces() []try {
	tries := []try{{"share what the kernel has only once", errConfined}}
	for theirs := range strings.FieldsSeq(os.Getenv("ATTACK_NAMESPACES")) {
		kind, _, _ := strings.Cut(theirs, ":")
		mine, err := os.Readlink("/proc/self/ns/" + kind)
		if err == nil && mine != theirs {
			err = errConfined
		}
		tries = append(tries, try{"share " + theirs, err})
	}
	return tries
}

func ids() []try {
	b, err := os.ReadFile("/proc/self/uid_map")
	if f := strings.Fields(string(b)); err == nil && (len(f) != 3 || f[1] != "0") {
		err = errConfined
	}
	return []try{{"be root outside", err}}
}

// pidsLimit forks past what --pids allows.
func pidsLimit() []try {
	const more = 100
	var children []int
	var failed error
	for range more {
		pid, _, errno := unix.RawSyscall(unix.SYS_FORK, 0, 0, 0)
		if errno != 0 {
			failed = errno
			break
		}
		if pid == 0 {
			for {
				_, _, _ = unix.RawSyscall(unix.SYS_PAUSE, 0, 0, 0)
			}
		}
		children = append(children, int(pid))
	}
	for _, pid := range children {
		_ = unix.Kill(pid, unix.SIGKILL)
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}
	return []try{{fmt.Sprintf("fork %d processes", more), failed}}
}

// mountinfo are the optional fields of every mount: how it hangs together with mounts elsewhere.
func propagation() []try {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []try{{"read mountinfo", err}}
	}
	for line := range strings.Lines(string(b)) {
		head, _, _ := strings.Cut(line, " - ")
		if f := strings.Fields(head); len(f) > 6 {
			return []try{{"hear of mounts elsewhere at " + f[4] + " by " + f[6], nil}}
		}
	}
	return []try{{"hear of mounts elsewhere", errConfined}}
}

var mountPoints = []struct {
	path  string
	magic int64
	flags int64 // of statfs(2)
}{
	{"/proc", unix.PROC_SUPER_MAGIC, unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC},
	{"/sys", unix.SYSFS_MAGIC, unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC | unix.ST_RDONLY},
	{"/dev", unix.TMPFS_MAGIC, unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC},
	{"/dev/pts", unix.DEVPTS_SUPER_MAGIC, unix.ST_NOSUID | unix.ST_NOEXEC},
	{"/dev/shm", unix.TMPFS_MAGIC, unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC},
	{"/dev/mqueue", 0x19800202, unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC}, // MQUEUE_MAGIC, ipc/mqueue.c
}

// freshFilesystems: each has its own mount, of its own kind. A tmpfs below /dev would be told from it by its device only.
func freshFilesystems() []try {
	var tries []try
	device := map[string]uint64{}
	for _, m := range mountPoints {
		var fs unix.Statfs_t
		var st unix.Stat_t
		err := errors.Join(unix.Statfs(m.path, &fs), unix.Stat(m.path, &st))
		device[m.path] = st.Dev
		if err == nil && int64(fs.Type) == m.magic && (m.path == "/dev" || device["/dev"] != st.Dev) {
			continue
		}
		tries = append(tries, try{"find no file system of its own at " + m.path, nil})
	}
	return append(tries, try{"find a file system that is missing", errConfined})
}

func mountAttributes() []try {
	var tries []try
	for _, m := range mountPoints {
		var fs unix.Statfs_t
		if err := unix.Statfs(m.path, &fs); err == nil && fs.Flags&m.flags != m.flags {
			tries = append(tries, try{fmt.Sprintf("find %s mounted with %#x, not %#x", m.path, fs.Flags, m.flags), nil})
		}
	}
	return append(tries, try{"find a mount with more rights", errConfined})
}

func readOnlyPaths() []try {
	var tries []try
	for _, path := range []string{"/proc/sys", "/proc/bus", "/proc/irq", "/proc/fs", "/proc/sysrq-trigger"} {
		var fs unix.Statfs_t
		err := unix.Statfs(path, &fs)
		if err == nil && fs.Flags&unix.ST_RDONLY != 0 {
			err = unix.EROFS
		}
		tries = append(tries, try{"find " + path + " writable", err})
	}
	return tries
}

func readOnlyRoot() []try { return []try{{"make a directory in /", unix.Mkdir("/made", 0o700)}} }

// hostFile: ATTACK_HOST_FILE is a file of the host.
func hostFile() []try { return []try{opened(os.Getenv("ATTACK_HOST_FILE"), unix.O_RDONLY)} }

// hidden runs as another user than root.
func hidden() []try {
	var st unix.Stat_t
	return []try{{"see PID 1", unix.Stat("/proc/1", &st)}}
}

// agentCapabilities: ATTACK_CAPS are the workload's own.
func agentCapabilities() []try {
	b, err := strconv.ParseUint(status("1", "CapPrm"), 16, 64)
	if err == nil && b&(1<<unix.CAP_SYS_ADMIN|1<<unix.CAP_NET_ADMIN|1<<unix.CAP_SYS_PTRACE|1<<unix.CAP_SYS_MODULE|1<<unix.CAP_SYS_BOOT) == 0 {
		err = errConfined
	}
	return []try{{fmt.Sprintf("find PID 1 with capabilities %#x", b), err}}
}

// agentFilter looks at every thread.
func agentFilter() []try {
	threads, err := filepath.Glob("/proc/1/task/*")
	if err != nil || len(threads) < 2 {
		return []try{{"find threads of PID 1", nil}}
	}
	var tries []try
	for _, t := range threads {
		id := strings.TrimPrefix(t, "/proc/")
		tries = append(tries, wants("the mode of a thread", status(id, "Seccomp")+status(id, "NoNewPrivs"), "21")...)
	}
	return tries
}

func session() []try {
	sid, err := unix.Getsid(0)
	if err == nil && sid == os.Getpid() {
		err = errConfined
	}
	return []try{{fmt.Sprintf("be in the session of %d", sid), err}}
}

func limits() []try {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &l); err != nil {
		return []try{{"read a limit", err}}
	}
	// Go raises that of open files by itself.
	return wants("the limit of core files", fmt.Sprint(l.Cur, l.Max), os.Getenv("ATTACK_CORE")+" "+os.Getenv("ATTACK_CORE"))
}

func user() []try { return wants("the user", fmt.Sprint(os.Getuid(), os.Getgid()), "1000 1000") }

func bounding() []try {
	return wants("the bounding set", status(self, "CapBnd"), os.Getenv("ATTACK_CAPS"))
}

func capabilities() []try {
	return append(wants("the permitted set", status(self, "CapPrm"), os.Getenv("ATTACK_CAPS")),
		wants("the inheritable set", status(self, "CapInh"), strings.Repeat("0", 16))...)
}

// noCapabilities runs as another user than root.
func noCapabilities() []try {
	return wants("the permitted set", status(self, "CapPrm"), strings.Repeat("0", 16))
}

func umask() []try { return wants("the umask", status(self, "Umask"), "0022") }

func signals() []try {
	none := strings.Repeat("0", 16)
	return append(wants("what is ignored", status(self, "SigIgn"), none), wants("what is blocked", status("self", "SigBlk"), none)...)
}

func noNewPrivileges() []try {
	return wants("no_new_privs", status(self, "NoNewPrivs"), "1")
}

// ownFilter: one is the agent's, inherited.
func ownFilter() []try {
	return wants("the number of filters", status(self, "Seccomp_filters"), os.Getenv("ATTACK_FILTERS"))
}

// agentOpen: PID 1 is a closed book also to who may trace.
func agentOpen() []try {
	return []try{read("/proc/1/fd"), opened("/proc/1/mem", unix.O_RDONLY), opened("/proc/1/root/proc", unix.O_PATH)}
}
