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
			r := w.Run(args...).Run()
			r.Want(t, 0)
			got := strings.Join(strings.Fields(r.Stdout), " ")
			// Inheritable and ambient stay empty: they would hand capabilities through exec to other users.
			want := "CapInh: 0000000000000000 CapPrm: " + c.caps + " CapEff: " + c.caps + " CapBnd: " + c.caps +
				" CapAmb: 0000000000000000 NoNewPrivs: 1 Seccomp: 2"
			if got != want {
				t.Errorf("%s:\n got %s\nwant %s", c.what, got, want)
			}
		}
		// Exec'd processes are confined like the workload, and other users than root have nothing of root's.
		id := w.Start(t, "--cap-drop", "ALL", "--cap-add", "KILL", busybox, "sleep", "600")
		r := w.Exec(id, "grep", "-E", "^(CapEff|NoNewPrivs|Seccomp):", "/proc/self/status").Run()
		if got := strings.Join(strings.Fields(r.Stdout), " "); got != "CapEff: 0000000000000020 NoNewPrivs: 1 Seccomp: 2" {
			t.Errorf("an exec'd process has %s", got)
		}
		r = w.Command("exec", "-u", "app", id, "grep", "-E", "^Cap(Prm|Eff):", "/proc/self/status").Run()
		if got := strings.Join(strings.Fields(r.Stdout), " "); got != "CapPrm: 0000000000000000 CapEff: 0000000000000000" {
			t.Errorf("a user other than root has %s", got)
		}
	})
}

// Refusals, tried from inside.
func TestRefusedInside(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
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
			r := w.Exec(id, "sh", "-c", c.script).Run()
			if r.Code == 0 || !strings.Contains(r.Stderr, c.says) {
				t.Errorf("%s was not refused: exit code %d, stderr %q", c.what, r.Code, r.Stderr)
			}
		}
	})
}

// What a workload can see of the world around it.
func TestSeesOnlyItself(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		for _, c := range []struct{ what, script, want string }{
			{"no network but its own loopback", "echo $(ls /sys/class/net)", "lo\n"},
			{"loopback is up", "ip -o addr show lo | grep -c 127.0.0.1", "1\n"},
			{"the agent is PID 1", "cat /proc/1/comm", "sandbox-agent\n"},
			// 0, 1, 2 and the one that reads the directory.
			{"no descriptor of the agent's", "ls /proc/self/fd | wc -l", "4\n"},
			// Root inside may not look into PID 1, which holds the way to the daemon.
			{"nothing of PID 1's", "readlink /proc/1/fd/* /proc/1/exe /proc/1/root || echo refused", "refused\n"},
		} {
			r := w.Exec(id, "sh", "-c", c.script).Run()
			if r.Stdout != c.want {
				t.Errorf("%s: exit code %d, wrote %q, want %q; stderr: %s", c.what, r.Code, r.Stdout, c.want, r.Stderr)
			}
		}
		r := w.Exec(id, "cat", "/proc/self/mountinfo").Run()
		r.Want(t, 0)
		for _, secret := range []string{w.RunDir, w.StateDir} {
			if strings.Contains(r.Stdout, secret) {
				t.Errorf("mountinfo inside names %s of the host:\n%s", secret, r.Stdout)
			}
		}
	})
}

func TestReadOnlyRootAndTmpfs(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--read-only", "--tmpfs", "/scratch", "--mount", "type=tmpfs,target=/small,size=1m,mode=0700", busybox, "sleep", "600")
		r := w.Exec(id, "touch", "/file").Run()
		if r.Code == 0 || !strings.Contains(r.Stderr, "Read-only") {
			t.Errorf("--read-only: exit code %d, stderr %q", r.Code, r.Stderr)
		}
		w.Exec(id, "sh", "-c", "echo kept > /scratch/file; cat /scratch/file").Run().WantOut(t, "kept\n")
		r = w.Exec(id, "sh", "-c", "stat -c %a /small; dd if=/dev/zero of=/small/x bs=64k count=32").Run()
		if r.Code == 0 || !strings.HasPrefix(r.Stdout, "700\n") || !strings.Contains(r.Stderr, "No space") {
			t.Errorf("2 MiB into a tmpfs of 1: exit code %d, stdout %q, stderr %q", r.Code, r.Stdout, r.Stderr)
		}
		// /dev/shm is there and writable, device nodes work.
		w.Exec(id, "sh", "-c", "echo x > /dev/shm/x && echo y > /dev/null && head -c 3 /dev/zero | wc -c").Run().WantOut(t, "3\n")
	})
}

func TestUlimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		w.Run("--ulimit", "nofile=100:200", "--ulimit", "core=0", busybox, "sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c").Run().WantOut(t, "100\n200\n0\n")
		w.Command("create", "--isolation", w.Isolation, "--ulimit", "nonsense=1", busybox, "true").Run().WantError(t, 125, "nonsense")
	})
}

// In a container not even who may trace others can look into the agent: its program is a file that nobody may read. (In a
// VM the agent is as exposed to CAP_SYS_PTRACE as any init, and what it could give away is the guest's own.)
func TestAgentIsClosedToTracers(t *testing.T) {
	w := shared.Wall("container")
	w.Watch(t)
	r := w.Run("--cap-add", "SYS_PTRACE", busybox, "sh", "-c", "ls /proc/1/fd 2>/dev/null | wc -l; readlink /proc/1/exe || echo refused").Run()
	r.WantOut(t, "0\nrefused\n")
}

