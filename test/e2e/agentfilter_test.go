package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The agent's own filter is over every one of its threads, and nothing the agent may ask of the kernel comes to the workload
// with it.
func TestAgentIsFiltered(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		r := w.Exec(id, "sh", "-c", "cat /proc/1/task/*/status | grep -E '^(Seccomp|NoNewPrivs):' | sort | uniq -c").Run()
		lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
		var what, threads []string
		for _, line := range lines {
			if f := strings.Fields(line); len(f) == 3 {
				threads, what = append(threads, f[0]), append(what, f[1]+f[2])
			}
		}
		// A Go program has a handful of threads.
		if len(threads) != 2 || threads[0] != threads[1] || threads[0] == "1" || strings.Join(what, " ") != "NoNewPrivs:1 Seccomp:2" {
			t.Errorf("threads of PID 1: %q", r.Stdout)
		}
		// Two filters over the workload: the agent's, and its own.
		w.Exec(id, "grep", "Seccomp_filters", "/proc/self/status").Run().WantOut(t, "Seccomp_filters:\t2\n")
	})
}

// narrowest is about what busybox's sh and cat need, and, in the last line, what docs/policy.md says that every profile must allow
// for a process to come into being.
const narrowest = `{"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": [{"action": "SCMP_ACT_ALLOW", "names": [
	"execve", "exit_group", "exit", "arch_prctl", "prctl", "setuid", "setgid", "set_tid_address", "set_robust_list", "rseq", "prlimit64", "readlinkat", "readlink", "getrandom", "brk", "mprotect",
	"mmap", "munmap", "getpid", "getppid", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "getuid", "geteuid", "getgid", "getegid", "getcwd",
	"read", "write", "writev", "open", "openat", "close", "fcntl", "ioctl", "fstat", "newfstatat", "stat", "lstat", "poll", "sendfile", "uname",
	"clone", "fork", "vfork", "wait4", "setpgid", "pipe", "pipe2", "dup2", "getpgrp", "time", "clock_gettime", "clock_nanosleep", "nanosleep", "kill", "pause", "rt_sigsuspend",
	"futex", "sched_yield", "madvise", "gettid", "tgkill"]}]}`

// The agent works under the narrowest profile: what it does itself is in its own table, and not owed to what a profile happens
// to allow.
func TestAgentWorksUnderANarrowProfile(t *testing.T) {
	d := ownDaemon(t, "--policy", policyFile(t, seccompPolicy))
	d.Watch(t)
	dir := t.TempDir()
	profile := filepath.Join(dir, "profile.json")
	must(t, os.WriteFile(profile, []byte(narrowest), 0o600))
	must(t, os.MkdirAll(filepath.Join(dir, "tree/sub"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "tree/sub/file"), []byte("content\n"), 0o640))
	must(t, os.Symlink("sub/file", filepath.Join(dir, "tree/link")))
	for _, iso := range isolations {
		t.Run(iso, func(t *testing.T) {
			w := d.Wall(iso)
			id := w.Start(t, "--label", "filter", "--security-opt", "seccomp="+profile, "-t", "-i", busybox, "sh", "-c", "read line; echo $line; exec sleep 600")
			// What the profile forbids ends the process, and nothing but it.
			if r := w.Exec(id, "mkdir", "/tmp/x").Run(); r.Code != 128+31 {
				t.Errorf("mkdir: exit code %d, %q, want the end by SIGSYS", r.Code, r.Stderr)
			}
			d.Call(t, "cp", filepath.Join(dir, "tree"), id+":/tmp/tree")
			w.Exec(id, "cat", "/tmp/tree/link").Run().WantOut(t, "content\n")
			d.Call(t, "cp", id+":/tmp/tree", filepath.Join(dir, "back-"+iso))
			if b, err := os.ReadFile(filepath.Join(dir, "back-"+iso, "sub/file")); err != nil || string(b) != "content\n" {
				t.Errorf("copied back: %q, %v", b, err)
			}
			w.Command("exec", "-i", id, "cat").WithStdin(strings.NewReader("through\n")).Run().WantOut(t, "through\n")
			w.Command("exec", "-u", "app", id, "sh", "-c", "echo as $PPID").Run().Want(t, 0)
			d.Call(t, "stats", "--no-stream", id)
			d.Call(t, "kill", "--signal", "WINCH", id)
			d.Call(t, "stop", "--grace", "1s", id)
			d.Call(t, "wait", id)
			// A drive that was not settled would say so at its next use.
			d.Call(t, "start", id)
			w.Exec(id, "cat", "/tmp/tree/link").Run().WantOut(t, "content\n")
		})
	}
}
