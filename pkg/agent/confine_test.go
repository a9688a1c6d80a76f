package agent_test

import (
	"fmt"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TestConfinement looks from inside.
func TestConfinement(t *testing.T) {
	s := newSandbox(t)
	status := s.run(process{args: []string{"cat", "/proc/self/status"}}).stdout
	for _, want := range []string{
		"NoNewPrivs:\t1", "Seccomp:\t2", "Seccomp_filters:\t1", "SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000",
		"CapInh:\t0000000000000000", "CapAmb:\t0000000000000000",
		"CapBnd:\t" + capHex, "CapPrm:\t" + capHex, "CapEff:\t" + capHex, "Umask:\t0022",
	} {
		if !strings.Contains(status, want+"\n") {
			t.Errorf("no %q in %s", want, status)
		}
	}
	for _, c := range []struct{ script, want string }{
		{"mkdir /tmp/x 2>&1 || true", "mkdir: can't create directory '/tmp/x': Inappropriate ioctl for device"}, // the filter
		{"ls /proc/self/fd | tr '\\n' ' '", "0 1 2 3"},                                                          // 3 is ls's own
		{"ulimit -n; ulimit -Hn", "512\n1024"},
		{"cat /proc/self/timerslack_ns", "50000"},
		{"hostname", "testhost"},
		{"cat /etc/hostname", "testhost"},
		{"grep -c localhost /etc/hosts", "2"},
		{"echo $HOME", "/root"},
		{"pwd", "/"},
		{"[ $(cut -d' ' -f6 /proc/self/stat) = $$ ] && echo leader", "leader"}, // its own session
		{"cat /proc/1/cmdline | tr '\\0' ' '", "sandbox-agent container"},
		{"cat /proc/1/environ 2>&1; ls /proc/1/fd 2>&1; readlink /proc/1/exe 2>&1; cat /proc/1/maps 2>&1 || true",
			"cat: can't open '/proc/1/environ': Permission denied\nls: can't open '/proc/1/fd': Permission denied\ncat: can't open '/proc/1/maps': Permission denied"},
		{"wc -c </proc/keys; cat /proc/keys /proc/interrupts; ls /sys/firmware", "0"}, // masked
		{"echo 1 2>&1 >/proc/sys/kernel/domainname || true", "sh: can't create /proc/sys/kernel/domainname: Read-only file system"},
		{"echo 2>&1 >/sys/kernel/x || true", "sh: can't create /sys/kernel/x: Read-only file system"},
		{"cat /proc/sys/kernel/ngroups_max | wc -l", "1"},
		{"ls /dev | tr '\\n' ' '", "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero"},
		{"echo x >/dev/null; dd if=/dev/zero bs=4 count=1 2>/dev/null | od -An -tx1; head -c 8 /dev/urandom | wc -c", "00 00 00 00\n8"},
		{"ip -o addr show lo | grep -c 'inet 127.0.0.1/8'", "1"},
		{"ip -o link | wc -l", "1"},
		{"awk '$2 == \"/dev\" { print $4 }' /proc/mounts | grep -c nodev", "1"},
		{"stat -c '%a %u' /work", "755 0"},
		{"awk '{print $5}' /proc/self/mountinfo | head -1", "/"},
		{"grep -c /mnt /proc/self/mountinfo || true", "0"}, // nothing of the host's mounts
	} {
		if got := s.sh(c.script); got != c.want {
			t.Errorf("%s:\n got %q\nwant %q", c.script, got, c.want)
		}
	}
}

// TestAgentSurrenders: what the agent itself no longer has, on any of its threads, also after it has forked.
func TestAgentSurrenders(t *testing.T) {
	s := newSandbox(t)
	threads := s.sh("cat /proc/1/task/*/status")
	if n := strings.Count(threads, "CapEff:"); n < 3 {
		t.Fatalf("only %d threads", n)
	}
	bounding := (uint64(1)<<len(spec.Capabilities) - 1) &^ (1<<12 | 1<<19 | 1<<21) // no NET_ADMIN, SYS_PTRACE, SYS_ADMIN
	// Those of the workload, and CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, MKNOD, SETFCAP.
	permitted := uint64(1<<0 | 1<<1 | 1<<2 | 1<<3 | 1<<4 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<18 | 1<<27 | 1<<31)
	for set, mask := range map[string]uint64{"CapPrm": permitted, "CapEff": permitted, "CapBnd": bounding} {
		want := fmt.Sprintf("%016x", mask)
		if got, all := strings.Count(threads, set+":\t"+want+"\n"), strings.Count(threads, set+":"); got != all {
			t.Errorf("%s: %d of %d threads have %s: %s", set, got, all, want, threads)
		}
	}
}

// capHex is defaultCaps as /proc shows them.
var capHex = fmt.Sprintf("%016x", 1<<0|1<<1|1<<3|1<<5|1<<6|1<<7|1<<18|1<<27)

func TestUsers(t *testing.T) {
	s := newSandbox(t)
	for _, c := range []struct {
		user string
		want string // id and HOME
	}{
		{"0", "uid=0(root) gid=0(root) groups=0(root) /root"},
		{"root", "uid=0(root) gid=0(root) groups=0(root) /root"},
		{"user", "uid=1000(user) gid=1000(user) groups=29(audio),44(video),1000(user) /home/user"},
		{"1000", "uid=1000(user) gid=1000(user) groups=29(audio),44(video),1000(user) /home/user"},
		{"user:staff", "uid=1000(user) gid=50(staff) groups=50(staff) /home/user"},
		{"1000:44", "uid=1000(user) gid=44(video) groups=44(video) /home/user"},
		{"4711", "uid=4711 gid=0(root) groups=0(root) /"},
		{"4711:4712", "uid=4711 gid=4712 groups=4712 /"},
	} {
		r := s.run(process{args: []string{"sh", "-c", "echo $(id) $HOME"}, user: c.user})
		if got := strings.TrimSpace(r.stdout); sortGroups(got) != sortGroups(c.want) {
			t.Errorf("%s: got %q %q, want %q", c.user, got, r.stderr, c.want)
		}
	}
	// Additional groups, by number only.
	r := s.run(process{args: []string{"id", "-G"}, edit: func(p *specs.Process) {
		p.User = specs.User{UID: 7, GID: 8, AdditionalGids: []uint32{44, 50}}
	}})
	if got := strings.Fields(r.stdout); len(got) != 3 || got[0] != "8" {
		t.Errorf("additional groups: %q %q", r.stdout, r.stderr)
	}
	// A user's capabilities do not outlive execve, and its streams are its own.
	r = s.run(process{args: []string{"sh", "-c", "grep CapEff /proc/self/status; echo reopened >/dev/stdout; echo too >/dev/stderr"}, user: "user"})
	if r.stdout != "CapEff:\t0000000000000000\nreopened\n" || r.stderr != "too\n" {
		t.Errorf("as user: %+v", r)
	}
	r = s.run(process{args: []string{"sh", "-c", "echo $HOME"}, env: []string{"HOME=/elsewhere"}})
	if r.stdout != "/elsewhere\n" {
		t.Errorf("HOME: %q", r.stdout)
	}
}

// sortGroups makes lists of groups comparable: their order means nothing.
func sortGroups(id string) string {
	head, groups, _ := strings.Cut(id, " groups=")
	groups, home, _ := strings.Cut(groups, " ")
	list := strings.Split(groups, ",")
	for i := range list {
		for j := range i {
			if list[i] < list[j] {
				list[i], list[j] = list[j], list[i]
			}
		}
	}
	return head + strings.Join(list, ",") + home
}

func TestOrphansAreReaped(t *testing.T) {
	s := newSandbox(t)
	s.sh("for i in 1 2 3 4 5 6 7 8 9 10; do (sh -c 'exit 3' & ) ; done; (sleep 0.05 >/dev/null 2>&1 &)")
	// A zombie among the processes would be one that nobody waits for.
	for range 50 {
		if out := s.sh("cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z ' || true"); out == "0" && s.sh("ls -d /proc/[0-9]* | wc -l") != "" {
			return
		}
	}
	t.Error("zombies stay: " + s.sh("cat /proc/[0-9]*/stat"))
}

func TestSignalAll(t *testing.T) {
	s := newSandbox(t)
	first, second := s.mustStart("sleep", "100"), s.mustStart("sh", "-c", "sleep 100 & wait")
	if err := first.Signal(t.Context(), 15, true); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{first.ID, second.ID} {
		exit, err := s.Process(p).Wait(t.Context())
		if err != nil || exit.Code != 143 {
			t.Errorf("%s: %+v %v", p, exit, err)
		}
	}
	if err := first.Signal(t.Context(), 15, false); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("signal to an ended process: %v", err)
	}
	if err := first.Signal(t.Context(), 9, true); err != nil {
		t.Errorf("signal to nobody: %v", err)
	}
	if err := first.Release(t.Context()); err != nil {
		t.Error(err)
	}
	if err := first.Release(t.Context()); err != nil {
		t.Errorf("released twice: %v", err)
	}
	running := s.mustStart("sleep", "100")
	if err := running.Release(t.Context()); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("released while running: %v", err)
	}
}

