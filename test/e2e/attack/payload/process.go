package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// runtimeProgram is CVE-2019-5736 up to its first step, a handle to the program that runs as PID 1, or as what comes to be a
// process of the sandbox. Another process of the test makes such ones meanwhile, through a link to /proc/self/exe.
func runtimeProgram() []try {
	tries := []try{opened("/proc/1/exe", unix.O_PATH), opened("/proc/1/exe", unix.O_RDONLY), opened("/proc/1/exe", unix.O_WRONLY)}
	mine, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return append(tries, try{"read my own name", err})
	}
	seen := 0
	for until := time.Now().Add(watchTime()); time.Now().Before(until); {
		entries, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return append(tries, try{"list processes", err})
		}
		for _, dir := range entries {
			comm, _ := os.ReadFile(dir + "/comm")
			if dir == "/proc/1" || !strings.HasPrefix(string(comm), "evil-exe") && !strings.HasPrefix(string(comm), "exe") && !strings.HasPrefix(string(comm), "sandbox-") {
				continue
			}
			target, err := os.Readlink(dir + "/exe")
			if err == nil && (target == mine || strings.HasPrefix(target, "/bin/")) {
				continue
			}
			seen++
			tries = append(tries, handleTo(dir, seen == 1)...)
		}
	}
	return tries
}

// handleTo gets hold of the program of a process on its way in, and through that tries to write to it. In a guest
// (ATTACK_READABLE) reading it is no attack: it is everybody's who is root there. A refusal is told once.
func handleTo(dir string, first bool) (tries []try) {
	fd, err := unix.Open(dir+"/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil && !first {
		return nil
	}
	const what = "the program of a process on its way in"
	if err != nil {
		return []try{{"read " + what, err}}
	}
	defer unix.Close(fd)
	if os.Getenv("ATTACK_READABLE") == "" {
		tries = append(tries, try{"read " + what, nil})
	}
	if w := opened(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY); w.err == nil || first {
		tries = append(tries, try{"write to " + what, w.err})
	}
	return tries
}

func watchTime() time.Duration {
	ms, _ := strconv.Atoi(os.Getenv("ATTACK_WATCH_MS"))
	return time.Duration(ms) * time.Millisecond
}

// descriptors is CVE-2024-21626: whatever the runtime left open is a way out.
func descriptors() []try {
	var tries []try
	for fd := 3; fd < 256; fd++ {
		target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
		// Go's own poller, made after the start.
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue // opened by this program
		}
		tries = append(tries, try{fmt.Sprintf("find %s as descriptor %d", target, fd), nil})
	}
	if tries == nil {
		tries = []try{{"find a descriptor", errNothing}}
	}
	return tries
}

// workdir is where CVE-2024-21626 led: a working directory outside of the root.
func workdir() []try {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err == nil && n > 0 && buf[0] == '/' {
		err = errors.New("inside")
	}
	return []try{{"be outside of the root", err}}
}

// traceInit: PID 1 holds the way to the daemon.
func traceInit() []try {
	tries := []try{read("/proc/1/environ"), opened("/proc/1/fd/0", unix.O_PATH), opened("/proc/1/mem", unix.O_RDWR), opened("/proc/1/root/proc", unix.O_PATH), opened("/proc/1/cwd", unix.O_PATH)}
	local := make([]byte, 1)
	// Where a static Go program's code lies.
	_, err := unix.ProcessVMReadv(1, []unix.Iovec{{Base: &local[0], Len: 1}}, []unix.RemoteIovec{{Base: 0x401000, Len: 1}}, 0)
	tries = append(tries, try{"process_vm_readv", err})
	if pidfd, err := unix.PidfdOpen(1, 0); err == nil {
		stolen, err := unix.PidfdGetfd(pidfd, 0, 0)
		if err == nil {
			unix.Close(stolen)
		}
		tries = append(tries, try{"pidfd_getfd", err})
		unix.Close(pidfd)
	}
	// It stops nothing, and ends with this process.
	return append(tries, syscall("ptrace", unix.SYS_PTRACE, unix.PTRACE_SEIZE, 1, 0, 0))
}

// signalInit sends PID 1 every signal there is, in each way to send one; what comes of it is seen outside.
func signalInit() {
	const signals = 64
	for sig := unix.Signal(1); sig <= signals; sig++ {
		_ = unix.Kill(1, sig)
		_ = unix.Tgkill(1, 1, sig)
		if pidfd, err := unix.PidfdOpen(1, 0); err == nil {
			_ = unix.PidfdSendSignal(pidfd, sig, nil, 0)
			unix.Close(pidfd)
		}
	}
}

// setUserID and fileCapabilities run as another user than root.
func setUserID() []try {
	return []try{becomes("/attack-setuid", "euid", func(said string) bool { return said == "0" })}
}

func fileCapabilities() []try {
	return []try{becomes("/attack-caps", "capeff", func(said string) bool { return strings.Trim(said, "0") != "" })}
}

func becomes(program, question string, more func(string) bool) try {
	out, err := exec.Command(program, question).Output()
	said := strings.TrimSpace(string(out))
	if err == nil && !more(said) {
		err = errors.New("stayed " + said)
	}
	return try{"become more by " + program, err}
}

// abstractSocket and neighbourSocket get the socket's name from the test.
func abstractSocket() []try { return []try{dial("@" + os.Getenv("ATTACK_ABSTRACT"))} }

func neighbourSocket() []try {
	tries := []try{dial(os.Getenv("ATTACK_SOCKET"))}
	for _, prefix := range []string{"/proc/1/root", "/proc/self/root", "/proc/1/cwd"} {
		tries = append(tries, dial(prefix+os.Getenv("ATTACK_SOCKET")))
	}
	return tries
}

// neighbourAgents gets the names of the sockets of other sandboxes' agents, and of the host's abstract ones, from the test.
func neighbourAgents() []try {
	tries := []try{{"find a neighbour's socket", errNothing}}
	for name := range strings.FieldsSeq(os.Getenv("ATTACK_NEIGHBOURS")) {
		tries = append(tries, dial(name))
		if !strings.HasPrefix(name, "@") {
			tries = append(tries, dial("/proc/1/root"+name), dial("/proc/self/root"+name), dial("/proc/self/cwd/../../../.."+name))
		}
	}
	ports, err := filepath.Glob("/dev/vport*")
	if more, _ := filepath.Glob("/dev/virtio-ports/*"); err == nil {
		ports = append(ports, more...)
	}
	for _, port := range ports {
		tries = append(tries, opened(port, unix.O_RDWR))
	}
	// The vsock address of a host, of a first guest and of oneself, at the port that agents use.
	for _, cid := range []uint32{unix.VMADDR_CID_LOCAL, unix.VMADDR_CID_HOST, 3} {
		tries = append(tries, dialVsock(cid))
	}
	return tries
}

func dialVsock(cid uint32) try {
	const agentPort = 1023
	what := fmt.Sprintf("connect to vsock %d", cid)
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return try{what, err}
	}
	defer unix.Close(fd)
	return try{what, unix.Connect(fd, &unix.SockaddrVM{CID: cid, Port: agentPort})}
}

func dial(name string) try {
	c, err := net.Dial("unix", name)
	if err == nil {
		_ = c.Close()
	}
	return try{"connect to " + name, err}
}

// vsock: any process of a guest, and any user of a host, may connect to what listens on it.
func vsock() []try {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return []try{{"make a vsock socket", err}}
}
