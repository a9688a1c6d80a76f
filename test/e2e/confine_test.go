package e2e

import (
	"regexp"
	"strings"
	"testing"
)

// defaultCaps is the usual set of container engines: CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP
// NET_BIND_SERVICE NET_RAW SYS_CHROOT MKNOD AUDIT_WRITE SETFCAP.
const defaultCaps = "00000000a80425fb"

// What the kernel says of a workload's process is the same behind both walls.
func TestConfinementIsTheSame(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		for _, c := range []struct {
			what  string
			flags []string
			caps  string
		}{
			{"default", nil, defaultCaps},
			{"added", []string{"--cap-add", "NET_ADMIN", "--cap-add", "cap_sys_nice"}, "00000000a88435fb"},
			{"dropped", []string{"--cap-drop", "CAP_CHOWN"}, "00000000a80425fa"},
			{"all dropped, one added", []string{"--cap-drop", "ALL", "--cap-add", "KILL"}, "0000000000000020"},
		} {
			args := append(c.flags, busybox, "grep", "-E", "^(Cap(Prm|Eff|Bnd|Inh|Amb)|NoNewPrivs|Seccomp):", "/proc/self/status")
			r := w.run(args...).run()
			r.want(t, 0)
			got := strings.Join(strings.Fields(r.stdout), " ")
			// Inheritable and ambient stay empty: they would hand capabilities through exec to other users.
			want := "CapInh: 0000000000000000 CapPrm: " + c.caps + " CapEff: " + c.caps + " CapBnd: " + c.caps +
				" CapAmb: 0000000000000000 NoNewPrivs: 1 Seccomp: 2"
			if got != want {
				t.Errorf("%s:\n got %s\nwant %s", c.what, got, want)
			}
		}
		// Exec'd processes are confined like the workload, and other users than root have nothing of root's.
		id := w.start(t, "--cap-drop", "ALL", "--cap-add", "KILL", busybox, "sleep", "600")
		r := w.exec(id, "grep", "-E", "^(CapEff|NoNewPrivs|Seccomp):", "/proc/self/status").run()
		if got := strings.Join(strings.Fields(r.stdout), " "); got != "CapEff: 0000000000000020 NoNewPrivs: 1 Seccomp: 2" {
			t.Errorf("an exec'd process has %s", got)
		}
		r = w.command("exec", "-u", "app", id, "grep", "-E", "^Cap(Prm|Eff):", "/proc/self/status").run()
		if got := strings.Join(strings.Fields(r.stdout), " "); got != "CapPrm: 0000000000000000 CapEff: 0000000000000000" {
			t.Errorf("a user other than root has %s", got)
		}
	})
}

// Refusals, tried from inside.
func TestRefusedInside(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.start(t, busybox, "sleep", "600")
		for _, c := range []struct{ what, script, says string }{
			{"mount", "mount -t tmpfs none /tmp", ""},
			{"mount without its capability", "mount -t proc none /tmp", ""},
			{"a kernel setting", "echo 1 > /proc/sys/kernel/panic", "Read-only"},
			{"sysrq", "echo h > /proc/sysrq-trigger", ""},
			{"sysfs", "echo 1 > /sys/kernel/profiling", ""},
			{"kernel memory map", "[ -s /proc/kcore ] || exit 1", ""},
			{"a disk of the host by number", "mknod /tmp/d b 254 0 && head -c 1 /tmp/d", ""},
			{"a new user namespace", "unshare -U true", ""},
			// date of busybox ends with 0 all the same.
			{"the clock", "date -s 2001-01-01 2>&1 | grep permitted >&2 && exit 1", "not permitted"},
			{"another host name", "hostname other", ""},
		} {
			r := w.exec(id, "sh", "-c", c.script).run()
			if r.code == 0 || !strings.Contains(r.stderr, c.says) {
				t.Errorf("%s was not refused: exit code %d, stderr %q", c.what, r.code, r.stderr)
			}
		}
	})
}