func TestShutdown(t *testing.T) {
	s := newSandbox(t)
	p := s.mustStart("sh", "-c", "trap 'echo ending; exit 5' TERM; echo ready; while :; do sleep 0.01; done")
	stubborn := s.mustStart("sh", "-c", "trap '' TERM; echo ready; sleep 100")
	var offset uint64
	readUntil(t, p, &offset, "ready")
	readUntil(t, stubborn, new(uint64), "ready")
	if err := s.Shutdown(t.Context(), 300_000_000); err != nil {
		t.Fatal(err)
	}
	<-s.done
	if !s.state.Success() {
		t.Errorf("the agent ended with %v", s.state)
	}
	if _, _, err := p.ReadOutput(t.Context(), offset); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("read from an ended sandbox: %v", err)
	}
}

func TestReadOnlyRoot(t *testing.T) {
	s := newSandbox(t, func(c *specs.Spec, _ string) {
		c.Root.Readonly = true
		c.Mounts = append(c.Mounts, specs.Mount{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=1777", "size=1m"}})
	})
	if got := s.sh("touch /x 2>&1 || true; touch /tmp/y && cat /etc/hostname"); got != "touch: /x: Read-only file system\ntesthost" {
		t.Errorf("got %q", got)
	}
}

func TestStats(t *testing.T) {
	s := newSandbox(t)
	claims, err := s.Stats(t.Context())
	if err != nil || claims.MemoryTotalBytes < 1<<20 || claims.MemoryAvailableBytes < 1<<20 {
		t.Errorf("%+v %v", claims, err)
	}
}

// A profile that the kernel does not have ends the start: nothing runs without what was asked for.
func TestUnknownAppArmorProfileEndsTheStart(t *testing.T) {
	s := newSandbox(t)
	for _, profile := range []string{"no-such-profile", "two words"} {
		base := *s.base
		base.Args, base.ApparmorProfile = []string{"true"}, profile
		_, err := s.Start(t.Context(), theContainer, "under "+profile, &base, false)
		if err == nil || !strings.Contains(err.Error(), "cannot ask for the AppArmor profile") {
			t.Errorf("%q: %v", profile, err)
		}
	}
}