// The kernel inside is the host's, or it is not: the two walls' one great difference.
func TestWhoseKernel(t *testing.T) {
	host := shared.Wall("container")
	host.Watch(t)
	command := []string{busybox, "sh", "-c", "uname -r; cat /proc/sys/kernel/random/boot_id"}
	inContainer := host.Run(command...).Run()
	inVM := shared.Wall("vm").Run(command...).Run()
	inContainer.Want(t, 0)
	inVM.Want(t, 0)
	onHost := hostKernel(t)
	if inContainer.Stdout != onHost {
		t.Errorf("in a container: %q, on the host: %q", inContainer.Stdout, onHost)
	}
	for i, line := range strings.Split(strings.TrimSpace(inVM.Stdout), "\n") {
		if line == strings.Split(onHost, "\n")[i] {
			t.Errorf("in a VM and on the host: %q", line)
		}
	}
	if !regexp.MustCompile(`^\d+\.\d+\.\S+\n[0-9a-f-]{36}\n$`).MatchString(inVM.Stdout) {
		t.Errorf("in a VM: %q, want a release and a boot id", inVM.Stdout)
	}
}

// Every mount of a sandbox, by what the kernel says of it: none is missing, none is more than it should be, none has a way to
// or from another namespace.
func TestMountsInside(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		type mount struct{ options, fstype string }
		mounts := map[string]mount{}
		for line := range strings.Lines(w.Exec(id, "cat", "/proc/self/mountinfo").Run().Stdout) {
			head, tail, found := strings.Cut(strings.TrimSpace(line), " - ")
			f := strings.Fields(head)
			if !found || len(f) < 6 {
				t.Fatalf("cannot read %q", line)
			}
			if len(f) > 6 {
				t.Errorf("not private: %s", line)
			}
			mounts[f[4]] = mount{"," + f[5] + ",", strings.Fields(tail)[0]} // a later one lies over an earlier
		}
		want := map[string]mount{
			"/":           {"rw,nodev", "overlay"},
			"/proc":       {"rw,nosuid,nodev,noexec", "proc"},
			"/dev":        {"rw,nosuid,nodev,noexec", "tmpfs"},
			"/dev/pts":    {"rw,nosuid,noexec", "devpts"},
			"/dev/shm":    {"rw,nosuid,nodev,noexec", "tmpfs"},
			"/dev/mqueue": {"rw,nosuid,nodev,noexec", "mqueue"},
			"/sys":        {"ro,nosuid,nodev,noexec", "sysfs"},
			"/proc/sys":   {"ro", "proc"},
			"/proc/bus":   {"ro", "proc"},
		}
		for at, m := range want {
			got := mounts[at]
			for option := range strings.SplitSeq(m.options, ",") {
				if !strings.Contains(got.options, ","+option+",") {
					t.Errorf("%s is mounted with %q, without %s", at, got.options, option)
				}
			}
			if got.fstype != m.fstype {
				t.Errorf("%s is a %q, not a %s", at, got.fstype, m.fstype)
			}
		}
		// Something lies over what is masked, and it is not what it masks.
		for _, at := range []string{"/proc/keys", "/proc/interrupts"} {
			if m := mounts[at]; m.fstype == "" || m.fstype == "proc" || !strings.Contains(m.options, ",ro,") {
				t.Errorf("%s is not masked: %+v", at, m)
			}
		}
		for at, m := range mounts {
			_, asked := want[at]
			node := strings.HasPrefix(at, "/dev/") && strings.Contains(m.options, ",nosuid,") && strings.Contains(m.options, ",noexec,")
			guarded := (strings.HasPrefix(at, "/proc/") || strings.HasPrefix(at, "/sys/")) && strings.Contains(m.options, ",ro,")
			if !asked && !node && !guarded {
				t.Errorf("%s is mounted besides: %+v", at, m)
			}
		}
		w.Exec(id, "sh", "-c", "echo $(ls /dev); echo $(ls -A /dev/shm /dev/mqueue); cd /dev; stat -c %t:%T null zero full random urandom tty").Run().WantOut(t,
			"fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero\n/dev/mqueue: /dev/shm:\n1:3\n1:5\n1:7\n1:8\n1:9\n5:0\n")
	})
}

// Users inside are hidden from one another, and PID 1 from all but root.
func TestUsersDoNotSeeEachOther(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		const script = "cat /proc/[0-9]*/comm | sort -u | tr '\\n' ' '"
		if r := w.Exec(id, "sh", "-c", script).Run(); !strings.Contains(r.Stdout, "sandbox-agent") || !strings.Contains(r.Stdout, "sleep") {
			t.Errorf("root sees %q", r.Stdout)
		}
		r := w.Command("exec", "-u", "app", id, "sh", "-c", script).Run()
		if r.Code != 0 || strings.Contains(r.Stdout, "sandbox-agent") || strings.Contains(r.Stdout, "sleep") || !strings.Contains(r.Stdout, "sh ") {
			t.Errorf("another user sees %q, exit code %d, %s", r.Stdout, r.Code, r.Stderr)
		}
	})
}

// A working directory outside of the root is refused (CVE-2024-21626): this one is, before it is entered, the agent's own procfs,
// which has no masks.
func TestWorkingDirectoryIsInside(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		w.Command("exec", "-w", "/proc/self/cwd", id, "ls").Run().WantError(t, 125, "outside the root")
		w.Run("-w", "/proc/self/cwd", busybox, "ls").Run().WantError(t, 125, "outside the root")
		w.Command("exec", "-w", "/proc/self/root/tmp", id, "pwd").Run().WantOut(t, "/tmp\n")
	})
}