// What a workload can see of the world around it.
func TestSeesOnlyItself(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.start(t, busybox, "sleep", "600")
		for _, c := range []struct{ what, script, want string }{
			{"no network but its own loopback", "echo $(ls /sys/class/net)", "lo\n"},
			{"loopback is up", "ip -o addr show lo | grep -c 127.0.0.1", "1\n"},
			{"the agent is PID 1", "cat /proc/1/comm", "sandbox-agent\n"},
			// 0, 1, 2 and the one that reads the directory.
			{"no descriptor of the agent's", "ls /proc/self/fd | wc -l", "4\n"},
			// Root inside may not look into PID 1, which holds the way to the daemon.
			{"nothing of PID 1's", "readlink /proc/1/fd/* /proc/1/exe /proc/1/root || echo refused", "refused\n"},
		} {
			r := w.exec(id, "sh", "-c", c.script).run()
			if r.stdout != c.want {
				t.Errorf("%s: exit code %d, wrote %q, want %q; stderr: %s", c.what, r.code, r.stdout, c.want, r.stderr)
			}
		}
		r := w.exec(id, "cat", "/proc/self/mountinfo").run()
		r.want(t, 0)
		for _, secret := range []string{w.runDir, w.stateDir} {
			if strings.Contains(r.stdout, secret) {
				t.Errorf("mountinfo inside names %s of the host:\n%s", secret, r.stdout)
			}
		}
	})
}

func TestReadOnlyRootAndTmpfs(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.start(t, "--read-only", "--tmpfs", "/scratch", "--mount", "type=tmpfs,target=/small,size=1m,mode=0700", busybox, "sleep", "600")
		r := w.exec(id, "touch", "/file").run()
		if r.code == 0 || !strings.Contains(r.stderr, "Read-only") {
			t.Errorf("--read-only: exit code %d, stderr %q", r.code, r.stderr)
		}
		w.exec(id, "sh", "-c", "echo kept > /scratch/file; cat /scratch/file").run().wantOut(t, "kept\n")
		r = w.exec(id, "sh", "-c", "stat -c %a /small; dd if=/dev/zero of=/small/x bs=64k count=32").run()
		if r.code == 0 || !strings.HasPrefix(r.stdout, "700\n") || !strings.Contains(r.stderr, "No space") {
			t.Errorf("2 MiB into a tmpfs of 1: exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
		}
		// /dev/shm is there and writable, device nodes work.
		w.exec(id, "sh", "-c", "echo x > /dev/shm/x && echo y > /dev/null && head -c 3 /dev/zero | wc -c").run().wantOut(t, "3\n")
	})
}

func TestUlimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		w.run("--ulimit", "nofile=100:200", "--ulimit", "core=0", busybox, "sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c").run().wantOut(t, "100\n200\n0\n")
		w.command("create", "--isolation", w.isolation, "--ulimit", "nonsense=1", busybox, "true").run().wantError(t, 125, "nonsense")
	})
}

// In a container not even who may trace others can look into the agent: its program is a file that nobody may read. (In a
// VM the agent is as exposed to CAP_SYS_PTRACE as any init, and what it could give away is the guest's own.)
func TestAgentIsClosedToTracers(t *testing.T) {
	w := wall{shared, "container"}
	w.watch(t)
	r := w.run("--cap-add", "SYS_PTRACE", busybox, "sh", "-c", "ls /proc/1/fd 2>/dev/null | wc -l; readlink /proc/1/exe || echo refused").run()
	r.wantOut(t, "0\nrefused\n")
}

// The kernel inside is the host's, or it is not: the two walls' one great difference.
func TestWhoseKernel(t *testing.T) {
	host := wall{shared, "container"}
	host.watch(t)
	command := []string{busybox, "sh", "-c", "uname -r; cat /proc/sys/kernel/random/boot_id"}
	inContainer := host.run(command...).run()
	inVM := wall{shared, "vm"}.run(command...).run()
	inContainer.want(t, 0)
	inVM.want(t, 0)
	onHost := hostKernel(t)
	if inContainer.stdout != onHost {
		t.Errorf("in a container: %q, on the host: %q", inContainer.stdout, onHost)
	}
	for i, line := range strings.Split(strings.TrimSpace(inVM.stdout), "\n") {
		if line == strings.Split(onHost, "\n")[i] {
			t.Errorf("in a VM and on the host: %q", line)
		}
	}
	if !regexp.MustCompile(`^\d+\.\d+\.\S+\n[0-9a-f-]{36}\n$`).MatchString(inVM.stdout) {
		t.Errorf("in a VM: %q, want a release and a boot id", inVM.stdout)
	}
}
