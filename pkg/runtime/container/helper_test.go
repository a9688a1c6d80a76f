package container

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TestMain: this binary is also the agent of the sandboxes it tests (a stand-in that runs shell scripts), and a daemon
// that kills itself in the middle of a start.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[0] == "sandbox-agent" && os.Args[1] == name {
		standIn()
	}
	if at := os.Getenv(crashEnv); at != "" {
		crashingDaemon(at)
	}
	code := m.Run()
	if image, err := busyboxImage(); err == nil {
		_ = os.RemoveAll(filepath.Dir(image))
	}
	os.Exit(code)
}

// unpreparable is what the stand-in refuses to make a root of.
const unpreparable = "unpreparable"

// standIn is the half of a test that runs inside: it takes the boot message, makes the root its own and then runs each
// connection's one line as a script. It answers with the output, a zero byte and the exit code.
func standIn() {
	check := func(err error, what string) {
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", what, err)
			os.Exit(1)
		}
	}
	buf, oob := make([]byte, 4096), make([]byte, 4096)
	n, oobn, _, _, err := unix.Recvmsg(3, buf, oob, unix.MSG_CMSG_CLOEXEC)
	check(err, "receive")
	if n == 0 {
		os.Exit(0) // the daemon died
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	check(err, "parse")
	fds, err := unix.ParseUnixRights(&messages[0])
	check(err, "rights")
	if len(fds) > 2 { // the door to the workload's group: this one stays outside
		check(unix.Close(fds[2]), "close")
	}
	check(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), "private")
	check(unix.MoveMount(fds[0], "", unix.AT_FDCWD, "/mnt", unix.MOVE_MOUNT_F_EMPTY_PATH), "move_mount")
	check(unix.Chroot("/mnt"), "chroot")
	check(unix.Chdir("/"), "chdir")
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); !errors.Is(err, unix.ENOENT) { // the probe's image has no /proc
		check(err, "proc")
	}
	l, err := net.FileListener(os.NewFile(uintptr(fds[1]), "listener"))
	check(err, "listener")
	answer, err := json.Marshal(spec.BootResult{})
	check(err, "answer")
	var boot spec.ContainerBoot
	check(json.Unmarshal(buf[:n], &boot), "decode")
	if len(boot.Prepare) > 0 {
		if string(boot.Prepare) == unpreparable {
			check(errors.New("no such root"), "prepare")
		}
		check(os.WriteFile("/prepared", boot.Prepare, 0o644), "prepare")
		_, err = unix.Write(3, answer)
		check(err, "answer")
		if n, err = unix.Read(3, buf); n == 0 {
			os.Exit(0) // the daemon has no use for it
		}
		check(err, "receive")
	}
	_, err = unix.Write(3, answer)
	check(err, "answer")
	check(unix.Close(3), "close")
	for {
		c, err := l.Accept()
		check(err, "accept")
		go func() {
			defer c.Close() //nolint:errcheck // a test's
			line, err := bufio.NewReader(c).ReadString('\n')
			if err != nil {
				return
			}
			// Where memory is short the script goes, not this program, which the race detector makes the larger one.
			cmd := exec.Command("/bin/sh", "-c", "echo 500 >/proc/self/oom_score_adj; "+line)
			cmd.Env = []string{"PATH=/bin"}
			cmd.Stdin = os.Stdin // /dev/null is not in here
			cmd.Stdout, cmd.Stderr = c, c
			err = cmd.Run()
			code := -1
			if cmd.ProcessState != nil {
				code = cmd.ProcessState.ExitCode()
			} else {
				fmt.Fprintln(c, err)
			}
			fmt.Fprintf(c, "\x00%d", code)
		}()
	}
}

// sh runs a script inside and answers with its output and exit code.
func sh(t testing.TB, i runtime.Instance, script string) (string, int) {
	t.Helper()
	c, err := i.Dial(t.Context())
	if err != nil {
		t.Fatalf("cannot dial: %v", err)
	}
	defer c.Close() //nolint:errcheck // a test's
	if err := c.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintln(c, script); err != nil {
		t.Fatal(err)
	}
	var all []byte
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil {
			break
		}
	}
	out, code, ok := strings.Cut(string(all), "\x00")
	n, err := strconv.Atoi(code)
	if !ok || err != nil {
		t.Fatalf("the sandbox answered %q to %q", all, script)
	}
	return out, n
}

// want runs a script inside that must succeed and print exactly want.
func want(t testing.TB, i runtime.Instance, script, want string) {
	t.Helper()
	if out, code := sh(t, i, script); code != 0 || strings.TrimSpace(out) != want {
		t.Errorf("%q printed %q and exited with %d, want %q", script, out, code, want)
	}
}

var busyboxImage = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "sandboxd-test-image-")
	if err != nil {
		return "", err
	}
	root := filepath.Join(dir, "root")
	script := `set -e
mkdir -p $1/bin $1/etc $1/tmp $1/proc $1/dev $1/home/user $1/mnt
cp /bin/busybox $1/bin/busybox
for a in $($1/bin/busybox --list); do [ $a = busybox ] || ln -s busybox $1/bin/$a; done
echo 'from the image' >$1/etc/motd
chmod 1777 $1/tmp
mknod -m 666 $1/dev/loop-control c 10 237
mknod -m 666 $1/dev/null c 1 3
chown 1000:1000 $1/home/user
chmod 711 $1
mkfs.erofs -zlz4 --quiet $2 $1`
	image := filepath.Join(dir, "image.erofs")
	cmd := exec.Command("/bin/sh", "-c", script, "sh", root, image)
	cmd.Env = append(os.Environ(), "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s (apt install busybox-static erofs-utils)", err, out)
	}
	return image, os.RemoveAll(root)
})

// host is a place of its own for one test's daemons.
type host struct {
	config Config
	image  string
	before string
}

func newHost(t testing.TB) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces, mounts and cgroups: run the tests as root")
	}
	image, err := busyboxImage()
	if err != nil {
		t.Fatal(err)
	}
	h := hostAt(t.TempDir(), fmt.Sprintf("/sandboxd-test-%d", os.Getpid()))
	h.image = image
	if h.config.IDs, err = idrange.Open(filepath.Join(filepath.Dir(h.config.RunDir), "ids")); err != nil {
		t.Fatal(err)
	}
	h.before = traces(t, h)
	t.Cleanup(func() {
		if after := traces(t, h); after != h.before {
			t.Errorf("left on the host:\n%s\nbefore:\n%s", after, h.before)
		}
		if err := cgroup.RemoveParent(h.config.CgroupParent); err != nil {
			t.Error(err)
		}
	})
	return h
}

// hostAt is the part of a host that a crashing daemon in another process shares.
func hostAt(dir, parent string) *host {
	return &host{config: Config{
		RunDir:       filepath.Join(dir, "run"),
		StateDir:     filepath.Join(dir, "state"),
		CgroupParent: parent,
		Agent:        "/proc/self/exe",
		Disk:         disk.NewMaker(filepath.Join(dir, "templates")),
	}}
}

// daemon is one run of a daemon.
func (h *host) daemon(t testing.TB) *Runtime {
	t.Helper()
	r, err := New(h.config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return r
}

func (h *host) sandbox(n int) spec.Sandbox {
	return spec.Sandbox{
		ID: fmt.Sprintf("%032x", n), ImagePath: h.image,
		Resources: spec.Resources{CPUMillis: 2000, MemoryBytes: 64 << 20, Pids: 64, DiskBytes: 64 << 20},
	}
}

func mustStart(t testing.TB, r *Runtime, s spec.Sandbox) runtime.Instance {
	t.Helper()
	i, err := r.Start(t.Context(), s)
	if err != nil {
		t.Fatalf("Start: %v", err)
	}
	return i
}

func mustRemove(t testing.TB, r *Runtime, id string) {
	t.Helper()
	if err := r.Remove(t.Context(), id); err != nil {
		t.Errorf("Remove: %v", err)
	}
}

// waitDone fails the test if the instance does not end.
func waitDone(t testing.TB, i runtime.Instance) {
	t.Helper()
	select {
	case <-i.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("the instance does not end")
	}
}

// traces is everything of a sandbox that can be found on the host.
func traces(t testing.TB, h *host) string {
	t.Helper()
	var b strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		// Others mount things while tests run; none of theirs looks like these.
		if strings.Contains(line, " - overlay sandbox ") || strings.Contains(line, " - erofs ") || strings.Contains(line, filepath.Dir(h.config.RunDir)) {
			b.WriteString(line)
		}
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range loops {
		file, err := os.ReadFile(l)
		if err == nil && (strings.Contains(string(file), "sandboxd-test") || strings.Contains(string(file), filepath.Dir(h.config.RunDir))) {
			fmt.Fprintf(&b, "%s: %s", l, file)
		}
	}
	groups, err := cgroup.List(h.config.CgroupParent)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(&b, "cgroups", groups)
	children, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	fmt.Fprintf(&b, "children %s\n", children)
	for _, dir := range []string{filepath.Join(h.config.RunDir, name), filepath.Join(h.config.StateDir, "sandbox"), filepath.Join(filepath.Dir(h.config.RunDir), "ids")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, filepath.Base(dir), entries)
	}
	return b.String()
}
